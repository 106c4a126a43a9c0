"""Samples that lie one after the other in one tensor, nodes of graphs and tokens with cu_seqlens, by brute force:
in batches of one sample."""

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace

SIZES = (3, 6, 4)  # the first has as many rows as the model has outputs


class GraphNetwork(nn.Module):
    """As of PyTorch Geometric: messages along edges, a mean of each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            h = layer(x)
            x = torch.relu(h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))
        graphs = int(batch.max()) + 1
        total = x.new_zeros(graphs, x.shape[1]).index_add(0, batch, x)
        return self.head(total / torch.bincount(batch, minlength=graphs)[:, None])


class Packed(nn.Module):
    """Attention of packed sequences, each within its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.out, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        of = torch.bucketize(torch.arange(len(x)), cu_seqlens[1:], right=True)
        scores = (self.q(x) @ self.k(x).T).masked_fill(of[:, None] != of, -torch.inf)
        x = x + self.out(scores.softmax(-1) @ self.v(x))
        ends = torch.nn.functional.pad(x.cumsum(0), (0, 0, 1, 0))[cu_seqlens]
        return self.head((ends.diff(dim=0) / cu_seqlens.diff()[:, None]).relu())


class Lengths(nn.Module):
    """Sequences one after the other, told apart by their lengths, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.neck, self.head = (nn.Linear(*size) for size in ((5, 8), (8, 7), (7, 6), (6, 3)))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = self.stem(x).relu().split(lengths.tolist())
        return self.head(self.neck(torch.stack([self.body(each).relu().mean(0) for each in rows])).tanh())


def _one(number: int) -> dict[str, Tensor]:
    random, nodes = torch.Generator().manual_seed(number), SIZES[number]
    return {"x": torch.randn(nodes, 5, generator=random, dtype=torch.float64),
            "edge_index": torch.randint(0, nodes, (2, 2 * nodes), generator=random),
            "batch": torch.zeros(nodes, dtype=torch.long)}


def _graph(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch)


def _packed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["x"], torch.tensor([0, len(batch["x"])]))


def _lengths(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["x"], torch.tensor([len(batch["x"])]))


KINDS = {"graphs": (GraphNetwork, _graph), "packed": (Packed, _packed), "lengths": (Lengths, _lengths)}


def _exact(kind: str, sent: Tensor) -> dict[str, Tensor]:
    """The mean square over samples, each by itself, of the derivative by a gate on each channel where it is read."""
    build, forward = KINDS[kind]
    model, found = noisy(build), dict[str, Tensor]()
    for group in trace(model, _one(0), forward).groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for number in range(len(SIZES)):
            gate = torch.ones(group.channels, dtype=torch.float64, requires_grad=True)
            handles = [model.get_submodule(edge.layer).register_forward_pre_hook(
                lambda module, args, edge=edge, gate=gate: (args[0] * gate[edge.channel],)) for edge in group.edges]
            output = forward(model, _one(number))
            (s,) = torch.autograd.grad((output * sent[number]).sum(), gate)
            total += s.square() / len(SIZES)
            for handle in handles:
                handle.remove()
        found[group.name] = total
    return found


def _assert_exact(scores: fastscore.Scores, exact: Mapping[str, Tensor]) -> None:
    assert set(scores) == set(exact)
    for name, value in exact.items():
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-5, atol=1e-9 * float(value.max()))


@pytest.mark.parametrize("kind", list(KINDS))
def test_batches_of_one_sample(kind: str) -> None:
    build, forward = KINDS[kind]
    model, sent = noisy(build), torch.randn(3, 3, generator=torch.Generator().manual_seed(9)).double()
    batches = [_one(number) for number in range(len(SIZES))]
    scores = fastscore.score(model, batches, forward=forward, progress=False, gradient="loss", normalize=False,
                             loss=lambda output, batch: (output * sent[SIZES.index(len(batch["x"]))]).sum())
    _assert_exact(scores, _exact(kind, sent))
    result = fastscore.prune(model, scores, batches[0], channels=0.5, forward=forward)
    with torch.no_grad():
        assert forward(result.model, batches[1]).shape == (1, 3)


@pytest.mark.parametrize("kind", ["graphs", "lengths"])
def test_batches_that_are_keywords_need_no_forward(kind: str) -> None:
    def keywords(number: int) -> dict[str, Tensor]:
        batch = _one(number)
        return batch if kind == "graphs" else {"x": batch["x"], "lengths": torch.tensor([len(batch["x"])])}

    batches = [keywords(number) for number in range(len(SIZES))]
    sent = torch.randn(3, 3, generator=torch.Generator().manual_seed(9)).double()
    model, exact = noisy(KINDS[kind][0]), _exact(kind, sent)
    scores = fastscore.score(model, batches, progress=False, gradient="loss", normalize=False,
                             loss=lambda output, batch: (output * sent[SIZES.index(len(batch["x"]))]).sum())
    _assert_exact(scores, exact)
    repaired = fastscore.prune(model, scores, batches[0], channels=0.5, calibration=batches, repair="linear")
    with torch.no_grad():
        assert repaired.model(**batches[1]).shape == (1, 3)
    assert fastscore.prune_iteratively(model, batches, steps=2, channels=0.6).report.channels[1]


def test_random_gradients_of_batches_of_one_sample() -> None:
    """Every direction once: the mean square is that of the gradients of the three outputs, times three."""
    batches = [_one(number) for number in range(len(SIZES))]
    scores = fastscore.score(noisy(GraphNetwork), batches, forward=_graph, probes="exact", normalize=False,
                             progress=False)
    exact = [_exact("graphs", torch.eye(3, dtype=torch.float64)[k].expand(3, 3)) for k in range(3)]
    _assert_exact(scores, {name: sum(each[name] for each in exact) for name in exact[0]})


def test_several_after_batches_of_one_say_the_way_out() -> None:
    """As the first batch, they are told apart: see test_samples_one_after_the_other."""
    model, two = noisy(GraphNetwork), _one(2) | {"batch": torch.tensor([0, 0, 0, 1])}
    with pytest.raises(RuntimeError, match="scored where batches have one sample each"):
        fastscore.score(model, [_one(1), two], forward=_graph, progress=False)


class NodeNetwork(nn.Module):
    """What the nodes that lead to a node say of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.second(self.first(x).relu())
        return torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])


def test_rows_of_one_sample_have_a_way_out_that_works() -> None:
    """Nodes read each other, so that they are no samples; the graph is one, where [1, nodes, classes] comes back."""
    model, batches = noisy(NodeNetwork), [_one(number) for number in range(len(SIZES))]
    with pytest.raises(ValueError, match=re.escape("forward=lambda model, batch: model(**batch)[None]")):
        fastscore.score(model, batches, progress=False)

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch)[None]

    scores = fastscore.score(model, batches, forward=forward, progress=False)
    result = fastscore.prune(model, scores, batches[0], channels=0.5, forward=forward)
    with torch.no_grad(), fastscore.mask(model, scores, result, batches[0], forward=forward):
        masked = forward(model, batches[1])
    assert result.report.channels[1] < result.report.channels[0]
    torch.testing.assert_close(forward(result.model, batches[1]), masked)
