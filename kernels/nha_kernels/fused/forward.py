"""triton: the fused forward. Choose a config, describe the launches, run them. No gradient yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
from torch import Tensor

from ..problem import Inputs, Problem, Result
from ..slots import final_slots, initial_slots
from .output import output_kernel
from .primitives import Launch, Layout, Tokens, map_pieces
from .states import scan_kernel, segment_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """How the forward is launched.

    chunk: tokens between two stored states, C; a power of two >= 16. segment: tokens that one program of the state pass
    takes, L; a multiple of 64 and of chunk. state_columns: columns of K~ or V~ a program. rows: tokens x heads of an
    output tile; keys: of a block of the window; slots: of a block.
    anchored: split decays by the fixed exponent anchor, else by the tree. Only bf16 (and fp32) spans its exponents.
    """

    chunk: int
    segment: int
    state_columns: int
    state_warps: int
    state_stages: int
    rows: int
    keys: int
    slots: int
    output_warps: int
    output_stages: int
    anchored: bool

    @classmethod
    def default(cls, problem: Problem) -> ForwardConfig:
        """What a problem is launched with: by head size, group and dtype; no search, no measurement."""
        wide = max(problem.head_dim, problem.value_dim)
        rows = min(64, max(16, triton.next_power_of_2(16 * min(problem.group, 16))))
        exact = problem.dtype != torch.bfloat16
        single = problem.dtype == torch.float32
        config = cls(
            chunk=32,
            segment=_segment_length(problem),
            state_columns=min(128, max(16, triton.next_power_of_2(wide))),
            state_warps=4,
            state_stages=2,
            rows=rows,
            keys=32,
            slots=min(64, max(16, triton.next_power_of_2(problem.slots))),
            output_warps=8 if wide > 128 and rows == 64 else 4,
            output_stages=2,
            anchored=not exact,
        )
        if not _aligned(problem, config):
            config = replace(config, chunk=16)
        if single:  # twice the bytes and no tensor cores: smaller tiles
            config = replace(
                config, chunk=16, state_columns=min(64, config.state_columns), rows=min(config.rows, 32),
                keys=16, slots=min(32, config.slots), state_stages=1, output_stages=1,
            )  # fmt: skip
        return config


def _segment_length(problem: Problem) -> int:
    """Long enough to amortise a segment's start, short enough for two waves of programs on a large GPU."""
    columns = -(-problem.head_dim // 128) + -(-problem.value_dim // 128)
    programs_per_token = problem.batch * problem.kv_heads * columns * -(-problem.slots // 64)
    length = problem.tokens * programs_per_token // 512
    return min(1024, max(128, triton.next_power_of_2(length + 1) // 2))


def _tile_tokens(problem: Problem, config: ForwardConfig) -> tuple[int, int]:
    """Tokens of a tile (at most 16) and query heads of a kv head that share it."""
    heads = min(problem.group, 16)
    return min(16, config.rows // heads), heads


def _aligned(problem: Problem, config: ForwardConfig) -> bool:
    """Does every tile's run of slot tokens stay within one chunk?"""
    tokens, _ = _tile_tokens(problem, config)
    return config.chunk % tokens == 0 and problem.delay % tokens == 0


def launchable_configs() -> Iterator[tuple[Problem, ForwardConfig]]:
    """A problem for each kernel variant that `ForwardConfig.default` can choose, with everything optional switched on.

    What varies a kernel's registers and shared memory is here: head sizes, group, dtype, slots and alignment.
    """
    for dtype, head_dim, group, aligned in product(DTYPES, (64, 128, 256), (1, 4, 7), (True, False)):
        problem = Problem(
            batch=1, tokens=4096, sequences=4, q_heads=group, kv_heads=1, head_dim=head_dim, value_dim=head_dim,
            slots=64 if aligned else 80, window=64, delay=64 if aligned else 40, dtype=dtype, gate_dtype=torch.float32,
            device="cuda", packed=True, positions="rope", explicit_strength=True, mask_empty_slots=True,
            has_state=True, output_final_state=True, return_lse=True,
        )  # fmt: skip
        yield problem, ForwardConfig.default(problem)


def why_unavailable(device_type: str) -> str | None:
    """Why `triton` cannot run on a device type of this machine at all, or None."""
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "the fused kernels need a GPU, and torch sees none"
    if device_type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"the fused kernels need a CUDA GPU; the tensors are on {device_type}"


def why_not(problem: Problem) -> str | None:
    """Why `triton` cannot serve a call: the limits of the fused kernels."""
    if problem.needs_grad:
        return "the fused kernels have no backward yet"
    if problem.dtype not in DTYPES:
        return f"the fused kernels take float16, bfloat16 or float32, not {str(problem.dtype).removeprefix('torch.')}"
    for name, size in (("D", problem.head_dim), ("Dv", problem.value_dim)):
        if size > 256 or size % 16:
            return f"the fused kernels take multiples of 16 up to 256 as head size, not {name} = {size}"
    if problem.slots > 256:
        return f"the fused kernels take up to 256 slots, not {problem.slots}"
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def run(problem: Problem, inputs: Inputs, config: ForwardConfig | None = None) -> Result:
    """Serve a call with a config (default: `ForwardConfig.default`); never waits for the device."""
    launches, o, lse, final = describe(problem, inputs, config or ForwardConfig.default(problem))
    with torch.cuda.device(inputs.q.device) if problem.device == "cuda" else nullcontext():
        for launch in launches:
            launch()
    return Result(o, lse, *((None, None) if final is None else final_slots(problem, inputs, final)))


def describe(
    problem: Problem, inputs: Inputs, config: ForwardConfig
) -> tuple[list[Launch], Tensor, Tensor | None, Tensor | None]:
    """The launches, in order, and what they fill: o [B, T, HQ, Dv], lse [B, T, HQ] and the slots [N, H, M, E]."""
    state = inputs.state if inputs.state is not None and inputs.state.capacity > 0 else None
    tokens, recent = _tokens(inputs), Tokens(None, None, None, None, None)
    if state is not None:
        recent = Tokens(
            state.k.contiguous(), state.v.contiguous(), state.g.contiguous(),
            None if state.s is None else state.s.contiguous(),
            (state.k if state.k_window is None else state.k_window).contiguous(),
        )  # fmt: skip
    capacity = 0 if state is None else state.capacity
    # Beyond what exists a longer window or delay changes nothing; clamped, all positions fit in 32 bits.
    window = min(problem.window, problem.tokens + capacity)
    delay = problem.delay if state is not None else min(problem.delay, problem.tokens)
    past = -(-delay // config.chunk) * config.chunk if state is not None else 0

    tile_tokens, tile_heads = _tile_tokens(problem, config)
    segments, segment_layout = _pieces(problem, inputs, past - delay, config.segment)
    tiles, tile_layout = _pieces(problem, inputs, 0, tile_tokens)
    heads, slots, dim, value_dim = problem.kv_heads, problem.slots, problem.head_dim, problem.value_dim
    device = inputs.q.device
    pieces = segments if problem.packed else segments * problem.sequences
    ends = torch.empty(pieces, heads, slots, dim + value_dim, dtype=torch.float32, device=device)
    totals = torch.empty(pieces, heads, slots, dtype=torch.float32, device=device)
    chunks = config.segment // config.chunk
    states = torch.empty(pieces * chunks, heads, slots, dim + value_dim, dtype=problem.dtype, device=device)
    initial = initial_slots(problem, inputs)
    final = None
    if problem.output_final_state:
        final = torch.empty(problem.sequences, heads, slots, dim + value_dim, dtype=torch.float32, device=device)
    o = torch.empty(problem.batch, problem.tokens, problem.q_heads, value_dim, dtype=problem.dtype, device=device)
    lse = None
    if problem.return_lse:
        lse = torch.empty(problem.batch, problem.tokens, problem.q_heads, dtype=torch.float32, device=device)

    sizes = {"H": heads, "M": slots}
    columns = config.state_columns
    blocks = -(-dim // columns) + -(-value_dim // columns)
    slot_block = min(64, max(16, triton.next_power_of_2(slots)))
    state_pass = dict(
        tokens=tokens, recent=recent, layout=segment_layout, p_ends=ends, p_totals=totals, p_states=states,
        T=problem.tokens, R=capacity, delay=delay, segments=segments, N=problem.sequences, **sizes, D=dim, DV=value_dim,
        C=config.chunk, L=config.segment, BM=slot_block, BD=columns, EXACT=not config.anchored,
    )  # fmt: skip
    state_grid = (pieces, heads * blocks, -(-slots // slot_block))
    state_options = {"num_warps": config.state_warps, "num_stages": config.state_stages}
    width = 128
    scan_grid = (problem.sequences, heads, slots * -(-(dim + value_dim) // width))
    window_queries = inputs.q if inputs.q_window is None else inputs.q_window
    output = dict(
        p_q=inputs.q.contiguous(), p_q_window=window_queries.contiguous(), tokens=tokens, recent=recent,
        layout=tile_layout, p_first_segment=segment_layout.first, p_states=states,
        rope=None if inputs.rope is None else tuple(x.contiguous() for x in inputs.rope), p_o=o, p_lse=lse,
        T=problem.tokens, R=capacity, P=0 if inputs.rope is None else len(inputs.rope[0]), W=window, delay=delay,
        tiles=tiles, segments=segments, N=problem.sequences, scale=float(inputs.scale), HQ=problem.q_heads, **sizes,
        D=dim, DV=value_dim, C=config.chunk, CHUNKS=chunks, BR=config.rows, BT=tile_tokens, HB=tile_heads,
        J=config.chunk if _aligned(problem, config) else triton.next_power_of_2(config.chunk + tile_tokens - 1),
        BN=config.keys, BM=config.slots, BD=max(16, triton.next_power_of_2(dim)),
        BDV=max(16, triton.next_power_of_2(value_dim)), LEVELS=(tile_tokens - 1).bit_length(),
        MASK_EMPTY=problem.mask_empty_slots, EXACT=not config.anchored,
    )  # fmt: skip
    output_tiles = tiles if problem.packed else tiles * problem.sequences
    output_grid = (output_tiles * heads * -(-problem.group // tile_heads),)
    launches = [
        Launch(segment_kernel, state_grid, {**state_pass, "BT": 64, "WRITE": False}, state_options),
        Launch(
            scan_kernel,
            scan_grid,
            dict(
                layout=segment_layout, p_ends=ends, p_totals=totals, p_initial=initial, p_final=final,
                segments=segments, **sizes, E=dim + value_dim, BE=width,
            ),  # fmt: skip
            {"num_warps": 1},
        ),
        Launch(segment_kernel, state_grid, {**state_pass, "BT": min(64, config.chunk), "WRITE": True}, state_options),
        Launch(
            output_kernel, output_grid, output, {"num_warps": config.output_warps, "num_stages": config.output_stages}
        ),
    ]
    return launches, o, lse, final


def _tokens(inputs: Inputs) -> Tokens:
    k_window = inputs.k if inputs.k_window is None else inputs.k_window
    s = None if inputs.s is None else inputs.s.contiguous()
    return Tokens(inputs.k.contiguous(), inputs.v.contiguous(), inputs.g.contiguous(), s, k_window.contiguous())


def _pieces(problem: Problem, inputs: Inputs, extra: int, size: int) -> tuple[int, Layout]:
    """Cut each sequence, `extra` tokens longer, into pieces of `size`: how many (a sequence, or for packed sequences an
    upper bound in all), and whose they are."""
    seen = None if inputs.state is None or inputs.state.capacity == 0 else inputs.state.seen
    if inputs.cu_seqlens is None:
        return -(-max(0, problem.tokens + extra) // size), Layout(None, seen, None, None)
    length = inputs.cu_seqlens.diff()
    count = torch.where(length > 0, (length + extra + size - 1).clamp(min=0) // size, 0)
    bound = max(0, problem.tokens + problem.sequences * max(0, extra)) // size + problem.sequences
    return bound, Layout(inputs.cu_seqlens, seen, *map_pieces(count, bound))
