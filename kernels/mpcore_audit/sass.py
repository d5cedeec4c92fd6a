"""Reads the disassembly of NVIDIA's machine code, as `nvdisasm` prints it."""

from __future__ import annotations

import re

from mpcore_audit.blocks import Block, Instruction

# "        /*0210*/              @!P2 STG.E.128 desc[UR6][R32.64+0x10], R16 ;"
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P(?:\d|T))\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^([.$\w]+):")
_REGISTER = re.compile(r"\b(U?[RP]\d+)\b")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_THREAD = ("SR_TID", "SR_LANEID", "SR_WARPID", "SR_EQMASK", "SR_LTMASK")
_GLOBAL = {
    "LDG": "load",
    "LDGSTS": "load",
    "STG": "store",
    "RED": "atomic",
    "REDG": "atomic",
    "ATOM": "atomic",
    "ATOMG": "atomic",
}
_SHARED = {"LDS": "load", "LDSM": "load", "STS": "store", "STSM": "store", "ATOMS": "atomic"}
_LOCAL = {"LDL": "load", "STL": "store"}
_FUSED = {"FFMA", "FFMA2", "DFMA", "HFMA2", "HFMA2_32I", "FFMA32I"}
# fused in name only: how a constant is put into a register
_CONSTANT = re.compile(r"^R\d+, -RZ, RZ,")


def parse(disassembly: str) -> list[Block]:
    """Returns the blocks of the one kernel in `disassembly`, its entry first.

    Jumps into subroutines (`CALL`) are passed over: those of division and square root are the
    only ones, and they return to the instruction behind the call.
    """
    blocks = [Block("entry")]
    falls_through = True
    regions: dict[str, dict[str, str]] = {}
    ends: dict[str, str] = {}
    for line in _kernel_lines(disassembly):
        label = _LABEL.match(line)
        if label:
            if falls_through:
                blocks[-1].successors.append(label.group(1))
            blocks.append(Block(label.group(1)))
            falls_through = True
            continue
        match = _LINE.match(line)
        if match is None:
            continue
        if not falls_through:
            # nothing jumps here
            blocks.append(Block(f"unreached {len(blocks)}"))
        predicate, opcode, operands = match.groups()
        blocks[-1].instructions.append(_instruction(predicate, opcode, operands.strip()))
        register = operands.split(",")[0].strip()
        target = _TARGET.search(operands)
        if opcode.startswith("BSSY") and target:
            regions.setdefault(blocks[-1].label, {})[register] = target.group(1)
        elif opcode.startswith("BSYNC"):
            ends[blocks[-1].label] = register
        targets, falls_through = _jump(predicate, opcode, operands)
        if targets is not None:
            blocks[-1].successors += targets
            if falls_through:
                following = f"after {len(blocks)}"
                blocks[-1].successors.append(following)
                blocks.append(Block(following))
    _reconverge(blocks, regions, ends)
    known = {block.label for block in blocks}
    for block in blocks:
        block.successors = [label for label in dict.fromkeys(block.successors) if label in known]
    return blocks


def fused(disassembly: str) -> int:
    """Returns how many fused multiply-adds there are, in whatever precision."""
    found = 0
    for match in filter(None, map(_LINE.match, _kernel_lines(disassembly))):
        opcode, operands = match.group(2), match.group(3)
        if opcode.split(".")[0] in _FUSED and not _CONSTANT.match(operands):
            found += 1
    return found


def fused_pairs(disassembly: str) -> int:
    """Returns how many fused multiply-adds work on a pair of float32 numbers."""
    lines = filter(None, map(_LINE.match, _kernel_lines(disassembly)))
    return sum(match.group(2).split(".")[0] == "FFMA2" for match in lines)


def adds_zero(disassembly: str) -> int:
    """Returns how many products are added to the constant +0, which makes +0 of -0."""
    found = 0
    for match in filter(None, map(_LINE.match, _kernel_lines(disassembly))):
        opcode, operands = match.group(2), match.group(3)
        if opcode.split(".")[0] in _FUSED and not _CONSTANT.match(operands):
            # RZ is a register that holds +0
            found += operands.split(",")[-1].split(".")[0].strip() == "RZ"
    return found


def _kernel_lines(disassembly: str) -> list[str]:
    """Returns the lines of the section that holds the code."""
    section = disassembly.split("\n.text.", 1)[-1]
    return re.split(r"\n//-{5,}", section, maxsplit=1)[0].splitlines()[1:]


