"""What transformers would only warn about, or not even that, is an error here: files and modules that do not agree."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import transformers
from torch import nn

from rosaq.checkpoint import INDEX_FILE, SINGLE_FILE, WeightReader, is_in_block, linear_sizes, read_json
from rosaq.config import CheckpointConfig
from rosaq.experts import name_on_disk
from rosaq.linear import RosaqLinear


def name_in_files(model: nn.Module, name: str, held: Collection[str]) -> str:
    """What the files, which hold the linears `held`, call the linear `name`: a model without a head leaves out the
    prefix that they have, and the other way round; and transformers reads the hub's names of some families too."""
    prefix, model_type = f"{model.base_model_prefix}.", str(getattr(model.config, "model_type", None))
    names = (name, prefix + name, name.removeprefix(prefix))
    return next((n for n in (*names, *(name_on_disk(n, model_type) for n in names)) if n in held), name)


def check_files(checkpoint_files: list[str] | None, config: CheckpointConfig) -> Collection[str] | None:
    """Names of the quantised linears in the files, None where that is not known; reads headers only. ValueError, naming
    the file or the tensor, if they do not hold what `config` says.

    transformers drops tensors it has no place for (zeros where the config says symmetric) with a warning, and takes
    pickles where there is nothing else.
    """
    if not checkpoint_files:
        return None
    pickles = [path for path in checkpoint_files if not path.endswith(".safetensors")]
    if pickles:
        raise ValueError(f"{pickles[0]}: got a file that is not safetensors, need safetensors: nothing is unpickled")
    directory = Path(checkpoint_files[0]).parent
    outside = [path for path in checkpoint_files if Path(path).parent != directory or _is_led_out(Path(path))]
    if outside:
        raise ValueError(f"{INDEX_FILE}: got file {outside[0]}, need plain file names inside one directory")
    # Files under other names (a `variant`) are left to transformers and to the checks after loading.
    if any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return linear_sizes(config, WeightReader(directory))
    return None


def _is_led_out(path: Path) -> bool:
    """True where the index of a directory further up has `path`: a ".." in it is the checkpoint's, not the user's."""
    for directory in path.parents[1:]:
        if (directory / INDEX_FILE).is_file():
            files = read_json(directory / INDEX_FILE).get("weight_map") or {}
            if any(directory / name == path for name in files.values()):
                return True
    return False


def check_placed(model: nn.Module, held: Collection[str], placed: Collection[str]) -> None:
    """ValueError naming a linear of `held`, which have codes in the files, that is not among the `placed` ones: its
    codes would be dropped, and random numbers run in its place. A head that this class of model has not may be left
    out."""
    modules = {name for name, _ in model.named_modules()}
    lost = sorted(name for name in set(held) - set(placed) if is_in_block(name) or name in modules)
    if lost:
        raise ValueError(
            f"{lost[0]}: got codes of {len(lost)} linears that have no place in {type(model).__name__}, need a config "
            "that has each of them quantised: see modules_to_not_convert and the sizes of the model"
        )


def check_loaded(name: str, module: RosaqLinear) -> None:
    """ValueError naming the tensor if transformers made one up: it marks what it has loaded, and only that."""
    for key, tensor in module.named_parameters(recurse=False):
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ValueError(f"{name}.{key}: got no such tensor in the checkpoint, need it")


def check_offloaded(name: str, module: RosaqLinear) -> bool:
    """True; ValueError if codes come back from the offload folder as another dtype (transformers before 5.19)."""
    hook = module._hf_hook
    for part in getattr(hook, "hooks", [hook]):
        weights = getattr(part, "weights_map", None)
        if weights is not None and weights["qweight"].dtype != torch.int32:
            raise ValueError(
                f"{name}.qweight: got {weights['qweight'].dtype} from the offload folder, need int32: transformers "
                f"{transformers.__version__} changes what it offloads to disk, need 5.19 or newer or no 'disk'"
            )
    return True
