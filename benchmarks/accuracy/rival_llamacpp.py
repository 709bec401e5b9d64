"""llama.cpp's quantiser with an importance matrix; writes the GGUF file, and a dense float16 directory decoded from it.

Only its shared library is needed (`--library`), with the structures of `llama.h` at release v0.5.0 below. Embeddings
stay in float16, as every rival here leaves them, unless `--low-bit-head` leaves their type to llama.cpp. Rows are
quantised one by one, so the order of a head's rows, which llama.cpp permutes for its own rotary embedding, does not
matter and is left as it is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# enum llama_ftype of llama.h: what `llama-quantize` is asked for by name.
FTYPES = {
    "Q4_0": 2,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "IQ3_XXS": 23,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ4_XS": 30,
}
GGML_TYPE_F16 = 1


class ImatrixEntry(ctypes.Structure):
    """`llama_model_imatrix_data`; a list of them ends with one that has no name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class QuantizeParams(ctypes.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(ImatrixEntry)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
    )


def name_map(model: Path) -> gguf.TensorNameMap:
    blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)


def gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight",))
    if found is None:
        raise ValueError(f"{name}: got a tensor that GGUF has no name for, need a Llama model without biases")
    return str(found)


def write_gguf(model: Path, output: Path) -> None:
    """The dense model as GGUF: float16 matrices, float32 norms; no tokenizer, which nothing here reads."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    names = name_map(model)
    for name, tensor in load_file(model / "model.safetensors").items():
        dtype = torch.float16 if tensor.dim() == 2 else torch.float32
        writer.add_tensor(gguf_name(names, name), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance_matrix(model: Path, windows: Tensor) -> dict[str, np.ndarray]:
    """{tensor name: mean square of each input channel, float32 [k]}, what llama.cpp's `llama-imatrix` computes."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    names, sums = name_map(model), {}

    def hook(name: str) -> object:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

        return add

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not network.get_output_embeddings():
            module.register_forward_pre_hook(hook(gguf_name(names, f"{name}.weight")))
    with torch.inference_mode():
        for window in windows.split(1):
            network(input_ids=window, use_cache=False)
    return {name: (total / windows.numel()).float().numpy() for name, total in sums.items()}


def quantize(
    library: Path, source: Path, output: Path, ftype: str, importance: dict[str, np.ndarray], low_bit_head: bool
) -> None:
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = QuantizeParams
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams))
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    entries = (ImatrixEntry * (len(importance) + 1))()  # the last one stays zero: the end of the list
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.nthread = 1
    params.ftype = FTYPES[ftype]
    if not low_bit_head:
        params.token_embedding_type = GGML_TYPE_F16
    params.imatrix = entries
    code = llama.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize: got return code {code} for {ftype}, need 0; its log is above")


def write_dense(quantised: Path, model: Path, output: Path) -> None:
    """The GGUF file decoded to float16 under the names of `model`, with its config and tokenizer."""
    output.mkdir(parents=True)
    names = name_map(model)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(quantised).tensors}
    dense = {}
    for name, original in load_file(model / "model.safetensors").items():
        tensor = tensors[gguf_name(names, name)]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(original.shape)
        dense[name] = torch.from_numpy(values.copy()).half()
    save_file(dense, output / "model.safetensors", metadata={"format": "pt"})
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, output / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="calibration tokens, .npy, int64 [sequences, length]")
    parser.add_argument("output", type=Path)
    parser.add_argument("--library", type=Path, required=True, help="libllama of release v0.5.0")
    parser.add_argument("--ftype", choices=tuple(FTYPES), required=True)
    parser.add_argument(
        "--low-bit-head", action="store_true", help="the embedding, which is the head, as llama.cpp likes"
    )
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True)
    source, quantised = arguments.output / "dense.gguf", arguments.output / "model.gguf"
    write_gguf(arguments.model, source)
    # The matrix is the same for every type: keep it beside the calibration tokens it comes from.
    cache = arguments.windows.with_suffix(".imatrix.npz")
    if not cache.is_file():
        np.savez(cache, **importance_matrix(arguments.model, torch.from_numpy(np.load(arguments.windows))))
    begin = time.perf_counter()
    importance = dict(np.load(cache))
    quantize(arguments.library, source, quantised, arguments.ftype, importance, arguments.low_bit_head)
    print(f"quantised in {time.perf_counter() - begin:.0f} s")
    source.unlink()
    write_dense(quantised, arguments.model, arguments.output / "dense")


if __name__ == "__main__":
    main()
