"""The emulator's values and pointers, and of Triton's language what needs no machine: sums, products, selections."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dtype(NamedTuple):
    """kind: torch's, as values have it here."""

    name: str
    kind: torch.dtype
    primitive_bitwidth: int


_NAMES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64")
_KINDS = {name: getattr(torch, name) for name in _NAMES} | {"int1": torch.bool}
DTYPES = {kind: Dtype(name, kind, 8 * kind.itemsize) for name, kind in _KINDS.items()}
EXACT = Dtype("bfloat16", torch.float32, 16)


def _raw(x: Any) -> Any:
    """A value's tensor; a number as it is."""
    if isinstance(x, Product):
        raise RuntimeError("a product is used before it is waited for")
    if not isinstance(x, (Value, bool, int, float)):
        raise TypeError(f"expected a value or a number, got {type(x).__name__}")
    return x.x if isinstance(x, Value) else x


def tensor(x: Any) -> Tensor:
    """A value's tensor, or a number's as Triton makes it."""
    x = _raw(x)
    if isinstance(x, Tensor):
        return x
    small = isinstance(x, int) and -(2**31) <= x < 2**31
    kind = torch.bool if isinstance(x, bool) else torch.int32 if small else torch.int64
    return torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else kind)


def scalar(x: int) -> Value:
    return Value(torch.tensor(x, dtype=torch.int32))


def _alike(*given: Any) -> tuple[Any, ...]:
    """Tensors in the dtype that holds them all (of torch's own doing, one without dimensions would not count)."""
    values = [_raw(x) for x in given]
    kinds = [x.dtype for x in values if isinstance(x, Tensor)]
    kind = kinds[0] if len(kinds) == 1 else torch.promote_types(*kinds)
    return tuple(x.to(kind) if isinstance(x, Tensor) else x for x in values)


def _number(x: Any) -> Any:
    """Truth as 0 or 1."""
    return x.int() if isinstance(x, Tensor) and x.dtype == torch.bool else int(x) if isinstance(x, bool) else x


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def ints(given: Any) -> list[int]:
    """Of numbers, or of one sequence of them."""
    return [int(x) for x in (given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given)]


def _divide(a: Any, b: Any) -> Tensor:
    return torch.div(*(x.float() if isinstance(x, Tensor) and x.itemsize < 4 else x for x in (a, b)))


def _operators(cls: type) -> type:
    """Python's operators, with C's division of integers."""

    def add(name: str, function: Callable[..., Any], prepare: Callable[[Any], Any] = lambda x: x) -> None:
        def straight(self: Value, other: Any) -> Any:
            if isinstance(other, Pointer):
                return NotImplemented
            return Value(function(*map(prepare, _alike(self, other))))

        setattr(cls, f"__{name}__", straight)
        setattr(cls, f"__r{name}__", lambda self, other: Value(function(*map(prepare, _alike(other, self)))))

    for name in ("add", "sub", "mul", "lshift", "rshift"):
        add(name, getattr(operator, name), _number)
    add("truediv", _divide, _number)
    add("floordiv", lambda a, b: torch.div(a, b, rounding_mode="trunc"), _number)
    add("mod", torch.fmod, _number)
    for name in ("and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne"):
        add(name, getattr(operator, f"__{name}__"))
    return cls


def _reshaping(method: str) -> Any:
    return lambda self, *sizes: Value(getattr(self.x, method)(*ints(sizes)))


@_operators
class Value:
    """A block in registers, or a number that is known at run time only."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    shape = property(lambda self: list(self.x.shape))
    dtype = property(lambda self: DTYPES[self.x.dtype])
    type = property(lambda self: SimpleNamespace(layout=None, shape=self.shape))
    reshape, permute, broadcast_to = map(_reshaping, ("reshape", "permute", "expand"))
    __neg__ = lambda self: Value(-self.x)  # noqa: E731
    __invert__ = lambda self: Value(~self.x)  # noqa: E731
    __bool__ = lambda self: bool(self.x)  # noqa: E731
    __index__ = lambda self: int(self.x)  # noqa: E731
    __getitem__ = lambda self, key: Value(self.x[key])  # noqa: E731

    def to(self, dtype: Dtype, bitcast: bool = False) -> Value:
        return Value(self.x.view(dtype.kind) if bitcast else self.x.to(dtype.kind))


class Pointer:
    """Places in a tensor, counted in elements."""

    def __init__(self, base: Tensor, offset: Value) -> None:
        self.base, self.offset = base, offset
        self.dtype = self.type = SimpleNamespace(element_ty=DTYPES[base.dtype], primitive_bitwidth=64)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)

    __radd__ = __add__

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.base, self.offset[key])

    def places(self, mask: Any, x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensor as it lies in memory; places there, whether they are meant, and x, all of one shape."""
        flat = self.base.as_strided((extent(self.base),), (1,))
        offset, meant, other = torch.broadcast_tensors(self.offset.x.long(), tensor(mask), tensor(x))
        wrong = meant & ((offset < 0) | (offset >= len(flat)))
        if wrong.any():
            raise IndexError(f"element {offset[wrong][0]} of a tensor {list(self.base.shape)}")
        return flat, torch.where(meant, offset, 0), meant, other


def extent(x: Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * x.stride(dim) for dim, size in enumerate(x.shape)) if x.numel() else 0


class Region(NamedTuple):
    """Elements low .. high of an allocation: where a view has gaps, also what lies in them."""

    allocation: int
    low: int
    high: int

    def meets(self, other: Region) -> bool:
        return self.allocation == other.allocation and self.low < other.high and other.low < self.high


