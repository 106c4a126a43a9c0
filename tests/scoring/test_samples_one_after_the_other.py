"""Batches of several samples that lie one after the other, each with as many rows as it holds: graphs, packed
sequences, clouds of points, molecules. Against each sample by itself, with gates instead of taps, in float64."""

import copy
import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import whole_way
from hypothesis import given, settings
from hypothesis import strategies as st
from samples_in_a_row import KINDS, SIZES, Batch, Cloud, Graphs, joined, parts, pooled
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore import Scorer, score
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.tracing import trace


def alone(model: nn.Module, group: ChannelGroup, sample: Batch, sent: Tensor) -> Tensor:
    """s of one sample, by itself: see whole_way.sums, which takes batches [N, ...]."""
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda module, args, kwargs: ((), {name: x[0] for name, x in kwargs.items()}),
                                    with_kwargs=True)
    return whole_way.sums(model, group, {name: x[None] for name, x in sample.items()}, sent[None])[0]


def check(scores: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    assert exact
    assert set(scores) == set(exact)
    for name, value in exact.items():
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-5, atol=1e-9 * float(value.abs().max()))


def brute_force(model: nn.Module, samples: Iterable[tuple[Batch, Tensor]], example: Batch) -> dict[str, Tensor]:
    """The mean square over samples, each by itself."""
    samples = list(samples)
    return {group.name: torch.stack([alone(model, group, *each).square() for each in samples]).mean(0)
            for group in trace(model, example).groups}


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_by_itself(kind: str) -> None:
    model, sent = noisy(KINDS[kind]), torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    samples = [parts(kind, sizes, seed) for seed, sizes in enumerate(SIZES)]
    rows = iter(sent)
    expected = [(one, next(rows)[:model(**one).shape[1]]) for batch in samples for one in batch]
    per_batch = {len(batch): torch.stack([v for one, v in expected if any(one is each for each in batch)])
                 for batch in samples}
    scores = score(model, [joined(batch) for batch in samples], gradient="loss", normalize=False, progress=False,
                   loss=lambda output, batch: (output * per_batch[len(output)]).sum())
    assert scores.samples == 9
    check(scores, brute_force(model, expected, joined(samples[0])))


@pytest.mark.parametrize("how", [{"importance": "taylor-abs"}, {"importance": "taylor"}, {"reduction": "element"},
                                 {"units": "norms"}, {"units": "blocks"}, {"normalize": True}], ids=str)
def test_in_one_batch_as_in_a_batch_each(how: dict[str, Any]) -> None:
    def mean_square(output: Tensor, batch: Batch) -> Tensor:
        return output.sin().square().sum()

    for kind in ("cloud", "packed") if how != {"units": "norms"} else ("cloud",):
        model, samples = noisy(KINDS[kind]), parts(kind, (4, 6, 3, 1))
        options = {"gradient": "loss", "normalize": False, "loss": mean_square, "progress": False, **how}
        scores, alone = (score(model, batches, **options) for batches in ([joined(samples)], samples))
        check(scores, {name: value.double() for name, value in alone.items()})


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), min_size=1, max_size=2),
       st.sampled_from(["sum", "mean", "amax", "molecules"]))
def test_any_sizes(batches: list[list[int]], kind: str) -> None:
    """Graphs of one node, and of none, too; every direction of the output once."""
    sizes = [[3, 4], *batches]
    model = noisy(KINDS[kind])
    samples = [parts(kind, each, seed) for seed, each in enumerate(sizes)]
    scores = score(model, [joined(batch) for batch in samples], probes="exact", normalize=False, progress=False)
    classes = 2 if kind == "molecules" else 3
    exact = [brute_force(model, [(one, axis) for batch in samples for one in batch], joined(samples[0]))
             for axis in torch.eye(classes, dtype=torch.float64)]
    check(scores, {name: sum(each[name] for each in exact) for name in exact[0]})


