"""Rows that the model's code routes by what they hold, regular in the batch that is traced and not in the next: they
are followed in each batch, where gradients may be sent back twice, and every number is that of brute force, in float64;
where they may not, groups whose rows could lie otherwise are given none."""

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
import whole_way
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.routing import Decisions, other_answers
from fastscore.graph.samples.sample_axes import find
from fastscore.graph.tracing import trace
from fastscore.graph.trials.sample_trials import Watched
from fastscore.modules.sample_axis import SampleAxis


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))


class Routed(nn.Module):
    """[N, T, 6] -> [N, 3]; `route` takes rows [N * T, 6] through `inner`."""

    def __init__(self, route: Callable[["Routed", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.other, self.head, self.route = mlp(6, 8, 6), mlp(6, 5, 6), mlp(6, 7, 3), route

    def forward(self, x: Tensor) -> Tensor:
        y = self.route(self, x, x.flatten(0, 1))
        return self.head((y.unflatten(0, x.shape[:2]) if y.dim() == 2 else y).mean(1))


def sorted_rows(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    order = rows[:, 0].argsort()
    return model.inner(rows[order])[order.argsort()]


def taken_by_an_expert(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    """As many as there are samples: expert choice."""
    picked = rows[:, 0].topk(len(x), sorted=False).indices.sort().values
    return rows.index_add(0, picked, model.inner(rows[picked]))


def two_experts(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    first = rows[:, 0] < 100
    y = torch.zeros_like(rows)
    y[first] = model.inner(rows[first])
    y[~first] = model.other(rows[~first])
    return y


def grouped(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    """Every token goes to two experts: rows in order of expert, cut at counts, and back with weights, as JetMoe has
    them."""
    chosen = torch.stack([rows[:, 0] > rows[:, 1], rows[:, 2] > 0.3]).long().T
    experts, order = chosen.flatten().sort(stable=True)
    parts = rows.index_select(0, order // 2).split((experts[:, None] == torch.arange(2)).sum(0).tolist())
    made = torch.cat([expert(part) for expert, part in zip((model.inner, model.other), parts, strict=True)])
    gates = rows[:, 3:5].softmax(1).flatten()[order]
    return torch.zeros_like(rows).index_add(0, order // 2, made * gates[:, None])


def gathered(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    """Samples in another order at each token: along no dimension is a place one sample's."""
    some = x[..., 1].argsort(0)
    return model.inner(x.gather(0, some[..., None].expand_as(x))).gather(0, some.argsort(0)[..., None].expand_as(x))


def in_python(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    first = (rows[:, 0] < 100).tolist()
    at = [place for place, yes in enumerate(first) if yes]
    return rows.index_add(0, torch.tensor(at, dtype=torch.int64), model.inner(rows[at]))


def top_tokens(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    """Of each sample: no row leaves it."""
    picked = x[..., 0].topk(2, 1).indices[..., None].expand(-1, -1, x.shape[2])
    return x.scatter_add(1, picked, model.inner(x.gather(1, picked)))


def top_tokens_of_all_rows(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    """The same, in places counted through the batch."""
    begin = torch.arange(len(x))[:, None] * x.shape[1]
    picked = (x[..., 0].topk(2, 1).indices + begin).flatten()
    return rows.index_add(0, picked, model.inner(rows[picked]))


def largest_token(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    """One of each sample, as CLIP takes the end of a text."""
    return model.inner(x)[torch.arange(len(x)), x[..., 0].argmax(1)][:, None] + model.other(x).max(1, keepdim=True)[0]


def thresholds(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
    y = model.inner(x)
    return torch.where(x > 0.1, y, y * 0.2) * (y > -0.3)


CASES: dict[str, tuple[Callable[..., Tensor], set[str]]] = {  # routing, groups whose rows it can put anywhere
    "sorted rows": (sorted_rows, {"inner.0"}),
    "expert choice": (taken_by_an_expert, {"inner.0"}),
    "two experts": (two_experts, {"inner.0", "other.0"}),
    "grouped by expert": (grouped, {"inner.0", "other.0"}),
    "gathered, another order at each place": (gathered, {"inner.0"}),
    "in Python": (in_python, {"inner.0"}),
    "top tokens": (top_tokens, set()),
    "top tokens of all rows": (top_tokens_of_all_rows, set()),
    "largest token": (largest_token, set()),
    "thresholds": (thresholds, set()),
}


def in_the_batch(model: nn.Module, group: ChannelGroup, x: Tensor, v: Tensor) -> Tensor:
    """As whole_way.sums, of samples beside each other, which are sent back one by one."""
    gate, (edge,) = torch.ones(group.channels, dtype=torch.float64, requires_grad=True), group.role("consumer")
    handle = model.get_submodule(edge.layer).register_forward_pre_hook(lambda layer, args: args[0] * gate)
    z = model(x)
    handle.remove()
    return torch.stack([torch.autograd.grad((z[n] * v[n]).sum(), gate, retain_graph=True)[0] for n in range(len(x))])


@pytest.mark.parametrize("name", CASES)
def test_rows_that_a_batch_may_route_otherwise_are_followed(name: str) -> None:
    route, moving = CASES[name]
    torch.manual_seed(0)
    model = Routed(route).double().eval()
    x, v = torch.randn(6, 2, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    regular = x[:3].clone()  # in order, below every threshold
    regular[..., 0] = torch.arange(6).reshape(3, 2) / 6 if name != "expert choice" else torch.tensor([9.0, 0])
    x = torch.cat([regular, x[3:]])
    x[3:, :, 0] += torch.tensor([[200, 0], [0, 0], [0, 200]]) if route in (two_experts, in_python) else 0
    graph = trace(model, x)

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        rows = [next(n for n in range(len(x)) if torch.equal(x[n], sample)) for sample in batch]
        return (output * v[rows]).sum()

    how: dict[str, Any] = {"gradient": "loss", "normalize": False, "loss": loss, "progress": False}
    with oracles.untouched(model):
        scores = fastscore.score(model, [x[:3], x[3:]], **how)
        single = fastscore.score(model, x.split(1), **how)  # the way out that the reason names
    scorer = fastscore.Scorer(model, x[:3], normalize=False)
    with scorer:
        for part in (slice(3), slice(3, 6)):
            (model(x[part]) * v[part]).sum().backward()
    together = name == "expert choice"  # no sample is alone what it is among others
    assert set(scores) == set(single) == {group.name for group in graph.groups}
    once = scorer.scores()
    assert set(once) == set(scores) - moving
    assert all("routes, gathers, flips or loops over them" in once.skipped[group] for group in moving)
    for group in graph.groups:
        want = whole_way.sums(model, group, x, v).square().mean(0) if not together else torch.cat(
            [in_the_batch(model, group, x[part], v[part]) for part in (slice(3), slice(3, 6))]).square().mean(0)
        for found in (scores, once) if together else (scores, once, single):
            if group.name in found:
                torch.testing.assert_close(found[group.name].double(), want, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("samples", "dtype"), thinned([2, 8, 9, 70], [torch.float64, torch.float32, torch.bfloat16]))
def test_any_number_of_samples_is_followed(samples: int, dtype: torch.dtype) -> None:
    """One digit of each sample's number at a time, also where numbers are short."""
    torch.manual_seed(0)
    model, x = Routed(sorted_rows).to(dtype).eval(), torch.randn(samples, 3, 6, dtype=dtype)
    how: dict[str, Any] = {"probes": 2, "progress": False}
    scores, single = fastscore.score(model, [x], **how), fastscore.score(model, list(x.split(1)), **how)
    assert set(scores) == set(single) == {"inner.0", "inner.2", "head.0"}
    for name in scores:
        torch.testing.assert_close(scores[name], single[name], rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0)


def test_rows_that_meet_in_one_batch_have_no_score() -> None:
    """In the batch that was traced no row was of several samples."""
    def meeting(model: Routed, x: Tensor, rows: Tensor) -> Tensor:
        y = sorted_rows(model, x, rows)
        return y.unflatten(0, x.shape[:2]) + (0.01 * y.mean(0) if len(x) > 9 else 0)

    torch.manual_seed(0)
    model, x = Routed(meeting).eval(), torch.randn(12, 3, 6)
    scores = fastscore.score(model, [x[:4], x], progress=False)
    assert "head.0" in scores
    assert scores.skipped["inner.0"] == "what inner.2 reads of one sample reaches the outputs of others, so that " \
                                        "samples cannot be told apart"


def test_padding_that_is_left_out() -> None:
    """The mask of the traced batch is all ones; those of others need not be."""
    class Unpadded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = mlp(6, 8, 6), mlp(6, 7, 3)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return self.head(torch.zeros_like(x).masked_scatter(keep[..., None] != 0, self.inner(x[keep != 0])).mean(1))

    torch.manual_seed(0)
    model, x = Unpadded(), torch.randn(3, 4, 6)
    keep = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]])
    batches = [{"x": x, "keep": torch.ones_like(keep)}, {"x": x, "keep": keep}]
    scores = fastscore.score(model, batches, progress=False)
    single = fastscore.score(model, [{key: value[n:n + 1] for key, value in batch.items()} for batch in batches
                                     for n in range(3)], progress=False)
    assert set(scores) == set(single) == {"head.0", "inner.0"}
    for name in scores:
        torch.testing.assert_close(scores[name], single[name], rtol=1e-4, atol=0)
    scorer = fastscore.Scorer(model, batches[0])
    assert "routes, gathers, flips or loops over them" in scorer._totals._graph.skipped["inner.0"]


def test_decisions_are_a_function_of_what_they_are_made_of() -> None:
    """The code may take one twice, to send rows there and to fetch them back."""
    x = torch.randn(4, 5)
    with Decisions(x) as noted:
        for constant in (torch.rand(4, 5) > 0.5, x + 1, torch.arange(5) < 3, x.sum() > 0):
            assert constant.numel()
    assert not noted.found
    plain = x.argsort(1), x > 0, x.topk(2).indices, (x.float() * 3).long(), x.max(1).indices
    twice = []
    for _ in range(2):
        with Decisions(x, seed=3) as noted:
            twice.append((x.argsort(1), x > 0, x.topk(2).indices, (x.float() * 3).long(), x.max(1).indices))
        assert noted.found
    for before, one, two in zip(plain, *twice, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, before)
    assert 0 < int(other_answers(torch.ones(8, 8, dtype=torch.int64), 0).sum()) < 64
    assert sorted(other_answers(torch.arange(9), 1).tolist()) == list(range(9))


def test_integers_may_say_what_rows_are_whose_unless_they_name_rows_of_tables() -> None:
    table, ids, x = torch.randn(9, 4), torch.arange(6).view(2, 3), torch.randn(2, 3, 4)
    ways: list[tuple[Callable[[], Any], bool]] = [
        (lambda: F.embedding((ids + 1).T, table) * x.sum(), False), (lambda: table[ids], False),
        (lambda: (ids.float() * 0.1).sin(), False), (lambda: x.flatten(0, 1)[ids], True),
        (lambda: x * ids[..., None], True), (lambda: x.take(ids), True), (lambda: ids.tolist(), True),
        (lambda: ids.numpy(), True), (lambda: int(ids[0, 0]), True), (lambda: F.embedding(ids, x.flatten(0, 1)), True)]
    for way, picks in ways:
        with Decisions((x, ids)) as noted:
            way()
        assert noted.picks == picks
        assert not noted.found


def test_rows_that_are_gathered_at_given_places_are_tried_at_others() -> None:
    model = Routed(lambda model, x, rows: x)
    x = {"x": torch.randn(3, 4, 6), "places": torch.arange(12).view(3, 4)}
    graph = trace(model, x, lambda model, batch: model.head(
        model.inner(batch["x"].flatten(0, 1))[batch["places"].flatten()].view(batch["x"].shape).mean(1)))
    assert not isinstance(graph.samples.calls["inner.2"][0], SampleAxis)


def test_decisions_are_looked_for_in_a_run_that_is_made_anyway() -> None:
    """Of a model that decides nothing there are two runs, on batches of two sizes; where it decides, two with other
    decisions, one with samples that end early, and six that show whether samples meet."""
    def runs(model: nn.Module) -> list[int]:
        made: list[int] = []
        find(model, {"inner.0": Watched(-1)}, lambda model, x: [made.append(len(x)) or model(x)], torch.randn(1, 4, 6))
        return made

    assert runs(Routed(lambda model, x, rows: model.inner(rows))) == [2, 3]
    assert runs(Routed(sorted_rows)) == [2, 3, *[3, 3, 3], *[3, 3, 3, 1, 1, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_a_mask_picks_are_not_called_the_same_for_all_samples(seed: int) -> None:
    """There are as many of some batch as of another by chance, or none."""
    torch.manual_seed(seed)
    inner, head = mlp(6, 6, 6), mlp(6, 6, 3)
    model = nn.ModuleDict({"inner": inner, "head": head}).double().eval()
    x = torch.randn(4, 6).double()
    for limit in (0.0, 0.5):
        def masked(model: Any, x: Tensor, limit: float = limit) -> Tensor:
            go = x[:, 0] > limit
            return model["head"](x.index_put((go,), model["inner"](x[go])))

        graph = trace(model, x, masked)
        if (reason := graph.samples.reason("inner.2")) is not None:
            assert "it cannot be told which of the rows that inner.2 reads belong to which sample: " in reason


def test_rows_along_another_dimension_are_followed() -> None:
    """One row of places, [1, R, C], as of a batch whose padding is left out; and channels first, [1, C, R]."""
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = mlp(6, 8, 6), mlp(6, 7, 3)
            self.before, self.after = nn.Conv1d(6, 5, 1), nn.Conv1d(5, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            go = x[..., 0] > -0.5
            rows = x[go][None]
            y = self.inner(rows) + self.after(self.before(rows.mT).relu()).mT
            return self.head(x.masked_scatter(go[..., None], y).mean(1))

    torch.manual_seed(0)
    model, x, v = Joined().double(), torch.randn(5, 4, 6).double(), torch.randn(5, 3).double()
    scores = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                             loss=lambda output, batch: (output * v).sum())
    groups = {group.name: group for group in trace(model, x).groups}
    assert set(scores) == set(groups) == {"inner.0", "head.0", "before"}
    for name, group in groups.items():
        want = whole_way.sums(model, group, x, v).square().mean(0)
        torch.testing.assert_close(scores[name].double(), want, rtol=1e-6, atol=1e-30)
