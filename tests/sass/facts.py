"""What tests want to know of a compiled kernel: which instructions it has, all in all and on the hot path.

Facts are kept under build/sass, by the content of the cubin and of this folder: disassembling takes long.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.sass.disassembly import Instruction, Kernel, disassemble, extract
from tests.sass.loops import hot_paths, main_loop

FOLDER = Path(__file__).resolve().parent
CACHE = FOLDER.parent.parent / "build" / "sass"

REGISTER = re.compile(r"\bR\d+\b")

Opcodes = dict[str, int]  # with all suffixes, and how many there are


@dataclass(frozen=True)
class Facts:
    """One kernel for one architecture. `odd_descriptors`: how many instructions have such a memory descriptor;
    `loads_together`: see `loads_together`; `hot`: turns of the main loop by their MMAs, see loops.py; empty without
    one."""

    name: str
    arch: str
    all: Opcodes
    odd_descriptors: int
    loads_together: int
    hot: dict[str, Opcodes]  # the key is a number: JSON has no others


def count(opcodes: Opcodes, *names: str) -> int:
    """How many instructions are one of the names, which may be whole opcodes or start like "LDS" or "MUFU.RCP"."""
    return sum(n for opcode, n in opcodes.items() if any(f"{opcode}.".startswith(f"{name}.") for name in names))


def _opcodes(instructions: Iterable[Instruction]) -> Opcodes:
    return dict(Counter(instruction.opcode for instruction in instructions))


def loads_together(kernel: Kernel) -> int:
    """The most loads of four bytes that are under way together: in a straight line, before one of their values is
    read. Rotations and bases are loaded like that; a branch behind each, and every load waits for the one before."""
    most = 0
    for block in kernel.blocks:
        loaded: list[str] = []
        for instruction in block:
            target, *sources = REGISTER.findall(instruction.operands) or [""]
            if instruction.opcode == "LDG.E":
                loaded = [] if any(source in loaded for source in sources) else loaded
                loaded.append(target)
            elif any(source in loaded for source in sources):
                loaded = []
            most = max(most, len(loaded))
    return most


def of_kernel(kernel: Kernel) -> Facts:
    loop = main_loop(kernel)
    turns = hot_paths(kernel, loop) if loop else {}
    hot = {str(mma): _opcodes(path) for mma, path in turns.items() if mma > 0}
    odd = sum(instruction.has_odd_descriptor for instruction in kernel.instructions)
    return Facts(kernel.name, kernel.arch, _opcodes(kernel.instructions), odd, loads_together(kernel), hot)


def _of_cubin(cubin: Path, arch: str) -> list[Facts]:
    source = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py")))
    kept = CACHE / f"{hashlib.sha256(source + arch.encode() + cubin.read_bytes()).hexdigest()[:24]}.json"
    if kept.exists():
        return [Facts(**facts) for facts in json.loads(kept.read_text())]
    found = [of_kernel(kernel) for kernel in disassemble(cubin, arch)]
    CACHE.mkdir(parents=True, exist_ok=True)
    new = kept.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps([asdict(facts) for facts in found]))
    new.replace(kept)
    return found


def facts_of(binary: Path, arch: str) -> list[Facts]:
    """Every kernel of a binary for an architecture ("90a"); [] if it has none."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda cubin: _of_cubin(cubin, arch), extract(binary, arch, Path(folder))))
    return [facts for kernels in found for facts in kernels]
