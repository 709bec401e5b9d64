"""Let a model continue a text: the quickest check that a checkpoint is sound, and how long a token takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosaq.evaluation.subject import load_model, load_tokenizer
from rosaq.integrations.transformers_decoding import compiled_step


@dataclass(frozen=True)
class Continuation:
    """text: the prompt and what the model added. num_tokens: added. first_seconds: until the first of them, with the
    whole prompt; token_seconds: of each further one on average, None where there is none. compile_seconds: of the
    second one where the step was compiled, which is when it happens; it is not in the average."""

    text: str
    num_tokens: int
    first_seconds: float
    token_seconds: float | None
    compile_seconds: float | None = None


class _Clock:
    """What transformers calls a streamer: it notes when the prompt and then every token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def continue_text(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str = "cpu",
    compile: bool = False,
) -> Continuation:
    """`prompt` and what `model` adds to it, on `device` ("cpu", "cuda" or "cuda:N"). compile: the step of one token, by
    torch.compile (see `compiled_step`)."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, need at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, need 0 or more")
    loaded: Any = load_model(model, dtype, device)
    tokenizer = load_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt: got no tokens, need some text")
    inputs = inputs.to(loaded.device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    clock = _Clock()
    with torch.no_grad():  # not inference_mode, where linears that read the same x do not share a call
        ids = loaded.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=clock,
            **sampling,
            **(compiled_step(loaded) if compile else {}),
        )
    start, first, *further = clock.times
    compiled, settled = (further[:1], further[1:]) if compile else ([], further)
    since = compiled[0] if compiled else first
    return Continuation(
        text=str(tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)),
        num_tokens=1 + len(further),
        first_seconds=first - start,
        token_seconds=(settled[-1] - since) / len(settled) if settled else None,
        compile_seconds=compiled[0] - first if compiled else None,
    )
