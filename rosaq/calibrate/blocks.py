"""Run a transformer one block at a time, with weights handed in: memory holds one block and the token stream.

The model itself stays on the meta device: its modules are code without weights, and `torch.func.functional_call`
runs them on the tensors of one block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from rosaq.models import Family, Site, Sizes, family_of

Tensors = dict[str, Tensor]


class _Stop(Exception):
    """Ends a forward pass as soon as the wanted activation exists."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps the keyword arguments that the model calls it with and passes the stream on."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", "full_attention")
        self.kwargs: dict[str, Any] = {}
        self._last = last

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        if self._last:
            raise _Stop
        return hidden


class BlockModel:
    """The blocks of a causal language model as functions of (weights, hidden states).

    directory: a local Hugging Face model directory; only config.json is read here.
    """

    def __init__(self, directory: Path) -> None:
        self.config = AutoConfig.from_pretrained(directory)
        self.family: Family = family_of(self.config.model_type)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"model: got {directory}, which is quantised already; need a 16 or 32-bit model")
        self.sizes = Sizes.of(self.config)
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation="sdpa")
        self._model.eval()
        rotary = self._model.get_submodule(self.family.rotary)
        # its frequencies are computed, not stored, so the meta copy has none
        self._model.set_submodule(self.family.rotary, type(rotary)(config=self.config))
        self._blocks = list(self._model.get_submodule(self.family.blocks))
        self._kwargs: dict[tuple[torch.Size, str], list[dict[str, Any]]] = {}

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """{path inside a block: (in_features, out_features)} of every linear of the family's table."""
        block = self._blocks[0]
        linears = {name: block.get_submodule(name) for name in self.family.linears}
        return {name: (int(m.in_features), int(m.out_features)) for name, m in linears.items()}

    def tensor_names(self) -> list[str]:
        """Names of the tensors of one block, relative to it."""
        return list(self._blocks[0].state_dict())

    @torch.no_grad()
    def embed(self, embedding: Tensor, input_ids: Tensor) -> Tensor:
        """input_ids [batch, length] -> hidden states [batch, length, hidden] float32."""
        module = self._model.get_submodule(self.family.embedding)
        hidden: Tensor = functional_call(module, {"weight": embedding}, (input_ids,))
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor, gain: Tensor, head: Tensor) -> Tensor:
        """Final norm and head: hidden [batch, length, hidden] -> [batch, length, vocab]."""
        normed: Tensor = functional_call(self._model.get_submodule(self.family.final_norm), {"weight": gain}, (hidden,))
        return normed @ head.T

    def forward(self, index: int, tensors: Tensors, hidden: Tensor) -> Tensor:
        """Block `index` with the given weights: hidden [batch, length, hidden] -> the same shape, differentiable."""
        kwargs = self._call_arguments(hidden)[index]
        out = functional_call(self._blocks[index], tensors, (hidden,), kwargs, strict=True)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def run(self, index: int, tensors: Tensors, hidden: Tensor) -> Tensor:
        """As `forward`, without gradients."""
        return self.forward(index, tensors, hidden)

    def inputs_of(
        self, index: int, tensors: Tensors, hidden: Tensor, sites: Iterable[Site], *, stop: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """({site name: its input [batch, length, k]}, the block's output, or None with `stop`: the forward pass then
        ends at the last wanted site)."""
        found: dict[str, Tensor] = {}
        wanted = list(sites)

        def keep(site: Site) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                found[site.name] = args[0]
                if stop and len(found) == len(wanted):
                    raise _Stop

            return hook

        block = self._blocks[index]
        hooks = [block.get_submodule(site.linears[0]).register_forward_pre_hook(keep(site)) for site in wanted]
        try:
            return found, self.run(index, tensors, hidden)
        except _Stop:
            return found, None
        finally:
            for handle in hooks:
                handle.remove()

    def attention_received(self, index: int, tensors: Tensors, hidden: Tensor) -> Tensor:
        """Attention that each token of hidden [batch, length, d] gets in block `index`, summed over heads and
        queries, under the layer's own mask: [batch, length]. One sequence at a time: a map takes heads x length²."""
        attention = self._blocks[index].get_submodule(self.family.value.rpartition(".")[0])
        received: list[Tensor] = []

        def keep(_module: nn.Module, _args: tuple[Any, ...], out: tuple[Tensor, Tensor | None]) -> None:
            if out[1] is None:
                raise ValueError(
                    f"importance: got no attention probabilities from {type(attention).__name__}, need an architecture "
                    "with eager attention, or another importance than 'attention'"
                )
            received.append(out[1].sum(dim=(1, 2)))  # [1, heads, queries, keys]
            raise _Stop

        handle = attention.register_forward_hook(keep)
        self._model.set_attn_implementation("eager")  # the only one that gives its probabilities out
        try:
            for sequence in hidden.split(1):
                with contextlib.suppress(_Stop):
                    self.run(index, tensors, sequence)
        finally:
            handle.remove()
            self._model.set_attn_implementation("sdpa")
        return torch.cat(received)

    def _call_arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        """What the model passes to each block (mask, positions) for a batch of this shape."""
        key = (hidden.shape, str(self._model.config._attn_implementation))  # eager attention wants its mask spelt out
        if key not in self._kwargs:
            recorders = [_Recorder(block, block is self._blocks[-1]) for block in self._blocks]
            parent_path, _, name = self.family.blocks.rpartition(".")
            parent = self._model.get_submodule(parent_path)
            setattr(parent, name, nn.ModuleList(recorders))
            try:
                with contextlib.suppress(_Stop):
                    parent(inputs_embeds=hidden, use_cache=False)
            finally:
                setattr(parent, name, nn.ModuleList(self._blocks))
            self._kwargs[key] = [recorder.kwargs for recorder in recorders]
        return self._kwargs[key]
