"""Loops of a kernel's control flow graph, and the path through a loop that does the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.sass.disassembly import Instruction, Kernel


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]
    ends: frozenset[int]  # blocks that go back to the header


def _dominators(kernel: Kernel) -> list[int]:
    """For each block the set of blocks that every way to it passes, as bits."""
    size = len(kernel.blocks)
    predecessors: list[list[int]] = [[] for _ in range(size)]
    for block, after in enumerate(kernel.successors):
        for successor in after:
            predecessors[successor].append(block)
    everything = (1 << size) - 1
    found = [everything] * size
    found[0] = 1
    has_changed = True
    while has_changed:
        has_changed = False
        for block in range(1, size):
            common = everything
            for predecessor in predecessors[block]:
                common &= found[predecessor]
            now = common | 1 << block if predecessors[block] else everything
            has_changed |= now != found[block]
            found[block] = now
    return found


def loops(kernel: Kernel) -> list[Loop]:
    """Natural loops, those with one header as one, smallest first."""
    dominators = _dominators(kernel)
    predecessors: dict[int, list[int]] = {}
    back: dict[int, set[int]] = {}
    for block, after in enumerate(kernel.successors):
        for successor in after:
            predecessors.setdefault(successor, []).append(block)
            if dominators[block] >> successor & 1:
                back.setdefault(successor, set()).add(block)
    found = []
    for header, ends in back.items():
        body, todo = {header}, list(ends)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += predecessors.get(block, [])
        found.append(Loop(header, frozenset(body), frozenset(ends)))
    return sorted(found, key=lambda loop: len(loop.blocks))


def is_mma(instruction: Instruction) -> bool:
    return instruction.is_a("HMMA", "HGMMA")


def is_async_copy(instruction: Instruction) -> bool:
    return instruction.is_a("LDGSTS", "UBLKCP")


def main_loop(kernel: Kernel) -> Loop | None:
    """The innermost loop that both fetches and multiplies."""
    for loop in loops(kernel):
        body = [instruction for block in loop.blocks for instruction in kernel.blocks[block]]
        if any(map(is_mma, body)) and any(map(is_async_copy, body)):
            return loop
    return None


def hot_paths(kernel: Kernel, loop: Loop) -> dict[int, list[Instruction]]:
    """One turn of the loop for every number of MMAs that a turn can have; of such turns, the one that fetches the most,
    then takes the fewest instructions. A kernel with an optional step has a turn with and one without it.

    Loops inside are passed once.
    """
    back = {(end, other.header) for other in loops(kernel) for end in other.ends}

    def forward(block: int) -> list[int]:
        return [s for s in kernel.successors[block] if s in loop.blocks and (block, s) not in back]

    # Best way from a block to an end of the loop, by MMAs on it: (copies, -instructions), next block, MMAs from there.
    best: dict[int, dict[int, tuple[tuple[int, int], int | None, int]]] = {}
    for block in _after_successors(loop.header, forward):
        body = kernel.blocks[block]
        mma, copies, length = sum(map(is_mma, body)), sum(map(is_async_copy, body)), len(body)
        found: dict[int, tuple[tuple[int, int], int | None, int]] = {}
        if block in loop.ends:
            found[mma] = (copies, -length), None, 0
        for following in forward(block):
            for rest, ((more, shorter), _, _) in best.get(following, {}).items():
                option = (copies + more, shorter - length), following, rest
                if mma + rest not in found or option[0] > found[mma + rest][0]:
                    found[mma + rest] = option
        best[block] = found
    return {mma: _walk(kernel, best, loop.header, mma) for mma in best[loop.header]}


def _after_successors(header: int, forward: Callable[[int], list[int]]) -> list[int]:
    """Blocks reached from the header, every one after all it leads to."""
    order: list[int] = []
    seen = {header}
    stack = [(header, iter(forward(header)))]
    while stack:
        block, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(forward(following))))
    return order


def _walk(
    kernel: Kernel, best: dict[int, dict[int, tuple[tuple[int, int], int | None, int]]], block: int, mma: int
) -> list[Instruction]:
    path: list[Instruction] = []
    at: int | None = block
    while at is not None:
        path += kernel.blocks[at]
        _, at, mma = best[at][mma]
    return path
