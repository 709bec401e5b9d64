"""The counter of bits that compares checkpoints of different tools (benchmarks/accuracy/bits.py)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rosaq
from rosaq.config import LinearFormat
from tests.models import save_dense, save_rosaq, tiny_llama

FILE = Path(__file__).parents[1] / "benchmarks" / "accuracy" / "bits.py"
gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rosaq[demo]'")
spec = importlib.util.spec_from_file_location("accuracy_bits", FILE)
bits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bits)


def linears():
    """{module path: [n, k]} of the tiny model's linears, without its head."""
    modules = tiny_llama().named_modules()
    return {name: m.weight for name, m in modules if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def save_tensors(directory, per_linear):
    directory.mkdir()
    tensors = {f"{name}.{key}": t for name, w in linears().items() for key, t in per_linear(w).items()}
    save_file({"model.embed_tokens.weight": torch.zeros(264, 64), **tensors}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({}))
    return directory


def test_a_dense_model_has_sixteen_bits(tmp_path):
    dense = save_dense(tmp_path / "dense")
    assert bits.bits_per_weight(dense, dense) == 16.0


@pytest.mark.parametrize("fmt", [LinearFormat(3, 32, num_salient=4), LinearFormat(4, 64, symmetric=True)])
def test_a_rosaq_checkpoint_counts_as_rosaq_counts_it(tmp_path, fmt):
    dense, quantised = save_dense(tmp_path / "dense"), save_rosaq(tmp_path / "quantised", default=fmt)
    own = rosaq.evaluate(quantised, text=["abc" * 100], context=8, windows=1).bits_per_weight
    assert bits.bits_per_weight(quantised, dense) == pytest.approx(own, rel=1e-12)


def gptq(weight):
    n, k = weight.shape
    return {
        "qweight": torch.zeros(k * 4 // 32, n, dtype=torch.int32),
        "qzeros": torch.zeros(k // 32, n * 4 // 32, dtype=torch.int32),
        "scales": torch.zeros(k // 32, n, dtype=torch.float16),
        "bias": torch.zeros(n, dtype=torch.float16),
    }


def test_codes_scales_and_zero_points_count_and_a_plain_order_does_not(tmp_path):
    dense = save_dense(tmp_path / "dense")
    directory = save_tensors(
        tmp_path / "gptq", lambda w: gptq(w) | {"g_idx": torch.arange(w.shape[1], dtype=torch.int32) // 32}
    )
    assert bits.bits_per_weight(directory, dense) == 4 + 16 / 32 + 4 / 32


def test_an_order_that_has_to_be_stored_counts(tmp_path):
    dense = save_dense(tmp_path / "dense")
    directory = save_tensors(
        tmp_path / "gptq", lambda w: gptq(w) | {"g_idx": torch.arange(w.shape[1], dtype=torch.int32).flip(0) // 32}
    )
    order = sum(32 * w.shape[1] for w in linears().values()) / sum(w.numel() for w in linears().values())
    assert bits.bits_per_weight(directory, dense) == pytest.approx(4.625 + order, rel=1e-12)


def test_gguf_counts_the_types_that_were_really_used(tmp_path):
    dense, file = save_dense(tmp_path / "dense"), tmp_path / "model.gguf"
    writer, names = gguf.GGUFWriter(file, "llama"), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = 0
    for name, weight in linears().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "down_proj" in name else gguf.GGMLQuantizationType.Q4_0
        expected += weight.numel() * (8.5 if "down_proj" in name else 4.5)
        packed = gguf.quants.quantize(weight.detach().numpy(), kind)
        writer.add_tensor(names.get_name(f"{name}.weight", try_suffixes=(".weight",)), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert bits.bits_per_weight(file, dense) == expected / sum(w.numel() for w in linears().values())


def test_a_missing_linear_is_named(tmp_path):
    dense = save_dense(tmp_path / "dense")
    directory = save_tensors(tmp_path / "half", lambda w: gptq(w) if w.shape[1] == 64 else {})
    with pytest.raises(ValueError, match=r"got no tensor of model.layers.0.mlp.down_proj \(2 such\)"):
        bits.bits_per_weight(directory, dense)
