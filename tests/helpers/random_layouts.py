"""Random networks on tokens [N, T, C] whose blocks hand their layers the samples in layouts of every kind."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

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


def _sorted(block: nn.Module, x: Tensor) -> Tensor:
    """Samples in order of what they hold, and back."""
    order = x.detach().sum((1, 2)).argsort()
    return block(x[order])[order.argsort()]


def _lengths(x: Tensor) -> Tensor:
    """As many tokens of each sample as its first one says, 1 or more."""
    return 1 + (x[:, 0, 0].detach().sigmoid() * x.shape[1]).long().clamp(max=x.shape[1] - 1)


def _packed(block: nn.Module, x: Tensor) -> Tensor:
    """The first tokens of each sample as PyTorch packs them: all samples' first, then all samples' second."""
    rows = pack_padded_sequence(x, _lengths(x), batch_first=True, enforce_sorted=False)
    rows = PackedSequence(block(rows.data), rows.batch_sizes, rows.sorted_indices, rows.unsorted_indices)
    return pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])[0]


def _ragged(block: nn.Module, x: Tensor) -> Tensor:
    """The first tokens of each sample, one sample's after another's, cut by numbers of Python."""
    counts = _lengths(x).tolist()
    parts = block(torch.cat([each[:count] for each, count in zip(x, counts, strict=True)])).split(counts)
    return torch.stack([part.mean(0) for part in parts])[:, None]


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
    "sorted": _sorted,
    "packed": _packed,
    "ragged": _ragged,
}
# which rows are whose has to be followed in a batch of several samples
MOVING = ("routed", "sorted", "packed", "ragged")


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
        self.layouts = rng.choices(list(LAYOUTS), [1 if name in ("shared", *MOVING) else 2 for name in LAYOUTS], k=4)
        self.blocks = nn.ModuleList(Block(rng.choice((5, 7)), tokens) for _ in self.layouts)
        self.pool = rng.choice(("mean", "first", "largest"))
        self.second = rng.random() < 0.3  # takes another input, with its samples along the second dimension

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.embed(x) if other is None else self.embed(x) + self.embed(other).mean(0)[:, None]
        for layout, block in zip(self.layouts, self.blocks, strict=True):
            x = x + LAYOUTS[layout](block, x)
        pooled = {"mean": lambda: x.mean(1), "first": lambda: x[:, 0], "largest": lambda: x.amax(1)}[self.pool]()
        return self.head(pooled)


@dataclass
class RandomLayouts:
    """model: float64, in evaluation mode. untold: groups that have no score in batches of several samples. others: for
    each sample, what the model's second input [T, N, 4] holds, samples first; None of a model without."""

    model: Layouts
    inputs: Tensor
    untold: set[str]
    others: Tensor | None = None


def generate(seed: int) -> RandomLayouts:
    """The network of this seed, always the same; every other one has as many tokens as samples."""
    rng = random.Random(seed)
    samples = 4
    tokens = samples if seed % 2 else rng.choice((2, 6, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Layouts(rng, tokens).double().eval()
        x = torch.randn(samples, tokens, 4, dtype=torch.float64)
        others = torch.randn_like(x) if model.second else None
    untold = {f"blocks.{i}.one" for i, layout in enumerate(model.layouts) if layout == "shared"}
    return RandomLayouts(model, x, untold, others)
