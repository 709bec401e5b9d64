"""llama.cpp through ctypes: products of ggml and greedy decoding, from the prebuilt libraries of one folder.

Written for release v0.5.0 as the npm package `@node-llama-cpp/linux-x64@3.22.1` ships it (bins/linux-x64). ggml picks
the build of its CPU kernels for this machine itself, and multiplies with 8-bit activations.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"Q4_0": 2, "Q4_K": 12}  # enum ggml_type
F32, CPU_DEVICE = 0, 0
MAX_THREADS = 512  # GGML_MAX_N_THREADS
ERROR = 4  # enum ggml_log_level


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * MAX_THREADS),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _Opaque(ctypes.Structure):
    """A parameter struct passed on as the library made it: at least as large, and by value only through memory."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (("n_tokens", c_int32), *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq", "seq", "out")))


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _log(level: int, text: bytes, _data: object) -> None:
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


# Name: result and arguments.
_BASE: dict[str, tuple[Any, ...]] = {
    "ggml_version": (c_char_p,),
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_threadpool_params_init": (None, POINTER(_ThreadpoolParams), c_int),
}
_GGML: dict[str, tuple[Any, ...]] = {
    "ggml_backend_load_all_from_path": (None, c_char_p),
    "ggml_backend_dev_by_type": (c_void_p, c_int),
}
_LLAMA: dict[str, tuple[Any, ...]] = {
    "llama_model_default_params": (_Opaque,),
    "llama_context_default_params": (_Opaque,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _Opaque),
    "llama_init_from_model": (c_void_p, c_void_p, _Opaque),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_attach_threadpool": (None, c_void_p, c_void_p, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_batch_get_one": (_Batch, POINTER(c_int32), c_int32),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
}


