"""Kernels in Gluon on the CPU, so that what they index, compute and hand on is tested without a GPU. Triton's own
interpreter takes none of them.

A kernel's Python runs as it stands, with whole torch tensors for what threads hold together, and with stand-ins for the
language. Its partitions take turns in an order of the seed's choosing: a turn may end wherever one touches shared
memory or a barrier. The copy engine finishes what is under way in any order too. What is not there yet is NaN.

Errors: a deadlock; shared memory written while a product or a copy reads it or a copy writes it; a product used before
it is waited for; a product or a copy of what no fence has made visible to it; more arrivals at a barrier than it
counts; products or stores that a partition never waits for; memory outside of a tensor. Any other wait that is missing
gives wrong numbers with some seeds.

Not modelled: layouts, the warps of a partition (so `barrier` does nothing), registers, how much shared memory there is,
what the compiler takes for a constant, exponents that a GPU's units flush to 0, launches that overlap.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

from nha_kernels.fused import hopper
from nha_kernels.fused.primitives import Launch, start_next, wait_for_previous

from .emulated_language import (
    DTYPES,
    EXACT,
    PLAIN,
    Dtype,
    Pointer,
    Product,
    Region,
    Value,
    extent,
    ints,
    multiply,
    nothing,
    run_time_range,
    scalar,
    tensor,
)


def run(launch: Launch, *, seed: int = 0, exact: bool = False) -> None:
    """Run a launch, of a kernel in Gluon or in plain Triton, on CPU tensors.

    exact: the kernel's bf16 is fp32, in shared memory too, and so may be the tensors that it takes for bf16.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for program in product(*map(range, launch.grid)):
            _Machine(launch, program, random.Random(f"{seed} {program}"), exact).run()
    finally:
        torch.set_num_threads(threads)


# ---- Shared memory, barriers, the copy engine ----


class _Shared:
    """A view of shared memory."""

    def __init__(self, machine: _Machine, allocation: int, x: Tensor, dtype: Dtype) -> None:
        self.machine, self.allocation, self.x, self.dtype = machine, allocation, x, dtype
        self.shape = list(x.shape)
        self.type = SimpleNamespace(shape=self.shape)
        low = int(x.storage_offset())
        self.region = Region(allocation, low, low + extent(x))

    def view(self, x: Tensor) -> _Shared:
        return _Shared(self.machine, self.allocation, x, self.dtype)

    def index(self, place: Any) -> _Shared:
        if not 0 <= int(place) < len(self.x):
            raise IndexError(f"place {int(place)} of {len(self.x)} in shared memory")
        return self.view(self.x[int(place)])

    def slice(self, start: Any, length: int, dim: int = 0) -> _Shared:
        return self.view(self.x.narrow(dim, int(start), length))

    def reshape(self, shape: Sequence[int]) -> _Shared:
        return self.view(self.x.view(*shape))

    def permute(self, order: Sequence[int]) -> _Shared:
        return self.view(self.x.permute(*order))

    def load(self, layout: Any = None) -> Value:
        self.machine.switch()
        return Value(self.x.clone())

    def store(self, value: Any) -> None:
        self.machine.switch()
        x = tensor(value)
        if list(x.shape) != self.shape or x.dtype != self.x.dtype:
            raise ValueError(f"{list(x.shape)} {x.dtype} stored to shared memory {self.shape} {self.x.dtype}")
        self.machine.before_writing(self.region)
        self.machine.unfenced.add((self.region, self.machine.current))
        self.x.copy_(x)


