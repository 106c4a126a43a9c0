"""A parametrization whose layer must be left alone."""

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Elsewhere(nn.Module):
    """One that reads another module's parameter."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is read."""
        return weight * (1 + self.others[0].weight.mean())


def computed_elsewhere(layer: nn.Module, other: nn.Linear | None = None) -> nn.Module:
    """The layer, with a weight that is computed from a parameter of `other`, too."""
    parametrize.register_parametrization(layer, "weight", Elsewhere(nn.Linear(3, 3) if other is None else other))
    return layer
