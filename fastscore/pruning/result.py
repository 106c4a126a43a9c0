"""What prune() returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from torch import Tensor, nn

from fastscore.graph.surgery import RemovedIndices
from fastscore.pruning.report import PruneReport


@dataclass(frozen=True)
class PruneResult:
    """model: the smaller network, an ordinary module. report: what was done. removed: layer -> removed channels.

    removed_indices: (layer, its inputs or outputs) -> positions that went. new_biases: layers that got a bias. Both are
    what fastscore.rebuild_optimizer and fastscore.save_pruned go by.
    """

    model: nn.Module
    report: PruneReport
    removed: Mapping[str, Tensor]
    removed_indices: RemovedIndices
    new_biases: tuple[str, ...]

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the channels and MACs of each layer before and after, to an image file.

        Raises ImportError without matplotlib (pip install 'torch-fastscore[plot]'), ValueError for an unknown suffix.
        """
        from fastscore.plots import check
        from fastscore.pruning.plots import pruning

        check(path)
        pruning(self.report, path)
