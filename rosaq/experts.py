"""Mixtures of experts with one linear module for each matrix of each expert, in place of transformers' 3-D Parameters.

transformers keeps all experts of a block in two Parameters, gate_up_proj [E, 2i, d] and down_proj [E, d, i]. Here an
expert is three modules under the names that checkpoints on the hub have, "0.gate_proj" and so on, so whatever works
linear by linear (second moments, tuning, a RosaqLinear in its place) works for experts too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Names of gate, up and down in an expert, by model_type. Only these are replaced: other families gate in other ways.
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}

# What the module that holds router and experts is called in files, where that is not as in memory. transformers renames
# it both ways; rosaq writes the names in memory, and these only for other engines.
ON_DISK = {"mixtral": (".mlp.", ".block_sparse_moe.")}


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) of x [tokens, d]; the three linears are children under `names`."""

    def __init__(
        self, names: tuple[str, str, str], linears: tuple[nn.Module, ...], act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.names, self._act_fn = names, act_fn
        for name, linear in zip(names, linears, strict=True):
            self.add_module(name, linear)

    def hidden(self, x: Tensor) -> Tensor:
        """The input [tokens, i] of the last linear."""
        gate, up, _ = (cast(nn.Module, self._modules[name]) for name in self.names)
        hidden: Tensor = self._act_fn(gate(x)) * up(x)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = cast(nn.Module, self._modules[self.names[2]])(self.hidden(x))
        return y


class Experts(nn.Module):
    """Sum over the chosen experts of a token of weight · expert(token); children "0", "1", ..."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def __getitem__(self, number: int) -> Expert:
        if str(number) not in self._modules:
            raise ValueError(
                f"expert: got number {number}, need one of {len(self._modules)}: expert parallelism (`ep_plan`) is not "
                "supported, tensor parallelism is"
            )
        return cast(Expert, self._modules[str(number)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, d], top_k_index int64 and top_k_weights [tokens, k] -> [tokens, d]."""
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, choice = routed(top_k_index, number)
            out = self[number](hidden_states[tokens]) * top_k_weights[tokens, choice, None]
            total = total.index_add(0, tokens, out.to(total.dtype))
        return total


def routed(top_k_index: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(tokens [t], which of their choices it was [t]) that go to expert `number`."""
    tokens, choice = torch.where(top_k_index == number)
    return tokens, choice


def fused(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every set of experts that transformers keeps as 3-D Parameters, in a family of `NAMES`."""
    if getattr(getattr(model, "config", None), "model_type", None) not in NAMES:
        return []
    wanted = {"gate_up_proj", "down_proj"}
    return [
        (path, m) for path, m in model.named_modules() if {n for n, _ in m.named_parameters(recurse=False)} == wanted
    ]


def replace_fused(model: nn.Module) -> list[str]:
    """Put an `Experts` of `nn.Linear` on the meta device in place of every fused module of `model`; the paths of what
    was replaced. Weights are not carried over."""
    found = fused(model)
    for path, module in found:
        gate, up, down = names = NAMES[cast(Any, model).config.model_type]
        num_experts, double, hidden = cast(Tensor, module.gate_up_proj).shape
        sizes = {gate: (hidden, double // 2), up: (hidden, double // 2), down: (double // 2, hidden)}
        act_fn = cast(Callable[[Tensor], Tensor], module.act_fn)
        experts = [
            Expert(names, tuple(nn.Linear(*sizes[name], bias=False, device="meta") for name in names), act_fn)
            for _ in range(num_experts)
        ]
        model.set_submodule(path, Experts(experts))
    return [path for path, _ in found]


def plan_experts(model: nn.Module, plan: dict[str, str]) -> None:
    """Put the linears of every `Experts` of `model` into transformers' tensor-parallel plan, in place of the 3-D
    Parameters: an expert is cut along its hidden layer, as any MLP. Without such an entry nothing changes."""
    for path, module in model.named_modules():
        key = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        if isinstance(module, Experts) and plan.get(key) == "moe_tp_experts":
            for old in (key, f"{key}.gate_up_proj", f"{key}.down_proj"):
                plan.pop(old, None)
            gate, up, down = module[0].names
            plan |= {f"{key}.*.{gate}": "colwise", f"{key}.*.{up}": "colwise", f"{key}.*.{down}": "rowwise"}


def name_on_disk(name: str, model_type: str) -> str:
    """The name under which checkpoints on the hub have the tensor that the model calls `name`."""
    return name.replace(*ON_DISK[model_type]) if model_type in ON_DISK else name
