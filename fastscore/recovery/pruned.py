"""What of fastscore.pruning, which stands above, repairs are given."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fastscore.graph.cutting.surgery import RemovedIndices


@runtime_checkable
class Pruned(Protocol):
    """What is read of a PruneResult."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def removed_indices(self) -> RemovedIndices: ...
    @property
    def report(self) -> Any: ...
    def cut_again(self, model: nn.Module, weights: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> Any: ...
