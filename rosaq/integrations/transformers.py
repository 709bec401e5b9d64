"""transformers: `AutoModelForCausalLM.from_pretrained(DIR)` and `save_pretrained(DIR)` of rosaq checkpoints.

transformers only warns about tensors that are missing, and then runs on random numbers; here that is an error.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from rosaq.checkpoint import INDEX_FILE, SINGLE_FILE, WeightReader, linear_sizes
from rosaq.config import QUANT_METHOD, CheckpointConfig
from rosaq.linear import RosaqLinear


class RosaqConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; its attributes are exactly the keys of `CheckpointConfig.to_dict()`.

    ValueError for another method, a newer version or an unknown key.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(CheckpointConfig.from_dict(values).to_dict())


class RosaqHfQuantizer(HfQuantizer):
    """Puts RosaqLinear where the checkpoint has quantised linears, and checks and packs them after loading."""

    requires_calibration = True

    def __init__(self, quantization_config: RosaqConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "quantization_config: got a dense checkpoint, need one that rosaq has quantised; "
                "run `rosaq quantize MODEL -o OUT`, then load OUT"
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = CheckpointConfig.from_dict(self.quantization_config.to_dict())
        check_files(kwargs.get("checkpoint_files"), config)
        skip = [*config.modules_to_not_convert, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear or not should_convert_module(name, skip):
                continue
            fmt, bias = config.format_of(name), module.bias is not None
            fmt.check_sizes(module.in_features, module.out_features, name)
            swapped = RosaqLinear(module.in_features, module.out_features, fmt, bias=bias, device="meta")
            model.set_submodule(name, swapped)
        warn_of_dense_experts(model)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        del kwargs
        for name, module in model.named_modules():
            if not isinstance(module, RosaqLinear) or module.is_offloaded:
                continue
            for key, tensor in module.named_parameters(recurse=False):
                if hasattr(tensor, "_local_tensor"):
                    raise NotImplementedError(f"{name}.{key}: got a tensor-parallel shard, need a model on one device")
                # transformers marks what it has loaded; what it has made up itself lacks the mark.
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(f"{name}.{key}: got no such tensor in the checkpoint, need it")
            module.check(name)
            module.pack()
        # The ops have no gradient: one that skips every quantised layer is worse than none.
        model.requires_grad_(False)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, RosaqLinear):
                model.set_submodule(name, dense_linear(module, dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def check_files(checkpoint_files: list[str] | None, config: CheckpointConfig) -> None:
    """ValueError, naming the tensor, if the files do not hold what `config` says; reads headers only.

    transformers drops tensors it has no place for (zeros where the config says symmetric) with a warning.
    """
    directory = Path(checkpoint_files[0]).parent if checkpoint_files else None
    # Files under other names (a `variant`) are left to transformers and to the checks after loading.
    if directory and any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        linear_sizes(config, WeightReader(directory))


def dense_linear(linear: RosaqLinear, dtype: torch.dtype) -> nn.Linear:
    """The `nn.Linear` of `dtype` that computes what `linear` computes."""
    weight = linear.dequantize().to(dtype)
    dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return dense


def warn_of_dense_experts(model: nn.Module) -> None:
    """Warn where a mixture of experts keeps its experts as 3-D Parameters, which stay in 16 bits."""
    dense = [name for name, p in model.named_parameters() if "expert" in name and p.dim() == 3]
    if dense:
        numel = sum(model.get_parameter(name).numel() for name in dense)
        total = sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"rosaq: {len(dense)} expert tensors ({100 * numel / max(total, 1):.0f} % of the stored elements, "
            f"first {dense[0]}) are no nn.Linear and stay in 16 bits: this model is hardly smaller than before",
            UserWarning,
            stacklevel=2,
        )


def register() -> None:
    """Add rosaq to transformers' tables; repeated calls and re-imports leave one entry, the newest."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = RosaqConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = RosaqHfQuantizer