@dataclass(eq=False)
class Product:
    """Of wgmma, under way until `over`. reads: of shared memory."""

    value: Value
    reads: list[Region]
    over: bool = False


# ---- The language, where it needs no machine ----


def run_time_range(*bounds: Any, **hints: Any) -> Iterator[Value]:
    return map(scalar, range(*map(int, bounds)))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Value]:
    return lambda x: Value(function(tensor(x)))


def _chosen(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Value]:
    """maximum or minimum; of a number and NaN, the number."""
    return lambda *given: Value(function(*_alike(*(Value(_wide(tensor(x))) for x in given))))


def _extreme(function: Callable[..., Tensor], least: float) -> Callable[..., Value]:
    """max or min; of numbers and NaN, a number."""

    def reduce(x: Value, axis: int | None = None) -> Value:
        dims = tuple(range(x.x.ndim)) if axis is None else (axis,)
        if not x.x.is_floating_point():
            return Value(function(x.x, dims))
        missing = x.x.isnan()
        most = function(_wide(x.x).masked_fill(missing, least), dims)
        return Value(most.masked_fill(missing.all(dims), math.nan))

    return reduce


def _sum(x: Value, axis: int | None = None) -> Value:
    wide = _wide(_number(x.x))
    return Value(wide.sum(axis, dtype=wide.dtype))


def _fma(*terms: Any) -> Value:
    a, b, c = (tensor(x).double() for x in terms)
    return Value((a * b + c).float())


def _where(condition: Any, a: Any, b: Any) -> Value:
    if not isinstance(a, Value) and not isinstance(b, Value):
        a = Value(tensor(a))
    x, y = map(_number, _alike(a, b))
    return Value(torch.where(tensor(condition), x, y))


def _full(shape: Any, value: Any, dtype: Dtype, layout: Any = None) -> Value:
    return Value(tensor(value).to(dtype.kind).expand(ints([shape])).clone())


def _associative_scan(given: Any, axis: int, combine: Callable[..., Any], reverse: bool = False) -> Any:
    """Of a value or of a tuple of them."""
    slices = [tuple(map(Value, x)) for x in zip(*(_raw(x).unbind(axis) for x in _tuple(given)), strict=True)]
    slices = slices[::-1] if reverse else slices
    for i in range(1, len(slices)):
        slices[i] = _tuple(combine(*slices[i - 1], *slices[i]))
    slices = slices[::-1] if reverse else slices
    scanned = tuple(Value(torch.stack([_raw(x) for x in parts], axis)) for parts in zip(*slices, strict=True))
    return scanned if isinstance(given, tuple) else scanned[0]


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _write(pointer: Pointer, value: Any, mask: Any, accumulate: bool) -> None:
    flat, places, meant, x = pointer.places(True if mask is None else mask, value)
    flat.index_put_((places[meant],), x[meant].to(flat.dtype), accumulate)


def multiply(a: Any, b: Any, acc: Any = None, use_acc: Any = True, **hints: Any) -> Value:
    left, right = _raw(a), _raw(b)
    if left.dtype != right.dtype:
        raise TypeError(f"a product of {left.dtype} and {right.dtype}")
    result = left.float() @ right.float()
    if acc is None:
        return Value(result)
    if acc.x.shape != result.shape or acc.x.dtype != torch.float32:
        raise TypeError(f"a product {list(result.shape)} added to {acc.shape} {acc.x.dtype}")
    return Value(acc.x + result if use_acc else result)


def _same(x: Any, *hints: Any, **more: Any) -> Any:
    return x


def nothing(*args: Any, **named: Any) -> None:
    pass


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


PLAIN: dict[str, Any] = dict(
    constexpr=_same, convert_layout=lambda x, layout, assert_trivial=False: Value(tensor(x)), set_auto_layout=_same,
    range=run_time_range, static_range=range, static_assert=_static_assert, device_assert=nothing,
    barrier=nothing, thread_barrier=nothing, static_print=nothing, multiple_of=_same, max_contiguous=_same,
    arange=lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
    full=_full, full_like=lambda x, value: _full(x.shape, value, x.dtype),
    zeros=lambda shape, dtype, layout=None: _full(shape, 0, dtype), zeros_like=lambda x: _full(x.shape, 0, x.dtype),
    where=_where, fma=_fma, maximum=_chosen(torch.fmax), minimum=_chosen(torch.fmin),
    **{name: _unary(getattr(torch, name)) for name in ("abs", "exp2", "exp", "log2", "log", "sqrt", "rsqrt")},
    sum=_sum, max=_extreme(torch.amax, -math.inf), min=_extreme(torch.amin, math.inf), dot=multiply,
    cdiv=lambda a, b: (a + b - 1) // b,
    associative_scan=_associative_scan, expand_dims=lambda x, axis: Value(x.x.unsqueeze(axis)),
    trans=lambda x: Value(x.x.mT), split=lambda x: tuple(map(Value, x.x.unbind(-1))),
    join=lambda a, b: Value(torch.stack(_alike(a, b), -1)), reshape=Value.reshape, permute=Value.permute,
    broadcast_to=Value.broadcast_to, store=lambda pointer, x, mask=None, **hints: _write(pointer, x, mask, False),
    atomic_add=lambda pointer, x, mask=None, **hints: _write(pointer, x, mask, True),
)  # fmt: skip
