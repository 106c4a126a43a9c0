"""Feature maps of two networks, layer by layer: how far the smaller one's are from the dense one's."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastscore.graph.cutting.surgery import RemovedIndices
from fastscore.modules.inspection import channel_dim
from fastscore.modules.narrower import staying
from fastscore.wording import counted


class FeatureMaps:
    """Hooks on both networks that keep what `layers` return, while it is entered.

    removed: what pruning took out, so that of the dense network's channels those that are left are compared; without it
    both have as many. Raises ValueError for a layer that there is not.
    """

    def __init__(self, dense: nn.Module, smaller: nn.Module, layers: Iterable[str], removed: RemovedIndices) -> None:
        if not isinstance(layers, Iterable) or isinstance(layers, nn.Module):
            raise TypeError(f"features: {layers!r:.80}, where names of modules are meant, such as [\"layer1\"]")
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self._networks, self._removed = (dense, smaller), removed
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._handles: list[RemovableHandle] = []
        for name in self.layers:
            for network, word in zip(self._networks, ("dense", "smaller"), strict=True):
                if name not in dict(network.named_modules()):
                    raise ValueError(f"features: the {word} network has no module {name!r}; "
                                     "[name for name, _ in model.named_modules()] lists them")

    def __enter__(self) -> "FeatureMaps":
        for network, kept in zip(self._networks, self._kept, strict=True):
            for name in self.layers:
                self._handles.append(network.get_submodule(name).register_forward_hook(partial(_keep, name, kept)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def distance(self) -> Tensor:
        """The mean over layers of the squared error as a share of the dense network's variance about its mean; 0
        without layers. Raises ValueError where channels went and it is not known which."""
        total = torch.zeros(())
        for name in self.layers:
            expected, got = (kept.pop(name).float() for kept in self._kept)
            expected = self._left(name, expected.to(got.device), got)
            variance = (expected - expected.mean()).square().mean()
            total = total.to(got.device) + (got - expected).square().mean() / variance.clamp(min=1e-12)
        return total / max(len(self.layers), 1)

    def _left(self, name: str, expected: Tensor, got: Tensor) -> Tensor:
        layer = self._networks[1].get_submodule(name)
        index = self._removed.get((name, "outputs"))
        if index is not None:
            dim = channel_dim(layer)
            if expected.shape[dim] != got.shape[dim] + len(index):
                raise ValueError(f"features: {name} makes {counted(expected.shape[dim], 'channel')} in the dense "
                                 f"network and {got.shape[dim]} in the smaller one, from which {len(index)} went: "
                                 "give the network that went into prune() as the dense one")
            expected = expected.index_select(dim, staying(expected.shape[dim], index).to(expected.device))
        if expected.shape != got.shape:
            within = [part for part, _ in layer.named_modules(prefix=name) if (part, "outputs") in self._removed]
            raise ValueError(f"features: {name} returns {list(expected.shape)} in the dense network and "
                             f"{list(got.shape)} in the smaller one: " + (
                                 "a PruneResult says what went of each convolution, Linear and normalisation, and "
                                 f"of no module around them: name one of them, such as {within[-1]}" if within else
                                 f"{'' if self._removed else 'pass the PruneResult in place of its model, and '}name a "
                                 "convolution, a Linear or a normalisation, of which it says what went"))
        return expected


def _keep(name: str, kept: dict[str, Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(f"features: {name} returns {type(output).__name__}, not a floating-point tensor: name a layer "
                        "within it that returns one")
    kept[name] = output
