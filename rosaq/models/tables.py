"""The supported families, by the `model_type` of their config."""

from __future__ import annotations

from dataclasses import replace

from rosaq.models.family import Family, Site

LLAMA = Family(
    name="llama",
    sites=(
        Site(
            "attn_in",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            reads="residual",
            norm="input_layernorm",
        ),
        Site("attn_out", ("self_attn.o_proj",), reads="values"),
        Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), reads="residual", norm="post_attention_layernorm"),
        Site("mlp_out", ("mlp.down_proj",), reads="hidden"),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    value="self_attn.v_proj",
)

# Norms multiply by 1 + weight. What the writers add is normed too, so the stream keeps its basis. q and k: as Qwen3.
GEMMA3 = Family(
    name="gemma3_text",
    sites=(
        LLAMA.sites[0],
        LLAMA.sites[1],
        Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), reads="residual", norm="pre_feedforward_layernorm"),
        LLAMA.sites[3],
    ),
    writers=LLAMA.writers,
    value=LLAMA.value,
    gain_offset=1.0,
    is_post_normed=True,
)


def _mixture(name: str, gate: str, up: str, down: str) -> Family:
    """Llama's attention with a router and experts in place of the MLP."""
    return replace(
        LLAMA,
        name=name,
        sites=(
            *LLAMA.sites[:2],
            Site(
                "mlp_in",
                (f"mlp.experts.*.{gate}", f"mlp.experts.*.{up}"),
                reads="residual",
                norm="post_attention_layernorm",
                kept=("mlp.gate",),
            ),
            Site("mlp_out", (f"mlp.experts.*.{down}",), reads="hidden"),
        ),
        writers=("self_attn.o_proj", f"mlp.experts.*.{down}"),
    )


FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, name="mistral"),  # same tensors; its sliding window is in the attention mask
    "qwen2": replace(LLAMA, name="qwen2"),  # and Qwen2.5: q, k and v have biases, which no table needs to name
    "qwen3": replace(LLAMA, name="qwen3"),  # q and k are normed per head; nothing is folded through them
    "gemma": replace(LLAMA, name="gemma", gain_offset=1.0),
    "gemma3_text": GEMMA3,
    "mixtral": _mixture("mixtral", "w1", "w3", "w2"),
    "qwen3_moe": _mixture("qwen3_moe", "gate_proj", "up_proj", "down_proj"),
}


def family_of(model_type: str) -> Family:
    """The table for a config's `model_type`; ValueError naming the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, need one of {sorted(FAMILIES)} (a family is one table)")
    return FAMILIES[model_type]
