"""Graphs, clouds of points and boxes as batches: how many rows a sample has is up to what it holds, and they lie
regular in the batch that is traced. What reads them is exact, against each sample by itself, or left alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from thinned import thinned
from torch import Tensor, nn
from torchvision.ops import nms

from fastscore import Scorer, score

Batch = Sequence[Tensor]


class Rows(nn.Module):
    """Layers that read rows, their pooling over each sample, and a head."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, 8), nn.Linear(8, 9)
        self.head, self.last = nn.Linear(9, 7), nn.Linear(7, 3)

    def pooled(self, rows: Tensor, sample: Tensor, samples: int) -> Tensor:
        sums = rows.new_zeros(samples, rows.shape[1]).index_add(0, sample, rows)
        return self.last(self.head(sums).relu())


class Graphs(Rows):
    """Nodes of all graphs one after the other, edges between them, and the graph of each node."""

    def aggregated(self, rows: Tensor, edges: Tensor) -> Tensor:
        return rows + torch.zeros_like(rows).index_add(0, edges[1], rows[edges[0]])

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = self.aggregated(self.first(x), edges).relu()
        x = self.aggregated(self.second(x), edges).relu()
        return self.pooled(x, graph, int(graph.max()) + 1)


def as_graphs(model: nn.Module, batch: Batch) -> Any:
    """Padded nodes [N, T, C], their adjacency [N, T, T] and which are there [N, T], as one graph."""
    x, adjacency, here = batch
    place = torch.full(here.shape, -1)
    place[here] = torch.arange(int(here.sum()))
    at = adjacency.nonzero().T
    edges = torch.stack([place[at[0], at[1]], place[at[0], at[2]]])
    return model(x[here], edges, here.nonzero()[:, 0])


def rings(*sizes: int) -> list[Tensor]:
    places = max(sizes)
    x, here = torch.zeros(len(sizes), places, 5), torch.zeros(len(sizes), places, dtype=torch.bool)
    adjacency = torch.zeros(len(sizes), places, places, dtype=torch.bool)
    for number, size in enumerate(sizes):
        x[number, :size], here[number, :size] = torch.randn(size, 5), True
        adjacency[number, range(size), [(node + 1) % size for node in range(size)]] = True
    return [x.double(), adjacency, here]


class Voxels(Rows):
    """Points [N, P, 3]; those of a sample that share a voxel become one row."""

    def forward(self, points: Tensor) -> Tensor:
        flat, samples = points.flatten(0, 1), len(points)
        sample = torch.arange(samples).repeat_interleave(points.shape[1])
        voxel = torch.cat([sample[:, None], flat.floor().long()], 1)
        found, of_point = torch.unique(voxel, dim=0, return_inverse=True)
        x = self.first(flat).relu()
        x = self.second(x.new_zeros(len(found), x.shape[1]).index_add(0, of_point, x)).relu()
        return self.pooled(x, found[:, 0], samples)


class Boxes(Rows):
    """Features [N, T, 6], whose first four are boxes; those that NMS leaves are read."""

    def forward(self, x: Tensor) -> Tensor:
        corners = torch.cat([x[..., :2], x[..., :2] + 1], 2)
        kept = [nms(boxes, each[:, 4], 0.3) for boxes, each in zip(corners, x, strict=True)]
        rows = torch.cat([each[places] for each, places in zip(x, kept, strict=True)])
        sample = torch.cat([torch.full_like(places, number) for number, places in enumerate(kept)])
        return self.pooled(self.second(self.first(rows).relu()).relu(), sample, len(x))


def call(model: nn.Module, batch: Batch) -> Any:
    return model(*batch)


def far(samples: int, count: int, features: int) -> Tensor:
    """Points of which no two are near."""
    return torch.arange(count)[:, None] * 4.0 + torch.rand(samples, count, features).double()


def clustered(numbers: Sequence[int], features: int) -> Tensor:
    """As many places as each number says, the last of them many times."""
    count = max(numbers)
    places = torch.stack([torch.arange(count).clamp(max=number - 1) for number in numbers])
    return places[..., None] * 4.0 + 0.1 * torch.rand(len(numbers), count, features).double()


CASES: dict[str, tuple[type[Rows], int, Callable[[nn.Module, Batch], Any], Batch, Batch]] = {
    "graphs": (Graphs, 5, as_graphs, rings(8, 8), rings(3, 5, 4, 8)),
    "voxels": (Voxels, 3, call, [far(2, 12, 3)], [clustered([3, 5, 4, 8], 3)]),
    "boxes": (Boxes, 6, call, [far(2, 12, 6)], [clustered([3, 5, 4, 8], 6)])}


@pytest.mark.parametrize(("name", "samples"), thinned(CASES, [1, 2]))
def test_rows_that_are_regular_where_it_is_traced(name: str, samples: int) -> None:
    """As many rows in all as the number of samples divides: nothing else tells that they are not."""
    torch.manual_seed(0)
    kind, features, forward, example, batch = CASES[name]
    model, count = kind(features).double(), len(batch[0])
    scorer = Scorer(model, [tensor[:samples] for tensor in example], forward=forward)
    with scorer:
        forward(model, batch).square().sum().backward()
    model.zero_grad()
    scores = scorer.scores()
    assert "head" in scores
    assert "routes, gathers, flips or loops over them" in scores.skipped["first"]
    singles = [[tensor[number:number + 1] for tensor in batch] for number in range(count)]
    for layer, reader in {"first": "second", "second": "head", "head": "last"}.items():
        if layer in scores:
            exact = torch.stack([one_sample(model, reader, forward, single) for single in singles]).mean(0)
            torch.testing.assert_close(scores[layer].double(), exact, rtol=1e-6, atol=0)


def one_sample(model: nn.Module, reader: str, forward: Callable[[nn.Module, Batch], Any], single: Batch) -> Tensor:
    """(s / length)² of the channels that a layer reads."""
    gate = torch.ones(model.get_submodule(reader).in_features, dtype=torch.float64, requires_grad=True)
    handle = model.get_submodule(reader).register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    output = forward(model, single)
    handle.remove()
    v = 2 * output.detach()
    return (torch.autograd.grad(output, gate, v)[0] / v.norm()).square()


@pytest.mark.parametrize("name", CASES)
def test_batches_of_one_sample_each_are_scored_whole(name: str) -> None:
    """The way out."""
    kind, features, forward, _, batch = CASES[name]
    scores = score(kind(features).double(), [[tensor[number:number + 1] for tensor in batch] for number in range(4)],
                   forward=forward)
    assert list(scores) == ["first", "second", "head"]


def test_graphs_that_lie_one_after_the_other() -> None:
    """Each is sent back by itself: see test_samples_one_after_the_other."""
    caught: list[Any] = []

    class Joined(nn.Module):
        """What a batch [N, T, C] becomes on its way."""

        def forward(self, *batch: Tensor) -> Any:
            caught.append(batch)

    as_graphs(Joined(), CASES["graphs"][4])
    assert list(score(Graphs(5).double(), caught, forward=call)) == ["first", "second", "head"]
