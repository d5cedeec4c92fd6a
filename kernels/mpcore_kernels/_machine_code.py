"""What one compiled kernel does, found by following its instructions.

`_sass.py` and `_amdgcn.py` turn disassembly into the instructions and blocks below; this module
asks two questions of them, the same for both makers.

*Which accesses belong to the elements of a tensor?* A program also reads its entry of the table
and a scalar or two, and may store a flag. All threads give those the same address, while each
element has a thread of its own. So an access belongs to the elements if its address depends on the
thread's index, which `thread_dependent` finds by propagating it from register to register.

*Which instructions does a full chunk execute?* A kernel has two bodies, one without masks for full
chunks at aligned addresses and one with masks for the rest. Both touch every element, the first
one with fewer, wider accesses. So of all paths through the code that move at least the bytes that
are needed, the full chunk's is the one that moves the fewest, with the fewest accesses, in the
fewest instructions; the masked body is what this rule finds once those accesses are taken away. A
path that no execution takes (compilers for AMD leave some, through both bodies) moves more than it
needs to, and is therefore never chosen.

Not seen: what a subroutine does (only division and square root have any, and they access no
memory), and how often a loop runs: `Body.loops` tells that elements are accessed in one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_MOST_PATHS = 1000


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


@dataclass(frozen=True)
class Body:
    """What one thread executes on one path through a kernel.

    Attributes:
        loads: How many loads of elements there are of each width in bytes.
        stores: The same of stores.
        barriers: Waits for other threads.
        shared: Accesses to shared memory.
        instructions: Everything that is executed.
        loops: Whether there is a loop around an access to elements; it is counted once.
        labels: The blocks with accesses to elements.
    """

    loads: Mapping[int, int]
    stores: Mapping[int, int]
    barriers: int
    shared: int
    instructions: int
    loops: bool
    labels: frozenset[str]

    @property
    def accesses(self) -> int:
        """Loads and stores of elements."""
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def bytes(self) -> int:
        """Bytes that those move."""
        both = (*self.loads.items(), *self.stores.items())
        return sum(width * count for width, count in both)


def thread_dependent(blocks: Sequence[Block], entry: frozenset[str]) -> dict[str, list[bool]]:
    """Tells of each instruction of each block whether its address depends on the thread.

    Args:
        blocks: The kernel, the first block being the entry.
        entry: Registers that hold the thread's index at the start.
    """
    before: dict[str, set[str]] = {block.label: set() for block in blocks}
    before[blocks[0].label] |= entry
    by_label = {block.label: block for block in blocks}
    waiting = [block.label for block in blocks]
    while waiting:
        label = waiting.pop(0)
        after, _ = _propagate(by_label[label], before[label])
        for successor in by_label[label].successors:
            if not after <= before[successor]:
                before[successor] |= after
                waiting.append(successor)
    return {block.label: _propagate(block, before[block.label])[1] for block in blocks}


def _propagate(block: Block, before: set[str]) -> tuple[set[str], list[bool]]:
    """Returns the thread-dependent registers after `block`, and which addresses are so."""
    known, found = set(before), []
    for instruction in block.instructions:
        found.append(bool(instruction.address & known))
        if instruction.thread or instruction.reads & known:
            known |= instruction.writes
        elif not instruction.conditional:
            known -= instruction.writes
    return known, found


def bodies(blocks: Sequence[Block], entry: frozenset[str], needed: int) -> list[Body]:
    """Returns what a full chunk executes, then what the others do (if that is another body).

    Args:
        blocks: The kernel, the first block being the entry.
        entry: Registers that hold the thread's index at the start.
        needed: Bytes that a thread must move; 0 for a kernel that does not work on elements.
    """
    is_element = thread_dependent(blocks, entry)
    full = _cheapest(blocks, is_element, needed, frozenset())
    if not full.labels:
        return [full]
    rest = _cheapest(blocks, is_element, needed, full.labels)
    return [full, rest] if rest.labels else [full]


def _cheapest(
    blocks: Sequence[Block],
    is_element: Mapping[str, list[bool]],
    needed: int,
    without: frozenset[str],
) -> Body:
    """Returns the path that moves `needed` bytes at the least cost, through no block of `without`.

    Paths are told apart by the blocks with accesses to elements that they go through: there
    are few of those, so following all paths stays cheap however much the code branches.
    """
    by_label = {block.label: block for block in blocks}
    parts = {
        block.label: _part(block, is_element[block.label], _in_a_loop(by_label, block.label))
        for block in blocks
    }
    back = _back_edges(by_label, blocks[0].label)
    found: dict[str, dict[frozenset[str], Body]] = {}
    for label in _after_successors(by_label, blocks[0].label, back):
        nexts = [
            body
            for successor in by_label[label].successors
            if (label, successor) not in back and successor not in without
            for body in found[successor].values()
        ]
        found[label] = {}
        for rest in nexts or [_EMPTY]:
            body = _join(parts[label], rest)
            best = found[label].get(body.labels)
            if best is None or body.instructions < best.instructions:
                found[label][body.labels] = body
        if len(found[label]) > _MOST_PATHS:
            raise RuntimeError(
                f"audit: expected at most {_MOST_PATHS} paths that access different elements, got "
                "more. Give the kernel fewer branches around its loads and stores."
            )
    paths = found[blocks[0].label].values()
    return min(
        paths,
        key=lambda body: (
            body.bytes < needed,
            body.bytes if body.bytes >= needed else -body.bytes,
            body.accesses,
            body.instructions,
        ),
    )


_EMPTY = Body({}, {}, 0, 0, 0, False, frozenset())


def _in_a_loop(by_label: Mapping[str, Block], label: str) -> bool:
    """Tells whether a block can run again after it ran."""
    seen: set[str] = set()
    waiting = list(by_label[label].successors)
    while waiting:
        successor = waiting.pop()
        if successor not in seen:
            seen.add(successor)
            waiting += by_label[successor].successors
    return label in seen


def _part(block: Block, is_element: Sequence[bool], in_a_loop: bool) -> Body:
    """Returns what one block contributes to the paths that go through it."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction, element in zip(block.instructions, is_element, strict=True):
        if element and instruction.memory == "global":
            if instruction.access == "load":
                loads[instruction.width] += 1
            elif instruction.access == "store":
                stores[instruction.width] += 1
    return Body(
        loads=loads,
        stores=stores,
        barriers=sum(instruction.barrier for instruction in block.instructions),
        shared=sum(instruction.memory == "shared" for instruction in block.instructions),
        instructions=len(block.instructions),
        loops=bool(loads or stores) and in_a_loop,
        labels=frozenset([block.label] if loads or stores else []),
    )


def _join(first: Body, rest: Body) -> Body:
    return Body(
        loads=Counter(first.loads) + Counter(rest.loads),
        stores=Counter(first.stores) + Counter(rest.stores),
        barriers=first.barriers + rest.barriers,
        shared=first.shared + rest.shared,
        instructions=first.instructions + rest.instructions,
        loops=first.loops or rest.loops,
        labels=first.labels | rest.labels,
    )


def _back_edges(by_label: Mapping[str, Block], entry: str) -> set[tuple[str, str]]:
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


def _after_successors(
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
