"""What a kernel's results hang on, read from Hopper's assembly, `cuobjdump -sass`.

`hazards`: does anything touch the registers of a wgmma that is still under way?

A wgmma runs beside the instructions that follow it. Until it is waited for it reads its left operand, where that lies
in registers, and writes its accumulator. The compiler must keep these registers free for so long, but versions of ptxas
are known that give them away (triton-lang/triton#11781, triton-lang/triton#11854): the kernel then computes something
else, without a warning, and perhaps not on every run.

`late_descriptors`: is the address of a wgmma's operand copied from a thread's registers (R2UR) behind an earlier wgmma
of its group? Where ptxas 12.8 puts the copy there, that wgmma was seen to read shared memory out of bounds; ptxas 13.0
puts it elsewhere. Not every such copy does harm: kernels are known that have some and are right.

`constant_operands`: is a constant in a wgmma's left operand there in time? ptxas 12.8 was seen to write one for the
second of two wgmmas only.

`unset_addresses`: is a uniform register read that nothing wrote? ptxas 12.8 was seen to add the address of a wgmma's
operand to one.

`early_reads`: does a thread read global memory before it waited for the kernel before (griddepcontrol.wait, ACQBULK)?
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.F32\b")
REGISTER = re.compile(r"\bR(\d+)(\.64)?")
UNIFORM = re.compile(r"\bUR(\d+)")
DESCRIPTOR = re.compile(r"\bgdesc\[UR(\d+)\]")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
# An operand that is not in brackets, after any predicates that the instruction writes too.
DESTINATION = re.compile(r"(?:U?P[T\d]\s*,\s*)*R(\d+)")
# These only read what stands in the destination's place.
READERS = re.compile(r"[A-Z]*SETP2?|FCHK|R2P|BAR|BRX|CALL|RET|WARPSYNC|NANOSLEEP")
DOUBLES = ("DADD", "DFMA", "DMUL", "DSETP")
CONSTANT = re.compile(r"\b(?:MOV R\d+, (?:RZ|0x[0-9a-f]+)$|CS2R\b|IMAD\.MOV\.U32 R\d+, RZ, RZ, (?:RZ|0x))")
ARITHMETIC = re.compile(r"UIADD3|UIMAD|ULEA|ULOP3|UMOV|USEL|USHF")  # of uniform registers
UNIFORM_DESTINATION = re.compile(r"(?:U?P[T\d]\s*,\s*)*UR(\d+)")
LOAD = re.compile(r"LDG|LDGSTS|LD|ATOMG?|RED")  # of global memory
# wgmmas under way at once. No kernel comes near; one that never waits must not be followed for ever.
MOST = 256


@dataclass(frozen=True, slots=True)
class Product:
    """A wgmma, and its registers; descriptors: uniform ones, which hold where its operands lie in shared memory."""

    text: str
    left: range
    accumulator: range
    descriptors: range
    ends_group: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """touched: registers read or written. uniform: the uniform register that a thread's is copied to. wait: how many
    groups of wgmmas may be under way behind it. target: the address that it may branch to. continues: may the next
    instruction follow?"""

    address: int
    name: str
    text: str
    written: frozenset[int]
    touched: frozenset[int]
    product: Product | None
    uniform: int | None
    wait: int | None
    target: int | None
    continues: bool


Group = tuple[Product, ...]
State = TypeVar("State", bound=Hashable)


def hazards(sass: str) -> list[str]:
    """A sentence for each instruction that touches registers of a wgmma under way, on any path through the code."""
    found: dict[str, None] = {}
    nothing: tuple[Group, ...] = ((),)  # the last group is still open
    for instruction, groups in _walk(sass, nothing, _after):
        for product in (product for group in groups for product in group):
            if what := _touch(instruction, product):
                found[f"{instruction.text} {what} of {product.text}"] = None
    return list(found)


def late_descriptors(sass: str) -> list[str]:
    """A sentence for each wgmma whose descriptor is written by R2UR behind an earlier wgmma of its group."""
    found: dict[str, None] = {}
    nothing: tuple[bool, frozenset[tuple[int, str]]] = (False, frozenset())
    for instruction, (_, written) in _walk(sass, nothing, _after_copies):
        for register, text in sorted(written):
            if instruction.product is not None and register in instruction.product.descriptors:
                found[f"{text} writes the descriptor of {instruction.text}"] = None
    return list(found)


def constant_operands(sass: str) -> list[str]:
    """A sentence for each constant that is written into a left operand between two wgmmas which otherwise share it, and
    for which the first of them, by address, had something else."""
    found: dict[str, None] = {}
    last: dict[int, str] = {}
    met: dict[range, dict[int, str]] = {}
    for instruction in _instructions(sass):
        if instruction.product is not None and instruction.product.left:
            left = instruction.product.left
            now = {register: last.get(register, "") for register in left}
            before = met.get(left, {})
            changed = {register for register in before if now[register] != before[register]}
            for register in changed if len(changed) < len(left) else ():
                same = _apart(now[register]) == _apart(before[register])
                if CONSTANT.search(now[register]) and not same:
                    found[f"{now[register]} comes late for {instruction.text}"] = None
            met[left] = now
        last.update(dict.fromkeys(instruction.written, instruction.text))
    return list(found)


def _apart(text: str) -> str:
    """An instruction without its address."""
    return text.partition("*/")[2]


def unset_addresses(sass: str) -> list[str]:
    """Each step of arithmetic that reads a uniform register which nothing above it writes."""
    found: list[str] = []
    written: set[int] = set()
    for match in INSTRUCTION.finditer(sass):
        address, _, operation, arguments = match.groups()
        first = None if operation.startswith("UISETP") else UNIFORM_DESTINATION.match(arguments)
        if ARITHMETIC.match(operation):
            read = [int(x) for x in UNIFORM.findall(arguments)][1 if first else 0 :]
            if not written.issuperset(read):
                found.append(f"/*{address}*/ {operation} {arguments.strip()}")
        if first:
            wide = {"64", "WIDE"}.intersection(operation.split("."))
            written.update(range(int(first[1]), int(first[1]) + (2 if wide else 1)))
    return found


def early_reads(sass: str) -> list[str]:
    """Every load from global memory that some path leads to without a wait for the kernel before."""
    paths = _walk(sass, False, lambda instruction, waited: waited or instruction.name == "ACQBULK")
    found = (instruction.text for instruction, waited in paths if not waited and LOAD.fullmatch(instruction.name))
    return list(dict.fromkeys(found))


def _walk(
    sass: str, initial: State, after: Callable[[Instruction, State], State]
) -> Iterator[tuple[Instruction, State]]:
    """Each instruction, with each state in which a path leads to it; `after` gives the state behind an instruction."""
    code = list(_instructions(sass))
    places = {instruction.address: i for i, instruction in enumerate(code)}
    seen: set[tuple[int, State]] = set()
    reached: set[int] = set()
    for start in range(len(code)):
        if start in reached:
            continue
        # Code that only an indirect branch leads to is entered in the initial state.
        paths = [(start, initial)]
        while paths:
            i, state = paths.pop()
            if i == len(code) or (i, state) in seen:
                continue
            seen.add((i, state))
            reached.add(i)
            instruction = code[i]
            yield instruction, state
            state = after(instruction, state)
            if instruction.target is not None:
                paths.append((places[instruction.target], state))
            if instruction.continues:
                paths.append((i + 1, state))


def _touch(instruction: Instruction, product: Product) -> str | None:
    """How an instruction gets in the way of a wgmma that is under way."""
    if not instruction.written.isdisjoint(product.left):
        return "writes the left operand"
    if instruction.product is not None and instruction.product.accumulator == product.accumulator:
        # Products into one accumulator follow each other in order, but a left operand is read at once.
        return "reads the accumulator" if _overlap(instruction.product.left, product.accumulator) else None
    if not instruction.written.isdisjoint(product.accumulator):
        return "writes the accumulator"
    if not instruction.touched.isdisjoint(product.accumulator):
        return "reads the accumulator"
    return None


def _overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _after(instruction: Instruction, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups of wgmmas under way behind an instruction, the open one last."""
    *closed, last = groups
    if instruction.wait is not None:
        closed = closed[max(0, len(closed) - instruction.wait) :]
    if instruction.product is not None:
        last = (*last, instruction.product)
        if instruction.product.ends_group:
            closed, last = [*closed, last], ()
        if sum(map(len, closed)) + len(last) > MOST:
            raise ValueError(f"more than {MOST} wgmmas are under way at once: {instruction.text}")
    return (*closed, last)


