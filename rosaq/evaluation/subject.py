"""The model that is measured: loaded once, with its tokenizer and what it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosaq import ops
from rosaq.checkpoint import WeightReader, weights_file
from rosaq.devices import choose_device
from rosaq.linear import RosaqLinear

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Subject:
    """A loaded causal language model, and where it came from.

    `source` is the directory or hub id, or the module itself; `given_tokenizer` None means the one saved there.
    """

    source: str | Path | nn.Module
    module: nn.Module
    dtype: str
    given_tokenizer: Any = None

    @cached_property
    def tokenizer(self) -> Any:
        """ValueError for a module that does not know where it came from."""
        return self.given_tokenizer if self.given_tokenizer is not None else load_tokenizer(self.source)

    @property
    def name(self) -> str:
        """The directory, the hub id, or the class of a module built in memory."""
        if isinstance(self.source, nn.Module):
            return str(getattr(self.source, "name_or_path", "") or type(self.source).__name__)
        return str(self.source)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it tells apart, None where it does not say."""
        size = getattr(getattr(self.module, "config", None), "vocab_size", None)
        return None if size is None else int(size)

    def check_length(self, argument: str, tokens: int) -> None:
        """ValueError where `tokens` are more than the positions that the model was made for."""
        limit = getattr(getattr(self.module, "config", None), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(f"{argument}: got {tokens}, need at most {limit}, the positions this model knows")

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """[b, t, vocab] of ids [b, t] int64."""
        logits: Tensor = self.module(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    @property
    def device(self) -> torch.device:
        """Of the module's first parameter: where its input goes."""
        return next(self.module.parameters()).device

    @property
    def bits_per_weight(self) -> float | None:
        """Bits stored per weight of the linears but the head (of the quantised ones, where there are any); None where
        no linear is found, or the files have dtypes that rosaq does not know."""
        head = getattr(self.module, "get_output_embeddings", lambda: None)()
        quantised = [m for m in self.module.modules() if isinstance(m, RosaqLinear) and m is not head]
        if quantised:
            numels = [m.in_features * m.out_features for m in quantised]
            return sum(m.bits_per_weight * n for m, n in zip(quantised, numels, strict=True)) / sum(numels)
        dense = {
            f"{name}.weight": m for name, m in self.module.named_modules() if isinstance(m, nn.Linear) and m is not head
        }
        sizes = self._sizes()
        if not dense or sizes is None:
            return None
        if not dense.keys() <= sizes.keys():
            sizes = {name: m.weight.nbytes for name, m in dense.items()}
        return 8 * sum(sizes[name] for name in dense) / sum(m.weight.numel() for m in dense.values())

    @property
    def num_bytes(self) -> int | None:
        """Of all the model's tensors, on disk where it was given as a directory; None where the files have dtypes that
        rosaq does not know."""
        sizes = self._sizes()
        return None if sizes is None else sum(sizes.values())

    def _sizes(self) -> dict[str, int] | None:
        """{tensor: bytes}, by the names on disk where the model was given as a directory; None as for `num_bytes`."""
        if isinstance(self.source, nn.Module) or not Path(self.source).is_dir():
            return {name: t.nbytes for name, t in (*self.module.named_parameters(), *self.module.named_buffers())}
        try:
            reader = WeightReader(self.source)
        except ValueError:  # transformers has read these files, so they are sound
            return None
        return {name: reader.nbytes(name) for name in reader.names()}


Model = str | Path | nn.Module | Subject


def load_subject(model: Model, dtype: str | None = None, tokenizer: Any = None, *, device: str = "cpu") -> Subject:
    """`model` (directory, hub id or module) loaded and in eval mode; a Subject is returned as it is.

    dtype       of the activations and dense weights of a model given by name: float32, float16 or bfloat16. None:
                float32, but bfloat16 for a quantised model on a GPU, where the kernels take 16-bit activations.
    device      where a model given by name runs: "cpu", "cuda" or "cuda:N". A module stays where it is.
    tokenizer   needed only where `model` is a module that does not know the directory it came from.
    """
    if isinstance(model, Subject):
        return model
    module = load_model(model, dtype, device)
    used = str(next(module.parameters()).dtype).removeprefix("torch.")
    return Subject(model, module, used if dtype is None or isinstance(model, nn.Module) else dtype, tokenizer)


def load_model(model: str | Path | nn.Module, dtype: str | None = None, device: str = "cpu") -> nn.Module:
    """The causal language model in `model` (directory or hub id) on `device`, in eval mode; a module is returned as it
    is. dtype: as for `load_subject`. ValueError for a quantised model where this build of rosaq has no kernels for the
    device, or none for float32; FileNotFoundError for a directory without safetensors."""
    if isinstance(model, nn.Module):
        return model.eval()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, need one of {DTYPES}")
    place = choose_device(device)
    _check_name(model)
    if Path(model).is_dir():
        weights_file(Path(model))  # pickled weights are refused here, with a better message than transformers'
    from transformers import AutoModelForCausalLM

    if place.type != "cpu" and dtype in (None, "float32"):
        is_ours = _is_ours(model)
        if is_ours and dtype is not None:
            raise ValueError(f"dtype: got {dtype} for a quantised model on {place}, need float16 or bfloat16")
        dtype = "bfloat16" if is_ours else "float32"
    wanted = {"dtype": getattr(torch, dtype or "float32"), "use_safetensors": True}  # nothing is unpickled
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, **wanted)
    if any(isinstance(module, RosaqLinear) for module in loaded.modules()):
        try:
            ops.check_device(place)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    return loaded.eval() if place.type == "cpu" else loaded.to(place).eval()


def _is_ours(model: str | Path) -> bool:
    """Whether the model of that name is a rosaq checkpoint: what others quantised may take float32."""
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(model), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == "rosaq"


def load_tokenizer(model: str | Path | nn.Module) -> Any:
    """The tokenizer saved with `model`; ValueError for a module that does not know where it came from."""
    name = getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else model
    if not name:
        raise ValueError("tokenizer: got none for a model built in memory, need one")
    _check_name(name)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _check_name(name: str | Path) -> None:
    """A path that is not there would be looked up on the hub, with an error that sends people the wrong way."""
    text = str(name)
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if not Path(name).is_dir() and not is_hub_id:
        raise FileNotFoundError(
            f"model: got {text!r}, which is no directory, need a model directory or a hub id 'owner/name'"
        )