def _reconverge(
    blocks: list[Block], regions: dict[str, dict[str, str]], ends: dict[str, str]
) -> None:
    """Adds to each block that ends in `BSYNC` where its threads go on.

    That is where the `BSSY` on the same register said that was executed last. One register serves
    many regions, one after the other, so it is followed through the code.

    Args:
        blocks: The kernel, its entry first; successors are added.
        regions: For each block the registers that its `BSSY`s set, and to which label.
        ends: For each block that ends in `BSYNC` the register that this waits on.
    """
    by_label = {block.label: block for block in blocks}
    # a register and a label for each region that may be open at a block's start
    before: dict[str, set[tuple[str, str]]] = {label: set() for label in by_label}
    waiting = list(by_label)
    while waiting:
        label = waiting.pop(0)
        opened = regions.get(label, {})
        after = {region for region in before[label] if region[0] not in opened}
        after |= set(opened.items())
        if label in ends:
            goals = sorted(goal for register, goal in after if register == ends[label])
            by_label[label].successors += [
                goal for goal in goals if goal not in by_label[label].successors
            ]
        for successor in by_label[label].successors:
            if successor in before and not after <= before[successor]:
                before[successor] |= after
                waiting.append(successor)


def _jump(predicate: str | None, opcode: str, operands: str) -> tuple[list[str] | None, bool]:
    """Returns where an instruction jumps (None: nowhere) and whether the next one may follow."""
    name = opcode.split(".")[0]
    if name in ("EXIT", "RET"):
        return [], predicate is not None
    if name == "BSYNC":
        # where to is found by `_reconverge`
        return [], predicate is not None
    if name == "BRA":
        target = _TARGET.search(operands)
        conditions = operands.split("`")[0].strip(" ,(")
        # BRA.U UP0 and BRA.DIV UR4 carry their condition among the operands
        return ([target.group(1)] if target else []), predicate is not None or bool(conditions)
    return None, True


def _instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    name, *modifiers = opcode.split(".")
    memory, access = _memory(name)
    fields = [part.strip() for part in re.split(r",(?![^\[]*\])", operands)] if operands else []
    writes, rest = _split(name, modifiers, fields, access)
    address = frozenset(_address(fields)) if memory else frozenset()
    reads = {register for part in rest for register in _REGISTER.findall(part)} | address
    if predicate:
        reads |= set(_REGISTER.findall(predicate))
    return Instruction(
        opcode=opcode,
        writes=frozenset(writes),
        reads=frozenset(reads),
        address=address,
        conditional=predicate is not None,
        thread=any(part.startswith(_THREAD) for part in rest),
        memory=memory,
        access=access,
        width=_width(modifiers) if memory else 0,
        barrier=name == "BAR",
    )


def _memory(name: str) -> tuple[str, str]:
    for memory, names in (("global", _GLOBAL), ("shared", _SHARED), ("local", _LOCAL)):
        if name in names:
            return memory, names[name]
    return "", ""


def _split(
    name: str, modifiers: list[str], fields: list[str], access: str
) -> tuple[list[str], list[str]]:
    """Returns the registers that are set, and the operands that are not destinations."""
    if access == "store" or name in ("RED", "REDG", "BAR", "BRA", "EXIT", "CALL", "RET"):
        return [], fields
    only_predicates = name.endswith("SETP") or "PLOP3" in name
    count = 1
    while count < len(fields) and re.fullmatch(r"U?P[\dT]", fields[count]):
        count += 1
    first = fields[0] if fields else ""
    if not only_predicates and re.fullmatch(r"U?P[\dT]", first):
        # a predicate comes first and the register after it: SHFL.BFLY PT, R5, R4, ...
        count += 1
    writes = [r for part in fields[:count] for r in _REGISTER.findall(part)]
    for register in list(writes):
        kind, number = re.fullmatch(r"([A-Z]+)(\d+)", register).groups()  # type: ignore[union-attr]
        if kind.endswith("R"):
            writes += [f"{kind}{int(number) + i}" for i in range(1, _registers(name, modifiers))]
    return writes, fields[count:]


def _registers(name: str, modifiers: list[str]) -> int:
    """Returns how many registers a result fills."""
    if "128" in modifiers:
        return 4
    return 2 if {"64", "WIDE"} & set(modifiers) or name == "CS2R" or name.startswith("D") else 1


def _address(fields: list[str]) -> list[str]:
    """Returns the first register of each address in brackets; a pair is named by its first."""
    inside = [part for part in fields if "[" in part]
    return [r for part in inside for r in _REGISTER.findall(part.rsplit("[", 1)[1])]


def _width(modifiers: list[str]) -> int:
    for name, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2)):
        if name in modifiers:
            return width
    return 1 if {"U8", "S8"} & set(modifiers) else 4
