"""Token importance: RSQ's normalisation, and attention read from the model's own layers and masks."""

import pytest
import torch

from rosaq.calibrate import BlockModel, importance_from_scores
from tests.models import save_dense, tiny_llama, tiny_mistral
from tests.tolerances import assert_same_function, assert_tight


def test_importance_is_min_max_with_mean_one():
    scores = torch.tensor([[1.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 8.0]], dtype=torch.float64)
    got = importance_from_scores(scores, 0.1)
    raw = torch.tensor([[0.1, 1.0, 0.55, 0.1], [0.1, 0.1, 0.1, 1.0]], dtype=torch.float64)
    assert_tight(got, raw / raw.mean(1, keepdim=True))
    assert_tight(importance_from_scores(torch.full((1, 5), 7.0), 0.1), torch.ones(1, 5))
    with pytest.raises(ValueError, match="floor: got 0"):
        importance_from_scores(scores, 0)


@pytest.mark.parametrize(("make", "window"), [(tiny_llama, None), (tiny_mistral, 4)])
def test_attention_received_is_the_column_sum_under_the_layers_mask(make, window, tmp_path):
    model = make(sliding_window=window) if window else make()
    blocks = BlockModel(save_dense(tmp_path, model))
    weights = {name: t.float() for name, t in model.model.layers[0].state_dict().items()}
    hidden = torch.randn(3, 11, 64)
    before = blocks.run(0, weights, hidden)
    got = blocks.attention_received(0, weights, hidden)
    assert torch.equal(blocks.run(0, weights, hidden), before)  # back to the fast attention

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
