"""The attention of the calibration passes against torch's own, forward and back, and what it tells of the tokens."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rosaq.calibrate import attention
from tests.peak import PeakMemory
from tests.tolerances import assert_as_good_as, assert_same_function

LENGTH = 300  # two and a half blocks of queries


class Module(torch.nn.Module):
    is_causal = True


def drawn(dtype, batch=2, heads=6, kv_heads=2, d=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, LENGTH, d) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def window_mask(window):
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    return None if window is None else ((key <= query) & (key > query - window)).expand(2, 1, -1, -1)


def of_torch(query, key, value, mask):
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)


def with_gradients(function, tensors, slope):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_attention_forward_and_back(dtype, window, monkeypatch):
    *tensors, slope = drawn(dtype)
    mask = window_mask(window)

    def ours(query, key, value):
        return attention._attention(Module(), query, key, value, mask)[0].transpose(1, 2)

    want = with_gradients(lambda *t: of_torch(*t, mask), [t.double() for t in tensors], slope.double())
    plain = with_gradients(lambda *t: of_torch(*t, mask), tensors, slope)
    for scores in (1 << 20, 1):  # all key-value heads in one product, and one by one
        monkeypatch.setattr(attention, "_ON_CPU", attention.Tiles(128, scores))
        for mine, loss, exact in zip(with_gradients(ours, tensors, slope), plain, want, strict=True):
            assert mine.dtype == dtype
            assert_as_good_as(mine, loss, exact)


@pytest.mark.parametrize("window", [None, 40])
def test_it_tells_how_much_attention_a_token_got(window):
    query, key, value, _ = drawn(torch.float32)
    mask = window_mask(window)
    received = attention._attention(Module(), query, key, value, mask)[1]
    scores = query @ key.repeat_interleave(3, 1).transpose(-1, -2) / 4
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    want = scores.masked_fill(~allowed, -torch.inf).softmax(-1).sum((1, 2))
    assert_same_function(received, want)
    assert not received.requires_grad


def test_without_a_way_back_no_probabilities_are_kept():
    query, key, value, _ = drawn(torch.float32, batch=8)
    with PeakMemory() as forward:
        attention._attention(Module(), query, key, value, None)
    leaf = query.clone().requires_grad_()
    with PeakMemory() as back:
        attention._attention(Module(), leaf, key, value, None)
    kept = 8 * 6 * 4 * (128 * 128 + 128 * 256 + 44 * 300)  # what is left of them behind no query
    assert forward.peak < back.peak - 0.9 * kept
    assert forward.peak < 8 * query.nbytes


def test_what_it_does_not_compute_is_refused():
    query, key, value, _ = drawn(torch.float32)
    with pytest.raises(
        ValueError, match=r"attention: Module: got \['softcap'\], need causal attention by plain softmax"
    ):
        attention._attention(Module(), query, key, value, None, softcap=50.0)
    seeing_all = Module()
    seeing_all.is_causal = False
    with pytest.raises(ValueError, match="attention: Module: got attention that is not causal"):
        attention._attention(seeing_all, query, key, value, None)
