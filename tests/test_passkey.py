"""Passkey retrieval: the prompt, both scores against models whose memory is known, and refusals."""

import random

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from rosaq.evaluation import find_passkeys
from rosaq.evaluation.passkey import INTRODUCTION, NEEDLE, QUESTION, passkey_prompt
from tests.models import ByteTokenizer, byte_level_tokenizer, save_dense, tiny_llama

TOKENIZER = ByteTokenizer()


class Memory(nn.Module):
    """A byte model that answers "key is" with the digits after the first "key is " of its cache, if that lies at most
    `reach` bytes back, and with zeros else."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.bias = reach, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        del use_cache
        cache = past_key_values if past_key_values is not None else DynamicCache()
        keys, _ = cache.update(*[input_ids.view(1, 1, -1, 1).float()] * 2, 0)
        history = bytes(int(value) for value in keys.flatten())
        ends = range(len(history) - input_ids.shape[1] + 1, len(history) + 1)
        logits = torch.full((1, len(ends), 256), -10.0)
        for row, end in enumerate(ends):
            logits[0, row, self.after(history[:end])] = 10.0
        return type("Output", (), {"logits": logits + self.bias, "past_key_values": cache})()

    def after(self, history):
        question, needle = history.rfind(b"key is"), history.find(b"key is ")
        known = 0 <= needle < question and len(history) - needle <= self.reach
        key = history[needle + 7 : needle + 12] if known else b"00000"
        written = len(history) - question - len(b"key is")
        return (b" " + key)[min(written, 5)]


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [300, 777])
def test_prompt_has_the_length_and_the_needle_at_its_depth(length, depth):
    prompt = bytes(passkey_prompt(TOKENIZER, "54321", length, depth)).decode()
    assert len(prompt) == length
    assert prompt.startswith(INTRODUCTION)
    assert prompt.endswith(QUESTION)
    filler = prompt.removeprefix(INTRODUCTION).removesuffix(QUESTION)
    before, needle, after = filler.partition(NEEDLE.format(key="54321"))
    assert needle
    assert before == "" or before.endswith("again. ")  # whole sentences only
    assert len(before) == pytest.approx(depth * (len(before) + len(after)), abs=90)


def test_a_model_that_remembers_everything_finds_every_key():
    result = find_passkeys(Memory(10**6), length=500, keys=2, tokenizer=TOKENIZER)
    assert (result.retrieved, result.decoys_beaten, result.prompts, result.length) == (1.0, 1.0, 10, 500)
    assert [row.depth for row in result.by_depth] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_model_that_forgets_finds_late_keys_only():
    result = find_passkeys(Memory(200), length=1000, keys=2, tokenizer=TOKENIZER)
    assert [row.retrieved for row in result.by_depth] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert result.retrieved == pytest.approx(0.2)


def test_a_model_that_knows_nothing_beats_half_of_the_decoys():
    result = find_passkeys(tiny_llama(), length=300, keys=8, decoys=19, tokenizer=TOKENIZER)
    assert result.retrieved == 0.0
    assert 0.3 < result.decoys_beaten < 0.7  # 40 prompts: a standard error of 0.05


def test_scores_read_from_the_cache_are_those_of_whole_texts():
    """The likelihoods that rank the keys, against one forward pass per candidate."""
    model, decoys = tiny_llama(), 5
    result = find_passkeys(model, length=250, depths=[0.5], keys=1, decoys=decoys, seed=3, tokenizer=TOKENIZER)
    numbers = [str(n) for n in random.Random(3).sample(range(10000, 100000), decoys + 1)]
    prompt = passkey_prompt(TOKENIZER, numbers[0], 250 - 6, 0.5)

    def score(number):
        answer = list(f" {number}".encode())
        with torch.inference_mode():
            log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return sum(float(log_p[row, token]) for row, token in zip(rows, answer, strict=True))

    scores = [score(number) for number in numbers]
    assert result.decoys_beaten == sum(other < scores[0] for other in scores[1:]) / decoys


def test_same_seed_same_prompts_and_every_kind_of_model_is_taken(tmp_path):
    directory = save_dense(tmp_path)
    seen = []
    kwargs = {"length": 260, "depths": [0.0, 1.0], "keys": 1}
    by_name = find_passkeys(directory, progress=lambda *args: seen.append(args), **kwargs)
    assert seen == [(1, 2), (2, 2)]
    assert by_name == find_passkeys(directory, tokenizer=byte_level_tokenizer(), **kwargs)
    assert by_name.to_dict()["model"] == str(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 513}, "passkey: got 513, need at most 512, the positions this model knows"),
        ({"length": 150}, r"passkey: got a prompt of 144 tokens, need more than \d+ for the question alone"),
        ({"keys": 0}, "keys: got 0, need at least 1"),
        ({"decoys": 0}, "decoys: got 0, need at least 1"),
        ({"depths": []}, r"depths: got \[\], need one or more from 0 to 1"),
        ({"depths": [0.5, 1.5]}, r"depths: got \[0.5, 1.5\]"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        find_passkeys(tiny_llama(), **({"length": 300, "tokenizer": TOKENIZER} | changes))
