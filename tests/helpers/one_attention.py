"""A network around one attention of width 16, whatever its code does."""

from collections.abc import Callable

from torch import Tensor, nn


class Net(nn.Module):
    """[samples, positions, 16] -> [samples, 3]. kind: makes the attention."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attn, self.head = kind(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attn(x)).mean(1))
