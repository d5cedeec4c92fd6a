"""Instructions and blocks of a compiled kernel, whichever GPU it is for, and what follows what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction, reduced to what the audit looks at.

    Attributes:
        opcode: As the disassembler prints it.
        writes: Registers that it sets.
        reads: Registers that it depends on, those of addresses included.
        address: The registers of `reads` that make its address.
        conditional: Whether a predicate may switch it off, so that it may leave `writes` alone.
        thread: Whether it reads the index of the thread.
        memory: `"global"`, `"shared"`, `"local"`, or empty if it accesses no memory.
        access: `"load"`, `"store"`, `"atomic"`, or empty.
        width: Bytes per thread that it moves to or from memory.
        barrier: Whether it waits for other threads of the program.
    """

    opcode: str
    writes: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    address: frozenset[str] = frozenset()
    conditional: bool = False
    thread: bool = False
    memory: str = ""
    access: str = ""
    width: int = 0
    barrier: bool = False


@dataclass
class Block:
    """Instructions without a jump among them, and the labels of the blocks that may follow."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)


def in_a_loop(by_label: Mapping[str, Block], label: str) -> bool:
    """Tells whether a block can run again after it ran."""
    seen: set[str] = set()
    waiting = list(by_label[label].successors)
    while waiting:
        successor = waiting.pop()
        if successor not in seen:
            seen.add(successor)
            waiting += by_label[successor].successors
    return label in seen


def back_edges(by_label: Mapping[str, Block], entry: str) -> set[tuple[str, str]]:
    """Returns the jumps that close a loop."""
    back, done, open_blocks = set(), set(), [entry]
    pending = {entry: list(by_label[entry].successors)}
    while open_blocks:
        label = open_blocks[-1]
        if not pending[label]:
            done.add(open_blocks.pop())
            continue
        successor = pending[label].pop()
        if successor in open_blocks:
            back.add((label, successor))
        elif successor not in done:
            open_blocks.append(successor)
            pending[successor] = list(by_label[successor].successors)
    return back


def after_successors(
    by_label: Mapping[str, Block], entry: str, back: set[tuple[str, str]]
) -> list[str]:
    """Returns the blocks that can be reached, each after all that may follow it."""
    order: list[str] = []
    seen: set[str] = set()
    stack = [(entry, False)]
    while stack:
        label, finished = stack.pop()
        if finished:
            order.append(label)
        elif label not in seen:
            seen.add(label)
            stack.append((label, True))
            stack += [(s, False) for s in by_label[label].successors if (label, s) not in back]
    return order
