"""What one backward pass adds to the totals of groups."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup
from fastscore.scoring.criteria import GradientImportance
from fastscore.scoring.group_sums import ByLayer, EdgeSums, JointSums, SideBySide
from fastscore.scoring.pending import Share
from fastscore.scoring.weights import filter_products
from fastscore.taps.measures import DEGREES


class Shares:
    """Of every pass, for the groups of a graph and one criterion. model: whose weights the criterion may read."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], criterion: GradientImportance) -> None:
        self._model, self._groups, self._criterion = model, groups, criterion
        self._sums = JointSums(groups)
        self._edge_sums = [EdgeSums(group) for group in groups] if criterion.edges else []

    def of(self, by_layer: ByLayer, joint: SideBySide | None, length: Tensor | None, halves: tuple[range, range],
           weight_gradients: Mapping[str, Tensor]) -> Iterator[Share]:
        """What the pass adds to the totals of groups, float64 [2, ..., ΣC].

        by_layer: layer -> what its taps measured. joint: the same, side by side. length: of each sample's output
        gradient, float64 [N], where it is divided out. halves: which samples (or minibatches) go to which half.
        weight_gradients: of the parameters that the criterion reads, by name.
        """
        scale = None if length is None else self._scale(length)

        def of_halves(values: Tensor) -> Tensor:  # [V, N, U] -> [2, ..., U]
            taken = [slice(None if half else 0) if self._criterion.minibatch else slice(half.start, None, 2)
                     for half in halves]
            return torch.stack([self._criterion.accumulate(values[:, each]) for each in taken])

        names = [group.name for group in self._groups]
        if self._criterion.filters:
            for group in self._groups:
                share = filter_products(self._model, group, weight_gradients)
                yield Share((group.name,), [len(share)],
                            torch.stack([share if half else torch.zeros_like(share) for half in halves]))
        elif self._criterion.edges:
            for name, edge_sums in zip(names, self._edge_sums, strict=True):
                values = edge_sums(by_layer, scale)
                if values is not None:
                    share = edge_sums.of_channels(of_halves(values))
                    yield Share((name,), [share.shape[-1]], share)
        elif joint is not None and self._sums.reads(joint.layers):
            values = self._sums(joint, self._criterion.part, None if scale is None else scale[self._criterion.part])
            yield Share(tuple(names), self._sums.channels, self._sums.of_channels(of_halves(values)))

    def _scale(self, length: Tensor) -> Tensor:
        """[P, N]: what makes each part that of an output gradient of length 1; over N too, where a minibatch counts as
        one."""
        scale = torch.where(length == 0, torch.inf, length)
        if self._criterion.minibatch:
            scale = scale * len(length)
        return torch.stack([scale.pow(-degree) for degree in DEGREES[self._criterion.measure]])
