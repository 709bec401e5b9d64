"""What is compared: tools with their environments, the runs at about equal bits, and what was left out and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SEQUENCES = 128


@dataclass(frozen=True)
class Environment:
    """Packages of a tool's own virtual environment; `npm` is unpacked beside it for its shared libraries."""

    packages: tuple[str, ...]
    npm: str | None = None


@dataclass(frozen=True)
class Run:
    """One checkpoint: a script of this folder in a tool's environment, or rosaq itself (script None).

    `sequences` calibration windows of 512 tokens are the first so many of one list, the same for everybody.
    """

    name: str
    tool: Literal["rosaq", "llm-compressor", "auto-round", "llama.cpp"]
    script: str | None
    arguments: tuple[str, ...]
    sequences: int = SEQUENCES


# torch first: the tools' own requirements would pull a build with GPU libraries.
ENVIRONMENTS = {
    "llm-compressor": Environment(("torch==2.13.0", "llmcompressor==0.14.0.1")),
    "auto-round": Environment(("torch==2.13.0", "auto-round==0.16.1")),
    # A prebuilt libllama: building llama.cpp takes a quarter of an hour.
    "llama.cpp": Environment(
        ("torch==2.13.0", "transformers==5.23.0", "gguf==0.19.0"), npm="@node-llama-cpp/linux-x64@3.22.1"
    ),
}


def _grouped(bits: int) -> tuple[str, ...]:
    return "--bits", str(bits), "--group-size", "64"


def _runs(bits: int) -> list[Run]:
    """The tools that store codes of `bits` bits in groups of 64, which divide every width of SmolLM2-135M."""
    compressor = "rival_llmcompressor.py"
    return [
        Run(f"rosaq-gptq int{bits} g64", "rosaq", None, ("--recipe", "rosaq-gptq", *_grouped(bits))),
        Run(f"GPTQ int{bits} g64", "llm-compressor", compressor, ("--method", "gptq", *_grouped(bits))),
        # AWQ's search runs every block 20 times per site; its authors report that few sequences are enough.
        Run(f"AWQ int{bits} g64", "llm-compressor", compressor, ("--method", "awq", *_grouped(bits)), sequences=16),
        Run(f"AutoRound int{bits} g64", "auto-round", "rival_autoround.py", _grouped(bits)),
    ]


def _llamacpp(*ftypes: str) -> list[Run]:
    return [Run(ftype, "llama.cpp", "rival_llamacpp.py", ("--ftype", ftype)) for ftype in ftypes]


def _budget(name: str, *arguments: str, sequences: int = SEQUENCES) -> Run:
    """rosaq with 3.45 bits on average: one scale a row, and the bits that groups would take as fourth bits of codes."""
    return Run(name, "rosaq", None, ("--target-bits", "3.45", "--group-size", "-1", *arguments), sequences)


# `best` takes four times the text: the rows that saw more than the others.
_BEST = [
    Run("rosaq-gptq int3 g64 best", "rosaq", None, ("--preset", "best", *_grouped(3)), sequences=512),
    _budget("rosaq-gptq 3.45 bits best", "--preset", "best", sequences=512),
]

RUNS = [
    *_runs(3),
    _budget("rosaq-gptq 3.45 bits"),
    *_BEST,
    *_runs(4),
    Run("rosaq-gptq 4.31 bits", "rosaq", None, ("--target-bits", "4.31")),
    *_llamacpp("IQ3_XXS", "IQ3_S", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_S"),
]

NOT_RUN = {
    "GPTQModel 7.7.0": "needs torch 2.14.1 or newer; its GPTQ is compared through llm-compressor's",
    "AutoAWQ 0.2.9": "no longer maintained; llm-compressor has its method",
    "QuaRot + GPTQ": "research code that needs CUDA kernels; rosaq's recipe quarot is the same method",
    "ExLlamaV3": "needs a CUDA device to quantise",
}
