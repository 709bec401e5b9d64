"""rosaq.checkpoint: lazy reading, streaming writing, and refusing what is damaged."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from rosaq.checkpoint import (
    WeightReader,
    bits_per_weight,
    linear_bytes,
    linear_sizes,
    read_config,
    read_header,
    total_bytes,
    write_shards,
)
from rosaq.config import CheckpointConfig, LinearFormat
from tests.models import save_dense, save_rosaq, vandalise


def some_tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(8, 16, dtype=torch.float16),
        "b.qweight": torch.randint(-(2**31), 2**31 - 1, (8, 4), dtype=torch.int32),
        "c.zeros": torch.randint(0, 8, (8, 2), dtype=torch.uint8),
        "d.bias": torch.randn(8, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 1), (300, 2), (1, 4)])
def test_written_tensors_read_back_equal(tmp_path, max_shard_bytes, num_files):
    tensors = some_tensors()
    files = write_shards(tmp_path, iter(tensors.items()), max_shard_bytes)
    assert len(files) == num_files
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [p.name for p in files]
    reader = WeightReader(tmp_path)
    assert reader.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.get(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert reader.nbytes(name) == tensor.nbytes
    assert total_bytes(tmp_path) == sum(t.nbytes for t in tensors.values())


def test_shards_follow_the_hub_convention(tmp_path):
    files = write_shards(tmp_path, some_tensors().items(), 300)
    assert files[0].name == "model-00001-of-00002.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a.weight"] == files[0].name
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in some_tensors().values())


def test_writing_again_leaves_no_stale_file(tmp_path):
    write_shards(tmp_path, some_tensors().items(), 1)
    write_shards(tmp_path, some_tensors().items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_one_storage_under_two_names_is_written_twice(tmp_path):
    tensor = torch.randn(4, 4)
    write_shards(tmp_path, [("a", tensor), ("b", tensor)])
    assert all(torch.equal(t, tensor) for t in load_file(tmp_path / "model.safetensors").values())


def test_interrupted_writing_leaves_nothing(tmp_path):
    def broken():
        yield from list(some_tensors().items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, broken(), 1)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_before_and_while_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr("rosaq.checkpoint.writer.shutil.disk_usage", lambda _: usage)
        with pytest.raises(OSError, match="disk full: got 10 bytes free, need 256") as error:
            write_shards(tmp_path, some_tensors().items(), 1)
    assert error.value.errno == errno.ENOSPC

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rosaq.checkpoint.writer.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        write_shards(tmp_path, some_tensors().items(), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "size", "message"),
    [
        ([], 10, "tensors: got none"),
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], 10, "tensors: got 'a' twice"),
        ([("a", torch.zeros(1))], 0, "max_shard_bytes: got 0"),
    ],
)
def test_bad_writing_is_refused(tmp_path, tensors, size, message):
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, tensors, size)


# --- refusals of the reading side ---------------------------------------------------------------------------------


def test_directory_without_safetensors_is_refused_and_pickles_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no weights, need model.safetensors"):
        WeightReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model.bin\)"):
        WeightReader(tmp_path)
    with pytest.raises(FileNotFoundError, match="got no such directory"):
        WeightReader(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file_is_refused_with_sizes(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(), path)
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model.safetensors: got {len(content)} bytes, need \d+"):
        WeightReader(tmp_path)


def test_trailing_bytes_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(), path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="truncated or damaged"):
        WeightReader(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "damaged header"),
        (b'{"a": 3}', "damaged header"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"a: got 4 bytes, need 8 for shape \[2\]"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "a: got dtype F99"),
    ],
)
def test_damaged_header_is_refused(tmp_path, header, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_index_may_not_leave_the_directory(tmp_path, name):
    write_index(tmp_path, {"a": name})
    with pytest.raises(ValueError, match="need a plain file name inside"):
        WeightReader(tmp_path)


def test_index_must_match_its_files(tmp_path):
    write_index(tmp_path, {"a": "x.safetensors"})
    with pytest.raises(FileNotFoundError, match="x.safetensors: got no such file, needed by"):
        WeightReader(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="got no tensor 'a'"):
        WeightReader(tmp_path)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    write_shards(tmp_path, some_tensors().items(), 300)
    save_file({"a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert WeightReader(tmp_path).names() == ["a.weight"]
    model = LlamaForCausalLM.from_pretrained(save_dense(tmp_path / "both"))
    model.model.norm.weight.data.fill_(2)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for path in (tmp_path / "sharded").glob("model*"):
        path.rename(tmp_path / "both" / path.name)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "both").model.norm.weight
    assert torch.equal(WeightReader(tmp_path / "both").get("model.norm.weight"), theirs)


def test_unknown_tensor_is_named(tmp_path):
    write_shards(tmp_path, some_tensors().items())
    with pytest.raises(KeyError, match="got no tensor 'z' among 4"):
        WeightReader(tmp_path).get("z")


def write_config(directory, **changes):
    values = CheckpointConfig(LinearFormat(3, 64), recipe="rtn").to_dict() | changes
    (directory / "config.json").write_text(json.dumps({"quantization_config": values}))


def test_config_reads_back(tmp_path):
    write_config(tmp_path)
    assert read_config(tmp_path) == CheckpointConfig(LinearFormat(3, 64), recipe="rtn")


def test_a_module_differs_from_the_default_in_what_it_names(tmp_path):
    write_config(tmp_path, group_size=64, modules={"down_proj": {"bits": 4}})
    assert read_config(tmp_path).format_of("model.layers.0.mlp.down_proj") == LinearFormat(4, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version: got 99, this rosaq reads 1 to 2"),
        ({"quant_method": "gptq"}, "quant_method: got 'gptq', need 'rosaq'"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"symmetric": True}, r"unknown keys \['symmetric'\], need .*'sym'"),
        ({"bits": 5}, "bits: got 5"),
    ],
)
def test_foreign_config_is_refused(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_missing_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: got no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="got no quantization_config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="need UTF-8 JSON"):
        read_config(tmp_path)


# --- the layout of the quantised linears ----------------------------------------------------------------------------

Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_layout_of_a_sound_checkpoint(tmp_path):
    save_rosaq(tmp_path, default=LinearFormat(3, 32, num_salient=4))
    sizes = linear_sizes(read_config(tmp_path), WeightReader(tmp_path))
    assert len(sizes) == 14
    assert sizes["model.layers.1.mlp.down_proj"] == (64, 128)
    # 3 bits, 16 + 8 per group of 32; 16 bits of every salient weight and 32 of every index
    q_bits = 3 * 64 * 64 + 24 * 64 * 2 + 4 * (64 * 16 + 32)
    reader = WeightReader(tmp_path)
    assert 8 * linear_bytes(reader, read_config(tmp_path), Q_PROJ, sizes[Q_PROJ]) == q_bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.scales"), r"scales: got no such tensor, need float16 \[64, 2\]"),
        (
            lambda t: t.update({f"{Q_PROJ}.zeros": torch.zeros(64, 1, dtype=torch.uint8)}),
            r"zeros: got uint8 \[64, 1\], need uint8 \[64, 2\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].bfloat16()}),
            r"scales: got bfloat16 \[64, 2\], need float16",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.g_idx": torch.zeros(64, dtype=torch.int32)}),
            r"g_idx: got int32 \[64\], need no such tensor",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.qweight": t[f"{Q_PROJ}.qweight"][:, :5].contiguous()}),
            "in_features: got 53, need a positive multiple of 32",
        ),
    ],
)
def test_layout_against_the_config_is_refused(tmp_path, change, message):
    save_rosaq(tmp_path, default=LinearFormat(3, 32, num_salient=4))
    vandalise(tmp_path, change)
    with pytest.raises(ValueError, match=f"{Q_PROJ}.*{message}"):
        bits_per_weight(tmp_path)


def test_dense_checkpoint_has_no_bits_to_count(tmp_path):
    write_config(tmp_path)
    write_shards(tmp_path, [("a.weight", torch.zeros(4))])
    with pytest.raises(ValueError, match="got no quantised linear"):
        bits_per_weight(tmp_path)
