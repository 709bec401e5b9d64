"""transformers: `from_pretrained(DIR)`, `save_pretrained(DIR)`, round to nearest on the fly, tensor parallelism.

transformers only warns about tensors that are missing, and then runs on random numbers; here that is an error.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from rosaq.checkpoint import is_in_block
from rosaq.config import FORMAT_VERSION, QUANT_METHOD, CheckpointConfig
from rosaq.experts import fused, plan_experts, replace_fused
from rosaq.integrations.transformers_checks import (
    check_files,
    check_loaded,
    check_offloaded,
    check_placed,
    name_in_files,
)
from rosaq.integrations.transformers_model import check_untied
from rosaq.integrations.transformers_rounding import RoundToNearest, check_roundable
from rosaq.linear import RosaqLinear
from rosaq.siblings import join_siblings


class RosaqConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; its attributes are exactly the keys of `CheckpointConfig.to_dict()`.

    `from_pretrained(DENSE, quantization_config=RosaqConfig(bits=4, group_size=64))` rounds a dense checkpoint to
    nearest while it is loaded: no calibration, so no rotation and no salient directions. `modules_to_not_convert`
    None leaves the head and what is tied to it. ValueError for another method, a newer version or an unknown key.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = False,
        modules_to_not_convert: list[str] | None = None,
        **values: Any,
    ) -> None:
        given = {"quant_method": QUANT_METHOD, "version": FORMAT_VERSION, "recipe": "rtn"} | values
        given |= {"bits": bits, "group_size": group_size, "sym": sym}
        given["modules_to_not_convert"] = modules_to_not_convert or ()
        self.modules_to_not_convert = modules_to_not_convert
        self.__dict__ |= CheckpointConfig.from_dict(given).to_dict()
        if modules_to_not_convert is None:
            self.modules_to_not_convert = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read config.json's form: nothing of it is filled in, since that would guess at what the tensors mean."""
        config = cls(**CheckpointConfig.from_dict(config_dict).to_dict())
        return (config, kwargs) if return_unused_kwargs else config


