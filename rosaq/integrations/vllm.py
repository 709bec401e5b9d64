"""vLLM: `vllm serve DIR` of a rosaq checkpoint, chosen by its `quant_method`; one entry point, base classes only.

vLLM fuses q/k/v and gate/up into one layer. Their parts share rotation and salient directions, so a fused layer is one
launch; parts that differ (other bits, other directions) become a launch each, their outputs laid side by side.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from rosaq.checkpoint import WeightReader, linear_sizes
from rosaq.config import QUANT_METHOD, CheckpointConfig
from rosaq.integrations.vllm_linear import FusedLinear, check_head, head_refusal, parts_of

TENSORS = ("qweight", "scales", "zeros", "salient_weight", "salient_index", "salient_basis", "rotation")


class RosaqVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of config.json, as vLLM asks for it."""

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        narrow = [torch.float16, torch.bfloat16]
        return narrow if current_platform.is_cuda_alike() else [*narrow, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RosaqVllmConfig:
        return cls(CheckpointConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse files that are not what config.json says, and a quantised head, before any engine starts; for a model
        in a directory."""
        del hf_config, revision
        if Path(model_name).is_dir():
            check_head(linear_sizes(self.checkpoint, WeightReader(model_name)))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        checkpoint = self.checkpoint
        self.checkpoint = replace(
            checkpoint,
            modules=hf_to_vllm_mapper.apply_dict(checkpoint.modules),
            modules_to_not_convert=tuple(hf_to_vllm_mapper.apply_list(list(checkpoint.modules_to_not_convert))),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        is_linear = isinstance(layer, LinearBase)
        if not is_linear and not isinstance(layer, ParallelLMHead) and "experts" not in prefix:
            return None
        names = self.names_of(prefix)
        skipped = [self._is_skipped(name) for name in names]
        if all(skipped):
            return UnquantizedLinearMethod() if is_linear else None
        if any(skipped):
            raise ValueError(
                f"{prefix}: modules_to_not_convert: got {[n for n, skip in zip(names, skipped, strict=True) if skip]} "
                f"but not the rest of {names}, need all or none of what vLLM fuses"
            )
        if "experts" in prefix:
            raise NotImplementedError(
                f"{prefix}: got a mixture of experts, need a model without one: run this checkpoint with transformers, "
                "or `rosaq convert DIR -o OUT --to dense`"
            )
        if not is_linear:
            raise head_refusal(prefix)
        return RosaqLinearMethod(self.checkpoint, prefix, names)

    def names_of(self, prefix: str) -> list[str]:
        """The checkpoint's modules that vLLM's module `prefix` is made of."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _is_skipped(self, name: str) -> bool:
        return any(
            name == skip or name.startswith(f"{skip}.") or name.endswith(f".{skip}")
            for skip in self.checkpoint.modules_to_not_convert
        )


class RosaqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads, cuts and runs the parts of one of vLLM's linear layers."""

    def __init__(self, checkpoint: CheckpointConfig, prefix: str, names: list[str]) -> None:
        self.checkpoint, self.prefix, self.names = checkpoint, prefix, names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        del output_size, params_dtype, extra_weight_attrs
        rank = getattr(layer, "tp_rank", get_tensor_model_parallel_rank())
        num_ranks = getattr(layer, "tp_size", get_tensor_model_parallel_world_size())
        fused = FusedLinear(
            parts_of(self.checkpoint, self.prefix, self.names, output_partition_sizes),
            in_features=input_size,
            held_in_features=input_size_per_partition,
            rank=rank,
            num_ranks=num_ranks,
            allowed=self.checkpoint.tp_sizes,
        )
        layer.rosaq = fused
        for key in TENSORS:
            # Formats may differ between the parts, so no one tensor could hold them: loading puts them aside.
            parameter = nn.Parameter(torch.empty(0, dtype=_DTYPES.get(key, torch.float16)), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": _loader(fused, key)})
            layer.register_parameter(key, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        cast(FusedLinear, layer.rosaq).pack()
        for key in TENSORS:
            layer._parameters.pop(key, None)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cast(FusedLinear, layer.rosaq).forward(x, bias)


_DTYPES = {"qweight": torch.int32, "salient_index": torch.int32, "zeros": torch.uint8}


def _loader(fused: FusedLinear, key: str) -> Any:
    def load(param: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
        fused.load(key, loaded, shard_id if shard_id is not None else getattr(loaded, "shard_id", None), param.device)

    return load


def register() -> None:
    """The entry point of group vllm.general_plugins; called in every process, more than once in some."""
    register_quantization_config(QUANT_METHOD)(RosaqVllmConfig)
