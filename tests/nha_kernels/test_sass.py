"""The checks of the assembly find what they are there for."""

from __future__ import annotations

import pytest

from .sass import constant_operands, early_reads, hazards, late_descriptors, unset_addresses

# Two groups: R24 .. R31 = R4 .. R7 times shared memory, and R32 .. R39 = R8 .. R11 times shared memory.
PRODUCTS = (
    "WARPGROUP.ARRIVE",
    "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], RZ, !UPT, gsb0",
    "HGMMA.64x16x16.F32.BF16 R32, R8, gdesc[UR8], RZ, !UPT, gsb0",
)
WAIT_FOR_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
USE = "FADD R12, R24, R32"


def listing(*instructions: str) -> str:
    """As `cuobjdump -sass` writes them, 16 bytes each."""
    return "\n".join(f"        /*{16 * i:04x}*/  {x} ;  /* 0x0 */" for i, x in enumerate((*instructions, "EXIT")))


@pytest.mark.parametrize(
    "between",
    [
        "FADD R12, R4, R13",  # the left operand may be read
        "LDS.128 R12, [R4]",
        "LDSM.16.M88.4 R12, [R16]",
        "LDSM.16.MT88 R3, [R16]",
        "ISETP.GE.AND P0, PT, R4, R5, PT",  # writes no register, but P0
        "R2UR UR4, R6",
        "IMAD.WIDE R14, R23, R12, R16",  # R23 alone, not R24
        "STS.128 [R23], R12",
        "BAR.SYNC.DEFER_BLOCKING R4, 0x80",
    ],
)
def test_what_leaves_the_registers_alone(between: str) -> None:
    assert hazards(listing(*PRODUCTS, between, WAIT, USE)) == []


@pytest.mark.parametrize(
    ("between", "what"),
    [
        ("MOV R7, R12", "writes the left operand"),
        ("@P0 MOV R7, R12", "writes the left operand"),
        ("LDS.128 R0, [R12]", None),
        ("LDS.128 R1, [R12]", "writes the left operand"),
        ("LDSM.16.M88.4 R11, [R12]", "writes the left operand"),
        ("IMAD.WIDE R10, R12, 0x4, R14", "writes the left operand"),
        ("SHFL.BFLY PT, R4, R12, 0x1, 0x1f", "writes the left operand"),
        ("FADD R12, R31, R13", "reads the accumulator"),
        ("STSM.16.M88.4 [R12], R22", "reads the accumulator"),
        ("LDG.E R12, desc[UR4][R23.64]", "reads the accumulator"),
        ("HGMMA.64x16x16.F32.BF16 R40, R24, gdesc[UR8], RZ, !UPT, gsb0", "reads the accumulator"),
        ("MOV R24, R12", "writes the accumulator"),
        ("HGMMA.64x16x16.F32.BF16 R28, gdesc[UR4], RZ, !UPT, gsb0", "writes the accumulator"),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", None),  # products into the same sums follow each other
    ],
)
def test_a_planted_hazard_is_found(between: str, what: str | None) -> None:
    found = hazards(listing(*PRODUCTS, between, WAIT, USE))
    assert bool(found) == (what is not None)
    for sentence in found:
        assert between in sentence
        assert f"{what} of " in sentence


def test_a_wait_frees_the_groups_that_it_waits_for() -> None:
    assert hazards(listing(*PRODUCTS, WAIT_FOR_ONE, "MOV R4, R24", WAIT, USE)) == []
    (sentence,) = hazards(listing(*PRODUCTS, WAIT_FOR_ONE, "MOV R8, R24", WAIT, USE))
    assert "writes the left operand" in sentence
    assert hazards(listing(*PRODUCTS, USE))  # no wait at all


def test_branches_are_followed() -> None:
    """What lies behind a branch, outside of the straight way to the wait, and round a loop."""
    aside = ("@!P0 BRA 0x70", WAIT, USE, "EXIT")
    assert len(hazards(listing(*PRODUCTS, *aside, "MOV R5, R12", "BRA 0x40"))) == 1
    assert hazards(listing(*PRODUCTS, *aside, "MOV R12, R5", "BRA 0x40")) == []
    assert len(hazards(listing("MOV R8, R12", *PRODUCTS, WAIT_FOR_ONE, "@P0 BRA 0x0", WAIT))) == 1
    assert hazards(listing("MOV R4, R12", *PRODUCTS, WAIT_FOR_ONE, "@P0 BRA 0x0", WAIT)) == []
    assert len(hazards(listing("BRX R2 -0x10", *PRODUCTS, "MOV R4, R12", WAIT))) == 1  # who knows how it got there


# One group: R24 .. R31 += both operands in shared memory, twice.
GROUP = (
    "WARPGROUP.ARRIVE",
    "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT",
    "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
)
SECOND_FROM_REGISTERS = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"


