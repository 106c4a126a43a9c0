"""What random networks mostly consist of: convolutions, activations, sums, concatenations, and cuts of channels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from random_generating import Generating
from random_program import SIZE, WIDTHS, equal_parts
from torch import Tensor, nn


class Standardised(nn.Conv2d):
    """Computes its weight from its parameters, of all inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 0.1).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Steps(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def common(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.conv: 5, self.channelwise: 4, self.activation: 5, self.residual: 3, self.combine: 3,
                self.concat: 2, self.halves: 2, self.grouped: 1, self.transposed: 1, self.again: 1, self.resize: 2,
                self.squeeze_excite: 1, self.hostile: 1}

    def conv(self, source: int | None = None, width: int | None = None) -> int | None:
        source = self.pick() if source is None else source
        if source is None:
            return None
        value, size = self.values[source], self.rng.choice((1, 3))
        out = self.new_labels(width or self.rng.choice(WIDTHS))
        kind = Standardised if self.more and self.rng.random() < 0.3 else nn.Conv2d
        layer = kind(len(value.labels), len(out), size, padding=size // 2, bias=self.rng.random() < 0.5)
        return self.call("conv", source, out, value.size, layer)

    def grouped(self) -> int | None:
        source = self.pick(lambda value: len(value.labels) % 2 == 0)
        if source is None:
            return None
        value, out = self.values[source], self.new_labels(self.rng.choice(WIDTHS))
        layer = nn.Conv2d(len(value.labels), len(out), 3, padding=1, groups=2)
        if len(value.labels) == 2:  # an input goes with what is made of it alone
            made = [label for label in value.labels for _ in range(len(out) // 2)]
            return self.add("multiplier", (source,), made, value.size, lambda layer, x: layer(x), layer, fresh=True)
        return self.call("grouped", source, out, value.size, layer, 2)

    def transposed(self) -> int | None:
        source = self.pick(lambda value: value.size <= SIZE // 2)
        if source is None:
            return None
        value, out = self.values[source], self.new_labels(self.rng.choice(WIDTHS))
        layer = nn.ConvTranspose2d(len(value.labels), len(out), 2, 2, bias=self.rng.random() < 0.5)
        return self.call("transposed", source, out, 2 * value.size, layer)

    def again(self) -> int | None:
        """A convolution that another value went through already."""
        used = [step for step in self.steps if step.name == "conv"]
        if not used:
            return None
        step = self.rng.choice(used)
        assert step.layer is not None
        layer = self.layers[step.layer]
        source = self.pick(lambda value: len(value.labels) == layer.in_channels)
        if source is None:
            return None
        return self.call("again", source, self.new_labels(layer.out_channels), self.values[source].size, step.layer)

    def channelwise(self) -> int | None:
        source = self.pick()
        if source is None:
            return None
        value = self.values[source]
        width = len(value.labels)
        kind = self.rng.choice(("depthwise", "norm", "norm", "norm", "instance", "prelu", "slope"))
        layer = {"depthwise": lambda: nn.Conv2d(width, width, 3, padding=1, groups=width),
                 "norm": lambda: nn.BatchNorm2d(width), "prelu": lambda: nn.PReLU(width), "slope": lambda: nn.PReLU(),
                 "instance": lambda: nn.InstanceNorm2d(width, affine=True)}[kind]()
        return self.add(kind, (source,), value.labels, value.size, lambda layer, x: layer(x), layer,
                        fresh=kind in ("depthwise", "norm"))

    def activation(self) -> int | None:
        source = self.pick()
        if source is None:
            return None
        value = self.values[source]
        if value.fresh and self.rng.random() < 0.5:
            name, run = self.rng.choice([("relu_", torch.relu_), ("leaky_", lambda x: F.leaky_relu(x, 0.1, True)),
                                         ("hardswish_", lambda x: F.hardtanh_(x, -1, 1))])
            value.dead = True
        else:
            name, run = self.rng.choice([("relu", torch.relu), ("gelu", F.gelu), ("tanh", torch.tanh), ("silu", F.silu),
                                         ("hardswish", F.hardswish), ("half", lambda x: x / 2 + 0.1),
                                         ("dropout", lambda x: F.dropout(x, 0.5, training=False))])
        return self.add(name, (source,), value.labels, value.size, run)

    def resize(self) -> int | None:
        source = self.pick(lambda value: value.size >= 4)
        if source is None:
            return None
        value = self.values[source]
        name, run = self.rng.choice([("maxpool", lambda x: F.max_pool2d(x, 2)),
                                     ("avgpool", lambda x: F.avg_pool2d(x, 2)),
                                     ("strided", lambda x: x[:, :, ::2, ::2])])
        if value.size < SIZE and self.rng.random() < 0.3:
            mode = self.rng.choice(("nearest", "bilinear"))
            return self.add(mode, (source,), value.labels, 2 * value.size,
                            lambda x: F.interpolate(x, scale_factor=2, mode=mode))
        return self.add(name, (source,), value.labels, value.size // 2, run)

    def combine(self) -> int | None:
        pair = self.pair()
        if pair is None:
            return None
        first, second = (self.values[i] for i in pair)
        ties = [(first.labels, second.labels)]
        if first.fresh and first is not second and self.rng.random() < 0.4:
            first.dead = True

            def iadd(x: Tensor, y: Tensor) -> Tensor:
                x += y
                return x

            return self.add("iadd", pair, first.labels, first.size, iadd, ties=ties)
        name, run, fresh = self.rng.choice([("add", torch.add, True), ("sub", torch.sub, True),
                                            ("mul", lambda x, y: x * torch.sigmoid(y), False)])
        return self.add(name, pair, first.labels, first.size, run, fresh=fresh, ties=ties)

    def as_wide(self) -> int | None:
        """A view of one value, in the width of another, which autograd does not see."""
        pair = self.pair()
        if pair is None or set(self.values[pair[0]].labels) & set(self.values[pair[1]].labels):
            return None
        other, first = (self.values[i].labels for i in pair)
        return self.add("as wide", pair[::-1], first, self.values[pair[1]].size,
                        lambda x, y: x.reshape(len(x), y.shape[1], *x.shape[2:]), alike=[*first, *other])

    def residual(self) -> int | None:
        """x + a convolution or two of x; among more kinds, with a gate between them."""
        source = self.pick()
        if source is None:
            return None
        width = len(self.values[source].labels)
        branch = self.conv(source)
        assert branch is not None
        if self.rng.random() < 0.7:
            labels, size = self.values[branch].labels, self.values[branch].size
            if self.with_kinds and len(labels) % 4 == 0:  # no draw, which would change all that comes after it
                parts = equal_parts(labels, 2)
                branch = self.add("gated", (branch,), parts[0], size, lambda x: F.glu(x, 1), ties=[parts])
            else:
                branch = self.add("relu", (branch,), labels, size, torch.relu)
            branch = self.conv(branch, width)
        elif len(self.values[branch].labels) != width:
            return branch
        assert branch is not None
        one, other = self.values[source], self.values[branch]
        return self.add("add", (source, branch), one.labels, one.size, torch.add, fresh=True,
                        ties=[(one.labels, other.labels)])

    def squeeze_excite(self) -> int | None:
        source = self.pick()
        if source is None:
            return None
        value = self.values[source]
        pooled = self.add("pool", (source,), value.labels, 1, lambda x: x.mean((2, 3), keepdim=True))
        self.values[pooled].dead = True  # for others
        squeezed = self.conv(pooled)
        assert squeezed is not None
        self.values[squeezed].dead = True
        small = self.add("silu", (squeezed,), self.values[squeezed].labels, 1, F.silu)
        self.values[small].dead = True
        scale = self.conv(small, len(value.labels))
        assert scale is not None
        self.values[scale].dead = True
        return self.add("excite", (source, scale), value.labels, value.size, lambda x, s: x * torch.sigmoid(s),
                        ties=[(value.labels, self.values[scale].labels)])

    def concat(self) -> int | None:
        first = self.pick(lambda value: len(value.labels) <= 8)
        if first is None:
            return None
        value = self.values[first]
        other = self.pick(lambda o: o.size == value.size and len(o.labels) <= 8)
        if other is None:
            return None
        return self.add("cat", (first, other), value.labels + self.values[other].labels, value.size,
                        lambda *xs: torch.cat(xs, 1), fresh=True)

    def halves(self) -> int | None:
        """chunk, or split into equal parts; both parts go on."""
        source = self.pick(lambda value: len(value.labels) % 2 == 0 and len(value.labels) >= 4)
        if source is None:
            return None
        value = self.values[source]
        half = len(value.labels) // 2
        way = self.rng.choice(("chunk", "split"))
        parts = self.add(way, (source,), value.labels, value.size,  # the program's value is a tuple of two
                         lambda x: x.chunk(2, 1) if way == "chunk" else x.split(half, 1),
                         ties=[equal_parts(value.labels, 2)], fixes=value.labels if way == "split" else [])
        self.values[parts].dead = True
        left = self.add("left", (parts,), value.labels[:half], value.size, lambda both: both[0])
        right = self.add("right", (parts,), value.labels[half:], value.size, lambda both: both[1])
        return self.rng.choice((left, right))

    def hostile(self) -> int | None:
        """A cut or a permutation of channels that the code fixes; or a shuffle of two halves, which stay alike."""
        source = self.pick(lambda value: len(value.labels) % 2 == 0 and len(value.labels) >= 4)
        if source is None:
            return None
        value = self.values[source]
        labels, width = value.labels, len(value.labels)
        kind = self.rng.choice(("shuffle", "flip", "first", "split", "roll", "select"))
        if kind == "split":
            parts = self.add("split", (source,), labels, value.size, lambda x: x.split([1, width - 1], 1), fixes=labels)
            self.values[parts].dead = True
            return self.add("part", (parts,), labels[1:], value.size, lambda both: both[1])
        table: dict[str, tuple[list[int], Callable[[Tensor], Tensor]]] = {
            "shuffle": ([labels[i % 2 * (width // 2) + i // 2] for i in range(width)],
                        lambda x: x.reshape(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)),
            "flip": (labels[::-1], lambda x: x.flip(1)),
            "first": (labels[:width - 1], lambda x: x[:, :width - 1]),
            "roll": (labels[1:] + labels[:1], lambda x: x.roll(-1, 1)),
            "select": ([labels[0], labels[2]], lambda x: x[:, [0, 2]]),
        }
        halves = {"ties": [equal_parts(labels, 2)]} if kind == "shuffle" else {"fixes": labels}
        return self.add(kind, (source,), table[kind][0], value.size, table[kind][1], **halves)
