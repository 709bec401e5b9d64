"""Loops of a kernel's control flow graph, and the path through a loop that does the work."""

from __future__ import annotations

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


def hot_path(kernel: Kernel, loop: Loop) -> list[Instruction]:
    """One turn of the loop that multiplies the most, then fetches the most, then takes the fewest instructions.

    Loops inside are passed once.
    """
    back = {(end, other.header) for other in loops(kernel) for end in other.ends}

    def forward(block: int) -> list[int]:
        return [s for s in kernel.successors[block] if s in loop.blocks and (block, s) not in back]

    order: list[int] = []
    seen: set[int] = set()
    stack = [(loop.header, iter(forward(loop.header)))]
    seen.add(loop.header)
    while stack:
        block, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(forward(following))))

    # Best way from a block to an end of the loop: (score, next block). Scores add up, so the best of parts is the best.
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    for block in order:
        body = kernel.blocks[block]
        own = (sum(map(is_mma, body)), sum(map(is_async_copy, body)), -len(body))
        options: list[tuple[tuple[int, int, int], int | None]] = [(own, None)] if block in loop.ends else []
        for following in forward(block):
            if following in best:
                a, b, c = best[following][0]
                options.append(((own[0] + a, own[1] + b, own[2] + c), following))
        if options:
            best[block] = max(options, key=lambda option: option[0])
    path: list[Instruction] = []
    at: int | None = loop.header
    while at is not None:
        path += kernel.blocks[at]
        at = best[at][1]
    return path