@pytest.mark.parametrize("copy", ["R2UR UR8, R2", "@P0 R2UR UR11, R2", "R2UR.OR P1, UR9, R2"])
def test_an_address_copied_inside_a_group_is_found(copy: str) -> None:
    arrive, first, second = GROUP
    (sentence,) = late_descriptors(listing(arrive, first, copy, second, WAIT))
    assert copy in sentence
    assert second in sentence
    assert late_descriptors(listing(copy, *GROUP, WAIT)) == []
    assert late_descriptors(listing(arrive, copy, first, second, WAIT)) == []
    assert late_descriptors(listing(*GROUP, copy, *GROUP, WAIT)) == []  # between two groups


@pytest.mark.parametrize("between", ["R2UR UR7, R2", "R2UR UR12, R2", "UMOV UR8, UR3", "UIADD3 UR10, UR4, 0x2, URZ"])
def test_what_leaves_the_descriptor_alone(between: str) -> None:
    arrive, first, second = GROUP
    assert late_descriptors(listing(arrive, first, between, second, WAIT)) == []


def test_one_operand_in_shared_memory_takes_half_a_descriptor() -> None:
    assert late_descriptors(listing(*GROUP[:2], "R2UR UR9, R2", SECOND_FROM_REGISTERS, WAIT)) == []
    assert len(late_descriptors(listing(*GROUP[:2], "R2UR UR10, R2", SECOND_FROM_REGISTERS, WAIT))) == 1


def test_groups_are_followed_round_branches() -> None:
    arrive, first, second = GROUP
    aside = ("@P0 BRA 0x50", second, WAIT, "EXIT")
    assert len(late_descriptors(listing(arrive, first, *aside[:2], "EXIT", "R2UR UR8, R2", "BRA 0x30"))) == 1
    assert late_descriptors(listing(arrive, first, *aside[:2], "EXIT", "R2UR UR3, R2", "BRA 0x30")) == []
    # A loop whose only product closes the group: the copy stands behind no other.
    assert late_descriptors(listing("R2UR UR8, R2", second, "@P0 BRA 0x0", WAIT)) == []
    assert len(late_descriptors(listing("R2UR UR4, R2", first, "@P0 BRA 0x0", second, WAIT))) == 1


def test_reads_come_behind_the_wait_on_every_path() -> None:
    load = "LDG.E.64 R8, desc[UR4][R2.64]"
    assert early_reads(listing("PREEXIT", "ACQBULK", load, "UTMALDG.4D [UR8], [UR4]")) == []
    assert len(early_reads(listing("PREEXIT", load, "ACQBULK"))) == 1
    assert len(early_reads(listing("LDGSTS.E.BYPASS.128 [R12], desc[UR6][R6.64], P1", "ACQBULK"))) == 1
    assert len(early_reads(listing("@P0 BRA 0x20", "ACQBULK", load))) == 1  # round the wait
    assert early_reads(listing("BRA 0x30", load, "EXIT", "ACQBULK", "BRA 0x10")) == []
    assert len(early_reads(listing("BRX R2 -0x10", "ACQBULK", "EXIT", load))) == 1  # who knows how it got there


def test_what_it_cannot_read_it_refuses() -> None:
    with pytest.raises(ValueError, match="expected a product of 16-bit numbers"):
        hazards(listing("QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT, gsb0"))
    with pytest.raises(ValueError, match="expected a product with shared memory"):
        late_descriptors(listing("HGMMA.64x16x16.F32.BF16 R24, R4, R8, RZ, !UPT, gsb0"))
    with pytest.raises(ValueError, match="under way at once"):
        hazards(listing(*PRODUCTS, "BRA 0x0"))


@pytest.mark.parametrize(
    ("before", "between", "late"),
    [
        ((), ("MOV R6, 0x3f803f80",), True),
        (("CS2R R6, SRZ",), ("MOV R6, 0x3f803f80",), True),
        (("MOV R6, RZ",), ("MOV R6, RZ",), False),
        (("MOV R6, RZ",), (), False),
        ((), ("FADD R6, R12, R13",), False),
        ((), ("LDS.64 R4, [R12]", "MOV R6, RZ", "MOV R7, RZ"), False),  # another operand
    ],
)
def test_constants_in_a_left_operand(before: tuple[str, ...], between: tuple[str, ...], late: bool) -> None:
    product = PRODUCTS[1]
    assert bool(constant_operands(listing("LDS.128 R4, [R12]", *before, product, WAIT, *between, product))) == late


@pytest.mark.parametrize(
    ("instructions", "unset"),
    [
        (("R2UR UR4, R6", "UIADD3 UR5, UP0, UR4, 0x2, URZ"), False),
        (("ULDC.64 UR4, c[0x0][0x208]", "UIADD3.64 UR6, UR4, UR4, URZ", "UMOV UR8, UR7"), False),
        (("R2UR UR4, R6", "UIADD3 UR5, UP0, UR14, 0x2, URZ"), True),
        (("UMOV UR4, UR4",), True),
        (("UISETP.LT.AND UP0, UPT, UR4, UR5, UPT", "UMOV UR6, UR4"), True),
    ],
)
def test_uniform_registers_that_nothing_wrote(instructions: tuple[str, ...], unset: bool) -> None:
    assert bool(unset_addresses(listing(*instructions))) == unset
