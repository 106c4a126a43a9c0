"""Steps of random networks that divide channels over several dimensions: branches weighed against each other, split
attention, channel shuffles; and convolutions of which whole groups go."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from random_generating import Generating
from random_program import WIDTHS, equal_parts
from torch import Tensor, nn

PATHS = 2


class Weighing(nn.Module):
    """The sum of values, each channel of which is weighed by what a squeeze of both makes.

    way: how the weights come to lie by branches: a view whose width is open, or kept, or has branches last; or taken
    apart.
    """

    def __init__(self, width: int, small: int, way: str) -> None:
        super().__init__()
        self.width, self.paths, self.way = width, PATHS, way
        self.reduce, self.select = nn.Linear(width, small), nn.Linear(small, PATHS * width)

    def forward(self, *values: Tensor) -> Tensor:
        """[N, C, H, W], ... -> the same."""
        x = torch.stack(values, 1)
        made = self.select(self.reduce(x.sum(1).mean((2, 3))).tanh())
        if self.way == "apart":
            parts = made.view(len(made), self.paths, -1, 1, 1).softmax(1).chunk(self.paths, 1)
            return values[0] * parts[0].squeeze(1) + values[1] * parts[1].squeeze(1)
        if self.way == "last":
            weights = made.unflatten(1, (-1, self.paths)).softmax(2).transpose(1, 2)[..., None, None]
        else:
            weights = made.view(len(made), self.paths, self.width if self.way == "kept" else -1, 1, 1).softmax(1)
        return (x * weights).sum(1)


class Parts(Weighing):
    """The same of the equal parts of one value."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2·C, H, W] -> [N, C, H, W]."""
        y = x.reshape(len(x), self.paths, x.shape[1] // self.paths, *x.shape[2:])
        made = self.select(self.reduce(y.sum(1).mean((2, 3))).tanh())
        weights = made.view(len(x), 1, self.paths, -1).transpose(1, 2).softmax(1).reshape(len(x), -1)
        return (y * weights.view(len(x), self.paths, x.shape[1] // self.paths, 1, 1)).sum(1)


def shuffled(x: Tensor) -> Tensor:
    """Channel i of each half goes to place 2·i, or 2·i + 1."""
    return x.view(len(x), PATHS, x.shape[1] // PATHS, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


class Views(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def views(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.weighed: 3, self.split_attention: 2, self.interleaved: 3, self.whole_groups: 3}

    def weighed(self) -> int | None:
        """Two values, channel by channel."""
        pair = self.pair()
        if pair is None or pair[0] == pair[1]:
            return None
        labels, other = (self.values[source].labels for source in pair)
        way, small = self.rng.choice(("open", "kept", "last", "apart")), self.new_labels(3)
        made = [label for label in labels for _ in range(PATHS)] if way == "last" else labels * PATHS
        return self.add("weighed", pair, labels, self.values[pair[0]].size, lambda layer, *values: layer(*values),
                        Weighing(len(labels), len(small), way), ties=[(labels, other)],
                        within=[(".reduce", labels, small), (".select", small, made)])

    def split_attention(self) -> int | None:
        """Parts of what a convolution makes."""
        source = self.conv(None, PATHS * self.rng.choice((3, 4)))
        if source is None:
            return None
        parts, small = equal_parts(self.values[source].labels, PATHS), self.new_labels(3)
        return self.add("split attention", (source,), parts[0], self.values[source].size, lambda layer, x: layer(x),
                        Parts(len(parts[0]), len(small), ""), ties=[parts],
                        within=[(".reduce", parts[0], small), (".select", small, parts[0] * PATHS)])

    def interleaved(self) -> int | None:
        """A shuffle of two groups."""
        source = self.pick(lambda value: len(value.labels) % PATHS == 0)
        if source is None:
            return None
        parts = equal_parts(self.values[source].labels, PATHS)
        return self.add("interleaved", (source,), [label for pair in zip(*parts, strict=True) for label in pair],
                        self.values[source].size, shuffled, fresh=True, onward=[parts])

    def whole_groups(self) -> int | None:
        """A convolution that makes two outputs of each input, or one of each two."""
        source = self.pick(lambda value: 2 < len(value.labels) <= 2 * max(WIDTHS) and len(value.labels) % 2 == 0)
        if source is None:
            return None
        value = self.values[source]
        labels, width = value.labels, len(value.labels)
        if width <= max(WIDTHS) and self.rng.random() < 0.5:
            layer = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
            return self.add("multiplier", (source,), [label for label in labels for _ in range(2)], value.size,
                            lambda layer, x: layer(x), layer, fresh=True)
        layer = nn.Conv2d(width, width // 2, 3, padding=1, groups=width // 2)
        return self.add("sets", (source,), labels[::2], value.size, lambda layer, x: layer(x), layer, fresh=True,
                        ties=[(labels[::2], labels[1::2])])