class RosaqHfQuantizer(HfQuantizer):
    """Puts RosaqLinear where the checkpoint has quantised linears, and checks and packs them after loading."""

    requires_calibration = False
    quantization_config: RosaqConfig

    def __init__(self, quantization_config: RosaqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._has_experts = False
        self._rounded: set[str] = set()  # linears of a dense checkpoint, rounded as they are read

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        del args, kwargs
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map} - {None, "auto"}
        if "disk" in places and not self.pre_quantized:
            raise ValueError(
                "device_map: got 'disk' for a dense checkpoint, need memory for what is quantised while loading; "
                "run `rosaq quantize MODEL -o OUT`, then offload OUT"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.quantization_config.modules_to_not_convert is None:
            self.quantization_config.modules_to_not_convert = sorted(get_keys_to_not_convert(model))
        config = self._config()
        held = check_files(kwargs.get("checkpoint_files"), config) if self.pre_quantized else None
        if not self.pre_quantized:
            check_roundable(config)
        skip = [*config.modules_to_not_convert, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
        can_split = self.pre_quantized or hasattr(HfQuantizer, "update_weight_conversions")  # 5.0 has not
        if can_split and all(should_convert_module(path, skip) for path, _ in fused(model)):
            self._has_experts = bool(replace_fused(model))
        linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(n, skip)}
        check_untied(model, linears)
        placed = set()
        for name, module in linears.items():
            stored = name if held is None else name_in_files(model, name, held)
            if held is not None and stored not in held and not is_in_block(name) and name not in config.modules:
                continue  # a head of this class that the checkpoint has not: transformers says that it is new
            fmt, bias = config.format_of(stored), module.bias is not None
            fmt.check_sizes(module.in_features, module.out_features, name)
            if self.pre_quantized:
                swapped = RosaqLinear(module.in_features, module.out_features, fmt, bias=bias, device="meta")
                model.set_submodule(name, swapped)
                placed.add(stored)
            else:
                self._rounded.add(name)
        if held is not None:
            check_placed(model, held, placed)
        warn_of_dense_experts(model)
        return model

    def _config(self) -> CheckpointConfig:
        return CheckpointConfig.from_dict(self.quantization_config.to_dict())

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """args: the model, in newer versions of transformers."""
        if self._has_experts:  # each is loaded for itself, so nothing is to be merged
            weight_conversions = [c for c in weight_conversions if not isinstance(c, WeightConverter)]
        return list(super().update_weight_conversions(weight_conversions, *args))  # type: ignore[no-untyped-call]

    # --- a dense checkpoint, rounded to nearest as its tensors come ------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        del model, kwargs
        module, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and module in self._rounded

    def get_quantize_ops(self) -> RoundToNearest:
        return RoundToNearest(self._config())

    @property
    def quantized_element_size(self) -> float:
        return self._config().default.bits / 8 + 2 / 32  # bytes, for the planning of device_map="auto"

    # --- after loading ----------------------------------------------------------------------------------------------

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        plan_experts(model, plan)
        if has_parallel_styles():
            from rosaq.integrations.transformers_parallel import register_styles, update_plan

            register_styles()
            update_plan(model, plan)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        del kwargs
        offloaded = None
        for name, module in model.named_modules():
            if not isinstance(module, RosaqLinear):
                continue
            if module.is_offloaded:
                offloaded = offloaded or check_offloaded(name, module)
                continue
            if self.pre_quantized:
                check_loaded(name, module)
            elif module.bias is not None:
                module.bias.data = module.bias.data.to(torch.float16)
            if any(hasattr(tensor, "_local_tensor") for tensor in module.parameters(recurse=False)):
                if not has_parallel_styles():
                    raise NotImplementedError(
                        f"{name}: tensor parallelism: got transformers {transformers.__version__}, need one "
                        "with transformers.distributed.parallel_utils (5.23 is tested)"
                    )
                from rosaq.integrations.transformers_parallel import keep_local_tensors

                keep_local_tensors(name, module)
            module.check(name)
            module.pack()
        missing = sorted(n for n in self._rounded if not isinstance(model.get_submodule(n), RosaqLinear))
        if missing:
            raise ValueError(f"{missing[0]}.weight: got no such tensor in the checkpoint, need it")
        if self._has_experts:
            vars(model)["_weight_conversions"] = []  # saved under the names in memory, whatever they were on disk
        if not getattr(model.config, "is_encoder_decoder", False):  # there k and v may read what the encoder made
            join_siblings(model)
        # Codes have no gradient: training what is left of the weights alone is nobody's intention.
        model.requires_grad_(False)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        if any(isinstance(module, RosaqLinear) and module.piece is not None for module in model.modules()):
            raise ValueError(
                "save_pretrained: got a model cut between ranks, need one on a single device "
                "(the checkpoint it was loaded from holds the same)"
            )
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, RosaqLinear):
                if module.is_offloaded:
                    raise ValueError(
                        f"{name}: got a model with offloaded tensors to dequantise, need all of it in memory (without "
                        "'cpu' or 'disk' in device_map), or `rosaq convert OUT -o DENSE --to dense`"
                    )
                model.set_submodule(name, dense_linear(module, dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return not self._has_experts  # which of them run depends on the tokens


def has_parallel_styles() -> bool:
    """True where this torch and this transformers have what `transformers_parallel` extends."""
    return torch.distributed.is_available() and find_spec("transformers.distributed.parallel_utils") is not None


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
    holders = [(path, m) for path, m in model.named_modules() if "expert" in path and not isinstance(m, RosaqLinear)]
    dense = [f"{path}.{n}" for path, m in holders for n, p in m.named_parameters(recurse=False) if p.dim() == 3]
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
    """Add rosaq to transformers' tables; repeated calls and re-imports leave one entry, the newest.

    Called by the entry point's stand-in (`_rosaq_autoload`) and when this module is imported for `RosaqConfig`.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = RosaqConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = RosaqHfQuantizer


register()
