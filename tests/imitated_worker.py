"""Quantises for tests/test_device.py in a process of its own: on the imitated device, and on the CPU the same way."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rosaq.pipeline import QuantizeResult, quantize
from rosaq.recipes import make_recipe
from rosaq.specs import CalibrationSpec
from tests.imitated_device import NAME, Imitation, register
from tests.models import TEXT


def main(cases: str, out: str) -> None:
    """Every case of the JSON file `cases`, {name: arguments of `rosaq.quantize`}, into OUT/name-cpu and
    OUT/name-imitated; what was told of the latter, and what the device refused, into OUT/told.json."""
    device = register()
    names = quantize.__globals__
    choose = names["choose_device"]
    told: dict[str, Any] = {"refused": _refused(device)}
    for name, options in json.loads(Path(cases).read_text()).items():
        _quantize(Path(out) / f"{name}-cpu", dict(options))
        names["choose_device"] = lambda _: device
        with Imitation() as mode:
            result = _quantize(Path(out) / f"{name}-{NAME}", dict(options))
        told[name] = {"device": result.device, "ops": sorted(mode.ops)}
        names["choose_device"] = choose
    Path(out, "told.json").write_text(json.dumps(told))


def _quantize(output: Path, options: dict[str, Any]) -> QuantizeResult:
    # products in float32: what is fused on one device is not on another
    spec = CalibrationSpec(bf16=False, **options.pop("spec"))
    rates = options.pop("model_rates", None)  # of a recipe's tuning: no argument of `quantize`
    if rates is not None:
        recipe = make_recipe(options["recipe"], **{name: options.pop(name) for name in ("group_size", "salient")})
        options["recipe"] = replace(recipe, tune=replace(recipe.tune, model_rates=rates))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize(output=output, spec=spec, calibration=TEXT, **options)


def _refused(device: torch.device) -> dict[str, str]:
    """What the device says to code that forgets it."""
    generator = torch.Generator()
    wrong: dict[str, Callable[[], Any]] = {
        "mixed": lambda: torch.ones(2, device=device) + torch.ones(2),
        "inplace": lambda: torch.ones(2).add_(torch.ones(2, device=device)),
        "generator": lambda: torch.randn(2, device=device, generator=generator),
        "numpy": lambda: torch.ones(2, device=device).numpy(),
    }
    messages = {}
    with Imitation():
        for name, call in wrong.items():
            try:
                call()
            except (RuntimeError, TypeError) as error:
                messages[name] = str(error)
    return messages


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
