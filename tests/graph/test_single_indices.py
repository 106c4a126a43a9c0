"""Embeddings that are looked up by one index, a tensor without dimensions."""

from pathlib import Path

import pytest
import torch
import whole_way
from torch import Tensor, nn


class Universal(nn.Module):
    """One block, several times over, each with an embedding of its number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.first, self.steps = nn.Linear(6, 8), nn.Embedding(3, 8)
        self.block, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for step in range(3):
            h = h + self.block(torch.relu(h + self.steps(torch.full(self.shape, step))))
        return self.last(h)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_stream_that_they_are_added_to_goes(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole_way.check(lambda: Universal(shape), x, ["first"], tmp_path)
