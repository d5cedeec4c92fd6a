"""Reads AMD's assembly, as LLVM prints it."""

from __future__ import annotations

import re

from mpcore_audit.blocks import Block, Instruction

# "\tbuffer_store_dwordx4 v[2:5], v14, s[16:19], 0 offen"
_LINE = re.compile(r"^\t([a-z]\w+)\s*([^;]*)")
_LABEL = re.compile(r"^(\.LBB\w+):")
_REGISTERS = re.compile(r"\b([vsa])(?:(\d+)|\[(\d+):(\d+)\])|\b(vcc)\b")
_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
_FUSED = re.compile(r"^v_(pk_)?(fma|mac|mad)(c|[am]k)?_(mix\w*_)?(legacy_)?f(16|32|64)")
# these exchange values between threads, through the hardware of shared memory but not its contents
_EXCHANGES = ("ds_bpermute", "ds_permute", "ds_swizzle")
# not correctly rounded. Routines for division and square root start from some of them;
# v_rcp_iflag_f32, from which divisions of integers start, is not among them
_APPROXIMATE = re.compile(r"^v_(rcp|rsq|sqrt|exp|log|sin|cos)_(?:legacy_)?f(16|32|64)")
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
    # to add -0 changes nothing: this multiplies a half, widened on the way, and no more
    return sum(addend != "neg(0)" for addend in _addends(assembly))


def adds_zero(assembly: str) -> int:
    """Returns how many products are added to the constant +0, which makes +0 of -0.

    Compilers do so where an FP32 product is rounded to FP16, by v_fma_mixlo_f16: those of Triton
    3.7 and 3.8 do.
    """
    return sum(addend in ("0", "0x0", "0.0") for addend in _addends(assembly))


def _addends(assembly: str) -> list[str]:
    """Returns what each fused multiply-add adds; nothing for those that add to their result."""
    matches = filter(None, map(_LINE.match, _kernel_lines(assembly)))
    found = [match.group(2).split(",") for match in matches if _FUSED.match(match.group(1))]
    return [fields[3].split()[0] if len(fields) > 3 else "" for fields in found]


def approximations(assembly: str) -> tuple[str, ...]:
    """Returns the instructions with approximate results that no exact routine corrects."""
    found = set()
    for block in parse(assembly):
        for place, instruction in enumerate(block.instructions):
            match = _APPROXIMATE.match(instruction.opcode)
            if match and not _is_refined(block, place, *match.groups()):
                found.add(re.sub(r"_e(32|64)$", "", instruction.opcode))
    return tuple(sorted(found))


def _is_refined(block: Block, place: int, kind: str, bits: str) -> bool:
    """Tells whether the instruction at `place` is the start of a correctly rounded routine.

    LLVM has three of them, each in one block. Division takes the reciprocal of what v_div_scale
    made of the divisor and ends in v_div_fmas and v_div_fixup. The float32 root compares the
    neighbours of the approximate one, one place below and above, by a fused multiply-add each. The
    float64 root takes seven fused multiply-adds from the reciprocal of the root.
    """
    instruction = block.instructions[place]
    direct, derived = _uses(block, place)
    names = [re.sub(r"_e(32|64)$", "", other.opcode) for other in derived]
    if kind == "rcp" and bits != "16":
        before = reversed(block.instructions[:place])
        source = next((other for other in before if other.writes & instruction.reads), None)
        scaled = source is not None and source.opcode.startswith(f"v_div_scale_f{bits}")
        return scaled and {f"v_div_fmas_f{bits}", f"v_div_fixup_f{bits}"} <= set(names)
    fused = sum(name in (f"v_fma_f{bits}", f"v_fmac_f{bits}") for name in names)
    if (kind, bits) == ("sqrt", "32"):
        return sum(other.opcode.startswith("v_add_u32") for other in direct) == 2 <= fused
    return (kind, bits) == ("rsq", "64") and fused >= 7


def _uses(block: Block, place: int) -> tuple[list[Instruction], list[Instruction]]:
    """Returns what reads a result before it is overwritten, and what depends on it at all."""
    result = set(block.instructions[place].writes)
    known, direct, derived = set(result), [], []
    for instruction in block.instructions[place + 1 :]:
        if instruction.reads & result:
            direct.append(instruction)
        result -= instruction.writes
        if instruction.reads & known:
            derived.append(instruction)
            known |= instruction.writes
        else:
            known -= instruction.writes
    return direct, derived


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
