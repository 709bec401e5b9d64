"""Passkey retrieval: a number hidden in filler text, and whether the model can still tell it at the end."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rosaq.evaluation.subject import Model, Subject, load_subject

INTRODUCTION = "There is a pass key hidden in this text. Find it and memorise it.\n\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is"
KEY_DIGITS = 5
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class DepthRow:
    """The prompts whose key lies at `depth`: 0 is the start of the filler text, 1 its end."""

    depth: float
    prompts: int
    retrieved: float
    decoys_beaten: float


@dataclass(frozen=True)
class PasskeyResult:
    """Retrieval from prompts of `length` tokens, the answer included.

    retrieved       share of prompts where greedy decoding writes the key.
    decoys_beaten   share of the other keys that the model finds less likely than the true one, mean over prompts: 0.5
                    is chance, 1 perfect. It still tells models apart that never get every digit right.
    """

    model: str
    length: int
    prompts: int
    decoys: int
    seed: int
    retrieved: float
    decoys_beaten: float
    by_depth: tuple[DepthRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def find_passkeys(
    model: Model,
    *,
    length: int,
    depths: Sequence[float] = DEPTHS,
    keys: int = 2,
    decoys: int = 9,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> PasskeyResult:
    """Hide `keys` numbers at each of `depths` in prompts of `length` tokens, and ask `model` for them.

    decoys      other numbers of as many digits, whose likelihood is compared with the key's.
    dtype, device, tokenizer, progress   as for `evaluate`; progress counts prompts.
    ValueError where `length` is beyond the model's positions or too short to hold more than the question.
    """
    for name, value in (("keys", keys), ("decoys", decoys)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths: got {list(depths)}, need one or more from 0 to 1")
    subject = load_subject(model, dtype, tokenizer, device=device)
    subject.check_length("passkey", length)
    draw = random.Random(seed)
    rows: list[DepthRow] = []
    for depth in depths:
        found = []
        for _ in range(keys):
            # Without repetition: a decoy that equals the key would be no decoy.
            numbers = draw.sample(range(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS), decoys + 1)
            found.append(_ask(subject, [str(number) for number in numbers], length, depth))
            if progress:
                progress(len(rows) * keys + len(found), len(depths) * keys)
        rows.append(DepthRow(depth, keys, *(sum(values) / keys for values in zip(*found, strict=True))))
    return PasskeyResult(
        model=subject.name,
        length=length,
        prompts=keys * len(depths),
        decoys=decoys,
        seed=seed,
        retrieved=sum(row.retrieved for row in rows) / len(rows),
        decoys_beaten=sum(row.decoys_beaten for row in rows) / len(rows),
        by_depth=tuple(rows),
    )


@torch.inference_mode()
def _ask(subject: Subject, candidates: list[str], length: int, depth: float) -> tuple[float, float]:
    """(1 if the first candidate, the key, was written, else 0; share of the others that are less likely)."""
    answers = [_tokens(subject.tokenizer, f" {candidate}") for candidate in candidates]
    room = length - max(len(answer) for answer in answers)
    prompt = torch.tensor([passkey_prompt(subject.tokenizer, candidates[0], room, depth)])
    module = subject.module
    prompt = prompt.to(next(module.parameters()).device)
    read = module(input_ids=prompt, use_cache=True)
    written = _greedy(module, read, len(answers[0]))
    scores = [_log_likelihood(module, read, answer) for answer in answers]
    retrieved = subject.tokenizer.decode(written).strip() == candidates[0]
    return float(retrieved), sum(score < scores[0] for score in scores[1:]) / (len(scores) - 1)


def passkey_prompt(tokenizer: Any, key: str, length: int, depth: float) -> list[int]:
    """`length` tokens: introduction, filler with the key's sentence at `depth` of it, question."""
    start, needle, end = (_tokens(tokenizer, part) for part in (INTRODUCTION, NEEDLE.format(key=key), QUESTION))
    room = length - len(start) - len(needle) - len(end)
    if room < 1:
        raise ValueError(
            f"passkey: got a prompt of {length} tokens, need more than {length - room} for the question alone"
        )
    sentence = _tokens(tokenizer, FILLER)
    # Whole sentences before the needle, so that it is never read as the rest of one that was cut.
    before = round(depth * room / len(sentence)) * len(sentence)
    before = min(before, room // len(sentence) * len(sentence))
    filler = (sentence * (room // len(sentence) + 1))[:room]
    return start + filler[:before] + needle + filler[before:] + end


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _greedy(module: nn.Module, read: Any, count: int) -> list[int]:
    """The most likely `count` tokens after what was `read`, a model output with a cache that is left as it is."""
    cache, written = copy.deepcopy(read.past_key_values), [int(read.logits[0, -1].argmax())]
    while len(written) < count:
        step = torch.tensor([written[-1:]], device=read.logits.device)
        logits: Tensor = module(input_ids=step, past_key_values=cache, use_cache=True).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def _log_likelihood(module: nn.Module, read: Any, answer: list[int]) -> float:
    """Of the tokens of `answer` after what was `read`, summed."""
    cache = copy.deepcopy(read.past_key_values)
    ids = torch.tensor([answer], device=read.logits.device)
    logits = [read.logits[0, -1:]]
    if len(answer) > 1:
        logits.append(module(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits[0])
    log_p = torch.cat(logits).float().log_softmax(-1)
    return float(log_p.gather(-1, ids[0].unsqueeze(-1)).double().sum())
