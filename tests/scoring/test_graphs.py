"""Passes as graphs: recorded once, replayed for each batch, with the same scores, bit for bit, as without."""

from typing import Any

import pytest
import torch
from networks import NETWORKS
from recorded import NOT_PERMITTED, HostRecorder
from torch import Tensor, nn

import fastscore
from fastscore.fastpath import graphs


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> HostRecorder:
    """CPUs have graphs, and take the path of a GPU."""
    monkeypatch.setenv("FASTSCORE_PORTABLE", "1")
    on_host = HostRecorder()
    monkeypatch.setitem(graphs.RECORDERS, "cpu", on_host)
    return on_host


def inputs(name: str, *sizes: int) -> list[Tensor]:
    torch.manual_seed(0)
    like = NETWORKS[name].inputs().float()
    return [torch.randn(size, *like.shape[1:]) for size in sizes]


def both(model: nn.Module, batches: list[Any], **options: Any) -> tuple[fastscore.Scores, fastscore.Scores]:
    """(with graphs, without)"""
    found = [fastscore.score(model, batches, progress=False, graph=graph, **options) for graph in ("auto", False)]
    for layer in found[0]:
        assert torch.equal(found[0].totals[layer], found[1].totals[layer]), layer
        assert torch.equal(found[0].half_totals[layer], found[1].half_totals[layer]), layer
    for layer in found[0].means:
        assert torch.equal(found[0].means[layer], found[1].means[layer]), layer
    assert found[0].samples == found[1].samples
    return found[0], found[1]


OPTIONS = {
    "taylor-sq": {},
    "probes": {"probes": 3},
    "mean ablation": {"ablation": "mean"},
    "elements": {"reduction": "element"},
    "minibatches": {"importance": "molchanov-bn"},
    "orthogonal": {"probes": 2, "distribution": "orthogonal"},
    "loss": {"gradient": "loss"},
    "fixed order": {"fixed_order": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_scores_of_replayed_passes_are_those_of_passes_that_run(recorder: HostRecorder, option: str) -> None:
    model = NETWORKS["residual"].traced(dtype=torch.float32)
    batches: list[Any] = inputs("residual", 4, 4, 4, 4, 2)
    if option == "loss":
        batches = [(x, torch.arange(len(x)) % 2) for x in batches]
    scores, eager = both(model, batches, **OPTIONS[option])
    assert sum(recorder.replays) == 3  # the first ran as it was, and so did the last, which is smaller
    assert scores.plan is not None
    assert eager.plan is not None
    # minibatches that count as one go to the halves in turn, which are two graphs
    assert scores.plan.graph == ("2 CUDA graphs" if option == "minibatches" else "1 CUDA graph")
    assert scores.plan.graph in str(scores.plan)
    assert eager.plan.graph == "no CUDA graph: graph=False"


@pytest.mark.parametrize("name", ["mobile", "squeeze-excite"])
def test_batches_of_odd_size_take_two_graphs_as_their_halves_differ(recorder: HostRecorder, name: str) -> None:
    both(NETWORKS[name].traced(dtype=torch.float32), inputs(name, *[3] * 6))
    assert recorder.replays == [3, 2]


def test_shapes_that_do_not_repeat_are_not_recorded(recorder: HostRecorder) -> None:
    scores, _ = both(NETWORKS["residual"].traced(dtype=torch.float32), inputs("residual", 1, 2, 3))
    assert recorder.replays == []
    assert scores.plan is not None
    assert scores.plan.graph == "no CUDA graph: no two batches in a row of one shape"


class Looks(nn.Module):
    """Its forward pass asks the host about what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.max().item() > -9 else -x
        return self.last(self.first(x).relu().mean((2, 3)))


def test_a_model_that_waits_for_the_device_runs_as_it_is_and_the_plan_says_why(recorder: HostRecorder) -> None:
    torch.manual_seed(0)
    model, batches = Looks(), [torch.randn(2, 3, 6, 6) for _ in range(4)]
    scores, _ = both(model, batches)
    assert recorder.replays == []
    assert scores.plan is not None
    assert scores.plan.graph == f"no CUDA graph: recording failed: Tensor.item: {NOT_PERMITTED}"
    with pytest.raises(RuntimeError, match=f'graph: True, but recording failed: .*{NOT_PERMITTED}; use graph="auto"'):
        fastscore.score(model, batches, progress=False, graph=True)


def test_a_graph_that_cannot_be_is_an_error_where_it_was_asked_for() -> None:
    model, batches = NETWORKS["residual"].traced(dtype=torch.float32), inputs("residual", 2, 2)
    with pytest.raises(RuntimeError, match='graph: True, but nothing records the work of cpu; use graph="auto"'):
        fastscore.score(model, batches, progress=False, graph=True)


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_nan_in_a_replayed_pass_is_named(recorder: HostRecorder, bad: int) -> None:
    batches = inputs("residual", 2, 2, 2, 2)
    batches[bad][1] = torch.nan
    with pytest.raises(FloatingPointError, match="batches: NaN or infinity in the input"):
        fastscore.score(NETWORKS["residual"].traced(dtype=torch.float32), batches, progress=False)


class Overflows(torch.autograd.Function):
    """Hands on its input; its gradient is infinite where the input is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x > 1e3, torch.inf, g)


class OverflowsBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.last(Overflows.apply(x))


@pytest.mark.parametrize("bad", [1, 2, 3])
@pytest.mark.parametrize("graph", ["auto", False])
def test_a_gradient_that_overflows_is_named_by_its_layer(recorder: HostRecorder, bad: int, graph: Any) -> None:
    torch.manual_seed(0)
    batches = [torch.rand(2, 3) for _ in range(4)]
    batches[bad] *= 1e6
    model = OverflowsBackward()
    nn.init.constant_(model.first.weight, 1.0)
    nn.init.constant_(model.second.weight, 1.0)
    with pytest.raises(FloatingPointError, match="second: NaN or infinity in the gradient that reaches its channels"):
        fastscore.score(model, batches, progress=False, graph=graph)
