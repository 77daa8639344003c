"""A small language model learns, and learns the same whichever backend serves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pydoc_data import topics

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nha_kernels import native_hybrid_attention
from nha_kernels.fused import limits

from .helpers import DEVICE, ON_GPU, budget, error

needs_cuda = pytest.mark.skipif(not ON_GPU, reason="hundreds of steps of the fused kernels take a GPU")
# Half a megabyte that ships with Python: what its help() says.
TEXT = "".join(topics.topics[name] for name in sorted(topics.topics)).encode()


@dataclass(frozen=True)
class Run:
    """What one training run is. dtype: of the model; narrow: of what attention is given, gates apart."""

    backend: str
    steps: int
    dtype: torch.dtype = torch.float32
    narrow: torch.dtype = torch.float32
    batch: int = 8
    tokens: int = 96
    width: int = 64
    head_dim: int = 16
    window: int = 16
    rate: float = 3e-3
    seed: int = 0


def rope_tables(run: Run) -> tuple[Tensor, Tensor]:
    rates = 10000.0 ** -torch.linspace(0, 1, run.head_dim // 2 + 1, dtype=torch.float64)[:-1]
    angle = torch.arange(run.tokens, dtype=torch.float64)[:, None] * rates
    return angle.cos().to(DEVICE, run.dtype), angle.sin().to(DEVICE, run.dtype)


class Attention(nn.Module):
    """Two query heads for each of two kv heads."""

    HEADS = 2
    GROUP = 2
    SLOTS = 16

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.sizes = [self.GROUP * self.HEADS * run.head_dim, *[self.HEADS * run.head_dim] * 2, self.HEADS * self.SLOTS]
        self.into = nn.Linear(run.width, sum(self.sizes))
        self.out = nn.Linear(self.sizes[0], run.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v, gates = self.into(x).split(self.sizes, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.run.head_dim)).to(self.run.narrow) for y in (q, k, v))
        # Gates that begin near -1/16: slots that remember.
        g = F.logsigmoid(gates.unflatten(-1, (self.HEADS, self.SLOTS))) / 16
        o, _ = native_hybrid_attention(q, k, v, g, self.run.window, rope=rope, backend=self.run.backend)
        return self.out(o.to(x.dtype).flatten(-2))


class Block(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(run.width) for _ in range(2))
        self.attention = Attention(run)
        self.into = nn.Linear(run.width, 4 * run.width)
        self.out = nn.Linear(2 * run.width, run.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norms[0](x), rope)
        return x + self.out(F.glu(self.into(self.norms[1](x))))


class Model(nn.Module):
    """Of bytes: two layers, and a head that is the embedding."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, run.width)
        self.blocks = nn.ModuleList(Block(run) for _ in range(2))
        self.norm = nn.RMSNorm(run.width)
        nn.init.normal_(self.embedding.weight, std=run.width**-0.5)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, rope)
        return F.linear(self.norm(x), self.embedding.weight)


def train(run: Run) -> Tensor:
    """The loss of each step, fp64 [steps]; a seed fixes all that is random, whatever the dtypes and the device."""
    random = torch.Generator().manual_seed(run.seed)
    text = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = Model(run).to(DEVICE, run.dtype)
    rope = rope_tables(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate)
    losses = []
    for _ in range(run.steps):
        begin = torch.randint(len(text) - run.tokens, (run.batch, 1), generator=random)
        batch = text[begin + torch.arange(run.tokens + 1)].long().to(DEVICE)
        loss = F.cross_entropy(model(batch[:, :-1], rope).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


def smoothed(losses: Tensor) -> Tensor:
    """Means of 20 steps: the batches' own ups and downs are larger than what a run learns between two of them."""
    return losses.unfold(0, 20, 1).mean(-1)


def entropy() -> float:
    """The loss of a model that knows how often each byte occurs, and nothing of what stands before it."""
    share = torch.bincount(torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).int()).double() / len(TEXT)
    return torch.special.entr(share).sum().item()


def assert_learns(losses: Tensor) -> None:
    assert losses.isfinite().all()
    assert smoothed(losses)[-1] < entropy() - 0.3


def test_learns() -> None:
    run = Run("chunked", steps=60)
    losses = train(run)
    assert_learns(losses)
    short = replace(run, steps=10)
    again = train(short)
    if ON_GPU:  # where contributions are added up in any order
        assert error(again, losses[:10]) < 1e-3
    else:
        assert torch.equal(again, losses[:10])


@pytest.mark.skipif(limits.why_unavailable(DEVICE) is not None, reason=str(limits.why_unavailable(DEVICE)))
def test_the_fused_kernels_take_the_same_steps() -> None:
    """In fp32, within what fp32 loses: twice as far from a run in float64 as chunked's losses, at most."""
    run = Run("chunked", steps=3, batch=1, tokens=24, window=5)
    exact = train(replace(run, dtype=torch.float64, narrow=torch.float64))
    allowed = budget(error(train(run), exact), torch.float32)
    assert error(train(replace(run, backend="triton")), exact) <= allowed


@needs_cuda
def test_the_fused_kernels_learn_as_much() -> None:
    """In bf16 two runs part ways as soon as a rounding differs. How far apart is usual: as far as chunked in bf16 is
    from chunked in fp32. Two runs that each are so far from fp32 are twice that from each other, at most; means over
    some seeds, since how far one run strays is chance."""
    between, usual = [], []
    for seed in range(3):
        wide = Run("chunked", steps=250, width=128, head_dim=64, tokens=256, rate=1e-3, seed=seed)
        narrow = replace(wide, narrow=torch.bfloat16)
        fused = train(replace(narrow, backend="triton"))
        plain, right = train(narrow), train(wide)
        for losses in (fused, plain, right):
            assert_learns(losses)
        between.append((smoothed(fused) - smoothed(plain)).abs().mean())
        usual.append((smoothed(plain) - smoothed(right)).abs().mean())
    assert sum(between) <= 2 * sum(usual)