def test_rows_that_fold_give_the_same_either_way() -> None:
    """Clouds of as many points each, as [N, P, C] and one after the other."""
    model = noisy(Cloud)
    points = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of = torch.arange(3).repeat_interleave(4)

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside.second(self.inside.norm(self.inside.first(x.flatten(0, 1))).relu()).relu()
            return self.inside.last(self.inside.head(x.unflatten(0, (-1, 4)).amax(1)).relu())

    how = {"gradient": "loss", "loss": lambda output, batch: output.sin().sum(), "progress": False,
           "importance": "taylor-abs"}
    folded = score(Folded(), [points], **how)  # type: ignore[arg-type]
    flat = score(model, [{"x": points.flatten(0, 1), "batch": of}], **how)  # type: ignore[arg-type]
    assert len(flat) == 3
    for name, value in flat.items():
        torch.testing.assert_close(value, folded[f"inside.{name}"], rtol=1e-6, atol=0)


def test_a_mean_is_that_of_all_rows_of_a_batch() -> None:
    kind = "mean"
    model, batch = noisy(KINDS[kind]), parts(kind, SIZES[0])
    seen: list[Tensor] = []
    handle = model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean(0)))
    model(**joined(batch))
    handle.remove()
    scores = score(model, [joined(batch)], gradient="loss", normalize=False, ablation="mean", progress=False,
                   loss=lambda output, batch: output.sum())
    found = []
    for one in batch:
        gate = torch.ones(8, dtype=torch.float64, requires_grad=True)
        handle = model.second.register_forward_pre_hook(
            lambda module, args, gate=gate: (args[0] * gate + (1 - gate) * seen[0],))
        found.append(torch.autograd.grad(model(**one).sum(), gate)[0].detach())
        handle.remove()
    exact = torch.stack(found).square().mean(0)
    torch.testing.assert_close(scores["first"].double(), exact, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(scores.means["second"].double(), seen[0], rtol=1e-6, atol=1e-12)


def test_random_gradients_are_those_of_a_probe() -> None:
    model, batches = noisy(Cloud), [joined(parts("cloud", sizes)) for sizes in SIZES]
    wanted = score(model, batches, progress=False, probes=2)
    scorer = Scorer(model, batches[0], gradient="random")
    with scorer:
        for batch in batches:
            output = model(**batch)
            scorer.probe(output)
            scorer.probe(output)
            output.sum().backward()
    check(scorer.scores(), {name: value.double() for name, value in wanted.items()})
    alike = score(model, [parts("cloud", (5,))[0]], progress=False)  # one sample alone has the same gradient
    assert set(alike) == set(wanted)


def test_a_model_that_was_traced_with_one_sample() -> None:
    model = noisy(Cloud)
    for sizes in ((5,), (4, 6, 3), (5,)):
        assert set(score(model, [joined(parts("cloud", sizes))], progress=False)) == {"first", "second", "head"}


def test_gradients_of_whole_batches() -> None:
    """Of molchanov-group, which reads the gradients of minibatches, samples need not be told apart."""
    model, batch = noisy(Cloud), joined(parts("cloud", (4, 6, 3)))
    scores = score(model, [batch], importance="molchanov-group", gradient="loss", normalize=False, progress=False,
                   loss=lambda output, batch: output.square().sum())
    weight = torch.autograd.grad(model(**batch).square().sum(), [model.first.weight, model.first.bias])
    exact = (model.first.weight * weight[0]).square().sum(1) + (model.first.bias * weight[1]).square()
    torch.testing.assert_close(scores["first"].double(), exact.detach(), rtol=1e-5, atol=0)


def test_graphs_of_passes_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        output: Tensor = model(**batch)
        if output.requires_grad:
            kept.append(weakref.ref(output))
        return output

    batches = [joined(parts("sum", sizes)) for sizes in SIZES]
    score(noisy(KINDS["sum"]), batches, forward=forward, progress=False)
    gc.collect()
    assert kept
    assert all(output() is None for output in kept)


class Mixing(Graphs):
    """Every node sees the mean of all graphs' after the first layer; with `values`, without a gradient."""

    values = False

    def forward(self, x: Tensor, edge_index: Tensor, ptr: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x / (1 + x.detach().amax()) if self.values else x + x.mean(0)
        of = torch.bucketize(torch.arange(len(x)), ptr[1:], right=True)
        return self.last(self.head(pooled("sum", self.second(x).relu(), of, len(ptr) - 1)).relu())


@pytest.mark.parametrize("values", [False, True])
def test_samples_that_meet(values: bool) -> None:
    model, batch = noisy(lambda: Mixing("sum")), joined(parts("sum", (4, 6, 3)))
    model.values = values
    if values:
        with pytest.warns(UserWarning, match="depends on which others are in its batch"):
            assert set(score(model, [batch], progress=False)) >= {"second", "head"}
        return

    class Outer(nn.Module):
        """A layer before the mean, too."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.inside = nn.Linear(5, 5), model

        def forward(self, x: Tensor, edge_index: Tensor, ptr: Tensor) -> Tensor:
            return self.inside(self.before(x).relu(), edge_index, ptr)

    with pytest.warns(UserWarning, match="depends on which others are in its batch"):
        scores = score(noisy(Outer), [batch], progress=False)
    assert "reaches several rows of the output" in scores.skipped["before"]
    assert {"inside.second", "inside.head"} <= set(scores)


def test_rows_of_the_output_that_are_nodes_are_no_samples() -> None:
    """They see each other; as one sample they are scored, [1, nodes * C]."""
    class Nodes(Graphs):
        def forward(self, x: Tensor, edge_index: Tensor, ptr: Tensor) -> Tensor:
            x = x + torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
            x = self.second(self.first(x).relu()).relu()
            x = x + torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
            return self.last(self.head(x).relu())

    model, batch = noisy(lambda: Nodes("sum")), joined(parts("sum", (4, 6, 3)))
    with pytest.warns(UserWarning, match="depends on which others are in its batch"):
        scores = score(model, [batch], progress=False)
    assert set(scores) == {"second", "head"}
    assert "reaches the outputs of others" in scores.skipped["first"]
    whole = score(model, [batch], forward=lambda model, batch: model(**batch).flatten()[None], progress=False)
    assert set(whole) == {"first", "second", "head"}
    assert whole.samples == 1


def test_what_cannot_be_says_so() -> None:
    model, batch = noisy(KINDS["sum"]), joined(parts("sum", (4, 6, 3)))
    for argument, options in {"samples": {"samples": 2}, "compile": {"compile": True},
                              "sample_dims": {"sample_dims": 2}}.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            score(model, [batch], progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'gradient="random" and scorer.probe\(output\)'):
        Scorer(model, batch)
    with pytest.raises(ValueError, match=r"^samples: "):
        score(noisy(Cloud), [(joined(parts("cloud", (4, 6, 3))),)], samples=20, progress=False,
              forward=lambda model, batch: model(**batch[0]))
    rows = joined(parts("cloud", (4, 6, 3)))
    for of in (rows["batch"], torch.zeros(13, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"^samples: .*lie one after the other"):
            score(noisy(Cloud), [(rows["x"], of)], samples=20, progress=False,
                  forward=lambda model, batch: model(*batch))


@pytest.mark.parametrize("kind", ["mean", "packed", "cloud"])
def test_the_whole_way(kind: str) -> None:
    """Batches are units of what is held out: no graph is cut."""
    model = noisy(KINDS[kind])
    batches = [joined(parts(kind, (2 + number % 3, 1, 4), number)) for number in range(12)]
    scores = score(model, batches, ablation="mean", progress=False)
    result = fastscore.prune(model, scores, batches[0], macs=0.7, calibration=batches)
    assert result.report.macs[1] <= 0.7 * result.report.macs[0]
    again = fastscore.reconstruct(model, fastscore.prune(model, scores, batches[0], macs=0.7), batches)
    assert again.model(**batches[1]).shape == model(**batches[1]).shape
    assert len(fastscore.curve(model, scores, batches, macs=(0.8,), progress=False).records()) == 1
    fastscore.distill(model, again, batches, held_out=batches[:2], steps=2, progress=False)
    if kind == "cloud":
        fastscore.recalibrate(again.model, batches)