def _after_copies(
    instruction: Instruction, state: tuple[bool, frozenset[tuple[int, str]]]
) -> tuple[bool, frozenset[tuple[int, str]]]:
    """Behind an instruction: is a group of wgmmas open, and which uniform registers were copied to since it is?"""
    inside, written = state
    if instruction.product is not None:
        return (False, frozenset()) if instruction.product.ends_group else (True, written)
    if inside and instruction.uniform is not None:
        written |= {(instruction.uniform, instruction.text)}
    return inside, written


def _instructions(sass: str) -> Iterator[Instruction]:
    for match in INSTRUCTION.finditer(sass):
        address, predicate, operation, arguments = match.groups()
        name = operation.split(".")[0]
        text = f"/*{address}*/ {predicate or ''}{operation} {arguments.strip()}"
        product = _product(text, operation, arguments) if "GMMA" in name else None
        if product is not None:
            written = frozenset(product.accumulator)
            touched = written.union(product.left)
        else:
            written, touched = _registers(name, operation, arguments)
        uniform = UNIFORM.search(arguments) if name == "R2UR" else None
        target = TARGET.search(arguments) if name in ("BRA", "CALL", "JMP") else None
        wait = TARGET.search(arguments) if operation.startswith("WARPGROUP.DEPBAR") else None
        always = predicate is None and (target is None or target.start() == 0)
        yield Instruction(
            address=int(address, 16), name=name, text=text, written=written, touched=touched, product=product,
            uniform=uniform and int(uniform[1]), wait=wait and int(wait[1], 16), target=target and int(target[1], 16),
            continues=not (always and name in ("BRA", "JMP", "BRX", "EXIT", "RET")),
        )  # fmt: skip


