"""Linears that read the same x, computed by one call: the same bits, and what ends the sharing."""

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rosaq import ops
from rosaq.config import LinearFormat
from rosaq.linear import RosaqLinear
from rosaq.siblings import Siblings, can_share, join_siblings
from tests.cases import make_x
from tests.models import save_rosaq
from tests.test_linear import FORMATS, assert_same_tensors, random_tensors

SIZES = (24, 40, 8)


def make_linears(fmt, *, bias=True, k=128):
    """Three packed linears of different heights with one salient set and one rotation."""
    tensors = [random_tensors(fmt, n, k, bias=bias, seed=n) for n in SIZES]
    for other in tensors[1:]:
        other |= {name: tensors[0][name] for name in ("salient_index", "salient_basis", "rotation") if name in other}
    return [RosaqLinear.from_tensors(each, fmt) for each in tensors]


@pytest.fixture(name="calls")
def _calls(monkeypatch):
    """Counts the calls of both ops: {"fused_gemm": n, "fused_gemms": n}."""
    counted = {"fused_gemm": 0, "fused_gemms": 0}
    for name in counted:
        original = getattr(ops, name)

        def counting(*args, _name=name, _original=original, **kwargs):
            counted[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(ops, name, counting)
    return counted


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (3, "float32"), (40, "bfloat16"), (40, "float32")])
def test_one_call_gives_the_bits_of_each_alone(name, bias, m, dtype, isa):  # noqa: ARG001
    linears, x = make_linears(FORMATS[name], bias=bias), make_x(m, 128, dtype)
    alone = [linear(x) for linear in linears]
    Siblings(linears)
    for linear, want in zip(linears, alone, strict=True):
        assert torch.equal(linear(x), want)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_siblings_are_one_call_and_nothing_stays_behind(order, calls):
    linears, x = make_linears(FORMATS["int4-g128"]), make_x(2, 128)
    siblings = Siblings(linears)
    outputs = [linears[i](x) for i in order]
    assert calls == {"fused_gemm": 0, "fused_gemms": 1}
    gone = [weakref.ref(x), *(weakref.ref(y) for y in outputs)]
    del x, outputs
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert siblings._waiting is None


def test_another_x_and_a_changed_x_are_computed_anew(calls):
    linears, x = make_linears(FORMATS["int4-g128"]), make_x(2, 128)
    other = make_x(2, 128) + 1
    want = [linear(x + 1) for linear in linears], [linear(other) for linear in linears]
    Siblings(linears)
    linears[0](x)
    x += 1
    assert torch.equal(linears[1](x), want[0][1])
    assert torch.equal(linears[2](other), want[1][2])
    assert torch.equal(linears[2](x), want[0][2])
    assert calls["fused_gemms"] == 4


def test_inference_mode_computes_each_alone(calls):
    linears = make_linears(FORMATS["int4-g128"])
    Siblings(linears)
    with torch.inference_mode():
        for linear in linears:
            linear(make_x(2, 128))
    assert calls == {"fused_gemm": 3, "fused_gemms": 0}


def test_compiles_whole():
    linears, x = make_linears(FORMATS["int4-own-rotations-index"]), make_x(2, 128)
    want = torch.cat([linear(x) for linear in linears], dim=-1)
    Siblings(linears)
    compiled = torch.compile(lambda x: torch.cat([f(x) for f in linears], dim=-1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), want)


def test_state_dict_and_memory_are_those_of_each_alone():
    linears = make_linears(FORMATS["int3-index"])
    packed = [linear.packed.data_ptr() for linear in linears]
    want = [linear.state_dict() for linear in linears]
    Siblings(linears)
    linears[0](make_x(1, 128))
    assert [linear.packed.data_ptr() for linear in linears] == packed
    for linear, tensors in zip(linears, want, strict=True):
        assert_same_tensors(linear.state_dict(), tensors)
        assert copy.deepcopy(linear).siblings is None


def test_loading_other_tensors_parts_them():
    fmt, x = FORMATS["int3-index"], make_x(1, 128)
    linears = make_linears(fmt)
    Siblings(linears)
    linears[1].load_state_dict(random_tensors(fmt, SIZES[1], seed=77))
    assert all(linear.siblings is None for linear in linears)
    assert torch.equal(linears[1](x), RosaqLinear.from_tensors(random_tensors(fmt, SIZES[1], seed=77), fmt)(x))


def test_those_that_differ_before_w_do_not_share():
    fmt = FORMATS["int3-index"]
    linears = make_linears(fmt)
    stranger = RosaqLinear.from_tensors(random_tensors(fmt, 16, seed=5), fmt)
    assert can_share(linears)
    assert not can_share([linears[0], stranger])  # another salient set
    assert not can_share([linears[0], make_linears(fmt, bias=False)[1]])
    assert not can_share([linears[0], make_linears(FORMATS["int4-g128"])[1]])
    assert not can_share(linears[:1])
    loaded = make_linears(fmt)
    loaded[2].unpack()
    with pytest.raises(ValueError, match="need packed siblings"):
        Siblings(loaded)
    assert join_siblings(nn.ModuleDict({"q_proj": linears[0], "k_proj": stranger})) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_features": [24, 40]}, "out_features: got 2, need 3"),
        ({"out_features": [24, 40, 16]}, "out_features: got 16, need 8"),
        ({"packed": []}, "packed: got 0 weights, need 1 to 8"),
        ({"biases": [torch.zeros(24)]}, "biases: got 1, need none or 3"),
        ({"salient_weights": [torch.zeros(24, 4).half()] * 2}, "salient_weights: got 2, need none or 3"),
    ],
)
def test_fused_gemms_refuses_what_does_not_fit(changes, message):
    linears = make_linears(FORMATS["int4-g128"], bias=False)
    given = {"packed": [linear.packed for linear in linears], "salient_weights": [], "out_features": list(SIZES)}
    with pytest.raises(RuntimeError, match=message):
        ops.fused_gemms(make_x(1, 128), **(given | changes), bits=4, group_size=128, symmetric=False)


def test_a_loaded_model_shares_qkv_and_gate_up(tmp_path, calls):
    directory = save_rosaq(tmp_path / "model", default=LinearFormat(4, 32))
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    block, ids = model.model.layers[0], torch.arange(1, 9)[None]
    assert block.self_attn.q_proj.siblings is block.self_attn.v_proj.siblings is not None
    assert block.mlp.gate_proj.siblings is block.mlp.up_proj.siblings is not None
    with torch.no_grad():
        shared = model(ids).logits  # two layers: qkv and gate/up as one call each, o and down
        assert calls == {"fused_gemm": 4, "fused_gemms": 4}
        for module in model.modules():
            if getattr(module, "siblings", None) is not None:
                module.siblings.part()
        assert torch.equal(model(ids).logits, shared)


def test_a_model_that_shares_saves_what_it_read(tmp_path):
    directory = save_rosaq(tmp_path / "model", default=LinearFormat(3, 64, symmetric=True))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.model.layers[1].mlp.up_proj.siblings is not None
    model.save_pretrained(tmp_path / "again")
    read = [load_file(next(folder.glob("*.safetensors"))) for folder in (directory, tmp_path / "again")]
    quantised = [{name: t for name, t in tensors.items() if name.endswith("qweight")} for tensors in read]
    assert len(quantised[0]) == 14
    assert_same_tensors(*quantised)
