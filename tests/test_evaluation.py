"""rosaq.evaluation: the numbers against direct formulas, and their properties."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rosaq.config import LinearFormat
from rosaq.evaluation import Tally, evaluate, load_subject
from rosaq.report.tables import eval_table
from tests.models import ByteTokenizer, save_dense, save_rosaq, tiny_llama, vandalise
from tests.tolerances import assert_close_in

TEXT = ["The quick brown fox jumps over the lazy dog. " * 20]


def assert_close(got, want):
    """Two numbers are equal up to float32 rounding."""
    assert_close_in(torch.tensor([got]), torch.tensor([want], dtype=torch.float64), torch.float32)


class Fixed(nn.Module):
    """A language model whose logits depend on the current token only: table [vocab, vocab]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, use_cache=False):
        del use_cache
        return type("Output", (), {"logits": self.table[input_ids]})()


def random_logits(t, vocab, seed=0):
    return torch.randn(t, vocab, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("t", [1, 63, 64, 65, 200])
def test_tally_is_the_definition(t):
    logits, reference, targets = random_logits(t, 11), random_logits(t, 11, 1), torch.arange(t) % 11
    tally = Tally()
    tally.add(logits, targets, reference)
    p, q = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    assert tally.num_tokens == t
    assert_close(tally.perplexity, math.exp(-p[torch.arange(t), targets].mean()))
    assert_close(tally.kl_mean, kl.mean().item())
    assert_close(tally.kl_p99, kl.quantile(0.99).item())
    assert tally.top1_agreement == (logits.argmax(-1) == reference.argmax(-1)).double().mean()


def test_tally_adds_up_however_it_is_split():
    logits, reference, targets = random_logits(100, 11), random_logits(100, 11, 1), torch.arange(100) % 11
    whole, parts = Tally(), Tally()
    whole.add(logits, targets, reference)
    for rows in (slice(0, 30), slice(30, 100)):
        parts.add(logits[rows], targets[rows], reference[rows])
    assert_close(parts.perplexity, whole.perplexity)
    assert_close(parts.kl_mean, whole.kl_mean)


def test_without_reference_there_is_no_kl():
    tally = Tally()
    tally.add(random_logits(5, 7), torch.arange(5))
    assert (tally.kl_mean, tally.kl_p99, tally.top1_agreement) == (None, None, None)


def test_kl_of_a_model_with_itself_is_zero():
    tally, logits = Tally(), random_logits(50, 300)
    tally.add(logits, torch.arange(50), logits.clone())
    assert (tally.kl_mean, tally.kl_p99, tally.top1_agreement) == (0.0, 0.0, 1.0)


def test_kl_is_of_reference_to_model_and_not_the_reverse():
    # The reference is certain of token 0, the model gives it one half: KL = log 2; the reverse would be huge.
    tally = Tally()
    tally.add(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([[50.0, 0.0]]))
    assert_close(tally.kl_mean, math.log(2))


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    result = evaluate(Fixed(torch.zeros(256, 256)), text=TEXT, context=32, windows=3, tokenizer=ByteTokenizer())
    assert_close(result.ppl, 256.0)
    assert (result.tokens, result.windows, result.context) == (93, 3, 32)


def test_certain_and_right_has_perplexity_one():
    period = b"abcd"
    table = torch.zeros(256, 256)
    for now, after in zip(period, period[1:] + period[:1], strict=True):
        table[now, after] = 1000.0
    model = Fixed(table)
    result = evaluate(model, text=["abcd" * 50], context=16, windows=5, tokenizer=ByteTokenizer(), reference=model)
    assert result.ppl == 1.0
    assert result.kl == 0.0


def test_windows_are_independent_of_each_other():
    model = tiny_llama()
    kwargs = {"context": 24, "windows": 6, "tokenizer": ByteTokenizer()}
    text = TEXT[0][:144]
    swapped = text[72:] + text[:72]
    once = evaluate(model, text=[text], **kwargs)
    assert_close(evaluate(model, text=[swapped], **kwargs).ppl, once.ppl)
    assert_close(evaluate(model, text=[text], batch_size=4, **kwargs).ppl, once.ppl)


def test_directories_are_loaded_compared_and_counted(tmp_path):
    dense = save_dense(tmp_path / "dense")
    quantised = save_rosaq(tmp_path / "quantised", default=LinearFormat(3, 32, num_salient=4))
    seen = []
    result = evaluate(
        quantised, reference=dense, text=TEXT, context=24, windows=4, progress=lambda *args: seen.append(args)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.kl > 0
    assert 3.5 < result.bits_per_weight < 6
    original = evaluate(dense, reference=dense, text=TEXT, context=24, windows=4)
    assert (original.kl, original.top1_agreement, original.bits_per_weight) == (0.0, 1.0, 16.0)
    assert original.bytes > result.bytes
    assert result.to_dict()["reference"] == str(dense)


def test_builtin_text_is_the_default():
    result = evaluate(tiny_llama(), context=8, windows=2, tokenizer=ByteTokenizer())
    assert result.text == "builtin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context: got 1, need at least 2"),
        ({"windows": 0}, "windows: got 0"),
        ({"windows": 1000}, r"text: got \d+ tokens in 1 documents, need 24000"),
        ({"documents": "5:"}, "documents: got '5:' of 1 documents"),
        ({"text": "no-such-file.txt"}, "no-such-file.txt: got no such file"),
        ({"tokenizer": None}, "tokenizer: got none"),
        ({"reference": Fixed(torch.zeros(256, 100))}, r"reference: got logits \[23, 100\], need \[23, 256\]"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    kwargs = {"text": TEXT, "context": 24, "windows": 2, "tokenizer": ByteTokenizer()} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(Fixed(torch.zeros(256, 256)), **kwargs)


def test_context_beyond_the_models_positions_is_refused():
    with pytest.raises(ValueError, match="context: got 600, need at most 512"):
        evaluate(tiny_llama(), text=TEXT, context=600, windows=1, tokenizer=ByteTokenizer())


@pytest.mark.parametrize("name", ["./no/such/model", "/no/such/model", "a/b/c"])
def test_missing_directory_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="which is no directory"):
        evaluate(name, text=TEXT)


def test_a_reference_of_another_vocabulary_is_refused():
    small, large = tiny_llama(), tiny_llama(vocab_size=300)
    with pytest.raises(ValueError, match="reference: got a vocabulary of 300, need 264, that of the model"):
        evaluate(small, reference=large, tokenizer=ByteTokenizer())


def test_dtype_is_checked(tmp_path):
    with pytest.raises(ValueError, match="dtype: got 'float8'"):
        evaluate(save_dense(tmp_path), text=TEXT, dtype="float8")


def test_pickled_weights_are_refused_before_anything_is_read(tmp_path):
    dense = save_dense(tmp_path)
    (dense / "model.safetensors").unlink()
    (dense / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model.bin\).* need model.safetensors"):
        load_subject(dense)


def test_bits_that_cannot_be_counted_are_none(tmp_path):
    dense = save_dense(tmp_path)
    vandalise(dense, lambda tensors: tensors.update(extra=torch.zeros(2, dtype=torch.float8_e4m3fn)))
    options = {"text": TEXT, "context": 24, "windows": 1}
    unknown = evaluate(dense, **options)
    assert (unknown.bits_per_weight, unknown.bytes) == (None, None)
    config = GPT2Config(vocab_size=264, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    no_linear = evaluate(GPT2LMHeadModel(config), tokenizer=ByteTokenizer(), **options)
    assert no_linear.bits_per_weight is None
    assert no_linear.bytes > 0
    table = eval_table([unknown.to_dict(), no_linear.to_dict()])
    assert list(table.columns[1].cells) == ["-", "-"]
