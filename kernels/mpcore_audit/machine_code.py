"""What one compiled kernel does, found by following its instructions.

`sass.py` and `amdgcn.py` turn disassembly into the blocks of `blocks.py`; this module asks two
questions of them, the same for both makers.

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
memory), and how often a loop runs: `Body.loops` tells that elements are accessed in one, and
`Body.waits_in_a_loop` that threads wait in one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpcore_audit.blocks import Block, after_successors, back_edges, in_a_loop

_MOST_PATHS = 1000


@dataclass(frozen=True)
class Body:
    """What one thread executes on one path through a kernel.

    Attributes:
        loads: How many loads of elements there are of each width in bytes.
        stores: The same of stores.
        results: The same of stores at addresses that all threads share: a program's, not a
            thread's.
        atomics: Atomic operations, whatever their addresses.
        barriers: Waits for other threads.
        shared: Accesses to shared memory.
        instructions: Everything that is executed.
        loops: Whether there is a loop around an access to elements; it is counted once.
        waits_in_a_loop: Whether there is one around a barrier.
        labels: The blocks with accesses to elements.
    """

    loads: Mapping[int, int]
    stores: Mapping[int, int]
    results: Mapping[int, int]
    atomics: int
    barriers: int
    shared: int
    instructions: int
    loops: bool
    waits_in_a_loop: bool
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

    @property
    def bytes_per_chunk(self) -> int:
        """Bytes that a program writes about its chunk."""
        return sum(width * count for width, count in self.results.items())


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
        block.label: _part(block, is_element[block.label], in_a_loop(by_label, block.label))
        for block in blocks
    }
    back = back_edges(by_label, blocks[0].label)
    found: dict[str, dict[frozenset[str], Body]] = {}
    for label in after_successors(by_label, blocks[0].label, back):
        nexts = [
            body
            for successor in by_label[label].successors
            if (label, successor) not in back and successor not in without
            for body in found[successor].values()
        ]
        found[label] = {}
        for rest in nexts or [_EMPTY]:
            body = _join(parts[label], rest)
            other = found[label].get(body.labels, body)
            found[label][body.labels] = _shorter(body, other)
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


_EMPTY = Body(
    loads={},
    stores={},
    results={},
    atomics=0,
    barriers=0,
    shared=0,
    instructions=0,
    loops=False,
    waits_in_a_loop=False,
    labels=frozenset(),
)


def _part(block: Block, is_element: Sequence[bool], in_a_loop: bool) -> Body:
    """Returns what one block contributes to the paths that go through it."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    results: Counter[int] = Counter()
    atomics = 0
    for instruction, element in zip(block.instructions, is_element, strict=True):
        if instruction.memory != "global":
            continue
        if instruction.access == "store":
            (stores if element else results)[instruction.width] += 1
        elif instruction.access == "load" and element:
            loads[instruction.width] += 1
        atomics += instruction.access == "atomic"
    return Body(
        loads=dict(loads),
        stores=dict(stores),
        results=dict(results),
        atomics=atomics,
        barriers=sum(instruction.barrier for instruction in block.instructions),
        shared=sum(instruction.memory == "shared" for instruction in block.instructions),
        instructions=len(block.instructions),
        loops=bool(loads or stores) and in_a_loop,
        waits_in_a_loop=in_a_loop and any(i.barrier for i in block.instructions),
        labels=frozenset([block.label] if loads or stores else []),
    )


def _join(first: Body, rest: Body) -> Body:
    return Body(
        loads=dict(Counter(first.loads) + Counter(rest.loads)),
        stores=dict(Counter(first.stores) + Counter(rest.stores)),
        results=dict(Counter(first.results) + Counter(rest.results)),
        atomics=first.atomics + rest.atomics,
        barriers=first.barriers + rest.barriers,
        shared=first.shared + rest.shared,
        instructions=first.instructions + rest.instructions,
        loops=first.loops or rest.loops,
        waits_in_a_loop=first.waits_in_a_loop or rest.waits_in_a_loop,
        labels=first.labels | rest.labels,
    )


def _shorter(one: Body, other: Body) -> Body:
    """Returns the shorter of two paths to the same elements.

    What is written about a chunk is the most that either of them writes: one thread does that, and
    all others jump over it. Barriers are those of the shorter one: the longer one may be that of a
    chunk that is looked at again, because it is not finite.
    """
    return replace(
        min(one, other, key=lambda body: body.instructions),
        results=max(one, other, key=lambda body: body.bytes_per_chunk).results,
        atomics=max(one.atomics, other.atomics),
    )
