"""Layers that compute what PyTorch's own do not, as steps of random networks: norms over channels by their definition,
widths that a module keeps, parameters that no layer holds, attention."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from random_attention import HEADS, Attend
from random_generating import Generating
from torch import Tensor, nn


class OverChannels(nn.Module):
    """A normalisation over the channels of an image, by its definition, and an activation behind it that it holds, or
    none. gate: of each sample's channels, [N, C], where they count: None for all ones. spread: whether it is divided by
    how far it is from its mean, which it keeps where it is not centered."""

    def __init__(self, centered: bool, width: int, activation: nn.Module | None = None, spread: bool = False) -> None:
        super().__init__()
        self.act = activation
        self.centered, self.spread, self.eps, self.gate = centered, spread, 0.1, None
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if centered else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        counted = x if self.gate is None else x * self.gate[:, :, None, None]
        mean = counted.mean(1, keepdim=True) if self.centered or self.spread else 0.0
        y = (x - mean if self.centered else x) / ((counted - mean).square().mean(1, keepdim=True) + self.eps).sqrt()
        y = y * self.weight[:, None, None]
        y = y if self.bias is None else y + self.bias[:, None, None]
        return y if self.act is None else self.act(y)


class Swapped(nn.Module):
    """Cuts its input at a place that it keeps, and puts the parts the other way round."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return torch.cat(x.split(self.sizes, 1)[::-1], 1)


class Owned(nn.Module):
    """A parameter of its own meets each channel, in one of the ways that models have."""

    def __init__(self, way: str, width: int, size: int) -> None:
        super().__init__()
        shape = {"gamma": (width, 1, 1), "vector": (width,), "gain": (1, width, 1, 1), "places": (1, width, size, size),
                 "tokens": (1, size * size, width), "scalar": (1,), "both": (2, width)}[way]
        self.way, self.gamma = way, nn.Parameter(0.5 + torch.rand(shape))
        self.looked_up = width == 8
        if (way, width) == ("tokens", 6):  # of which the code reads the weight
            self.table = nn.Embedding(size * size + 1, width)
            del self.gamma

    def tokens(self, count: int) -> Tensor:
        """An embedding of positions, as it is or looked up."""
        if hasattr(self, "table"):
            return self.table.weight[None, :count]
        return self.gamma[:, torch.arange(count)] if self.looked_up else self.gamma

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        if self.way == "vector":
            return x * self.gamma.view(1, -1, 1, 1)
        if self.way == "tokens":  # of a model that has its channels last
            y = x.flatten(2).transpose(1, 2)
            return (y + self.tokens(y.shape[1])).transpose(1, 2).reshape(x.shape)
        if self.way == "both":
            return x * self.gamma[0][:, None, None] + self.gamma[1].view(-1, 1, 1)
        return x + self.gamma if self.way == "places" else x * self.gamma


class Waves(nn.Module):
    """Places of an image by sines: it makes them of nothing that a layer made."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [C, H, W]."""
        height, width = (torch.arange(size, dtype=x.dtype) / self.width for size in x.shape[2:])
        return torch.sin(torch.arange(1, self.width + 1, dtype=x.dtype)[:, None, None] * (height[:, None] - width))


class Located(nn.Module):
    """Its input with places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.waves = Waves(width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return x + self.waves(x)


class Layers(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def own_layers(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.owned: 5, self.over_channels: 4, self.swapped: 4, self.attended: 4}

    def over_channels(self) -> int | None:
        """A LayerNorm, RMSNorm or SimpleNorm, some with an activation inside."""
        drawn = self.rng.random()
        activation = nn.SiLU() if drawn % 0.2 < 0.1 else None
        return self.counting("over channels", lambda width: OverChannels(drawn < 0.6, width, activation,
                                                                            drawn > 0.8))

    def attended(self) -> int | None:
        """PyTorch's own attention of pixels to each other, or to those of another value."""
        source = self.pick(lambda value: len(value.labels) % HEADS == 0)
        if source is None:
            return None
        x = self.values[source].labels
        other = self.pick() if self.rng.random() < 0.4 else None
        memory = x if other is None else self.values[other].labels
        layer, out = Attend(len(x), None if other is None else len(memory)), self.new_labels(len(x))
        heads = [label for label in self.new_labels(HEADS) for _ in range(len(x) // HEADS)]
        names = layer.names()
        fused = names[0] == names[1]
        within = [(".attn", None, heads), (".attn.out_proj", heads, out)]
        within += [(f".attn.{names[0]}", x, heads * 3)] if fused else [
            (f".attn.{name}", read, heads) for name, read in zip(names, (x, memory, memory), strict=True)]
        sources = (source,) if other is None else (source, other)
        return self.add("attended", sources, out, self.values[source].size, lambda layer, *values: layer(*values),
                        layer, within=within, ties=[(x, memory)] if fused else [])

    def swapped(self) -> int | None:
        source = self.pick(lambda value: len(value.labels) > 3)
        if source is None:
            return None
        value = self.values[source]
        at = self.rng.randrange(1, len(value.labels) // 2)  # of equal parts each loses as much
        return self.add("swapped", (source,), value.labels[at:] + value.labels[:at], value.size,
                        lambda layer, x: layer(x), Swapped([at, len(value.labels) - at]))

    def owned(self) -> int | None:
        """A parameter that no layer of PyTorch's holds: a layer scale, a gain, an embedding of positions."""
        source = self.pick()
        if source is None:
            return None
        value = self.values[source]
        way = self.rng.choice(("gamma", "vector", "gain", "places", "tokens", "scalar", "both"))
        if way == "scalar" and len(value.labels) > 4:
            return self.add("located", (source,), value.labels, value.size, lambda layer, x: layer(x),
                            Located(len(value.labels)))
        return self.add(f"owned {way}", (source,), value.labels, value.size, lambda layer, x: layer(x),
                        Owned(way, len(value.labels), value.size))