def _library(folder: Path, pattern: str, functions: dict[str, tuple[Any, ...]]) -> Any:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: got {len(found)} files {pattern}, need one")
    library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    for name, (result, *arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Ggml:
    """The CPU backend with a pool of threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.base = _library(folder, "libggml-base.so", _BASE)
        self.base.ggml_log_set(_log, None)
        ggml = _library(folder, "libggml.*so*", _GGML)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.device = ggml.ggml_backend_dev_by_type(CPU_DEVICE)
        if self.device is None:
            raise RuntimeError(f"{folder}: got no CPU backend, need one that this machine can run")
        self.backend = self.base.ggml_backend_dev_init(self.device, None)
        self.version = self.base.ggml_version().decode()
        params = _ThreadpoolParams()
        self.base.ggml_threadpool_params_init(ctypes.byref(params), threads)
        if params.n_threads != threads:
            raise RuntimeError(f"ggml_threadpool_params: got {params.n_threads} threads at their place, need {threads}")
        params.poll = 0  # waiting threads sleep between graphs; they would spin into the next candidate's time
        self.pool = self._function("ggml_threadpool_new", c_void_p, POINTER(_ThreadpoolParams))(ctypes.byref(params))
        self._function("ggml_backend_set_n_threads", None, c_void_p, c_int)(self.backend, threads)
        self._function("ggml_backend_cpu_set_threadpool", None, c_void_p, c_void_p)(self.backend, self.pool)
        # The repacked orders (interleaved rows), where this build has them.
        extra = self._function("ggml_backend_dev_get_extra_bufts", POINTER(c_void_p), c_void_p)(self.device)
        self.buffer_types: list[Any] = [self.base.ggml_backend_dev_buffer_type(self.device)]
        while extra[len(self.buffer_types) - 1]:
            self.buffer_types.append(extra[len(self.buffer_types) - 1])

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of the CPU backend, which lives in a library that ggml chose."""
        registry = self.base.ggml_backend_dev_backend_reg(self.device)
        address = self.base.ggml_backend_reg_get_proc_address(registry, name.encode())
        if address is None:
            raise RuntimeError(f"{name}: got no such function of the CPU backend, need llama.cpp v0.5.0")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def products(self, kind: str, weight: Tensor, x: Tensor, copies: int) -> list[Products]:
        """x [m, k] times `copies` copies of weight [n, k] (both float32), once for each order that takes `kind`."""
        made = [Products(self, buffer_type, kind, weight, x, copies) for buffer_type in self.buffer_types]
        for each in made:
            if not each.supported:
                each.close()
        return [each for each in made if each.supported]


class Products:
    """One graph of x times every copy of a weight; calling it computes all."""

    def __init__(self, ggml: Ggml, buffer_type: Any, kind: str, weight: Tensor, x: Tensor, copies: int) -> None:
        self.ggml, self.copies = ggml, copies
        base, (n, k), m = ggml.base, weight.shape, len(x)
        size = 4 * copies + 16
        overhead = size * base.ggml_tensor_overhead() + base.ggml_graph_overhead_custom(size, False)
        self._contexts = [base.ggml_init(_InitParams(overhead, None, True)) for _ in range(2)]
        weights = [base.ggml_new_tensor_2d(self._contexts[0], TYPES[kind], k, n) for _ in range(copies)]
        x_tensor = base.ggml_new_tensor_2d(self._contexts[1], F32, k, m)
        self._ys = [base.ggml_mul_mat(self._contexts[1], each, x_tensor) for each in weights]
        self._graph = base.ggml_new_graph_custom(self._contexts[1], size, False)
        for y in self._ys:
            base.ggml_build_forward_expand(self._graph, y)
        self._buffers = [
            base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind_of_buffer)
            for context, kind_of_buffer in zip(self._contexts, (buffer_type, ggml.buffer_types[0]), strict=True)
        ]
        self.supported = bool(base.ggml_backend_dev_supports_op(ggml.device, self._ys[0]))
        self._y_shape = (m, n)
        if not self.supported:
            return
        packed = torch.empty(base.ggml_nbytes(weights[0]), dtype=torch.uint8)
        self.bytes_each = packed.numel()
        base.ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), packed.data_ptr(), 0, n, k, None)
        for each in weights:
            base.ggml_backend_tensor_set(each, packed.data_ptr(), 0, packed.numel())
        base.ggml_backend_tensor_set(x_tensor, x.data_ptr(), 0, x.nbytes)

    def __call__(self) -> None:
        code = self.ggml.base.ggml_backend_graph_compute(self.ggml.backend, self._graph)
        if code != 0:
            raise RuntimeError(f"ggml_backend_graph_compute: got {code}, need 0")

    def last(self) -> Tensor:
        """y float32 [m, n] of the last copy."""
        y = torch.empty(self._y_shape)
        self.ggml.base.ggml_backend_tensor_get(self._ys[-1], y.data_ptr(), 0, y.nbytes)
        return y

    def close(self) -> None:
        for buffer in self._buffers:
            self.ggml.base.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            self.ggml.base.ggml_free(context)


class Llama:
    """A GGUF model that decodes greedily, with the threads of a Ggml."""

    def __init__(self, ggml: Ggml, folder: Path, model: Path, threads: int) -> None:
        self.llama = _library(folder, "libllama.*so*", _LLAMA)
        self.llama.llama_log_set(_log, None)
        params = self.llama.llama_model_default_params()
        loaded = self.llama.llama_model_load_from_file(str(model).encode(), params)
        if loaded is None:
            raise RuntimeError(f"{model}: got no model, need a GGUF file of llama.cpp v0.5.0; its log is above")
        self.vocabulary = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(loaded))
        self.context = self.llama.llama_init_from_model(loaded, self.llama.llama_context_default_params())
        self.llama.llama_set_n_threads(self.context, threads, threads)
        self.llama.llama_attach_threadpool(self.context, ggml.pool, ggml.pool)

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """`tokens` ids that follow the prompt."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        ids: list[int] = []
        step = prompt
        for _ in range(tokens):
            held = (c_int32 * len(step))(*step)  # the batch only points at it
            batch = self.llama.llama_batch_get_one(held, len(step))
            code = self.llama.llama_decode(self.context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode: got {code}, need 0")
            logits = self.llama.llama_get_logits_ith(self.context, -1)
            values = ctypes.cast(logits, POINTER(c_float * self.vocabulary)).contents
            step = [int(torch.frombuffer(values, dtype=torch.float32).argmax())]
            ids += step
        return ids
