"""Bits per byte, ranges of context length and several contexts: against direct formulas."""

import math

import pytest
import torch

from rosaq.evaluation import PositionTally, Tally, evaluate
from tests.models import ByteTokenizer, byte_level_tokenizer, tiny_llama
from tests.test_evaluation import TEXT, Fixed, assert_close, random_logits


@pytest.mark.parametrize(
    ("context", "ranges"),
    [
        (2, [(1, 2)]),
        (32, [(1, 32)]),
        (33, [(1, 32), (32, 33)]),
        (128, [(1, 32), (32, 64), (64, 128)]),
        (200, [(1, 32), (32, 64), (64, 128), (128, 200)]),
    ],
)
def test_ranges_double_and_cover_every_predicted_token_once(context, ranges):
    tally = PositionTally(context)
    tally.add(random_logits(context - 1, 7), torch.zeros(context - 1, dtype=torch.int64))
    assert [(row.start, row.stop) for row in tally.rows()] == ranges
    assert [row.tokens for row in tally.rows()] == [stop - start for start, stop in ranges]


def test_each_range_is_the_tally_of_its_own_tokens():
    logits, reference, targets = random_logits(79, 11), random_logits(79, 11, 1), torch.arange(79) % 11
    tally, alone, whole = PositionTally(80), Tally(), Tally()
    tally.add(logits, targets, reference)
    # Row i of the logits has seen i + 1 tokens, so those with 32 to 63 tokens before them are rows 31 to 62.
    alone.add(logits[31:63], targets[31:63], reference[31:63])
    whole.add(logits, targets, reference)
    row = tally.rows()[1]
    assert (row.ppl, row.kl, row.kl_p99) == (alone.perplexity, alone.kl_mean, alone.kl_p99)
    assert row.top1_agreement == alone.top1_agreement
    assert_close(tally.total().perplexity, whole.perplexity)
    assert tally.total().kl_p99 == whole.kl_p99


def test_part_of_a_window_is_refused():
    with pytest.raises(ValueError, match="targets: got 50, need 79, a whole window's"):
        PositionTally(80).add(random_logits(50, 7), torch.zeros(50, dtype=torch.int64))


def test_a_loss_at_long_context_shows_in_the_last_rows():
    class Forgetful(Fixed):
        def forward(self, input_ids, use_cache=False):
            output = super().forward(input_ids, use_cache)
            output.logits[:, 64:] = 0  # knows nothing more after 64 tokens
            return output

    table = torch.zeros(256, 256)
    for now, after in zip(b"abcd", b"bcda", strict=True):
        table[now, after] = 20.0
    result = evaluate(Forgetful(table), text=["abcd" * 64], context=128, windows=2, tokenizer=ByteTokenizer())
    short, middle, long = result.by_position
    assert_close(short.ppl, 1.0)
    assert_close(middle.ppl, 1.0)
    assert 200 < long.ppl <= 256  # its first token has seen 64 and is still known
    assert result.to_dict()["by_position"][2]["start"] == 64


def test_bits_per_byte_of_a_byte_model_that_knows_nothing_is_eight():
    result = evaluate(Fixed(torch.zeros(256, 256)), text=TEXT, context=32, windows=3, tokenizer=ByteTokenizer())
    assert_close(result.bits_per_byte, 8.0)


def test_bits_per_byte_counts_the_bytes_of_the_text_and_not_tokens():
    tokenizer, model = byte_level_tokenizer(), tiny_llama()
    text = "žluťoučký kůň, " * 20  # characters of one and of two bytes
    result = evaluate(model, text=[text], context=24, windows=5, tokenizer=tokenizer)
    # One token a byte, so both measures are one number; a cut character may cost some bytes at a window's edge.
    assert math.log2(result.ppl) == pytest.approx(result.bits_per_byte, rel=0.1)


def test_reported_perplexity_is_that_of_all_positions_together():
    result = evaluate(
        tiny_llama(), text=TEXT, context=80, windows=2, reference=tiny_llama(1), tokenizer=ByteTokenizer()
    )
    nll = sum(row.tokens * math.log(row.ppl) for row in result.by_position)
    kl = sum(row.tokens * row.kl for row in result.by_position)
    assert sum(row.tokens for row in result.by_position) == result.tokens == 158
    assert_close(math.exp(nll / result.tokens), result.ppl)
    assert_close(kl / result.tokens, result.kl)