def _product(text: str, operation: str, arguments: str) -> Product:
    """Of 64 x N x 16 by 128 threads: N / 2 registers of fp32 sums, and 4 for a left operand in registers."""
    match = PRODUCT.match(operation)
    if match is None:
        raise ValueError(f"expected a product of 16-bit numbers with fp32 sums, got {text}")
    first, left, *_ = (operand.strip() for operand in arguments.split(","))
    accumulator, rows = int(first.removeprefix("R")), REGISTER.match(left)
    descriptor = DESCRIPTOR.search(arguments)
    if descriptor is None:
        raise ValueError(f"expected a product with shared memory, got {text}")
    shared = int(descriptor[1])
    return Product(
        text=text,
        left=range(int(rows[1]), int(rows[1]) + 4) if rows else range(0),
        accumulator=range(accumulator, accumulator + int(match[1]) // 2),
        descriptors=range(shared + (2 if rows else 0), shared + 4),  # of the left operand first
        ends_group="gsb0" in arguments,
    )


def _registers(name: str, operation: str, arguments: str) -> tuple[frozenset[int], frozenset[int]]:
    """Registers that an instruction writes, and all that it touches; rather one too many than one too few."""
    parts = operation.split(".")
    width = 1
    if name in ("LDSM", "STSM"):
        width = int(parts[-1]) if parts[-1].isdigit() else 1  # matrices: M88.4, or M88 for one
    elif "128" in parts:
        width = 4
    elif {"64", "F64", "WIDE"}.intersection(parts) or name in DOUBLES or (name == "CS2R" and "32" not in parts):
        width = 2
    touched: set[int] = set()
    operands = arguments.split(",")
    for i, operand in enumerate(operands):
        for register in REGISTER.finditer(operand):
            count = (2 if register[2] else 1) if "[" in operand else width
            if "WIDE" in parts and 0 < i < len(operands) - 1:  # the factors of a wide product are not
                count = 1
            touched.update(range(int(register[1]), int(register[1]) + count))
    first = None if READERS.fullmatch(name) else DESTINATION.match(arguments)
    written = range(int(first[1]), int(first[1]) + width) if first else range(0)
    return frozenset(written), frozenset(touched)
