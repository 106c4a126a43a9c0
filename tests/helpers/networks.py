"""Small networks, each with its channel groups written down by hand: the oracle's knowledge, not the tracer's."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import network_modules as modules
import torch
from torch import Tensor, nn

from fastscore.batches.calls import call_model
from fastscore.graph import cache
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.tracing import trace


@dataclass(frozen=True)
class Group:
    """edges: consumer -> for each channel, the positions of the consumer's input that carry it.

    producers: layers whose outputs are the group's channels, in the group's order. units: channels that can only go
    together; None where each goes alone.
    """

    channels: int
    edges: Mapping[str, Sequence[Sequence[int]]]
    producers: tuple[str, ...] = ()
    units: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Network:
    """A network to test with. leaks: producer-side zeroing reaches consumers as a constant (bias, BatchNorm shift)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: Mapping[str, Group]
    skipped: frozenset[str] = field(default_factory=frozenset)

    def model(self, seed: int = 0) -> nn.Module:
        """In float64 and evaluation mode, with weights and BatchNorm statistics that are far from their defaults."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return randomize(self.build()).double().eval()

    def traced(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """model(), with the graph of another like it known already: for tests of what comes after tracing."""
        model = self.model(seed).to(dtype)
        cache.put(model, self.inputs(1).to(dtype), call_model, _graph(self.build, self.shape, seed))
        return model

    def inputs(self, samples: int = 4, seed: int = 1) -> Tensor:
        """[N, ...], float64."""
        return torch.randn(samples, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def _graph(build: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> ChannelGraph:
    network = Network(build, shape, {})
    return trace(network.model(seed), network.inputs())


def randomize(model: nn.Module) -> nn.Module:
    """Give every normalisation a scale, a shift and statistics of its own, as training would; and a last layer that
    starts from nothing, as a ViT's, weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, 0, 0.3)
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def straight(channels: int, offset: int = 0, width: int = 1) -> list[list[int]]:
    """Channel c at the `width` positions from offset + c·width: 1 for a convolution, H·W after a flatten."""
    return [list(range(offset + c * width, offset + (c + 1) * width)) for c in range(channels)]


IMAGE = (3, 8, 8)
_RESIDUAL = {
    "stem.0": Group(6, {layer: straight(6) for layer in ("block1.conv1", "block2.conv1", "block2.shortcut.0")},
                    ("stem.0", "block1.conv2")),
    "block1.conv1": Group(5, {"block1.conv2": straight(5)}, ("block1.conv1",)),
    "block2.conv1": Group(8, {"block2.conv2": straight(8)}, ("block2.conv1",)),
    "block2.conv2": Group(7, {"head.fc": straight(7)}, ("block2.conv2", "block2.shortcut.0")),
}

