"""Run a transformer one block at a time, with weights handed in: memory holds one block and the token stream.

The model itself stays on the meta device: its modules are code without weights, and `torch.func.functional_call`
runs them on the tensors of one block.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from rosaq.calibrate.arguments import Stop, call_arguments
from rosaq.calibrate.attention import ATTENTION, register_attention
from rosaq.calibrate.buffers import compute_buffers
from rosaq.devices import multiplies_bf16
from rosaq.experts import Experts, replace_fused, routed
from rosaq.models import Family, Site, Sizes, family_of

Tensors = dict[str, Tensor]
LinearCalls = Mapping[str, Callable[[Tensor], Tensor]]  # {linear: x [..., k] -> y [..., n] without the bias}


@dataclass(frozen=True)
class SiteInput:
    """What the linears of a site read: x [tokens, k], and which of the batch's tokens they are, None: all of them (a
    site of one expert reads those routed to it)."""

    x: Tensor
    tokens: Tensor | None = None

    def of_tokens(self, values: Tensor) -> Tensor:
        """The entries of values [all tokens of the batch] that belong to x."""
        return values if self.tokens is None else values[self.tokens]


@dataclass(frozen=True)
class BlockPass:
    """What a forward pass through a block saw. inputs: {site name: its input}. output [batch, length, d]: of the block,
    None where the pass ended before. received [batch, length]: attention that each token got, summed over heads and
    queries; None where the pass ended before, or the architecture does not use transformers' attention interface."""

    inputs: dict[str, SiteInput]
    output: Tensor | None
    received: Tensor | None


