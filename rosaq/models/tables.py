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

FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, name="mistral"),  # same tensors; its sliding window is in the attention mask
}


def family_of(model_type: str) -> Family:
    """The table for a config's `model_type`; ValueError naming the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, need one of {sorted(FAMILIES)} (a family is one table)")
    return FAMILIES[model_type]