NETWORKS: dict[str, Network] = {
    "plain": Network(modules.plain, IMAGE, {
        "0": Group(5, {"3": straight(5)}, ("0",)),
        "3": Group(7, {"8": straight(7)}, ("3",))}),
    "residual": Network(modules.Residual, IMAGE, _RESIDUAL),
    "inplace": Network(lambda: modules.Residual(inplace=True), IMAGE, _RESIDUAL),
    "dense": Network(modules.Dense, IMAGE, {
        "conv0": Group(4, {"conv1": straight(4), "conv2": straight(4), "transition": straight(4, 5)}, ("conv0",)),
        "conv1": Group(3, {"conv2": straight(3, 4), "transition": straight(3, 9)}, ("conv1",)),
        "conv2": Group(5, {"transition": straight(5)}, ("conv2",)),
        "transition": Group(6, {"head.fc": straight(6)}, ("transition",))}),
    "mobile": Network(modules.Mobile, IMAGE, {
        "stem.0": Group(4, {"expand.0": straight(4), "last.0": straight(4)}, ("stem.0", "project.0")),
        "expand.0": Group(9, {"project.0": straight(9)}, ("expand.0",)),
        "last.0": Group(8, {"head.fc": straight(8)}, ("last.0",))}),
    "grouped": Network(modules.Grouped, IMAGE, {
        "reduce": Group(8, {"grouped": straight(8)}, ("reduce",), units=(0, 1) * 4),
        "grouped": Group(12, {"expand": straight(12)}, ("grouped",), units=(0, 1, 2) * 4),
        "expand": Group(5, {"head.fc": straight(5)}, ("expand",))}),
    "flattening": Network(modules.flattening, IMAGE, {
        "0": Group(4, {"4": straight(4, width=16)}, ("0",)),
        "4": Group(6, {"6": straight(6)}, ("4",))}),
    "chunked": Network(modules.Chunked, IMAGE, {
        "conv": Group(8, {"left": [[0], [1], [2], [3], [], [], [], []], "right": [[], [], [], [], [0], [1], [2], [3]]},
                      ("conv",), units=(0, 1, 2, 3) * 2),
        "left": Group(3, {"head.fc": straight(3)}, ("left",)),
        "right": Group(5, {"head.fc": straight(5, 3)}, ("right",))}),
    "gated": Network(modules.GatedUnit, IMAGE, {
        "conv": Group(8, {"last": [[0], [1], [2], [3], [], [], [], []]}, ("conv",), units=(0, 1, 2, 3) * 2),
        "last": Group(5, {"head.fc": straight(5)}, ("last",))}),
    "squeeze-excite": Network(modules.SqueezeExcite, IMAGE, {
        "conv": Group(6, {"squeeze": straight(6), "last": straight(6)}, ("conv", "excite")),
        "squeeze": Group(2, {"excite": straight(2)}, ("squeeze",)),
        "last": Group(5, {"head.fc": straight(5)}, ("last",))}),
    "unet": Network(modules.UNet, IMAGE, {
        "enter": Group(4, {"down": straight(4), "merge": straight(4, 5)}, ("enter",)),
        "down": Group(6, {"up": straight(6)}, ("down",)),
        "up": Group(5, {"merge": straight(5)}, ("up",)),
        "merge": Group(3, {"out": straight(3)}, ("merge",))}),
    "mlp": Network(modules.mlp, (6,), {
        "0": Group(8, {"3": straight(8)}, ("0",)),
        "3": Group(5, {"5": straight(5)}, ("3",))}),
    "tokens": Network(modules.Tokens, (5, 6), {
        "embed": Group(7, {"fc1": straight(7), "head": straight(7)}, ("embed", "fc2")),
        "fc1": Group(9, {"fc2": straight(9)}, ("fc1",))}),
    "shared": Network(modules.Shared, IMAGE, {
        "left": Group(5, {"shared": straight(5)}, ("left", "right")),
        "shared": Group(6, {"head.fc": straight(6)}, ("shared",))}),
    "recurrent": Network(modules.Recurrent, IMAGE, {
        "stem": Group(5, {"step": straight(5), "head.fc": straight(5)}, ("stem", "step"))}),
    "signal": Network(modules.Signal, (2, 12), {
        "conv1": Group(6, {"conv2": straight(6)}, ("conv1",)),
        "conv2": Group(5, {"fc": straight(5)}, ("conv2",))}),
}

# Their channels lie elsewhere in some producers than in the group, or are not what a consumer reads.
REARRANGED: dict[str, Network] = {
    "zero-padded": Network(modules.ZeroPadded, IMAGE, {
        "stem": Group(4, {"down": straight(4), "inner": straight(4, 2), "head.fc": straight(4, 2)},
                      ("stem", "down", "last")),
        "inner": Group(6, {"last": straight(6)}, ("inner",))}),
    "upsampling": Network(modules.Upsampling, IMAGE, {
        "a": Group(6, {"mask": straight(6), "b": straight(6, 3)}, ("a",)),
        "b": Group(8, {"up": straight(4) + [[]] * 4}, ("b",), units=(0, 1, 2, 3) * 2),
        "up": Group(8, {"last": [[0], [], [], [], [1], [], [], []]}, ("up",), units=(0,) * 4 + (1,) * 4),
        "last": Group(5, {"head.fc": straight(5)}, ("last",))}, frozenset({"mask"})),
}
