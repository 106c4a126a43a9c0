"""Random networks that know their own channels: the generator follows every channel through every step it writes.

A unit is a set of channels that can only go together: channels that are added to or multiplied with each other, that a
layer called twice makes or reads, or that lie at the same place of the equal parts of a chunk or a grouped convolution.
No tracer has a part in it, so units are an oracle for groups, scores, masks and surgery.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from networks import randomize
from random_attention import HEADS, Attend
from random_kinds import Gated, Kinds
from torch import Tensor, nn

SIZE = 8  # pixels of the input, each way
WIDTHS = (4, 6, 8)


@dataclass
class Value:
    """A tensor of the program: which unit each channel is of, its height and width, and who may write to it."""

    labels: list[int]
    size: int
    fresh: bool = False  # made by a step that does not save it for the backward pass, and read by none yet
    dead: bool = False  # overwritten


@dataclass
class Step:
    """values[i] = run(model, values[sources])"""

    name: str
    sources: tuple[int, ...]
    run: Callable[..., Tensor]
    layer: str | None = None
    ties: list[tuple[list[int], ...]] = field(default_factory=list)  # lists of labels that go together, place by place
    reads: list[int] | None = None  # what lies at each position of the layer's input
    makes: list[int] | None = None
    fixes: list[int] = field(default_factory=list)
    alike: list[int] = field(default_factory=list)  # channels of which the code takes as many to go as of the others
    counts: list[int] | None = None  # what the statistics of a normalisation over channels count
    within: list[tuple[str, list[int] | None, list[int]]] = field(default_factory=list)  # layers in it: the same
    counts_within: tuple[str, list[int]] | None = None  # a normalisation in it, and what its statistics count
    stays: list[int] = field(default_factory=list)  # channels that cannot go


class Program(nn.Module):
    """Runs its steps; the layers lie in an order of their own."""

    def __init__(self, steps: list[Step], layers: dict[str, nn.Module], output: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.steps, self.output = steps, output

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            arguments = [values[source] for source in step.sources]
            values.append(step.run(*([self.layers[step.layer]] if step.layer else []), *arguments))
        return values[self.output]


class OverChannels(nn.Module):
    """A normalisation over the channels of an image, by its definition. gate: of each sample's channels, [N, C], where
    they count: None for all ones."""

    def __init__(self, centered: bool, width: int) -> None:
        super().__init__()
        self.centered, self.eps, self.gate = centered, 0.1, None
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if centered else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        counted = x if self.gate is None else x * self.gate[:, :, None, None]
        mean = counted.mean(1, keepdim=True) if self.centered else 0.0
        y = (x - mean) / ((counted - mean).square().mean(1, keepdim=True) + self.eps).sqrt()
        y = y * self.weight[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


class Standardised(nn.Conv2d):
    """Computes its weight from its parameters, of all inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 0.1).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


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

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        if self.way == "vector":
            return x * self.gamma.view(1, -1, 1, 1)
        if self.way == "tokens":  # as an embedding of positions, of a model that has its channels last
            return (x.flatten(2).transpose(1, 2) + self.gamma).transpose(1, 2).reshape(x.shape)
        if self.way == "both":
            return x * self.gamma[0][:, None, None] + self.gamma[1].view(-1, 1, 1)
        return x + self.gamma if self.way == "places" else x * self.gamma


