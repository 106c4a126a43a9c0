"""Programs of random networks: steps on values whose channels are known, the network they make, and its definition.

A unit is a set of channels that can only go together: channels that are added to or multiplied with each other, that a
layer called twice makes or reads, or that lie at the same place of the equal parts of a chunk or a grouped convolution.
No tracer has a part in it, so units are an oracle for groups, scores, masks and surgery.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from random_kinds import Gated
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
    onward: list[tuple[list[int], ...]] = field(default_factory=list)  # the same, if a step takes what this makes
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
    def rounding(self) -> float:
        """Of what the model computes: routers of transformers take their softmax in float32."""
        return 1e-5 if "routed" in self.names else 1e-9

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


def equal_parts(labels: list[int], sections: int) -> tuple[list[int], ...]:
    width = len(labels) // sections
    return tuple(labels[i * width:(i + 1) * width] for i in range(sections))
