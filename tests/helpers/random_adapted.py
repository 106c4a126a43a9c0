"""Steps of random networks as language models and adapted ones have them: attention with biases by distance, with
shared keys that are turned, layers whose weights lie the other way round, bottlenecks beside a stream; and gates of all
channels, which keep them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from random_generating import Generating
from random_heads import APART, FUSED, OWN, Asking, Turned
from random_heads import HEADS as OF_QUERIES
from random_kinds import Gated
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HEADS, SHARED, DIMS = 4, 2, 4  # of queries; of keys and values; the width of each


class Distant(Asking):
    """ALiBi: the further two places are apart, the less one asks the other, each head by a slope of its own."""

    def __init__(self, width: int, names: tuple[str, ...], dims: int) -> None:
        super().__init__(width, names, dims)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, OF_QUERIES + 1))

    def weigh(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, heads, T, dims], twice -> [N, heads, T, T]."""
        at = torch.arange(q.shape[2])
        away = (at[:, None] - at).abs()
        return (q @ k.mT * q.shape[-1] ** -0.5 - self.slopes[:, None, None] * away).softmax(-1)


class Shared(Turned):
    """Queries of two heads share keys and values; queries and keys are turned by their places."""

    def __init__(self, width: int, own: bool) -> None:
        Gated.__init__(self)
        self.names, self.own = OWN if own else APART, own
        if own:
            self.asking, self.asked, self.each = HEADS, SHARED, DIMS
        else:
            self.num_heads, self.num_key_value_heads, self.head_dim = HEADS, SHARED, DIMS
        for name, heads in zip(self.names[:-1], (HEADS, SHARED, SHARED), strict=True):
            self.add_module(name, nn.Linear(width, heads * DIMS))
        self.add_module(self.names[-1], nn.Linear(HEADS * DIMS, width))

    def attend(self, x: Tensor) -> Tensor:
        """[N, T, C] -> the same."""
        heads, shared, dims = (self.asking, self.asked, self.each) if self.own else (
            self.num_heads, self.num_key_value_heads, self.head_dim)
        *asking, last = self.names
        q, k, v = (getattr(self, name)(self.through(name, x)).view(*x.shape[:2], number, dims).transpose(1, 2)
                   for name, number in zip(asking, (heads, shared, shared), strict=True))
        k, v = (each.repeat_interleave(heads // shared, 1) for each in (k, v))
        y = self.weigh(q, k) @ v
        return getattr(self, last)(self.through(last, y.transpose(1, 2).reshape(*x.shape[:2], heads * dims)))

    def within(self, reads: list[int], heads: list[int], made: list[int], out: list[int]
               ) -> list[tuple[str, list[int], list[int]]]:
        """See Asking. heads: of keys."""
        query, key = ([label for label in heads for _ in range(times)] for times in (HEADS // SHARED * DIMS, DIMS))
        return [*((f".{name}", reads, made) for name, made in zip(self.names, (query, key, key), strict=False)),
                (f".{self.names[-1]}", query, out)]


class Bottleneck(Gated):
    """What a few channels make of all: layers of tokens, whose weights may lie as transformers' Conv1D have them."""

    def __init__(self, width: int, small: int, turned: bool) -> None:
        super().__init__()
        self.down, self.up = (Conv1D(small, width), Conv1D(width, small)) if turned else (
            nn.Linear(width, small), nn.Linear(small, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        y = F.gelu(self.down(self.through("down", x.flatten(2).transpose(1, 2).contiguous())))
        return self.up(self.through("up", y)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class Neighbours(nn.Module):
    """ECA: each channel is weighed by the means of those beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


class Places(nn.Module):
    """CBAM: each place is weighed by the mean and the most of all channels there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class Adapted(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def adapted(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.distant: 4, self.shared: 4, self.bottleneck: 5, self.kept_by_a_gate: 1}

    def distant(self) -> int | None:
        """Heads go with their slope."""
        source = self.pick()
        return None if source is None else self.asking(source, Distant, OF_QUERIES,
                                                       self.rng.choice((FUSED, APART, OWN)), 2)

    def shared(self) -> int | None:
        """Heads go with the keys and values that they share; what is turned stays as wide."""
        source = self.pick()
        return None if source is None else self.asking(source, Shared, SHARED, self.rng.random() < 0.5)

    def asking(self, source: int, kind: type[Asking], count: int, *how: Any) -> int:
        """A step of attention of so many heads that can go."""
        reads = self.values[source].labels
        heads, out = self.new_labels(count), self.new_labels(len(reads))
        layer = kind(len(reads), *how)
        return self.add(kind.__name__.lower(), (source,), out, self.values[source].size, lambda layer, x: layer(x),
                        layer, within=layer.within(reads, heads, [], out))

    def bottleneck(self) -> int | None:
        """Beside what it reads, or in its place; what lies within goes."""
        source = self.pick()
        if source is None:
            return None
        reads, beside = self.values[source].labels, self.rng.random() < 0.7
        small, out = self.new_labels(self.rng.choice((2, 3))), self.new_labels(len(reads))
        return self.add("bottleneck", (source,), out, self.values[source].size,
                        (lambda layer, x: x + layer(x)) if beside else (lambda layer, x: layer(x)),
                        Bottleneck(len(reads), len(small), self.rng.random() < 0.6),
                        within=[(".down", reads, small), (".up", small, out)], ties=[(reads, out)] if beside else [])

    def kept_by_a_gate(self) -> int | None:
        """Which weighs channels by each other: none can go."""
        source = self.pick()
        if source is None:
            return None
        labels, weight = self.values[source].labels, self.new_labels(1)
        return self.add("gate", (source,), labels, self.values[source].size, lambda layer, x: layer(x),
                        Neighbours() if self.rng.random() < 0.5 else Places(),
                        within=[(".conv", None, weight)], stays=labels + weight)