class _Descriptor:
    """A tensor as the copy engine sees it."""

    def __init__(self, given: Any, exact: bool) -> None:
        if given.padding != "zero":
            raise NotImplementedError("what lies outside of a tensor reads as 0")
        self.base: Tensor = given.base.as_strided(given.shape, given.strides)
        self.block_shape = list(given.block_shape)
        self.dtype = EXACT if exact and self.base.dtype == torch.bfloat16 else DTYPES[self.base.dtype]

    def common(self, at: Sequence[int], block: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tensor and of a block that lies `at` there, what they have in common."""
        x = self.base
        for dim, (first, size) in enumerate(zip(at, self.block_shape, strict=True)):
            low = min(max(first, 0), x.shape[dim])
            length = max(0, min(first + size, x.shape[dim]) - low)
            x = x.narrow(dim, low, length)
            block = block.narrow(dim, low - first if length else 0, length)
        return x, block


@dataclass(eq=False)
class _Copy:
    """What the copy engine has under way. target: in shared memory. speed: how often it is chosen to be finished."""

    move: Callable[[], None]
    target: Region | None
    speed: float


@dataclass
class _Barrier:
    """pending, bytes: arrivals and bytes that the phase still lacks."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def change(self, arrivals: int, expected: int) -> None:
        self.pending -= arrivals
        self.bytes += expected
        if self.pending < 0:
            raise RuntimeError(f"more than {self.count} arrive at a barrier in one phase")
        if self.pending == self.bytes == 0:
            self.pending = self.count
            self.phase += 1


# ---- Partitions that take turns ----


class _Stopped(BaseException):
    """Another partition has failed."""


@dataclass(eq=False)
class _Task:
    """A partition. speed: how often it is chosen. until: what it waits for. products, stores: not waited for yet."""

    name: str
    speed: float
    until: Callable[[], bool] | None = None
    waits: tuple[_Shared, int] | None = None
    products: list[Product] = field(default_factory=list)
    stores: list[tuple[_Copy, Region]] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread = field(default_factory=threading.Thread)
    result: Any = None


class _Machine:
    """One program of a launch. Each partition is a thread, of which one at a time runs."""

    current: _Task

    def __init__(self, launch: Launch, program: tuple[int, ...], chance: random.Random, exact: bool) -> None:
        self.launch, self.program, self.chance, self.exact = launch, program, chance, exact
        self.haste = chance.uniform(-2, 1)  # of the copy engine
        self.tasks: list[_Task] = []
        self.copies: list[_Copy] = []
        self.barriers: dict[Region, _Barrier] = {}
        self.unfenced: set[tuple[Region, _Task]] = set()
        self.allocations = 0
        self.error: BaseException | None = None
        self.over = threading.Semaphore(0)
        self.modules: dict[int, dict[str, Any]] = {}
        self.stand_ins = _stand_ins(self)

    def run(self) -> None:
        kernel = self.launch.kernel.fn
        constant = {name for name, kind in kernel.__annotations__.items() if "constexpr" in str(kind)}
        arguments = {name: x if name in constant else self.argument(x) for name, x in self.launch.arguments.items()}
        self.current = self.start(partial(self.rebuild(kernel), **arguments), kernel.__name__)
        self.current.turn.release()
        self.over.acquire()
        if self.error is not None:
            raise self.error
        for copy in self.copies:
            copy.move()
        if any(barrier.bytes < 0 for barrier in self.barriers.values()):
            raise RuntimeError("a barrier gets more bytes than it was told to expect")

    def argument(self, x: Any) -> Any:
        """A launch's argument, as a kernel sees it."""
        if isinstance(x, Tensor):
            return Pointer(x, scalar(0))
        if isinstance(x, hopper.TensorDescriptor):
            return _Descriptor(x, self.exact)
        if isinstance(x, tuple):
            parts = [self.argument(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x if x is None else Value(tensor(x))

    # A kernel's functions, with stand-ins for what they name.

    def stand_in(self, x: Any) -> Any:
        if id(x) in self.stand_ins:
            return self.stand_ins[id(x)]
        if isinstance(x, tl.constexpr):
            return x.value
        if isinstance(x, ConstexprFunction):
            return x.fn
        if isinstance(x, (JITFunction, InterpretedFunction)):
            return _Later(self, x.fn)
        return x

    def rebuild(self, function: Any) -> Callable[..., Any]:
        names = self.modules.get(id(function.__globals__))
        if names is None:
            names = {name: self.stand_in(x) for name, x in function.__globals__.items()} | {"range": run_time_range}
            self.modules[id(function.__globals__)] = names
        cells = tuple(CellType(self.stand_in(cell.cell_contents)) for cell in function.__closure__ or ())
        defaults = tuple(self.stand_in(x) for x in function.__defaults__ or ())
        return FunctionType(function.__code__, names, function.__name__, defaults, cells)

    # Turns.

    def start(self, body: Callable[[], Any], name: str) -> _Task:
        task = _Task(name, 10 ** self.chance.uniform(-1.5, 1.5))
        task.thread = threading.Thread(target=self.live, args=(task, body), daemon=True)
        self.tasks.append(task)
        task.thread.start()
        return task

    @torch.no_grad()  # which every thread has for itself
    def live(self, task: _Task, body: Callable[[], Any]) -> None:
        task.turn.acquire()
        try:
            if self.error is None:
                task.result = body()
                if task.products or task.stores:
                    raise RuntimeError("a partition ends without a wait for its products or stores")
        except _Stopped:
            pass
        except BaseException as error:
            error.add_note(f"in {task.name} of program {self.program}")
            self.error = error
        self.tasks.remove(task)
        if self.tasks:
            self.current = self.choose()
            self.current.turn.release()
        else:
            self.over.release()

    def choose(self) -> _Task:
        """Who goes on. Before that the copy engine may."""
        while self.error is None:
            ready = [task for task in self.tasks if task.until is None or task.until()]
            choices: list[_Task | _Copy] = [*ready, *self.copies]
            if not choices:
                self.error = RuntimeError("deadlock: " + "; ".join(map(self.describe, self.tasks)))
                break
            (chosen,) = self.chance.choices(choices, [x.speed for x in choices])
            if isinstance(chosen, _Task):
                if self.chance.random() < 0.02:
                    chosen.speed = 10 ** self.chance.uniform(-1.5, 1.5)
                return chosen
            try:
                self.finish(chosen)
            except RuntimeError as error:
                self.error = error
        return self.tasks[-1]

    def switch(self, until: Callable[[], bool] | None = None) -> None:
        """Let others run, until a condition holds."""
        task = self.current
        task.until = until
        self.current = self.choose()
        if self.current is not task:
            self.current.turn.release()
            task.turn.acquire()
        if self.error is not None:
            raise _Stopped
        task.until = None

    def describe(self, task: _Task) -> str:
        """What it waits for, by the name that the outermost of its functions has for it."""
        if task.waits is None:
            return f"{task.name} waits for its partitions"
        barrier, phase = task.waits
        name, frame = "a barrier", sys._current_frames().get(task.thread.ident or 0)
        while frame is not None:
            for here, x in frame.f_locals.items() if frame.f_code.co_filename != __file__ else ():
                if isinstance(x, _Shared) and x.allocation == barrier.allocation:
                    name = here
                    break
            frame = frame.f_back
        return f"{task.name} waits for phase {phase} of {name}[{barrier.region.low}]"

    # Shared memory and what is under way there.

    def copy(self, move: Callable[[], None], target: Region | None = None) -> _Copy:
        self.copies.append(_Copy(move, target, 10 ** (self.haste + self.chance.uniform(-1.5, 1))))
        return self.copies[-1]

    def finish(self, copy: _Copy) -> None:
        if copy in self.copies:
            self.copies.remove(copy)
            copy.move()

    def before_writing(self, region: Region) -> None:
        for task in self.tasks:
            if any(region.meets(read) for x in task.products for read in x.reads):
                raise RuntimeError(f"shared memory overwritten while a product reads it, of {task.name}")
            if any(region.meets(read) for _, read in task.stores):
                raise RuntimeError(f"shared memory overwritten while a copy reads it, of {task.name}")
        if any(copy.target is not None and region.meets(copy.target) for copy in self.copies):
            raise RuntimeError("shared memory overwritten while a copy writes it")

    def before_async_use(self, region: Region) -> None:
        for written, task in self.unfenced:
            if region.meets(written):
                raise RuntimeError(f"no fence makes shared memory visible that was written by {task.name}")


@dataclass
class _Later:
    """A function that is rebuilt when it is called."""

    machine: _Machine
    function: Any

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.machine.rebuild(self.function)(*args, **named)


# ---- The rest of the language ----


class _Names:
    """A module's stand-ins, and its layouts: real ones, of which nothing is asked but that they can be made."""

    def __init__(self, real: Any, names: Mapping[str, Any]) -> None:
        self.real, self.names = real, names

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            return self.names[name]
        if name.endswith("Layout"):
            return getattr(self.real, name)
        raise NotImplementedError(f"{self.real.__name__}.{name} has no stand-in on the CPU")


def _stand_ins(machine: _Machine) -> dict[int, Any]:
    """By the id of what a kernel names, what stands in for it."""
    switch, exact = machine.switch, machine.exact

    def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Value:
        kind = pointer.base.dtype
        kind = torch.float32 if exact and kind == torch.bfloat16 else kind
        unknown = math.nan if kind.is_floating_point else 99
        flat, places, meant, x = pointer.places(True if mask is None else mask, unknown if other is None else other)
        read = flat[places] if len(flat) else x
        return Value(torch.where(meant, read.to(kind), x.to(kind)))

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan if x.is_floating_point() else 99)

    def allocate(dtype: Dtype, shape: Sequence[int], layout: Any, value: Any = None) -> _Shared:
        machine.allocations += 1
        shared = _Shared(machine, machine.allocations, poison(torch.empty(ints([shape]), dtype=dtype.kind)), dtype)
        if value is not None:
            shared.store(value)
        return shared

    def warp_specialize(partitions: Sequence[Any], warps: Sequence[int], registers: Any = None) -> Any:
        if len(partitions) != len(warps) + 1:
            raise ValueError(f"{len(partitions)} partitions, and warps for {len(warps)} beside the first")
        tasks = [
            machine.start(partial(body, *args), f"partition {i} ({body.function.__name__})")
            for i, (body, args) in enumerate(partitions)
        ]
        machine.current.waits = None
        switch(lambda: not any(task in machine.tasks for task in tasks))
        return tasks[0].result

    # Barriers.

    def init(barrier: _Shared, count: int) -> None:
        machine.unfenced.add((barrier.region, machine.current))
        machine.barriers[barrier.region] = _Barrier(count, count)

    def arrive(barrier: _Shared, *, count: int = 1, pred: Any = True, expected: int = 0) -> None:
        switch()
        if pred:
            machine.barriers[barrier.region].change(count, expected)

    def expect(barrier: _Shared, bytes_per_cta: Any, pred: Any = True) -> None:
        arrive(barrier, pred=pred, expected=int(bytes_per_cta))

    def wait(barrier: _Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if pred:
            state, parity = machine.barriers[barrier.region], int(phase)
            machine.current.waits = barrier, parity
            switch(lambda: state.phase & 1 != parity)

    # The copy engine.

    def load_async(source: _Descriptor, at: Sequence[Any], barrier: _Shared, target: _Shared, pred: Any = True) -> None:
        switch()
        if not pred:
            return
        if target.shape != source.block_shape or (target.dtype != source.dtype and not exact):
            raise TypeError(f"{source.block_shape} {source.dtype} loaded to {target.shape} {target.dtype}")
        machine.before_writing(target.region)
        machine.before_async_use(barrier.region)
        poison(target.x)
        first, state = ints(at), machine.barriers[barrier.region]

        def move() -> None:
            inside, part = source.common(first, target.x.zero_())
            part.copy_(inside)
            state.change(0, -target.x.numel() * target.dtype.primitive_bitwidth // 8)

        machine.copy(move, target.region)

    def store_async(target: _Descriptor, at: Sequence[Any], source: _Shared) -> None:
        switch()
        if source.shape != target.block_shape or (source.dtype != target.dtype and not exact):
            raise TypeError(f"{source.shape} {source.dtype} stored to {target.block_shape} {target.dtype}")
        machine.before_async_use(source.region)
        first = ints(at)

        def move() -> None:
            inside, part = target.common(first, source.x)
            inside.copy_(part)

        machine.current.stores.append((machine.copy(move), source.region))

    def store_wait(pendings: int) -> None:
        while len(machine.current.stores) > pendings:
            machine.finish(machine.current.stores.pop(0)[0])
        switch()

    def fence(cluster: bool = False) -> None:
        machine.unfenced = {(region, task) for region, task in machine.unfenced if task is not machine.current}

    # Products.

    def warpgroup_mma(
        a: Any, b: _Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **hints: Any
    ) -> Value | Product:
        switch()
        reads = [x.region for x in (a, b) if isinstance(x, _Shared)]
        for region in reads:
            machine.before_async_use(region)
        left, right = (Value(x.x) if isinstance(x, _Shared) else x for x in (a, b))
        started = Product(multiply(left, right, acc.value if isinstance(acc, Product) else acc, use_acc), reads)
        machine.current.products.append(started)
        return started if is_async else warpgroup_mma_wait(0, [started])

    def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
        """While some products are under way, some of `deps` may still be."""
        while len(machine.current.products) > num_outstanding:
            machine.current.products.pop(0).over = True
        results = tuple(x.value if isinstance(x, Product) and x.over else x for x in deps)
        return results[0] if len(results) == 1 else results

    language = PLAIN | {dtype.name: dtype for dtype in DTYPES.values()} | ({"bfloat16": EXACT} if exact else {})
    language |= dict(
        load=load, allocate_shared_memory=allocate, warp_specialize=warp_specialize,
        program_id=lambda axis: scalar(machine.program[axis]),
        num_programs=lambda axis: scalar(machine.launch.grid[axis]),
    )  # fmt: skip
    stand_ins = [
        (hopper.gl, _Names(hopper.gl, language)), (tl, _Names(tl, language)),
        (hopper.mbarrier, _Names(hopper.mbarrier, dict(init=init, expect=expect, arrive=arrive, wait=wait))),
        (hopper.barrier, nothing), (start_next, nothing), (wait_for_previous, nothing),
        (hopper.load_async, load_async), (hopper.store_async, store_async), (hopper.store_wait, store_wait),
        (hopper.fence_async_shared, fence), (hopper.warpgroup_mma, warpgroup_mma),
        (hopper.warpgroup_mma_wait, warpgroup_mma_wait), (hopper.mma_v2, multiply),
    ]  # fmt: skip
    return {id(real): here for real, here in stand_ins}
