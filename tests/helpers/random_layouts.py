"""Random networks on tokens [N, T, C] whose blocks hand their layers the samples in layouts of every kind."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTH = 6

Layout = Callable[[nn.Module, Tensor], Tensor]


def _windows(block: nn.Module, x: Tensor) -> Tensor:
    """Pairs of tokens, in the batch."""
    n, t = x.shape[:2]
    return block(x.reshape(n * t // 2, 2, WIDTH)).reshape(x.shape)


def _samples_together(block: nn.Module, x: Tensor) -> Tensor:
    """Rows of tokens, those of one place together."""
    return block(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)


def _stacked(block: nn.Module, x: Tensor) -> Tensor:
    """Two views in one batch."""
    one, two = block(torch.cat([x, x.flip(1)])).chunk(2)
    return one * two


def _shared(block: nn.Module, x: Tensor) -> Tensor:
    """Learned queries, the same for all samples; as many as there are tokens, and samples."""
    return x * block(block.queries)[None, :, None].mean(3)  # type: ignore[operator, index]


def _routed(block: nn.Module, x: Tensor) -> Tensor:
    """The tokens whose first channel is positive."""
    rows = x.flatten(0, 1)
    at = (rows[:, 0] > 0).nonzero()[:, 0]
    return torch.zeros_like(rows).index_add(0, at, block(rows[at])).reshape(x.shape)


LAYOUTS: dict[str, Layout] = {
    "batch first": lambda block, x: block(x),
    "sequence first": lambda block, x: block(x.transpose(0, 1)).transpose(0, 1),
    "rows": lambda block, x: block(x.flatten(0, 1)).reshape(x.shape),
    "samples together": _samples_together,
    "windows": _windows,
    "stacked": _stacked,
    "pooled": lambda block, x: block(x.mean(1))[:, None],
    "shared": _shared,
    "routed": _routed,
}
UNTOLD = ("shared", "routed")  # which rows are whose cannot be told in a batch of several samples


class Block(nn.Module):
    """WIDTH -> hidden -> WIDTH on whatever rows it is given."""

    def __init__(self, hidden: int, tokens: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.queries = nn.Parameter(torch.randn(tokens, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.one(x))
        return self.two(hidden)


class Layouts(nn.Module):
    """Residual blocks, each in a layout of its own, then logits of what is pooled from the tokens."""

    def __init__(self, rng: random.Random, tokens: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.layouts = rng.choices(list(LAYOUTS), [1 if name in UNTOLD else 2 for name in LAYOUTS], k=4)
        self.blocks = nn.ModuleList(Block(rng.choice((5, 7)), tokens) for _ in self.layouts)
        self.pool = rng.choice(("mean", "first", "largest"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layout, block in zip(self.layouts, self.blocks, strict=True):
            x = x + LAYOUTS[layout](block, x)
        pooled = {"mean": lambda: x.mean(1), "first": lambda: x[:, 0], "largest": lambda: x.amax(1)}[self.pool]()
        return self.head(pooled)


@dataclass
class RandomLayouts:
    """model: float64, in evaluation mode. untold: groups that have no score in batches of several samples."""

    model: Layouts
    inputs: Tensor
    untold: set[str]


def generate(seed: int) -> RandomLayouts:
    """The network of this seed, always the same; every other one has as many tokens as samples."""
    rng = random.Random(seed)
    samples = 4
    tokens = samples if seed % 2 else rng.choice((2, 6, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Layouts(rng, tokens).double().eval()
        x = torch.randn(samples, tokens, 4, dtype=torch.float64)
    return RandomLayouts(model, x, {f"blocks.{i}.one" for i, layout in enumerate(model.layouts) if layout in UNTOLD})
