"""`evaluate`: perplexity of a model on a text, and its distance from a reference model on the same windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosaq.evaluation.metrics import PositionTally, TallyRow
from rosaq.evaluation.subject import Model, Subject, load_subject
from rosaq.text import builtin_text, read_text, select_documents, token_windows

Text = str | Path | Sequence[str] | None


@dataclass(frozen=True)
class EvalResult:
    """What was measured, and everything needed to measure it again.

    ppl             perplexity over `tokens` predicted tokens: `windows` windows of `context`, no overlap, no BOS.
    bits_per_byte   their negative log likelihood in bits, over the UTF-8 bytes that they decode to: comparable between
                    models of different vocabularies, as perplexity is not.
    kl, kl_p99      mean and 99th percentile of KL(reference || model) per token, nats; None without a reference.
    top1_agreement  share of tokens where both models' most likely next token is the same.
    bits_per_weight bits stored per weight of the linears but the head (of the quantised ones, where there are any);
                    None where no linear is found, or the files have dtypes that rosaq does not know.
    bytes           of all the model's tensors, on disk where it was given as a directory; None for unknown dtypes.
    seconds         wall time of this model's forward passes, without loading and without the reference's.
    by_position     the same numbers for tokens that see [start, stop) tokens before them in their window.
    """

    model: str
    ppl: float
    bits_per_byte: float
    kl: float | None
    kl_p99: float | None
    top1_agreement: float | None
    bits_per_weight: float | None
    bytes: int | None
    seconds: float
    tokens: int
    context: int
    windows: int
    text: str
    documents: str | None
    reference: str | None
    dtype: str
    device: str
    by_position: tuple[TallyRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def evaluate(
    model: Model,
    *,
    text: Text = None,
    context: int = 512,
    windows: int = 20,
    reference: Model | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    documents: str | None = None,
    batch_size: int = 1,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Measure `model` (directory, hub id or loaded module) on `windows` windows of `context` tokens.

    text        a file (plain or JSON lines), a list of documents, or None for the built-in evaluation text.
    documents   "START:STOP", the part of the documents to use.
    reference   the model to compare distributions with, usually the dense original.
    dtype       of the activations and dense weights of models given by name: float32, float16 or bfloat16. None:
                float32, but bfloat16 for a quantised model on a GPU.
    device      where models given by name run: "cpu", "cuda" or "cuda:N". Modules stay where they are.
    tokenizer   needed only where `model` is a module that does not know the directory it came from.
    progress    called with (windows done, windows) after every batch.
    """
    _check_numbers(context, windows, batch_size)
    subject = load_subject(model, dtype, tokenizer, device=device)
    subject.check_length("context", context)
    other = load_subject(reference, dtype, device=device) if reference is not None else None
    if other is not None and None not in (own := (subject.vocabulary, other.vocabulary)) and own[0] != own[1]:
        raise ValueError(f"reference: got a vocabulary of {own[1]}, need {own[0]}, that of the model")
    ids = evaluation_windows(subject, text, documents, windows, context)
    tally, seconds = PositionTally(context), 0.0
    for start in range(0, windows, batch_size):
        batch = ids[start : start + batch_size]
        begin = time.perf_counter()
        logits = subject.logits(batch)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # the call returns before the GPU is done
        seconds += time.perf_counter() - begin
        # One window's logits at a time: with both models' 49k-entry rows this is what fills the memory.
        expected = other.logits(batch) if other is not None else None
        for row, window in enumerate(batch):
            targets = window[1:].to(logits.device)
            tally.add(logits[row, :-1], targets, None if expected is None else expected[row, :-1].to(logits.device))
        if progress:
            progress(min(start + batch_size, windows), windows)
    total = tally.total()
    num_bytes = sum(_predicted_bytes(subject.tokenizer, window) for window in ids.tolist())
    return EvalResult(
        model=subject.name,
        ppl=total.perplexity,
        bits_per_byte=total.bits / max(num_bytes, 1),
        kl=total.kl_mean,
        kl_p99=total.kl_p99,
        top1_agreement=total.top1_agreement,
        bits_per_weight=subject.bits_per_weight,
        bytes=subject.num_bytes,
        seconds=seconds,
        tokens=total.num_tokens,
        context=context,
        windows=windows,
        text=str(text) if isinstance(text, (str, Path)) else "builtin" if text is None else f"{len(text)} documents",
        documents=documents,
        reference=other.name if other is not None else None,
        dtype=subject.dtype,
        device=str(subject.device),
        by_position=tuple(tally.rows()),
    )


def evaluation_windows(subject: Subject, text: Text, documents: str | None, windows: int, context: int) -> Tensor:
    """The tokens [windows, context] that `evaluate` measures; ValueError for a text that has fewer."""
    _check_numbers(context, windows)
    return token_windows(subject.tokenizer, _documents(text, documents), windows, context, None)


def _check_numbers(context: int, windows: int, batch_size: int = 1) -> None:
    for name, value, least in (("context", context, 2), ("windows", windows, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, need at least {least}")


def _documents(text: Text, documents: str | None) -> list[str]:
    if text is None:
        found: Sequence[str] = builtin_text("evaluation")
    elif isinstance(text, (str, Path)):
        found = read_text(text)
    else:
        found = text
    return select_documents(found, documents)


def _predicted_bytes(tokenizer: Any, window: list[int]) -> int:
    """UTF-8 bytes of all tokens but the first, which nothing predicts.

    As a difference, because many tokenizers decode the first token of a text differently (its space is dropped).
    """
    as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    whole, first = (tokenizer.decode(ids, **as_it_is) for ids in (window, window[:1]))
    return len(whole.encode("utf-8")) - len(first.encode("utf-8"))
