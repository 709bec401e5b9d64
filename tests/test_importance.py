"""Token importance: RSQ's normalisation, and attention read from the model's own layers and masks."""

import pytest
import torch

from rosaq.calibrate import (
    BlockModel,
    BlockPass,
    Gram,
    Tokens,
    importance_from_scores,
    importance_summary,
    token_importance,
)
from rosaq.pipeline.rotations import add_value_heads
from rosaq.specs import STRATEGIES, ImportanceSpec
from tests.models import save_dense, tiny_llama, tiny_mistral
from tests.tolerances import assert_same_function, assert_tight

SCORES = torch.tensor([[1.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 8.0]], dtype=torch.float64)


@pytest.mark.parametrize("exponent", [1, 2])
def test_importance_is_min_max_with_mean_one(exponent):
    got = importance_from_scores(SCORES, ImportanceSpec(floor=0.1, exponent=exponent))
    raw = torch.tensor([[0.1, 1.0, 0.55, 0.1], [0.1, 0.1, 0.1, 1.0]], dtype=torch.float64) ** exponent
    assert_tight(got, raw / raw.mean(1, keepdim=True))
    assert_tight(importance_from_scores(torch.full((1, 5), 7.0), ImportanceSpec(floor=0.1)), torch.ones(1, 5))


def test_a_quantile_keeps_a_sink_from_setting_the_range():
    scores = torch.linspace(1, 2, 100, dtype=torch.float64).repeat(2, 1)
    scores[:, 0] = 1000  # the sink
    plain = importance_from_scores(scores, ImportanceSpec(floor=0.01))
    robust = importance_from_scores(scores, ImportanceSpec(floor=0.01, quantile=0.98))
    assert plain[:, 1:].max() < 1.1 * plain[:, 1:].min()  # nothing is left of the order of the others
    assert robust[:, 99].min() > 20 * robust[:, 1].max()
    assert robust[0, 0] == robust[0, 99]
    assert importance_summary([plain.flatten()])["effective_share"] < 0.2
    assert importance_summary([robust.flatten()])["effective_share"] > 0.7


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    model = tiny_llama()
    blocks = BlockModel(save_dense(tmp_path_factory.mktemp("importance") / "dense", model))
    return blocks, {name: t.float() for name, t in model.model.layers[0].state_dict().items()}


def test_every_strategy_scores_what_its_name_says(block):
    model, weights = block
    hidden, counts = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)), torch.arange(32).view(2, 16)

    passed = model.inputs_of(0, weights, hidden, [], stop=False)

    def got(strategy, **changes):
        return token_importance(hidden, ImportanceSpec(strategy, **changes), counts, passed)

    def want(scores):
        return importance_from_scores(scores, ImportanceSpec()).flatten()

    assert got("uniform") is None
    assert_same_function(got("attention"), want(passed.received))
    assert_same_function(got("norm"), want(hidden.square().sum(-1).sqrt()))
    change = (model.run(0, weights, hidden) - hidden).square().sum(-1).sqrt()
    assert_same_function(got("change"), want(-change))
    pairs = (hidden[:, :, None] - hidden[:, None]).square().sum(-1).mean(2)
    assert_same_function(got("distance"), want(pairs))
    assert_same_function(got("rarity"), want(-counts.float()))
    first = got("chunks", chunks=(0, 3), num_chunks=4).view(2, 16)
    assert first[0].tolist() == [2.0] * 4 + [0.0] * 8 + [2.0] * 4
    assert {"uniform", "attention", "norm", "change", "distance", "rarity", "chunks"} == set(STRATEGIES)


def test_the_summary_counts_the_tokens_that_count():
    assert importance_summary([None, None]) is None
    alone = torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0])
    summary = importance_summary([alone[:4], alone[4:]])
    assert summary["effective_share"] == pytest.approx(1 / 8)
    assert summary["histogram"] == [7 / 8, 0, 0, 0, 0, 0, 1 / 8, 0, 0, 0]
    assert importance_summary([torch.ones(6)])["effective_share"] == pytest.approx(1)


def test_refusals_name_the_argument():
    for changes, match in (
        ({"strategy": "loud"}, "importance: got 'loud', need one of uniform, attention"),
        ({"floor": 0}, "floor: got 0, need 0 < floor <= 1"),
        ({"exponent": 3}, "exponent: got 3, need 1 or 2"),
        ({"quantile": 1.5}, r"quantile: got 1\.5"),
        ({"chunks": (8,)}, r"chunks: got \(8,\) of 8"),
    ):
        with pytest.raises(ValueError, match=match):
            ImportanceSpec(**changes)
    nothing = BlockPass({}, None, None)
    with pytest.raises(ValueError, match="chunks: got sequences of 4 tokens, need at least num_chunks 8"):
        token_importance(torch.randn(1, 4, 64), ImportanceSpec("chunks"), torch.ones(1, 4), nothing)


def test_attention_without_probabilities_is_refused(block, monkeypatch):
    model, weights = block
    attention = model._blocks[0].self_attn
    real = type(attention).forward
    monkeypatch.setattr(type(attention), "forward", lambda *args, **kwargs: (real(*args, **kwargs)[0], None))
    hidden = torch.randn(1, 4, 64)
    passed = model.inputs_of(0, weights, hidden, [], stop=False)
    with pytest.raises(ValueError, match="importance: got no attention probabilities from the model's attention"):
        token_importance(hidden, ImportanceSpec("attention"), torch.ones(1, 4), passed)


@pytest.mark.parametrize(("make", "window"), [(tiny_llama, None), (tiny_mistral, 4)])
def test_attention_received_is_the_column_sum_under_the_layers_mask(make, window, tmp_path):
    model = make(sliding_window=window) if window else make()
    blocks = BlockModel(save_dense(tmp_path, model))
    weights = {name: t.float() for name, t in model.model.layers[0].state_dict().items()}
    hidden = torch.randn(3, 11, 64)
    got = blocks.inputs_of(0, weights, hidden, [], stop=False).received

    normed = torch.nn.functional.rms_norm(hidden, (64,), weights["input_layernorm.weight"], model.config.rms_norm_eps)
    q, k = ((normed @ weights[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, 16)).transpose(1, 2) for n in "qk")
    cos, sin = model.float().model.rotary_emb(hidden, torch.arange(11)[None])

    def rope(x):
        return x * cos[:, None] + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin[:, None]

    scores = rope(q) @ rope(k.repeat_interleave(2, 1)).transpose(-1, -2) / 4
    query, key = torch.arange(11)[:, None], torch.arange(11)[None]
    allowed = (key <= query) & (key > query - (window or 99))
    want = scores.masked_fill(~allowed, -torch.inf).softmax(-1).sum((1, 2))
    assert_same_function(got, want)
    assert_same_function(got.sum(1), torch.full((3,), 4 * 11.0))  # heads x queries


def test_axes_of_value_heads_listen_to_it_too():
    """Two key-value heads of three query heads each: a token's weight reaches its part in every one of them."""
    x = torch.randn(40, 2 * 3 * 8, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.1, 2, 40)
    grams = [Gram(8), Gram(8)]
    add_value_heads(grams, Tokens(x, weight), 8)
    parts = x.double().view(40, 2, 3, 8)
    want = torch.einsum("t,tkgi,tkgj->kij", weight.double(), parts, parts) / (3 * weight.double().sum())
    assert_same_function(torch.stack([gram.mean() for gram in grams]), want, torch.float32)
