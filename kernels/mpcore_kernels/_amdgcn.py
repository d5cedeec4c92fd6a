"""Reads AMD's assembly, as LLVM prints it."""

from __future__ import annotations

import re

from mpcore_kernels._machine_code import Block, Instruction

# "\tbuffer_store_dwordx4 v[2:5], v14, s[16:19], 0 offen"
_LINE = re.compile(r"^\t([a-z]\w+)\s*([^;]*)")
_LABEL = re.compile(r"^(\.LBB\w+):")
_REGISTERS = re.compile(r"\b([vsa])(?:(\d+)|\[(\d+):(\d+)\])|\b(vcc)\b")
_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
_FUSED = re.compile(r"^v_(pk_)?(fma|fmac|mac|mad)_(mix\w*_)?(legacy_)?f(16|32|64)")
# these exchange values between threads, through the hardware of shared memory but not its contents
_EXCHANGES = ("ds_bpermute", "ds_permute", "ds_swizzle")
# the thread's index is in v0 when a kernel starts
ENTRY = frozenset({"v0"})


def parse(assembly: str) -> list[Block]:
    """Returns the blocks of the one kernel in `assembly`, its entry first."""
    blocks = [Block("entry")]
    falls_through = True
    for line in _kernel_lines(assembly):
        label = _LABEL.match(line)
        match = _LINE.match(line)
        if label:
            if falls_through:
                blocks[-1].successors.append(label.group(1))
            blocks.append(Block(label.group(1)))
            falls_through = True
        elif match:
            if not falls_through:
                # nothing jumps here
                blocks.append(Block(f"unreached {len(blocks)}"))
                falls_through = True
            opcode, operands = match.group(1), match.group(2).strip()
            blocks[-1].instructions.append(_instruction(opcode, operands))
            if opcode in ("s_endpgm", "s_setpc_b64"):
                falls_through = False
            elif opcode == "s_branch" or opcode.startswith("s_cbranch"):
                blocks[-1].successors.append(operands)
                falls_through = opcode != "s_branch"
                if falls_through:
                    following = f"after {len(blocks)}"
                    blocks[-1].successors.append(following)
                    blocks.append(Block(following))
    return blocks


def fused(assembly: str) -> int:
    """Returns how many fused multiply-adds there are, in whatever precision."""
    matches = filter(None, map(_LINE.match, _kernel_lines(assembly)))
    found = [match.group(2) for match in matches if _FUSED.match(match.group(1))]
    # to add -0 changes nothing: this multiplies a half, widened on the way, and no more
    return sum(re.match(r"[^,]+,[^,]+,[^,]+, neg\(0\)", operands) is None for operands in found)


def _kernel_lines(assembly: str) -> list[str]:
    start = assembly.index(".Lfunc_begin0:")
    return assembly[start : assembly.index(".Lfunc_end0:", start)].splitlines()


def _instruction(opcode: str, operands: str) -> Instruction:
    memory, access = _memory(opcode)
    fields = [part.strip() for part in re.split(r",(?![^\[]*\])", operands)] if operands else []
    writes: list[str] = []
    if access != "store" and not opcode.startswith(("s_waitcnt", "s_cbranch", "s_cmp", "s_nop")):
        writes = _registers(fields[:1])
        # v_add_co_u32 v1, vcc, v2, v3: a carry is a second result
        if "_co_" in opcode and len(fields) > 1:
            writes += _registers(fields[1:2])
    address = frozenset(_registers(_address(opcode, access, fields)) if memory else [])
    reads = frozenset(_registers(fields if access == "store" else fields[1:])) | address
    return Instruction(
        opcode=opcode,
        writes=frozenset(writes),
        reads=reads,
        address=address,
        memory=memory,
        access=access,
        width=_width(opcode) if memory else 0,
        barrier=opcode == "s_barrier",
    )


def _memory(opcode: str) -> tuple[str, str]:
    kinds = {"global_": "global", "buffer_": "global", "flat_": "global", "ds_": "shared"}
    for prefix, memory in {**kinds, "scratch_": "local"}.items():
        if opcode.startswith(prefix) and not opcode.startswith(_EXCHANGES):
            if "_load" in opcode or "_read" in opcode:
                return memory, "load"
            if "_store" in opcode or "_write" in opcode:
                return memory, "store"
            # buffer_wbl2 and buffer_inv order memory and move nothing
            return (memory, "atomic") if "atomic" in opcode or memory == "shared" else ("", "")
    return "", ""


def _address(opcode: str, access: str, fields: list[str]) -> list[str]:
    """Returns the operands that make the address."""
    if access == "load" or opcode.startswith("buffer_"):
        return fields[1:]
    return fields[:1] + fields[2:]


def _registers(fields: list[str]) -> list[str]:
    found = []
    for field in fields:
        for kind, single, first, last, condition in _REGISTERS.findall(field):
            if condition:
                found.append(condition)
            else:
                numbers = range(int(first or single), int(last or single) + 1)
                found += [f"{kind}{number}" for number in numbers]
    return found


def _width(opcode: str) -> int:
    return next((width for name, width in _WIDTHS.items() if name in opcode), 0)
