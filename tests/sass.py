"""Machine code of Hopper, read for one fault: a register that is an operand of a tensor instruction
and is written while the instruction may still read it. Where it is under way over the end of a
loop's turn, ptxas says nothing of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)$")
LABEL = re.compile(r"(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
FIRST = re.compile(r"(?:U?PT?\d*,\s*)*R(\d+)\b")
# what names a register first and writes none
READS = re.compile(r"ST|RED|R2UR|R2P|UTMA|SYNCS|BAR|DEPBAR|CCTL|\w*SETP")
OPERAND = 4  # registers of an operand of a tensor instruction


class Instruction(NamedTuple):
    place: str
    predicate: str | None
    name: str
    arguments: str

    @property
    def operand(self) -> frozenset[int]:
        """The registers that a tensor instruction reads as its first factor; none from memory."""
        found = re.match(r"R\d+,\s*R(\d+)", self.arguments)
        return frozenset(range(int(found[1]), int(found[1]) + OPERAND)) if found else frozenset()

    @property
    def written(self) -> range:
        found = FIRST.match(self.arguments)
        if found is None or READS.match(self.name):
            return range(0)
        wide = {r"\.128|M88\.4": 4, r"\.64|\.WIDE|M88\.2|CS2R$": 2}
        size = next((n for pattern, n in wide.items() if re.search(pattern, self.name)), 1)
        return range(int(found[1]), int(found[1]) + size)


def overwritten(listing: str) -> list[str]:
    """Returns the instructions, with their addresses, that write an operand of a tensor instruction
    that may be under way, on any path through a kernel. listing: of nvdisasm."""
    code, labels = _parse(listing)
    found, seen = set(), set()
    paths = [(0, (), frozenset())]  # where, operands of groups under way, of the open group
    while paths:
        at, groups, group = paths.pop()
        while at < len(code) and (at, groups, group) not in seen:
            seen.add((at, groups, group))
            one = code[at]
            if "GMMA" in one.name:
                group |= one.operand
                if "gsb0" in one.arguments:
                    groups, group = (*groups, group), frozenset()
            elif one.name.startswith("WARPGROUP.DEPBAR"):
                left = int(one.arguments.rsplit("0x", 1)[1], 16)
                groups = groups[max(len(groups) - left, 0) :]
            elif not group.union(*groups).isdisjoint(one.written):
                found.add(f"{one.place} {one.name} {one.arguments}")
            target = TARGET.search(one.arguments) if one.name.startswith("BRA") else None
            if target:
                paths.append((labels[target[1]], groups, group))
            if one.predicate is None and one.name in ("BRA", "EXIT"):
                break
            at += 1
    return sorted(found)


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and which of them follows each label."""
    code, labels = [], {}
    for line in listing.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(Instruction(found[1], found[2], found[3], found[4].strip()))
    return code, labels
