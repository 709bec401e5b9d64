"""transformers: a dense checkpoint, rounded to nearest as its tensors are read; no calibration, one layer in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from rosaq.config import CheckpointConfig
from rosaq.linear import RosaqLinear
from rosaq.specs import QuantSpec


class RoundToNearest(ConversionOps):
    """Turns the `nn.Linear` of one dense weight into a packed RosaqLinear, the moment the weight is read."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        del source_patterns, target_patterns
        # The offline half, imported when used: serving must not load it.
        from rosaq.quantizers import quantize_weight

        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        model, name = kwargs["model"], kwargs["full_layer_name"].removesuffix(".weight")
        fmt, dense = self.config.format_of(name), model.get_submodule(name)
        if hasattr(dense.weight, "_local_tensor"):
            raise ValueError(
                f"{name}: got a dense checkpoint and tensor parallelism, need a quantised one: "
                "run `rosaq quantize MODEL -o OUT`, then load OUT"
            )
        spec = QuantSpec(fmt.bits, fmt.group_size, fmt.symmetric, method="rtn", clip=False)
        rounded = RosaqLinear(dense.in_features, dense.out_features, fmt, bias=dense.bias is not None, device="meta")
        for key, tensor in quantize_weight(weight, None, spec).items():
            rounded.register_parameter(key, nn.Parameter(tensor.to(weight.device), requires_grad=False))
        if dense.bias is not None:
            rounded.register_parameter("bias", dense.bias)
        model.set_submodule(name, rounded)
        kwargs["missing_keys"].discard(f"{name}.weight")
        return {}


def check_roundable(config: CheckpointConfig) -> None:
    """ValueError if `config` asks for what round to nearest of a dense checkpoint cannot give."""
    for fmt in (config.default, *config.modules.values()):
        if fmt.num_salient or fmt.rotation_size:
            raise ValueError(
                f"quantization_config: got num_salient {fmt.num_salient} and rotation_size {fmt.rotation_size} for a "
                "dense checkpoint, need 0: they come from calibration; run `rosaq quantize MODEL -o OUT`, then load OUT"
            )