@dataclass
class RandomNetwork:
    """model: float64, in evaluation mode. producers, consumers: layer -> the unit of each output (input) position.

    bound: units of the input and the output, which cannot go. fixed: units that the model's own code cuts at fixed
    places or moves about, or that are read to no end: they may be left alone.
    """

    seed: int
    model: Program
    producers: dict[str, list[int]]
    consumers: dict[str, list[int]]
    bound: set[int]
    fixed: set[int]
    names: list[str]
    norms: dict[str, list[int]] = field(default_factory=dict)  # normalisation over channels -> what it counts
    alike: list[set[int]] = field(default_factory=list)  # units of which as many must go: they go together, or none

    @property
    def read(self) -> set[int]:
        """Units that some layer reads."""
        return {unit for of_layer in self.consumers.values() for unit in of_layer}

    def near(self, layer: str) -> set[int]:
        """Units that are made or read by one layer with a unit that `layer` makes, or with one of those, and so on."""
        found, before = set(self.producers[layer]), 0
        while before != len(found):
            before = len(found)
            for of_layer in [*self.producers.values(), *self.consumers.values()]:
                if found & set(of_layer):
                    found |= set(of_layer)
        return found

    def inputs(self, samples: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(samples, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


def generate(seed: int, length: int | None = None, more: bool = False, kinds: bool = False,
             alike: bool = False) -> RandomNetwork:
    """The network of this seed, always the same. more: of more kinds of steps. kinds: of those of random_kinds, too.
    alike: code between two layers takes the widths of both to be the same."""
    return _Generator(seed, more, kinds, alike).build(length)


def _gated_owner(model: Program, layer: str) -> Gated | None:
    """The module of the program in which a layer is gated by definition."""
    owner = model.layers[layer.split(".")[1]]
    return owner if isinstance(owner, Gated) else None


def unify(together: Iterable[set[int]]) -> Callable[[int], int]:
    """Unit -> the same one of all that it goes together with, by way of others too."""
    parent: dict[int, int] = {}

    def first_of(unit: int) -> int:
        while unit in parent:
            unit = parent[unit]
        return unit

    for units in together:
        first, *others = {first_of(unit) for unit in units}
        parent.update(dict.fromkeys(others, first))
    return first_of


def joined(network: RandomNetwork, together: Iterable[set[int]]) -> RandomNetwork:
    """The network, where the units of each set go together."""
    first_of = unify(together)

    def of(layers: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: [first_of(unit) for unit in units] for name, units in layers.items()}

    return replace(network, producers=of(network.producers), consumers=of(network.consumers), norms=of(network.norms),
                   bound={first_of(unit) for unit in network.bound}, fixed={first_of(unit) for unit in network.fixed})


def gated(network: RandomNetwork, x: Tensor, scale: Callable[[int], Tensor | float]) -> Tensor:
    """`model(x)` with every consumer's input, and what each normalisation counts, multiplied, position by position, by
    scale(unit): [N] or a number."""
    handles = []
    for layer, units in network.norms.items():
        factors = [torch.as_tensor(scale(unit), dtype=torch.float64).expand(len(x)) for unit in units]
        owner = _gated_owner(network.model, layer)
        if owner is not None:
            owner.gates[layer.rpartition(".")[2]] = torch.stack(factors, 1)
        else:
            network.model.get_submodule(layer).gate = torch.stack(factors, 1)
    for layer, units in network.consumers.items():
        owner = _gated_owner(network.model, layer)
        if owner is not None:
            factors = [torch.as_tensor(scale(unit), dtype=torch.float64).expand(len(x)) for unit in units]
            owner.gates[layer.rpartition(".")[2]] = torch.stack(factors, 1)
            continue
        module = network.model.get_submodule(layer)

        def multiply(module: nn.Module, args: tuple[Tensor, ...], units: list[int] = units) -> tuple[Tensor, ...]:
            (a,) = args
            factors = [torch.as_tensor(scale(unit), dtype=torch.float64).expand(len(a)) for unit in units]
            shape = [len(a), -1] + [1] * (a.dim() - 2)
            return (a * torch.stack(factors, 1).reshape(shape),)

        handles.append(module.register_forward_pre_hook(multiply))
    try:
        return network.model(x)
    finally:
        for layer in network.norms:
            if _gated_owner(network.model, layer) is None:
                network.model.get_submodule(layer).gate = None
        for module in network.model.layers.children():
            if isinstance(module, Gated):
                module.gates.clear()
        for handle in handles:
            handle.remove()


def sums(network: RandomNetwork, x: Tensor, v: Tensor) -> dict[int, Tensor]:
    """unit -> s [N], the directional derivative of v·z: by autograd through gates."""
    units = sorted(network.read)
    gates = {unit: torch.ones(len(x), dtype=torch.float64, requires_grad=True) for unit in units}
    z = gated(network, x, lambda unit: gates.get(unit, 1.0))  # of those that nothing reads
    found = torch.autograd.grad((z * v).sum(), list(gates.values()), allow_unused=True)
    return {unit: torch.zeros(len(x), dtype=torch.float64) if s is None else s
            for unit, s in zip(units, found, strict=True)}


class _Generator(Kinds):
    def __init__(self, seed: int, more: bool = False, kinds: bool = False, alike: bool = False) -> None:
        self.seed, self.rng, self.more, self.with_kinds = seed, random.Random(seed), more, kinds
        self.alike = alike
        self.parent: list[int] = []
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.values = [Value(self.new_labels(3), SIZE)]

    # units, by union and find

    def new_labels(self, count: int) -> list[int]:
        self.parent += range(len(self.parent), len(self.parent) + count)
        return list(range(len(self.parent) - count, len(self.parent)))

    def unit(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def tie(self, *lists: list[int]) -> None:
        for labels in zip(*lists, strict=True):
            for other in labels[1:]:
                self.parent[self.unit(labels[0])] = self.unit(other)


    # the program

    def add(self, name: str, sources: tuple[int, ...], labels: list[int], size: int, run: Callable[..., Tensor],
            layer: nn.Module | str | None = None, fresh: bool = False, **notes: Any) -> int:
        """A step; notes: its `ties`, `reads`, `makes` and `fixes`."""
        for source in sources:
            self.values[source].fresh = False
        key = layer if isinstance(layer, str) else None
        if isinstance(layer, nn.Module):
            key = f"{name}{len(self.layers)}"
            self.layers[key] = layer
        self.steps.append(Step(name, sources, run, key, **notes))
        self.values.append(Value(labels, size, fresh))
        return len(self.values) - 1

    def call(self, name: str, source: int, out: list[int], size: int, layer: nn.Module | str, sections: int = 1) -> int:
        """A step that calls a layer which reads one value and makes another."""
        labels = self.values[source].labels
        return self.add(name, (source,), out, size, lambda layer, x: layer(x), layer, fresh=True, reads=labels,
                        makes=out, ties=[_parts(labels, sections), _parts(out, sections)])

    def pick(self, where: Callable[[Value], bool] = lambda value: True) -> int | None:
        """A value, a recent one more often than an old one."""
        candidates = [i for i, value in enumerate(self.values) if i and not value.dead and where(value)]
        if not candidates:
            return None
        return candidates[max(self.rng.randrange(len(candidates)) for _ in range(3))]

    def pair(self) -> tuple[int, int] | None:
        """Two values of one shape; now and then one twice."""
        first = self.pick()
        if first is None:
            return None
        value = self.values[first]
        other = self.pick(lambda o: (len(o.labels), o.size) == (len(value.labels), value.size)
                          and (o is not value or self.rng.random() < 0.2))
        return None if other is None else (first, other)

    # steps: each adds itself and gives its value, or None where nothing fits

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

    def over_channels(self) -> int | None:
        """A LayerNorm or RMSNorm over the channels, which go on being counted as zeros where they are gone."""
        source = self.pick()
        if source is None:
            return None
        value = self.values[source]
        return self.add("over channels", (source,), value.labels, value.size, lambda layer, x: layer(x),
                        OverChannels(self.rng.random() < 0.6, len(value.labels)), counts=value.labels)

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
        return self.add(f"owned {way}", (source,), value.labels, value.size, lambda layer, x: layer(x),
                        Owned(way, len(value.labels), value.size))

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
        """x + a convolution or two of x."""
        source = self.pick()
        if source is None:
            return None
        width = len(self.values[source].labels)
        branch = self.conv(source)
        assert branch is not None
        if self.rng.random() < 0.7:
            branch = self.add("relu", (branch,), self.values[branch].labels, self.values[branch].size, torch.relu)
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
                         ties=[_parts(value.labels, 2)], fixes=value.labels if way == "split" else [])
        self.values[parts].dead = True
        left = self.add("left", (parts,), value.labels[:half], value.size, lambda both: both[0])
        right = self.add("right", (parts,), value.labels[half:], value.size, lambda both: both[1])
        return self.rng.choice((left, right))

    def hostile(self) -> int | None:
        """A cut or a permutation of channels that the code fixes."""
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
        return self.add(kind, (source,), table[kind][0], value.size, table[kind][1], fixes=labels)

    def head(self) -> int:
        """The output: logits behind a mean or a flatten, or an image."""
        source = self.pick()
        assert source is not None
        value = self.values[source]
        way = self.rng.choice(("mean", "mean", "flatten", "image"))
        if way == "image":
            index = self.conv(source, 2)
            assert index is not None
            return index
        labels = value.labels
        if way == "mean":
            flat = self.add("mean", (source,), labels, 1, lambda x: x.mean((2, 3)))
        else:
            labels = [label for label in labels for _ in range(value.size ** 2)]
            flat = self.add("flatten", (source,), labels, 1, lambda x: x.flatten(1))
        out = self.new_labels(5)
        return self.add("linear", (flat,), out, 1, lambda layer, x: layer(x), nn.Linear(len(labels), 5), reads=labels,
                        makes=out)

    def build(self, length: int | None) -> RandomNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.conv(0)
            options: list[tuple[Callable[[], Any], int]] = [
                (self.conv, 5), (self.channelwise, 4), (self.activation, 5), (self.residual, 3), (self.combine, 3),
                (self.concat, 2), (self.halves, 2), (self.grouped, 1), (self.transposed, 1), (self.again, 1),
                (self.resize, 2), (self.squeeze_excite, 1), (self.hostile, 1)]
            if self.more:
                options += [(self.owned, 5), (self.over_channels, 4), (self.swapped, 4), (self.attended, 4)]
            options += self.kinds().items() if self.with_kinds else []
            options += [(self.as_wide, 12)] if self.alike else []
            steps, weights = zip(*options, strict=True)
            for step in self.rng.choices(steps, weights, k=length or self.rng.randrange(4, 14)):
                step()
            output = self.head()
            self.output_labels = self.values[output].labels
            live = self.steps_behind(output)
            dead = [step for i, step in enumerate(self.steps) if i not in live]
            if self.seed % 5:
                output = self.drop(dead, output)
            order = sorted({step.layer for step in self.steps if step.layer})
            self.rng.shuffle(order)
            model = Program(self.steps, {name: self.layers[name] for name in order}, output)
            randomize(model).double().eval()
        producers: dict[str, list[int]] = {}
        consumers: dict[str, list[int]] = {}
        in_vain = [step for step in self.steps if any(step is other for other in dead)]
        for step in [*(step for step in self.steps if not any(step is other for other in dead)), *in_vain]:
            for name, reads, makes in (("", step.reads, step.makes), *step.within):
                for known, labels in ((consumers, reads), (producers, makes)):
                    if labels is not None:
                        first = known.setdefault(f"layers.{step.layer}{name}", labels)
                        step.ties.append((first, labels))
            for ties in step.ties:
                self.tie(*ties)
        fixed = [label for step in self.steps for label in [*step.fixes, *step.alike]]
        if self.seed % 5 == 0:  # what runs to no end
            fixed += [label for step in dead for source in step.sources for label in self.values[source].labels]
            fixed += [label for step in dead for label in consumers.get(f"layers.{step.layer}", [])]
            fixed += [label for step in dead for _, reads, makes in step.within for label in [*(reads or []), *makes]]

        def units(labels: list[int]) -> list[int]:
            return [self.unit(label) for label in labels]

        norms = {f"layers.{step.layer}": units(step.counts) for step in self.steps if step.counts}
        norms |= {f"layers.{step.layer}{step.counts_within[0]}": units(step.counts_within[1]) for step in self.steps
                  if step.counts_within}
        stays = [label for step in self.steps for label in step.stays]
        return RandomNetwork(self.seed, model, {name: units(labels) for name, labels in producers.items()},
                             {name: units(labels) for name, labels in consumers.items()},
                             set(units(self.values[0].labels + self.output_labels + stays)), set(units(fixed)),
                             [step.name for step in self.steps], norms,
                             [set(units(step.alike)) for step in self.steps if step.alike])

    def steps_behind(self, output: int) -> set[int]:
        """The steps on which the output depends; what is written in place depends on all that came before."""
        behind, work = set[int](), [output]
        while work:
            index = work.pop()
            if index and index - 1 not in behind:
                behind.add(index - 1)
                work += self.steps[index - 1].sources
        return behind

    def drop(self, dead: list[Step], output: int) -> int:
        """Leave steps out; the number of the output afterwards."""
        number, kept = {0: 0}, []
        for i, step in enumerate(self.steps):
            if not any(step is other for other in dead):
                step.sources = tuple(number[source] for source in step.sources)
                kept.append(step)
                number[i + 1] = len(kept)
        self.steps = kept
        return number[output]


def _parts(labels: list[int], sections: int) -> tuple[list[int], ...]:
    width = len(labels) // sections
    return tuple(labels[i * width:(i + 1) * width] for i in range(sections))
