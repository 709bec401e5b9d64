"""Decoding with a compiled step: transformers' `generate`, a cache of fixed size, an attention for one query and dense
linears of one row.

On a CPU torch's fused attention takes 0.1 ms a layer however short the cache is, a third of a small model's step, and
its dense linear twice as long for an output head as plain operations, which the compiler fuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

ATTENTION = "rosaq_single_query"  # the name that transformers knows it by
# One C++ function calls a step's kernels, not Python; built apart from them it takes no longer to compile. Nobody asks
# whether the compiler's own strides are right. The rotated query is stored before it meets the keys: the compiler would
# compute its sine and cosine again for every position of the cache.
_OPTIONS = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "size_asserts": False,
    "realize_opcount_threshold": 10,  # of operations that are cheaper done again than stored; the compiler's is 30
}
_NOT_OURS = ("position_bias", "softcap", "s_aux", "cache")  # what some models' attention takes besides
_IN_A_BLOCK = re.compile(r"_modules\['\d+'\]")  # in the name of what a guard looks at
_steps: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()  # transformers compiles anew for another config


def compiled_step(model: Any) -> dict[str, Any]:
    """Arguments of `model.generate` that compile the step of one token; `model`'s attention becomes ATTENTION where it
    was torch's fused one. Call it as often as you like: a model is compiled once.

    transformers compiles by itself on a GPU once the cache is static; a CPU has to be asked for. The prompt runs as it
    is: compiled for every length anew, it would take longer than it saves. On a CPU torch looks at the step's inputs
    and at the model's embedding, final norm and head before every token, not at its blocks: whoever changes those
    afterwards (an adapter, another linear) calls `torch.compiler.reset()`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
    how = _steps.get(model)
    if how is None:
        how = _steps[model] = CompileConfig(fullgraph=True)
        how._compile_all_devices = True  # type: ignore[assignment]  # transformers declares it as None
        if model.device.type == "cpu":
            how.mode, how.options = None, {"guard_filter_fn": _not_in_blocks}  # type: ignore[assignment]
            how.backend = _own_backend()
    return {"cache_implementation": "static", "compile_config": how}


def _not_in_blocks(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep. A block's are thousands, a seventh of a small model's step."""
    return [_IN_A_BLOCK.search(guard.name) is None for guard in guards]


def _own_backend() -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """inductor, as one model's own: torch keeps what it compiled by class and backend, and without the guards of blocks
    another model of the class would be run with this one's formats."""

    def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.target is torch._C._nn.linear:
                node.target = dense_linear
        graph.recompile()
        compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=_OPTIONS)
        return compiled

    return inductor


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """What transformers calls an attention function, for masks as its "sdpa" gets them; that does all but one query of
    a traced step on the CPU. query [batch, heads, q, d], key and value [batch, kv heads, length, d]."""
    is_step = query.shape[2] == 1 and query.device.type == "cpu" and torch.compiler.is_compiling()
    if not is_step or any(how.get(name) is not None for name in _NOT_OURS):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    return single_query(query, key, value, attention_mask, how.get("scaling")), None


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with weight [n, k]; one row x [.., 1, k] of 16 bits as plain operations, summed in
    float32."""
    if x.numel() != x.shape[-1] or x.dtype not in (torch.bfloat16, torch.float16):
        return torch.nn.functional.linear(x, weight, bias)
    y = (x.reshape(-1).float() * weight).sum(-1)
    return (y if bias is None else y + bias).to(x.dtype).reshape(*x.shape[:-1], -1)


def single_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one query, summed in float32: [batch, heads, 1, d] -> [batch, 1, heads, d] in query's dtype.

    mask: true where it may look, or added to the scores, [batch or 1, heads or 1, 1, length]. scaling: 1/sqrt(d) where
    None.
    """
    batch, heads, _, d = query.shape
    shared = query.reshape(batch, key.shape[1], -1, 1, d)  # heads that read the same keys side by side
    # Not matmul: for one row it is a call to a library, and bfloat16 sums are rounded to bfloat16.
    scores = (shared.float() * key.unsqueeze(2)).sum(-1) * (d**-0.5 if scaling is None else scaling)
    if mask is not None:
        mask = mask.expand(batch, heads, 1, -1).reshape(scores.shape)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).unsqueeze(-1)
    return (weights * value.unsqueeze(2)).sum(-2).reshape(batch, 1, heads, d).to(query.dtype)
