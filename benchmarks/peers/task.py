"""What every contestant gets, and what each makes of it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.peers.measure import Stopwatch
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.tracing import trace
from fastscore.modules.attention import multihead_attention
from fastscore.modules.weights import held_weights


@dataclass(frozen=True)
class Task:
    """model: in evaluation mode. images [N, 3, H, W], labels int64 [N]. graph: the groups to score; ignored: the
    others, by name."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    graph: ChannelGraph
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, labels: Tensor, ignored: tuple[str, ...] = ()) -> "Task":
        """Score all channel groups that fastscore finds, but for `ignored`, and those that parameters read which are no
        layers, such as nn.MultiheadAttention's projections: nobody else can hook these."""
        graph = trace(model, images[:1])
        ignored = (*ignored, *(group.name for group in graph.groups
                               if any(held_weights.is_held(model, edge.layer) for edge in group.edges)))
        return cls(model, images, labels, graph.without(model, ignored), ignored)

    @classmethod
    def random(cls, name: str, images: int, size: int, device: str = "cpu", layout: str = "contiguous") -> "Task":
        """torchvision's model `name` with random weights, random images [images, 3, size, size] and labels."""
        torch.manual_seed(0)
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        model = torchvision.models.get_model(name).eval().to(device, memory_format=memory_format)
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():  # a ViT's last: nothing would come back
                nn.init.normal_(module.weight, 0, 0.02)
        x = torch.randn(images, 3, size, size).to(device, memory_format=memory_format)
        return cls.of(model, x, torch.randint(1000, (images,)).to(device))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that read the channels."""
        return tuple(dict.fromkeys(edge.layer for group in self.graph.groups for edge in group.role("consumer")))

    def own_copy(self, frozen: bool = False, hookable: bool = False) -> nn.Module:
        """A copy of the model, with parameters of its own over the same memory.

        hookable: where attention calls its output projection, as nn.MultiheadAttention does not.
        """
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=not frozen)
                                  for p in self.model.parameters()}
        model = copy.deepcopy(self.model, shared)
        for handle in multihead_attention.replace_attention(model) if hookable else ():
            handle.make_permanent()
        return model

    def loss(self, model: nn.Module, reduction: str = "mean") -> Tensor:
        """Cross entropy of `model` on the batch."""
        return F.cross_entropy(model(self.images), self.labels, reduction=reduction)


Importances: TypeAlias = Mapping[str, Tensor]  # layer -> [C]
Run: TypeAlias = Callable[[Stopwatch], Importances]  # leaves no gradient behind
Prepare: TypeAlias = Callable[[Task], Run]


def squares(graph: ChannelGraph, device: torch.device) -> Callable[[Mapping[str, Tensor]], Importances]:
    """From Σ a·g of each layer that reads channels, [N, C_in], to the mean of s² of each group, [C]."""
    places = {group.name: (group.unit.to(device), int(group.unit.max()) + 1,
                           [(edge.layer, edge.index.to(device), group.unit[edge.channel].to(device))
                            for edge in group.role("consumer")]) for group in graph.groups}

    def importances(sums: Mapping[str, Tensor]) -> Importances:
        found = {}
        for name, (unit, units, edges) in places.items():
            s = sums[edges[0][0]].new_zeros(len(sums[edges[0][0]]), units)
            for layer, index, of in edges:
                s.index_add_(1, of, sums[layer][:, index])
            found[name] = s.square().mean(0)[unit]
        return found

    return importances


def over_positions(product: Tensor, layer: nn.Module) -> Tensor:
    """[N, C], summed over all but samples and channels, which a Linear has last and others second."""
    positions = range(1, product.dim() - 1) if isinstance(layer, nn.Linear) else range(2, product.dim())
    return product.sum(tuple(positions)) if positions else product


def warmed(prepare: Prepare) -> Prepare:
    """The contestant, with a pass before the one that counts, as fastscore.score's first batches are."""

    def prepare_warmed(task: Task) -> Run:
        run = prepare(task)

        def twice(clock: Stopwatch) -> Importances:
            run(Stopwatch(clock.device))
            return run(clock)

        return twice

    return prepare_warmed
