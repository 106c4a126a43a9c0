"""Rows of sequences of different lengths, packed, sorted and picked: no score is wrong for a later batch whose rows lie
otherwise than those of the first."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import whole_way
from thinned import thinned
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastscore
from fastscore.graph.tracing import trace


class Net(nn.Module):
    """[N, T, 4] or tokens [N, T] -> [N, 3]. way: how the rows of all sequences come together, and what is put back."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.pre, self.way = nn.Embedding(30, 6), nn.Linear(4, 6), way
        self.one, self.two, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def mlp(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.one(x)))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.pre(x) if x.is_floating_point() else x
        return self.head(self.way(self, x) if lengths is None else self.way(self, x, lengths))


def packed(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    rows = PackedSequence(net.mlp(rows.data), rows.batch_sizes, rows.sorted_indices, rows.unsorted_indices)
    return pad_packed_sequence(rows, batch_first=True)[0].sum(1)


def joined(read: Callable[[Tensor], list[int]]) -> Callable[..., Tensor]:
    def way(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
        counts = read(lengths)
        rows = torch.cat([each[:count] for each, count in zip(x, counts, strict=True)])
        return torch.stack([part.sum(0) for part in net.mlp(rows).split(counts)])

    return way


def in_order_of_length(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    counts = lengths.tolist()
    order = sorted(range(len(counts)), key=lambda n: -counts[n])
    return net.mlp(x[order])[[order.index(n) for n in range(len(order))]].sum(1)


def in_order_of_length_by_tensors(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    order = lengths.argsort(descending=True)
    return net.mlp(x[order])[order.argsort()].sum(1)


def segments(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    sample = torch.arange(len(x)).repeat_interleave(lengths)
    at = torch.cat([torch.arange(int(length)) for length in lengths])
    return torch.zeros_like(x[:, 0]).index_add(0, sample, net.mlp(x[sample, at]))


def no_padding(net: Net, ids: Tensor) -> Tensor:
    at = ids.flatten().nonzero()[:, 0]
    made = net.mlp(net.embed(ids.flatten()[at]))
    return torch.zeros(ids.numel(), made.shape[1], dtype=made.dtype).index_copy(0, at, made).unflatten(
        0, ids.shape).sum(1)


def each_once(unique: Callable[..., Any]) -> Callable[..., Tensor]:
    """Tokens that come several times in a batch are embedded once."""
    def way(net: Net, ids: Tensor) -> Tensor:
        some, where = unique(ids.flatten(), return_inverse=True)
        return net.mlp(net.embed(some))[where].unflatten(0, ids.shape).sum(1)

    return way


WAYS: dict[str, Callable[..., Tensor]] = {
    "packed": packed, "tolist": joined(lambda lengths: lengths.tolist()), "segments": segments,
    "item": joined(lambda lengths: [length.item() for length in lengths]),
    "int": joined(lambda lengths: [int(length) for length in lengths]),
    "sorted": in_order_of_length, "sorted by tensors": in_order_of_length_by_tensors}
TOKENS: dict[str, Callable[..., Tensor]] = {
    "no padding": no_padding, "unique": each_once(torch.unique),
    "unique_consecutive": each_once(torch.unique_consecutive)}
FIRST: list[tuple[list[int], list[int]]] = [([3, 3], [5, 1]), ([3, 3], [1, 5]), ([3], [1, 5]), ([4, 2, 1], [1, 4, 4])]


def net(way: Callable[..., Tensor]) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(way).double().eval()


def check(model: Net, batches: Sequence[dict[str, Tensor]]) -> set[str]:
    """That every score there is is exact, each sample's divided by its length as a Scorer does; the names of them, and
    none where the model is refused."""
    torch.manual_seed(0)
    v = [torch.randn(len(batch[next(iter(batch))]), 3, dtype=torch.float64) for batch in batches]
    try:
        scorer = fastscore.Scorer(model, batches[0], importance="taylor-abs")
        with scorer:
            for batch, each in zip(batches, v, strict=True):
                (model(**batch) * each).sum().backward()
        scores = scorer.scores()
    except (ValueError, RuntimeError) as error:
        if "one sample each" not in str(error):
            raise
        return set()
    for group in trace(model, batches[0]).groups:
        if group.name in scores:
            want = torch.cat([whole_way.sums(model, group, batch, each) / each.norm(dim=1, keepdim=True)
                              for batch, each in zip(batches, v, strict=True)]).abs().mean(0)
            torch.testing.assert_close(scores[group.name].double(), want, rtol=1e-6, atol=1e-12)
    return set(scores)


@pytest.mark.parametrize(("way", "lengths"), thinned(WAYS, FIRST), ids=str)
def test_lengths(way: str, lengths: tuple[list[int], list[int]]) -> None:
    batches = [{"x": torch.randn(len(each), max(each), 4, dtype=torch.float64), "lengths": torch.tensor(each)}
               for each in lengths]
    assert "one" not in check(net(WAYS[way]), batches)


@pytest.mark.parametrize(("first", "way"), thinned(
    [[[1, 2], [3, 4], [5, 6]], [[5, 6, 7], [8, 9, 10]], [[5, 6, 7]]], TOKENS), ids=str)
def test_tokens(way: str, first: list[list[int]]) -> None:
    batches = [{"x": torch.tensor(ids)} for ids in (first, [[9, 3, 2], [1, 0, 9]], [[9, 9, 0, 0], [9, 1, 2, 3]])]
    assert "one" not in check(net(TOKENS[way]), batches)


def test_other_lengths_that_the_code_does_not_take_leave_what_can_be_told() -> None:
    """Lengths that stand for something else: only those of the batch run; rows are where they are."""
    def way(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
        if not bool((lengths == 3).all()):
            raise ValueError("3")
        return net.mlp(x.transpose(0, 1)).sum(0)

    x = torch.randn(3, 3, 4, dtype=torch.float64)
    assert check(net(way), [{"x": x, "lengths": torch.tensor([3, 3, 3])}]) == {"one", "pre", "two"}


class Recurrent(nn.Module):
    """Sequences [N, T, 4] -> [N, 3], packed for a recurrent module in one of its layouts."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Linear(4, 6), batch_first
        self.rnn = kind(6, 5, 2, batch_first=batch_first, bidirectional=True)  # type: ignore[arg-type]
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(x).relu() + 1
        x = x if self.batch_first else x.transpose(0, 1)
        rows, _ = self.rnn(pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False))
        return self.head(pad_packed_sequence(rows, batch_first=True)[0].sum(1) / lengths[:, None])


@pytest.mark.parametrize(("kind", "batch_first"), [(nn.LSTM, True), (nn.GRU, False)])
def test_padding_of_packed_sequences_is_in_no_mean(kind: type[nn.RNNBase], batch_first: bool) -> None:
    """Means, and what is compared with them, are those of the samples one by one, which have none; and of what the
    first layer reads, the mean is that of the steps there are."""
    torch.manual_seed(0)
    model = Recurrent(kind, batch_first).double().eval()
    lengths = [[5, 2, 3], [1, 4]]
    batches = [{"x": torch.randn(len(each), max(each), 4, dtype=torch.float64), "lengths": torch.tensor(each)}
               for each in lengths]
    alone = [{name: value[n:n + 1] for name, value in batch.items()} for batch in batches
             for n in range(len(batch["x"]))]
    v = {float(each["x"].sum()): torch.randn(3, dtype=torch.float64) for each in alone}

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return sum(row @ v[float(x.sum())] for row, x in zip(output, batch["x"], strict=True))

    every, one = (fastscore.score(model, given, ablation="mean", gradient="loss", normalize=False, loss=loss,
                                  progress=False) for given in (batches, alone))
    assert {"embed", "rnn.weight_ih_l0"} <= set(every) == set(one)
    for name in every:
        torch.testing.assert_close(every[name], one[name])
    for layer in every.means:
        torch.testing.assert_close(every.means[layer], one.means[layer])
    with torch.no_grad():
        read = [(model.embed(each["x"][0, :each["lengths"]]).relu() + 1).mean(0) for each in alone]
    torch.testing.assert_close(every.means["rnn.weight_ih_l0_reverse"].double(), torch.stack(read).mean(0))
