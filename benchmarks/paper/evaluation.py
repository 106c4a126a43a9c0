"""Accuracy of a network without its lowest-scored units, for one set of removed units after another."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.paper.data import Images
from fastscore import Scores
from fastscore.fastpath.folding import Folding
from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.groups import ChannelGroup, norm_gates
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.recovery.compensation import add_to_biases, mean_contributions, removed_means, removed_positions

POINTS = 31


def by_group(units: Iterable[tuple[str, int]]) -> dict[str, Tensor]:
    """(group, channel) pairs -> group -> int64 [R], ascending."""
    gone: dict[str, list[int]] = {}
    for name, channel in units:
        gone.setdefault(name, []).append(channel)
    return {name: torch.tensor(sorted(channels)) for name, channels in gone.items()}


class Evaluator:
    """Accuracy of `model` with units removed; on a copy whose BatchNorms are folded into the convolutions.

    A gate at a BatchNorm's output is then a row of the convolution's weight and an entry of its bias, and masking it
    an edit of both. Structural groups are really removed.
    """

    def __init__(self, model: nn.Module, images: Images, units: str) -> None:
        self.images, self.units = images, units
        self.example = images.images[:1]
        self.graph = trace(model, self.example)
        self.model = evaluation_copy(model)
        self.gates = norm_gates(model, self.graph)
        self.producers = {norm: layer for layer, norm in self.graph.normalized_by.items()}
        folded = Folding(self.model, self.graph.normalized_by, ()).folded
        left = {name for name, _ in self.model.named_modules() if name not in folded}
        self.graph = replace(self.graph, groups=tuple(
            replace(group, members=tuple(member for member in group.members if member.layer in left))
            for group in self.graph.groups))
        self.model.to(memory_format=torch.channels_last)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The units' groups."""
        return (self.gates if self.units == "norms" else self.graph).groups

    def order(self, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        """(group, channel) of every unit, least important first; the last channel of a structural group stays."""
        rows = [(group.name, scores[group.name]) for group in self.groups if group.name in scores]
        every = torch.cat([values for _, values in rows]).argsort(stable=True).tolist()
        place = [(name, channel) for name, values in rows for channel in range(len(values))]
        ordered = [place[i] for i in every]
        if self.units == "norms":
            return ordered
        last = {name: channel for name, channel in ordered}
        return [(name, channel) for name, channel in ordered if last[name] != channel]

    def without(self, removed: Mapping[str, Tensor], scores: Mapping[str, Tensor], compensate: bool) -> nn.Module:
        """The network without the channels of `removed` (group -> int64 [R]); compensate takes fastscore's Scores."""
        model = copy.deepcopy(self.model)
        assert isinstance(scores, Scores) or not compensate
        if self.units == "groups":
            positions = removed_positions(self.groups, removed)
            means = removed_means(self.model, scores.means, positions, self.groups, self.graph.kept_biases) \
                if compensate and removed else {}
            added = mean_contributions(self.model, means, self.example, lambda model, x: model(x)) if means else {}
            add_to_biases(model, added)  # first: a layer that reads removed channels may lose some of its own
            remove_channels(model, self.groups, removed)
            return model.to(memory_format=torch.channels_last)
        for norm, channels in removed.items():
            layer = model.get_submodule(self.producers[norm])
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            layer.weight.data[channels] = 0
            layer.bias.data[channels] = scores.means[norm][channels].to(layer.bias) if compensate else 0
        return model

    @torch.no_grad()
    def right(self, model: nn.Module, first: int = 0, stride: int = 1) -> tuple[int, int]:
        """(named right, images), on every `stride`th image from `first` on."""
        images, labels = self.images.images[first::stride], self.images.labels[first::stride]
        right = sum(int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
                    for x, y in zip(images.split(128), labels.split(128), strict=True))
        return right, len(labels)

    def curve(self, scores: Mapping[str, Tensor], compensate: bool = False, stride: int = 1) -> list[dict[str, int]]:
        """The paper's curve: P = floor(linspace(0, N/2, 31)) units removed; `right` of `images` at each.

        stride: each point is measured on every `stride`th image, from its own first one on: with 31, the points see
        every image once between them, and curves of other variants the same images at the same point.
        """
        order = self.order(scores)
        total = sum(group.channels for group in self.groups)
        rows = []
        for point, removed in enumerate(torch.linspace(0, total / 2, POINTS).long().tolist()):
            model = self.without(by_group(order[:removed]), scores, compensate)
            right, images = self.right(model, point % stride, stride)
            rows.append({"removed": removed, "total": total, "right": right, "images": images})
        return rows
