"""What prune() returns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from torch import Tensor, nn

from fastscore.graph.cutting.surgery import RemovedIndices
from fastscore.pruning import plots
from fastscore.pruning.report import PruneReport
from fastscore.pruning.surgery import Surgery
from fastscore.tables import Table


@dataclass(frozen=True)
class PruneResult(Table):
    """What prune() returns.

    Attributes:
        model: the smaller network, an ordinary module.
        report: what was done, in figures.
        removed: layer that makes channels -> int64 [R], those that went, ascending.
        removed_indices: (layer, its inputs, outputs or heads) -> int64 [R], the positions that went.
        new_biases: layers that got a bias. fastscore.rebuild_optimizer and fastscore.save_pruned go by both of these.
    """

    model: nn.Module
    report: PruneReport
    removed: Mapping[str, Tensor]
    removed_indices: RemovedIndices
    new_biases: tuple[str, ...]

    def cut_again(self, model: nn.Module, weights: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> "PruneResult":
        """This result with another model: the same channels out of the dense one once more, with other values in the
        layers that remain.

        weights: layer -> its new weight, of the dense shape. added: layer -> float64 [C_out], by which its bias grows;
        it gets one where it has none.
        """
        surgery = Surgery(model, self.removed_indices, added, weights)
        pruned = surgery.copy()
        params = sum(parameter.numel() for parameter in pruned.parameters())
        report = replace(self.report, params=(self.report.params[0], params))
        return replace(self, model=pruned, report=report, new_biases=surgery.new_biases)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {type(self.model).__name__}, {self.report!r}>"

    def records(self) -> list[dict[str, Any]]:
        """Those of the report."""
        return self.report.records()

    @property
    def _remarks(self) -> list[str]:
        return self.report._remarks

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the channels and MACs of each layer before and after, to an image file.

        Args:
            path: an image file, of a suffix that matplotlib knows.

        Raises:
            ImportError: without matplotlib (pip install 'torch-fastscore[plot]').
            ValueError: an unknown suffix.
        """
        plots.pruning(self.report, path)
