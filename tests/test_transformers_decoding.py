"""The compiled step of one token: its attention against the definition, whole generations against the plain ones."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from rosaq import QuantSpec, RosaqLinear
from rosaq.integrations.transformers_decoding import ATTENTION, attend, compiled_step, dense_linear, single_query
from tests.families import tiny_family
from tests.tolerances import assert_as_good_as

BATCH, HEADS, KV_HEADS, LENGTH, D = 2, 6, 2, 37, 16


def definition(query, key, value, visible, scaling):
    """softmax(q k / sqrt(d)) v in float64 -> [batch, 1, heads, d]."""
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (t.double() for t in (query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)))
    scores = (q @ k.transpose(-1, -2)) * scaling
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def some_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, HEADS, 1, D), (BATCH, KV_HEADS, LENGTH, D), (BATCH, KV_HEADS, LENGTH, D)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    visible = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    visible[0, ..., 30:] = False  # a cache that is not full
    visible[1, ..., :5] = False  # padding on the left
    return query, key, value, visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_single_query_is_attention(dtype, kind, scaling):
    query, key, value, visible = some_tensors(dtype)
    if kind == "none":
        visible = torch.ones_like(visible)
    mask = {"none": None, "boolean": visible, "added": torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)}[
        kind
    ]
    got = single_query(query, key, value, mask, scaling)
    plain = scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True).transpose(1, 2)
    assert_as_good_as(got, plain, definition(query, key, value, visible, D**-0.5 if scaling is None else scaling))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_linear_of_one_row_loses_no_more_than_torchs(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 1, 96), (40, 96)))
    added = torch.randn(40, generator=generator).to(dtype) if bias else None
    exact = nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    got = dense_linear(x, weight, added)
    assert got.dtype == dtype
    assert_as_good_as(got, nn.functional.linear(x, weight, added), exact)


@pytest.mark.parametrize("x", [torch.ones(2, 96, dtype=torch.bfloat16), torch.ones(1, 96)], ids=["rows", "float32"])
def test_a_dense_linear_is_torchs_otherwise(x):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    assert torch.equal(dense_linear(x, weight), nn.functional.linear(x, weight))


def test_a_prompt_is_left_to_transformers():
    query, key, value, _ = some_tensors(torch.float32)
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    prompt = query.expand(-1, -1, LENGTH, -1).contiguous()
    got, _ = attend(module, prompt, key, value, None)
    causal = scaled_dot_product_attention(prompt, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, causal)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generate_compiled_takes_it_and_gives_the_same_tokens(family):
    """Two prompts of different lengths, so that the mask hides padding as well as the empty end of the cache; Gemma has
    layers with a sliding window besides, which the text outgrows."""
    torch.compiler.reset()
    model = tiny_family(family)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompts["attention_mask"][1, :3] = 0
    length = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**prompts, **length)
    model.generate(**prompts, **length, **compiled_step(model))  # compiles
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        found = model.generate(**prompts, **length, **compiled_step(model))
    assert model.config._attn_implementation == ATTENTION
    fused = [event for event in seen.events() if event.name == "aten::scaled_dot_product_attention"]
    assert len(fused) == model.config.num_hidden_layers  # of the prompt alone
    assert found.tolist() == wanted.tolist()


def test_an_attention_chosen_by_the_user_stays():
    model = tiny_family("llama")
    model.set_attn_implementation("eager")
    compiled_step(model)
    assert model.config._attn_implementation == "eager"


def in_bits(bits):
    """A tiny Llama whose blocks' linears are rounded to `bits`."""
    model = tiny_family("llama")
    model.generation_config.eos_token_id = None
    for block in model.model.layers:
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            spec = QuantSpec(bits=bits, group_size=32, method="rtn")
            block.set_submodule(name, RosaqLinear.from_linear(linear, None, spec))
    return model


PROMPT = torch.arange(5, 12)[None]
LENGTH_OF_IT = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}


def logits_of(model, **how):
    """[tokens, vocab] of a greedy generation."""
    return torch.cat(model.generate(PROMPT, **LENGTH_OF_IT, return_dict_in_generate=True, **how).logits)


def products_of_torch(call):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.name in ("aten::linear", "aten::mm", "aten::addmm", "aten::matmul") for event in seen.events())


def test_a_compiled_step_leaves_a_dense_head_of_16_bits_to_no_library():
    torch.compiler.reset()
    model = in_bits(4).to(torch.bfloat16)
    logits_of(model, **compiled_step(model))
    of_the_prompt = products_of_torch(lambda: model(PROMPT, logits_to_keep=1))
    assert of_the_prompt > 0
    assert products_of_torch(lambda: logits_of(model, **compiled_step(model))) == of_the_prompt


def test_models_of_one_class_are_compiled_each_for_itself():
    """Blocks are not looked at before a step, so what was compiled for one model must not serve another."""
    torch.compiler.reset()
    for bits in (3, 4):
        model = in_bits(bits)
        torch.testing.assert_close(logits_of(model, **compiled_step(model)), logits_of(model))


def test_another_dtype_is_noticed_and_a_changed_block_after_a_reset():
    torch.compiler.reset()
    model = in_bits(4)
    first = logits_of(model, **compiled_step(model))
    model.to(torch.bfloat16)
    # The first token is the prompt's; kernels made for float32 would read two bfloat16 as one number.
    torch.testing.assert_close(logits_of(model, **compiled_step(model))[1], logits_of(model)[1], rtol=0.05, atol=0.05)
    model.to(torch.float32)
    block = model.model.layers[0]
    block.mlp.gate_proj = in_bits(3).model.layers[0].mlp.gate_proj
    torch.compiler.reset()
    changed = logits_of(model, **compiled_step(model))
    torch.testing.assert_close(changed, logits_of(model))
    assert not torch.equal(changed, first)
