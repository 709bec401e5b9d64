"""Second moments: importance weights them and travels with its tokens."""

import pytest
import torch

from rosaq.calibrate import Gram, Tokens
from tests.tolerances import assert_gram_close


def tokens(num, k=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Tokens(torch.randn(num, k, generator=g), torch.rand(num, generator=g))


def gram_of(*batches):
    gram = Gram(batches[0].x.shape[1])
    for batch in batches:
        gram.add_tokens(batch)
    return gram.mean()


def test_gram_is_the_weighted_mean_outer_product():
    t = tokens(30)
    x, w = t.x.double(), t.importance.double()
    assert_gram_close(gram_of(t), torch.einsum("t,ti,tj->ij", w, x, x) / w.sum())
    assert_gram_close(gram_of(Tokens(t.x)), x.T @ x / 30)


@pytest.mark.parametrize("num", [1, 7, 64])
def test_permuting_tokens_with_their_importance_changes_nothing(num):
    t = tokens(num)
    perm = torch.randperm(num, generator=torch.Generator().manual_seed(1))
    assert_gram_close(gram_of(t.reordered(perm)), gram_of(t))


def test_permuting_tokens_alone_changes_the_gram():
    t = tokens(64)
    moved = gram_of(Tokens(t.x.flip(0), t.importance))
    assert (moved - gram_of(t)).abs().max() > 0.05


def test_tokens_can_be_taken_out_again():
    t = tokens(50)
    loud = Tokens(1e4 * t.x[:3], t.importance[:3])
    everything, some = Gram(12), Gram(12)
    for batch in (t, loud):
        everything.add_tokens(batch)
    some.add_tokens(loud)
    assert_gram_close(everything.without(some).mean(), gram_of(t))
    assert not some.without(some).has_tokens


def test_gram_does_not_depend_on_the_batches():
    t = tokens(50)
    first, rest = t.reordered(torch.arange(20)), t.reordered(torch.arange(20, 50))
    assert_gram_close(gram_of(first, rest), gram_of(t))


def test_the_error_stays_small_over_many_tokens_and_between_unequal_channels():
    """float32 within a run of tokens, float64 between runs: the error must not grow with the number of tokens."""
    k = 300  # more than one panel of columns, and not a multiple of it
    t = tokens(20_000, k)
    x = t.x * torch.logspace(-2, 2, k)
    wide = x.double()
    want = (wide * t.importance.double()[:, None]).T @ wide / t.importance.double().sum()
    got = gram_of(Tokens(x, t.importance))
    assert_gram_close(got, want)
    assert torch.equal(got, got.T)


def test_a_massive_token_leaves_the_others_exact():
    t = tokens(2000, 48)
    x = t.x.clone()
    x[7] *= 1e4
    wide = x[7].double()
    got = gram_of(Tokens(x)) * len(x) - torch.outer(wide, wide)
    rest = torch.cat([x[:7], x[8:]]).double()
    assert_gram_close(got, rest.T @ rest)


def test_gram_refuses_bad_tokens():
    with pytest.raises(ValueError, match=r"importance: got shape \(3,\), need \(4,\)"):
        Tokens(torch.zeros(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4, 2\), need \[tokens, k\]"):
        Tokens(torch.zeros(2, 4, 2))
    x = torch.zeros(5, 2)
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN, Inf or beyond 1e19 in 1 of 5 tokens"):
        Gram(2).add_tokens(Tokens(x))
    with pytest.raises(ValueError, match="no token of positive importance"):
        Gram(2).mean()
