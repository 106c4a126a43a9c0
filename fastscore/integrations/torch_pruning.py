"""fastscore's scores as the importance of a Torch-Pruning pruner."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.scoring.scores import Scores
from fastscore.wording import counted

__all__ = ["Importance"]


class Importance:
    """`importance=` for any pruner of Torch-Pruning: its groups are ranked by fastscore's scores.

        importance = Importance(lambda: fastscore.score(model, batches))
        pruner = torch_pruning.pruner.BasePruner(model, example_inputs, importance, iterative_steps=3)

    The model must have the names it was scored with: the pruner's model is the one that was scored, not a wrapper
    around it. Groups that have no score (see scores.skipped), or only some of whose channels have one, are kept; so are
    attention heads whose queries, keys and values come from one layer, and the streams that nn.MultiheadAttention
    reads, of which Torch-Pruning takes the same part out of every head. GroupNormPruner.regularize() needs a score for
    every group: give it such layers as ignored_layers.

    Args:
        scores: Scores, or a function without arguments that makes them. A function is called at the first use, and
            again when a step has removed channels since; Scores hold for one step, after which they are refused.
    """

    def __init__(self, scores: Scores | Callable[[], Scores]) -> None:
        self._make = None if isinstance(scores, Scores) else scores
        self._scores = scores if isinstance(scores, Scores) else None
        self._ranked: set[tuple[str, bool]] = set()  # groups ranked in this round over all groups

    def __call__(self, group: Any) -> Tensor | None:
        """Importances of the channels of a group's first item.

        Args:
            group: a torch_pruning.Group over all channels, as DependencyGraph.get_all_groups() makes them.

        Returns:
            float32 [C]; None where the group has no score.

        Raises:
            ValueError: before the pruner has changed anything in this step, for scores of another model, of
                units="norms", or from before an earlier step.
        """
        graph = group._DG
        scores = self._current(graph, group)
        if any(isinstance(item.dep.target.module, nn.MultiheadAttention) for item in group):
            return None
        made = [(item, scores[layer].double()) for item in group
                if _makes_channels(layer := graph._module2name.get(item.dep.target.module), item.dep.target.module,
                                   scores) and graph.is_out_channel_pruning_fn(item.dep.handler)]
        values = _spread(group[0].idxs, [(item.root_idxs, item.idxs, values) for item, values in made])
        if values is None and made:  # several places of an input hold one channel, of whose roots the group knows one
            values = _spread(group[0].idxs, [(found.idxs, found.root_idxs, values) for item, values in made
                                             for found in _seen_from(graph, item, len(values), group[0])])
        return values

    def _current(self, graph: Any, group: Any) -> Scores:
        """Scores of the model as it is."""
        root = graph._module2name[group[0].dep.target.module], graph.is_out_channel_pruning_fn(group[0].dep.handler)
        first_of_round = not self._ranked or root in self._ranked
        if first_of_round:
            self._ranked.clear()
        self._ranked.add(root)
        layers = {graph._module2name.get(item.dep.target.module) for item in group}
        misfit = None if self._scores is None else _misfit(self._scores, graph, None if first_of_round else layers)
        if self._make is not None and (self._scores is None or misfit is not None):
            self._scores = self._make()
            misfit = _misfit(self._scores, graph, None)
        if misfit is not None:
            raise ValueError(misfit)
        assert self._scores is not None
        return self._scores


def _spread(index: Sequence[int], sources: Iterable[tuple[Sequence[int | None], Sequence[int | None], Tensor]]
            ) -> Tensor | None:
    """One importance for each of `index`, float32; None where one has none.

    sources: (places in `index`, the channel at each, the channels' importances). Where there are several, the mean, as
    fastscore ranks channels that go together.
    """
    at: dict[int, list[int]] = {}
    for number, each in enumerate(index):
        at.setdefault(int(each), []).append(number)
    total, count = torch.zeros(2, len(index), dtype=torch.float64, device="cpu")
    for places, channels, values in sources:
        for place, channel in zip(places, channels, strict=True):
            if place is not None and channel is not None:
                total[at.get(int(place), [])] += values[channel]
                count[at.get(int(place), [])] += 1
    return (total / count).float() if bool((count > 0).all()) else None


def _seen_from(graph: Any, item: Any, channels: int, first: Any) -> Iterator[Any]:
    """Where the channels that `item` makes lie in the layer of `first`, the item that a group starts from."""
    rooted = graph.get_pruning_group(item.dep.target.module, item.dep.handler, list(range(channels)))
    where = first.dep.target, first.dep.handler
    return (found for found in rooted if (found.dep.target, found.dep.handler) == where)


def _makes_channels(layer: str | None, module: nn.Module, scores: Scores) -> bool:
    """Whether a layer's outputs are the channels that `scores[layer]` speaks of, unless they are stale.

    Attention heads are scored under the name of the layer that makes their queries. Where that one makes keys and
    values too, its outputs are more than the channels, and Torch-Pruning means something else by removing them. So are
    those of a layer of which something keeps a part.
    """
    if layer is None or layer not in scores or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return False
    return (module.out_features if isinstance(module, nn.Linear) else module.out_channels) <= len(scores[layer])


def _misfit(scores: Scores, graph: Any, layers: set[str | None] | None) -> str | None:
    """Why scores do not fit the model of `graph`, of whose layers these are looked at (None: all); None: they do."""
    if scores.origin.units != "groups":
        return ('scores: they are of single BatchNorms (units="norms"), which no pruner can remove: score with '
                'units="groups"')
    modules = {name: module for module, name in graph._module2name.items()}
    for layer in scores:
        if layers is not None and layer not in layers:
            continue
        if layer not in modules:
            return (f"scores: they know a layer {layer}, and the pruner's model has none of that name: give the "
                    "pruner the model that was scored")
        width = graph.get_out_channels(modules[layer])
        if _makes_channels(layer, modules[layer], scores) and width != len(scores[layer]):
            return (f"scores: {layer} has {counted(width, 'channel')} and the scores know {len(scores[layer])}; it "
                    "was pruned since: score it again for each step, with "
                    "Importance(lambda: fastscore.score(model, ...))")
    return None
