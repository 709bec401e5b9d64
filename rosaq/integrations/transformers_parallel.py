"""transformers' tensor parallelism: styles that cut a RosaqLinear as `rosaq.sharding` says.

transformers' own styles cut every tensor of a module along one dimension, which is wrong for salient indices, bases and
rotations; a plan that puts one of them on a RosaqLinear is therefore refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

from rosaq.linear import RosaqLinear
from rosaq.sharding import Cut, Piece, check_cut, cut_dim, shard_format, take_salient
from rosaq.soundness import check_index


def _shard_param(module: RosaqLinear, name: str, mesh: DeviceMesh, cut: Cut) -> None:
    """Put a placeholder for this rank's part of Parameter `name` in its place; loading reads only that part."""
    meta = module._parameters.get(name)
    if meta is None:
        return
    piece = Piece(cut, mesh.get_local_rank(), mesh.size())
    check_cut(module.format, module.in_features, module.out_features, cut, piece.num_ranks)
    module.piece = piece
    dim = cut_dim(name, module.format, cut)
    placement = Replicate() if dim is None else Shard(dim)
    part = distribute_tensor(meta, mesh, [placement], src_data_rank=None)
    module._parameters[name] = nn.Parameter(part, requires_grad=False)


class CutOut(ColwiseParallel):
    """Column parallel: x whole, each rank makes some features of y. On other modules, transformers' own style."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if isinstance(module, RosaqLinear):
            _shard_param(module, param, mesh, "out")
        else:
            super().shard_param(module, param, mesh)  # type: ignore[no-untyped-call]


class CutIn(RowwiseParallel):
    """Row parallel: each rank has some channels of x, the sum over ranks is y. Elsewhere, transformers' own style."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if isinstance(module, RosaqLinear):
            _shard_param(module, param, mesh, "in")
        else:
            super().shard_param(module, param, mesh)  # type: ignore[no-untyped-call]

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(module, RosaqLinear) or isinstance(output, DTensor):
            return super().transform_output_post_forward(module, output, mesh)  # type: ignore[no-untyped-call]
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        torch.distributed.all_reduce(output, group=group)
        # The base class hides the bias from forward, so that it is added once; here in y's dtype.
        return output if module.bias is None else output + module.bias.to(output.dtype)


_STYLES = {
    "colwise": ("rosaq_out", CutOut(input_layouts=Replicate(), output_layouts=Shard(-1))),
    "colwise_gather_output": ("rosaq_out_gather", CutOut(input_layouts=Replicate(), output_layouts=Replicate())),
    "colwise_rep": ("rosaq_out_gather", CutOut(input_layouts=Replicate(), output_layouts=Replicate())),
    "rowwise": ("rosaq_in", CutIn(input_layouts=Shard(-1), output_layouts=Replicate())),
    "rowwise_split_input": ("rosaq_in_split", CutIn(input_layouts=Replicate(), output_layouts=Replicate())),
    "rowwise_rep": ("rosaq_in_split", CutIn(input_layouts=Replicate(), output_layouts=Replicate())),
}


def register_styles() -> None:
    """Add our styles to transformers' table."""
    for name, style in _STYLES.values():
        ALL_PARALLEL_STYLES.register(name, style)  # type: ignore[arg-type]


def update_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Put our styles, in place, where `plan` has transformers' own on a RosaqLinear."""
    for name, module in model.named_modules():
        key = replace_layer_number_by_wildcard(name)
        if isinstance(module, RosaqLinear) and plan.get(key) in _STYLES:
            plan[key] = _STYLES[plan[key]][0]


def keep_local_tensors(name: str, module: RosaqLinear) -> None:
    """After loading: put this rank's tensors into `module`, packed; nothing on a module that no plan cuts."""
    parts = {key: p for key, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
    if not parts:
        return
    piece = module.piece
    if piece is None:
        raise ValueError(
            f"{name}: got a parallel style that is not rosaq's in tp_plan, need one of "
            f"{sorted({style for style, _ in _STYLES.values()})}, or tp_plan='auto'"
        )
    tensors = {key: part.to_local() for key, part in parts.items()}
    fmt = shard_format(module.format, piece)
    if piece.cut == "in":
        if "salient_index" in tensors:
            check_index(tensors["salient_index"], module.in_features, name)
        width = module.in_features // piece.num_ranks
        fmt = take_salient(tensors, fmt, piece.rank * width, (piece.rank + 1) * width)
    module.hold_shard(tensors, fmt, name)
