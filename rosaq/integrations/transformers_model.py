"""What transformers makes of a checkpoint's config.json: which tensors the model needs. Built without weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

from rosaq.config import CheckpointConfig
from rosaq.experts import plan_experts, replace_fused
from rosaq.sharding import Cut, allowed_sizes


@dataclass(frozen=True)
class ModelShape:
    """The tensors of a model whose linears are quantised as a `CheckpointConfig` says.

    needed   names that a checkpoint must have; known: those and the names of tied tensors, which it may have.
    linears  {module path: (n, k)} of the quantised linears.
    cuts     {module path: how tensor parallelism cuts it}, as far as the model has a plan.
    """

    name: str
    needed: set[str]
    known: set[str]
    linears: dict[str, tuple[int, int]]
    cuts: dict[str, Cut]

    @classmethod
    def of(cls, model: nn.Module, config: CheckpointConfig) -> ModelShape:
        """The shape of `model`, whose linears are still dense; the experts of a mixture become linears, in place."""
        replace_fused(model)
        names, linears = set(model.state_dict()), {}
        for name, module in model.named_modules():
            if type(module) is nn.Linear and should_convert_module(name, list(config.modules_to_not_convert)):
                n, k = module.weight.shape
                linears[name] = (n, k)
                names.remove(f"{name}.weight")
                names |= {f"{name}.{key}" for key in config.format_of(name).tensor_shapes(k, n)}
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        return cls(type(model).__name__, names - tied, names, linears, _cuts(model, linears))

    def rank_counts(self, config: CheckpointConfig) -> tuple[int, ...]:
        """The numbers of ranks that every quantised linear can be cut between; empty where the model has no plan."""
        if set(self.cuts) != set(self.linears):
            return ()
        return allowed_sizes((config.format_of(name), k, n, self.cuts[name]) for name, (n, k) in self.linears.items())


def check_untied(model: nn.Module, quantised: Collection[str]) -> None:
    """ValueError if a module of `quantised` shares its weight with another one: codes cannot be an embedding."""
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        for module in (name.removesuffix(".weight") for name in pair):
            if module in quantised:
                raise ValueError(
                    f"tie_word_embeddings: got True and a quantised {module}, need False: the embedding stays in 16 "
                    "bits beside it; or name it in modules_to_not_convert where it has no codes"
                )


def dense_model(values: dict[str, Any]) -> nn.Module:
    """The model that a config.json describes, on the meta device, its linears dense.

    ValueError or KeyError for an architecture that transformers does not know.
    """
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    if not values.get("model_type"):
        raise ValueError("config.json: got no model_type, need the name of an architecture")
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return model


def _cuts(model: nn.Module, linears: dict[str, tuple[int, int]]) -> dict[str, Cut]:
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    plan_experts(model, plan)
    cuts: dict[str, Cut] = {}
    for name in linears:
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "")
        if style.startswith("colwise"):
            cuts[name] = "out"
        elif style.startswith("rowwise"):
            cuts[name] = "in"
    return cuts
