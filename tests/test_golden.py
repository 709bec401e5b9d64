"""The committed checkpoint of format version 1: it must load, and mean the same numbers, for ever."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from rosaq.checkpoint import WeightReader, bits_per_weight, read_config
from rosaq.linear import RosaqLinear
from tests.data.make_golden import FORMATS, GOLDEN, INPUT_IDS
from tests.tolerances import assert_as_good_as, assert_close_in


def load(dtype):
    return AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=dtype)


def test_config_is_read():
    config = read_config(GOLDEN)
    assert config.default == FORMATS["default"]
    assert config.modules == FORMATS["modules"]
    assert config.version == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_what_they_were(dtype):
    want = torch.from_numpy(load_file(GOLDEN / "expected" / "logits.safetensors")["logits"]).double()
    plain = load(torch.float32).dequantize(dtype).to(dtype)
    assert_as_good_as(load(dtype)(INPUT_IDS).logits, plain(INPUT_IDS).logits, want)


def dense_by_numpy(tensors, fmt):
    """The format description read literally: no line of rosaq is involved."""
    n = len(tensors["qweight"])
    string = np.unpackbits(tensors["qweight"].astype("<i4").view(np.uint8), axis=1, bitorder="little")
    codes = (string.reshape(n, -1, fmt.bits) << np.arange(fmt.bits)).sum(-1)
    k = codes.shape[1]
    group_of = np.arange(k) // (k if fmt.group_size == -1 else fmt.group_size)
    zeros = tensors["zeros"].astype(int)[:, group_of] if "zeros" in tensors else 2 ** (fmt.bits - 1)
    weight = (codes - zeros) * tensors["scales"].astype(np.float64)[:, group_of]
    if "salient_index" in tensors:
        weight[:, tensors["salient_index"]] += tensors["salient_weight"]
    if "salient_basis" in tensors:
        weight += tensors["salient_weight"].astype(np.float64) @ tensors["salient_basis"].astype(np.float64).T
    if "rotation" in tensors:
        rotation, b = tensors["rotation"].astype(np.float64), fmt.rotation_size
        for block in range(k // b):
            columns = slice(block * b, block * b + b)
            weight[:, columns] = weight[:, columns] @ rotation[min(block, len(rotation) - 1)].T
    return weight


def test_every_linear_is_readable_without_rosaq():
    tensors = load_file(GOLDEN / "model.safetensors")
    modules = {name: m for name, m in load(torch.float32).named_modules() if isinstance(m, RosaqLinear)}
    assert len(modules) == 7
    for name, module in modules.items():
        own = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(name + ".")}
        want = torch.from_numpy(dense_by_numpy(own, read_config(GOLDEN).format_of(name)))
        assert_close_in(module.dequantize(), want, torch.float32)


def test_bits_per_weight_is_counted_from_the_files():
    reader, modules = WeightReader(GOLDEN), [m for m in load(torch.float32).modules() if isinstance(m, RosaqLinear)]
    names = [n for n in reader.names() if ("self_attn" in n or "mlp" in n) and not n.endswith(".bias")]
    num_bits = 8 * sum(reader.nbytes(name) for name in names)
    num_weights = sum(m.in_features * m.out_features for m in modules)
    assert bits_per_weight(GOLDEN) == num_bits / num_weights
    assert sum(m.bits_per_weight * m.in_features * m.out_features for m in modules) == num_bits
