"""Let a model continue a text: the quickest check that a checkpoint is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rosaq.evaluation.subject import load_model, load_tokenizer


def continue_text(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
) -> str:
    """`prompt` and what `model` adds to it."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, need at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, need 0 or more")
    loaded: Any = load_model(model, dtype)
    tokenizer = load_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt: got no tokens, need some text")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.no_grad():  # not inference_mode, where linears that read the same x do not share a call
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
