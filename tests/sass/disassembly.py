"""Compiled kernels as instructions and a control flow graph, by NVIDIA's disassembler. Needs no GPU and no nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGED = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))

KERNEL = re.compile(r"^\.text\.(\S+):$")
LABEL = re.compile(r"^(\.L_\w+):$")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L_\w+)\)")
ODD_DESCRIPTOR = re.compile(r"\bdesc\[UR\d*[13579]\]")


def tool(name: str) -> str | None:
    """Where a program is: from NVIDIA's packages, else from a toolkit. None: neither has it."""
    packaged = [str(folder / name) for folder in PACKAGED if (folder / name).exists()]
    return packaged[0] if packaged else shutil.which(name)


def missing() -> str | None:
    """Why nothing can be disassembled here; None if it can."""
    absent = [name for name in ("cuobjdump", "nvdisasm", "c++filt") if tool(name) is None]
    return f"{' and '.join(absent)} not found; the [test] extra and binutils have them" if absent else None


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    opcode: str  # with all its suffixes
    operands: str

    def is_a(self, *names: str) -> bool:
        """Whether the opcode's first word is one of the names: LDG is not LDGSTS."""
        return self.opcode.split(".")[0] in names

    @property
    def target(self) -> str | None:
        """The label it may go to. CALL.REL is how cold code is left, too, never to return."""
        found = TARGET.search(self.operands) if self.is_a("BRA", "CALL") else None
        return found[1] if found else None

    @property
    def has_odd_descriptor(self) -> bool:
        """A memory descriptor has 64 bits, an even register and the next. ptxas 13.0 has also written desc[UR1], as
        [R9+UR0], desc[UR1][R248.64], which is an illegal instruction to an H100."""
        return ODD_DESCRIPTOR.search(self.operands) is not None

    @property
    def always_leaves(self) -> bool:
        """Control never reaches the next instruction."""
        if self.predicate is not None:
            return False
        return self.is_a("EXIT", "RET") or (self.opcode == "BRA" and self.operands.startswith("`"))


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, without arguments
    arch: str  # "sm_90a"
    blocks: list[list[Instruction]]  # straight-line pieces
    successors: list[list[int]]  # of each block, indices into blocks

    @property
    def instructions(self) -> Iterator[Instruction]:
        return (instruction for block in self.blocks for instruction in block)


def _split(lines: list[str]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Straight-line blocks of one kernel and where each of them goes."""
    blocks: list[list[Instruction]] = [[]]
    block_at: dict[str, int] = {}
    for line in lines:
        if label := LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            block_at[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            instruction = Instruction(found[1], found[2], found[3])
            if instruction.predicate in ("@!PT", "@!UPT"):
                continue  # padding
            blocks[-1].append(instruction)
            if instruction.target or instruction.always_leaves:
                blocks.append([])
    successors = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else None
        after = [] if (last and last.always_leaves) or i + 1 == len(blocks) else [i + 1]
        if last and last.target:
            after.append(block_at[last.target])
        successors.append(after)
    return blocks, successors


def parse(text: str, arch: str) -> list[Kernel]:
    """All kernels in the output of nvdisasm -c."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := KERNEL.match(line):
            lines = sections.setdefault(start[1], [])
        elif line.startswith("//----"):
            lines = []
        else:
            lines.append(line)
    names = _demangle(list(sections))
    return [Kernel(name, arch, *_split(body)) for name, body in zip(names, sections.values(), strict=True)]


def _demangle(names: list[str]) -> list[str]:
    filtered = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True) if names else None
    full = filtered.stdout.splitlines() if filtered else []
    return [re.sub(r"\(.*", "", name.removeprefix("void ").replace("(bool)", "").replace("> >", ">>")) for name in full]


def disassemble(cubin: Path, arch: str) -> list[Kernel]:
    """All kernels of one cubin."""
    done = subprocess.run([str(tool("nvdisasm")), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse(done.stdout, arch)


def extract(binary: Path, arch: str, folder: Path) -> list[Path]:
    """Writes the cubins for an architecture ("90a") in a library, an object file or a program; [] if it has none."""
    command = [
        str(tool("cuobjdump")),
        "--gpu-architecture",
        f"sm_{arch}",
        "--extract-elf",
        "all",
        str(binary.resolve()),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return sorted(folder.glob("*.cubin"))