def _with_bias(module: nn.Linear, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return call(x) if module.bias is None else call(x) + module.bias


class BlockModel:
    """The blocks of a causal language model as functions of (weights, hidden states).

    directory: a local Hugging Face model directory; only config.json is read here. device: where weights and hidden
    states will be, None: the CPU.
    """

    def __init__(self, directory: Path, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.config = AutoConfig.from_pretrained(directory)
        family = family_of(self.config.model_type)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"model: got {directory}, which is quantised already; need a 16 or 32-bit model")
        self.sizes = Sizes.of(self.config)
        self.family: Family = family.with_experts(self.sizes.num_experts)
        register_attention()
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, attn_implementation=ATTENTION
            )
            replace_fused(self._model)
        self._model.eval()
        compute_buffers(self._model, self.device)
        self._blocks = list(self._model.get_submodule(self.family.blocks))
        self._check_blocks()
        self.is_bf16 = False  # whether matrix products are in bfloat16
        self._kwargs: dict[torch.Size, list[dict[str, Any]]] = {}

    def _check_blocks(self) -> None:
        """ValueError unless every block has the linears of the table, and no other."""
        for index, block in enumerate(self._blocks):
            has = {name for name, module in block.named_modules() if type(module) is nn.Linear}
            missing, unknown = sorted({*self.family.linears} - has), sorted(has - {*self.family.linears})
            if missing or unknown:
                raise ValueError(
                    f"model: {self.family.block_prefix(index)[:-1]}: got a block without {missing[:3]} and with "
                    f"{unknown[:3]}, need the linears of the table {self.family.name!r} in every block"
                )

    def in_bf16(self) -> BlockModel:
        """This model with matrix products in bfloat16, everything between them and the hidden states in float32; itself
        on a device without instructions for it, where that would be slower."""
        if not multiplies_bf16(self.device):
            return self
        result = copy.copy(self)
        result.is_bf16 = True
        return result

    def products(self) -> torch.autocast:
        """The context that this model's matrix products run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16)

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """{path inside a block: (in_features, out_features)} of every linear of the family's table."""
        block = self._blocks[0]
        linears = {name: block.get_submodule(name) for name in self.family.linears}
        return {name: (int(m.in_features), int(m.out_features)) for name, m in linears.items()}

    def head_size(self) -> tuple[int, int]:
        """(in_features, out_features) of the output head; ValueError if it has a bias, which nothing here would add."""
        head: Any = self._model.get_submodule(self.family.head)
        if head.bias is not None:
            raise ValueError(f"{self.family.head}: bias: got one of {head.bias.numel()} entries, need a head without")
        return int(head.in_features), int(head.out_features)

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
        return self.final_norm(hidden, gain) @ head.T

    def final_norm(self, hidden: Tensor, gain: Tensor) -> Tensor:
        """The norm before the head, differentiable: hidden [..., hidden] -> the same shape."""
        normed: Tensor = functional_call(self._model.get_submodule(self.family.final_norm), {"weight": gain}, (hidden,))
        return normed

    def forward(self, index: int, tensors: Tensors, hidden: Tensor, linears: LinearCalls | None = None) -> Tensor:
        """Block `index` with the given weights: hidden [batch, length, hidden] -> the same shape, differentiable.
        linears: those that multiply in ways of their own; their weights are not among `tensors`."""
        kwargs = self._call_arguments(hidden)[index]
        with self.products(), self._replaced(index, linears or {}) as absent:
            out = functional_call(self._blocks[index], tensors | absent, (hidden,), kwargs, strict=True)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @contextlib.contextmanager
    def _replaced(self, index: int, linears: LinearCalls) -> Iterator[Tensors]:
        """While the context lasts, block `index` calls `linears` in place of its own; yields what then stands for their
        weights, which nothing reads."""
        modules: dict[str, Any] = {name: self._blocks[index].get_submodule(name) for name in linears}
        for name, module in modules.items():
            module.forward = functools.partial(_with_bias, module, linears[name])
        try:
            yield {f"{name}.weight": module.weight for name, module in modules.items()}
        finally:
            for module in modules.values():
                del module.forward

    @torch.no_grad()
    def run(self, index: int, tensors: Tensors, hidden: Tensor) -> Tensor:
        """As `forward`, without gradients."""
        return self.forward(index, tensors, hidden)

    def inputs_of(
        self,
        index: int,
        tensors: Tensors,
        hidden: Tensor,
        sites: Iterable[Site],
        *,
        stop: bool = True,
        route_all: bool = False,
    ) -> BlockPass:
        """A pass through block `index`; with `stop` it ends at the last wanted site. Sites of experts that no token was
        routed to are left out; with `route_all` those of all experts get every token, as if the router had sent it."""
        found: dict[str, SiteInput] = {}
        received: list[Tensor] = []
        routing: dict[str, Tensor | None] = {}
        wanted = list(sites)
        routed_sites = [site for site in wanted if site.expert is not None]
        # the experts' last linears read what only a run of the expert makes
        hooked = [site for site in wanted if site.expert is None or (site.reads == "hidden" and not route_all)]

        def keep(site: Site) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                found[site.name] = SiteInput(args[0].flatten(0, -2), routing.get(site.name))
                if stop and len(found) == len(wanted):
                    raise Stop

            return hook

        def route(experts: Experts, args: tuple[Any, ...]) -> None:
            x, chosen = args[0], args[1]
            for site in routed_sites:
                assert site.expert is not None
                tokens = routing[site.name] = None if route_all else routed(chosen, site.expert)[0]
                seen = x if tokens is None else x[tokens]
                if site not in hooked and len(seen):
                    is_hidden = site.reads == "hidden"
                    found[site.name] = SiteInput(experts[site.expert].hidden(seen) if is_hidden else seen, tokens)
            if stop and not any(site in hooked for site in routed_sites):
                raise Stop

        def attended(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, tuple) and isinstance(out[1], Tensor) and out[1].shape == hidden.shape[:2]:
                received.append(out[1])

        block = self._blocks[index]
        hooks = [block.get_submodule(site.linears[0]).register_forward_pre_hook(keep(site)) for site in hooked]
        hooks.append(self._attention(index).register_forward_hook(attended))
        if routed_sites:
            mixture = next(module for module in block.modules() if isinstance(module, Experts))
            hooks.append(mixture.register_forward_pre_hook(route))
        output = None
        try:
            with contextlib.suppress(Stop):
                output = self.run(index, tensors, hidden)
        finally:
            for handle in hooks:
                handle.remove()
        return BlockPass(found, output, received[0] if received else None)

    def _attention(self, index: int) -> nn.Module:
        attention: nn.Module = self._blocks[index].get_submodule(self.family.value.rpartition(".")[0])
        return attention

    def check_sites(self, tensors: Tensors, hidden: Tensor) -> None:
        """ValueError unless all linears of a site read one input: they are quantised by the second moments of what the
        first of them reads. For the sites of the first block that are no expert's; tensors: of that block."""
        inputs: Tensors = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs[name] = args[0]

            return hook

        block, sites = self._blocks[0], [site for site in self.family.sites if site.expert is None]
        hooks = [block.get_submodule(n).register_forward_pre_hook(keep(n)) for site in sites for n in site.linears]
        try:
            self.run(0, tensors, hidden)
        finally:
            for handle in hooks:
                handle.remove()
        for site in sites:
            others = [n for n in site.linears[1:] if not torch.equal(inputs[n], inputs[site.linears[0]])]
            if others:
                raise ValueError(
                    f"{self.family.name}: {site.name}: got {others}, which do not read what {site.linears[0]} reads, "
                    "need linears of one input in a site: this architecture does not fit its family's table"
                )

    def forward_with_outputs(
        self, index: int, tensors: Tensors, hidden: Tensor
    ) -> tuple[Tensor, Tensors, dict[str, SiteInput]]:
        """(`forward`, {linear: its own output}, {site name: its input}), outputs differentiable. The linears of an
        expert that no token was routed to are left out."""
        outputs: Tensors = {}
        inputs: dict[str, SiteInput] = {}
        routing: dict[str, Tensor] = {}
        sites = {site.linears[0]: site.name for site in self.family.sites}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                outputs[name] = out
                if name in sites:
                    inputs[sites[name]] = SiteInput(args[0].detach().flatten(0, -2), routing.get(sites[name]))

            return hook

        def route(_experts: nn.Module, args: tuple[Any, ...]) -> None:
            for site in self.family.sites:
                if site.expert is not None:
                    routing[site.name] = routed(args[1], site.expert)[0]

        block = self._blocks[index]
        hooks = [block.get_submodule(name).register_forward_hook(keep(name)) for name in self.family.linears]
        hooks += [m.register_forward_pre_hook(route) for m in block.modules() if isinstance(m, Experts)]
        try:
            return self.forward(index, tensors, hidden), outputs, inputs
        finally:
            for handle in hooks:
                handle.remove()

    def _call_arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        """What the model passes to each block (mask, positions) for a batch of this shape."""
        if hidden.shape not in self._kwargs:
            self._kwargs[hidden.shape] = call_arguments(self._model, self._blocks, self.family, hidden)
        return self._kwargs[hidden.shape]
