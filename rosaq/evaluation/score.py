"""`evaluate`: perplexity of a model on a text, and its distance from a reference model on the same windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosaq.checkpoint import WeightReader
from rosaq.evaluation.metrics import Tally
from rosaq.linear import RosaqLinear
from rosaq.text import builtin_text, read_text, select_documents, token_windows

Text = str | Path | Sequence[str] | None
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EvalResult:
    """What was measured, and everything needed to measure it again.

    ppl             perplexity over `tokens` predicted tokens: `windows` windows of `context`, no overlap, no BOS.
    kl, kl_p99      mean and 99th percentile of KL(reference || model) per token, nats; None without a reference.
    top1_agreement  share of tokens where both models' most likely next token is the same.
    bits_per_weight bits stored per weight of the linears (quantised ones; all but the head of a dense model).
    bytes           of all the model's tensors, on disk where it was given as a directory.
    seconds         wall time of this model's forward passes, without loading and without the reference's.
    """

    model: str
    ppl: float
    kl: float | None
    kl_p99: float | None
    top1_agreement: float | None
    bits_per_weight: float
    bytes: int
    seconds: float
    tokens: int
    context: int
    windows: int
    text: str
    documents: str | None
    reference: str | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def evaluate(
    model: str | Path | nn.Module,
    *,
    text: Text = None,
    context: int = 512,
    windows: int = 20,
    reference: str | Path | nn.Module | None = None,
    dtype: str = "float32",
    documents: str | None = None,
    batch_size: int = 1,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Measure `model` (directory, hub id or loaded module) on `windows` windows of `context` tokens.

    text        a file (plain or JSON lines), a list of documents, or None for the built-in evaluation text.
    documents   "START:STOP", the part of the documents to use.
    reference   the model to compare distributions with, usually the dense original.
    dtype       of the activations and dense weights of models given by name: float32, float16 or bfloat16.
    tokenizer   needed only where `model` is a module that does not know the directory it came from.
    progress    called with (windows done, windows) after every batch.
    """
    for name, value, least in (("context", context, 2), ("windows", windows, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, need at least {least}")
    loaded = load_model(model, dtype)
    limit = getattr(getattr(loaded, "config", None), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ValueError(f"context: got {context}, need at most {limit}, the positions this model knows")
    other = load_model(reference, dtype) if reference is not None else None
    found = _documents(text, documents)
    ids = token_windows(tokenizer or load_tokenizer(model), found, windows, context, None)
    tally, seconds = Tally(), 0.0
    for start in range(0, windows, batch_size):
        batch = ids[start : start + batch_size]
        begin = time.perf_counter()
        logits = _logits(loaded, batch)
        seconds += time.perf_counter() - begin
        # One window's logits at a time: with both models' 49k-entry rows this is what fills the memory.
        expected = _logits(other, batch) if other is not None else None
        for row, window in enumerate(batch):
            targets = window[1:].to(logits.device)
            tally.add(logits[row, :-1], targets, None if expected is None else expected[row, :-1].to(logits.device))
        if progress:
            progress(min(start + batch_size, windows), windows)
    return EvalResult(
        model=_name_of(model),
        ppl=tally.perplexity,
        kl=tally.kl_mean,
        kl_p99=tally.kl_p99,
        top1_agreement=tally.top1_agreement,
        bits_per_weight=_bits_per_weight(model, loaded),
        bytes=_bytes_of(model, loaded),
        seconds=seconds,
        tokens=tally.num_tokens,
        context=context,
        windows=windows,
        text=str(text) if isinstance(text, (str, Path)) else "builtin" if text is None else f"{len(text)} documents",
        documents=documents,
        reference=_name_of(reference) if reference is not None else None,
        dtype=dtype if not isinstance(model, nn.Module) else str(next(loaded.parameters()).dtype).split(".")[-1],
    )


def load_model(model: str | Path | nn.Module, dtype: str = "float32") -> nn.Module:
    """The causal language model in `model` (directory or hub id), in eval mode; a module is returned as it is."""
    if isinstance(model, nn.Module):
        return model.eval()
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, need one of {DTYPES}")
    _check_name(model)
    from transformers import AutoModelForCausalLM

    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.eval()


def load_tokenizer(model: str | Path | nn.Module) -> Any:
    """The tokenizer saved with `model`; ValueError for a module that does not know where it came from."""
    name = getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else model
    if not name:
        raise ValueError("tokenizer: got none for a model built in memory, need one")
    _check_name(name)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _check_name(name: str | Path) -> None:
    """A path that is not there would be looked up on the hub, with an error that sends people the wrong way."""
    text = str(name)
    is_hub_id = isinstance(name, str) and text.count("/") <= 1 and not text.startswith((".", "/", "~"))
    if not Path(name).is_dir() and not is_hub_id:
        raise FileNotFoundError(f"model: got {text!r}, which is no directory, need a model directory or a hub id")


def _documents(text: Text, documents: str | None) -> list[str]:
    if text is None:
        found: Sequence[str] = builtin_text("evaluation")
    elif isinstance(text, (str, Path)):
        found = read_text(text)
    else:
        found = text
    return select_documents(found, documents)


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """[b, context, vocab] of ids [b, context]."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits


def _name_of(model: str | Path | nn.Module) -> str:
    return (
        str(getattr(model, "name_or_path", "") or type(model).__name__) if isinstance(model, nn.Module) else str(model)
    )


def _bits_per_weight(model: str | Path | nn.Module, loaded: nn.Module) -> float:
    quantised = [m for m in loaded.modules() if isinstance(m, RosaqLinear)]
    if quantised:
        numels = [m.in_features * m.out_features for m in quantised]
        return sum(m.bits_per_weight * n for m, n in zip(quantised, numels, strict=True)) / sum(numels)
    head = getattr(loaded, "get_output_embeddings", lambda: None)()
    dense = {f"{name}.weight": m for name, m in loaded.named_modules() if isinstance(m, nn.Linear) and m is not head}
    numel = sum(m.weight.numel() for m in dense.values())
    reader = _reader_of(model)
    if reader is not None and all(name in reader for name in dense):
        return 8 * sum(reader.nbytes(name) for name in dense) / max(numel, 1)
    return 8 * sum(m.weight.nbytes for m in dense.values()) / max(numel, 1)


def _bytes_of(model: str | Path | nn.Module, loaded: nn.Module) -> int:
    reader = _reader_of(model)
    if reader is not None:
        return sum(reader.nbytes(name) for name in reader.names())
    return sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()))


def _reader_of(model: str | Path | nn.Module) -> WeightReader | None:
    """The files of a model given as a local directory; None for hub ids and modules."""
    is_directory = not isinstance(model, nn.Module) and Path(model).is_dir()
    return WeightReader(Path(str(model))) if is_directory else None
