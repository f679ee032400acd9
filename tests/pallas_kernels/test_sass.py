"""The reader of machine code that the compile gate uses."""

import pytest
import sass

LOOP = """
.L_x_1:
        /*0000*/                   WARPGROUP.ARRIVE
        /*0010*/                   FADD R40, R40, R41
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1
        /*0040*/                   {between}
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1
        /*0070*/              @!P1 BRA `(.L_x_1)
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
        /*0090*/                   MOV R8, R12
        /*00a0*/                   EXIT
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R12, R5",  # of the group before, which is there
        "MOV R16, R8",
        "STS.128 [R8], R20",
        "LDS R7, [R8]",
        "ISETP.GE.AND P0, PT, R8, R9, PT",
    ],
)
def test_operands_that_are_read_or_free(instruction):
    assert not sass.overwritten(LOOP.format(between=instruction))


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R8, R5",
        "LDS.128 R8, [R1]",
        "LDS.128 R6, [R1]",
        "SHFL.IDX PT, R11, R0, R1, R2",
        "CS2R R10, SRZ",
    ],
)
def test_operands_that_are_written_under_way(instruction):
    assert sass.overwritten(LOOP.format(between=instruction)) == [f"0040 {instruction}"]


def test_operands_under_way_over_the_end_of_a_turn():
    """R12 of the last group of a turn, written at the begin of the next."""
    text = LOOP.format(between="NOP").replace("FADD R40, R40", "FADD R12, R40")
    assert sass.overwritten(text) == ["0010 FADD R12, R40, R41"]
