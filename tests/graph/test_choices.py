"""Channels by which the model's code chooses something are kept; choices channel by channel hinder nobody."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from thinned import NIGHTLY
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

WIDTH = 12
# where the change of a value shows before another choice does
REASONS = ("they choose what comes to", "cannot follow its channels to")


class Chosen(nn.Module):
    """[N, T, 4] -> [N, 3]; `choose` is code between a layer and those that read it."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.read, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, 3)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.choose(self.make(x))).relu().mean(1))


def merged(x: Tensor) -> Tensor:
    """Tokens merged into those that are most like them, as ToMe does."""
    alike = F.normalize(x.detach(), dim=-1)
    nearest = (alike[:, ::2] @ alike[:, 1::2].mT).argmax(-1, keepdim=True).expand(-1, -1, x.shape[-1])
    return x[:, 1::2].scatter_reduce(1, nearest, x[:, ::2], "mean")


def longest(x: Tensor) -> Tensor:
    """The tokens of the largest norms."""
    places = x.norm(dim=-1).topk(2, dim=1).indices
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def without_padding(x: Tensor) -> Tensor:
    """Tokens that are nothing but zeros count for nothing."""
    x = x.relu()
    return x * (x.abs().sum(-1, keepdim=True) > 0) + 1


def brightest(x: Tensor) -> Tensor:
    return x[torch.arange(len(x)), x.sum(-1).argmax(1)][:, None]


def in_order(x: Tensor) -> Tensor:
    return x.gather(1, x.sum(-1, keepdim=True).argsort(1).expand_as(x)) * torch.arange(x.shape[1])[:, None]


def rounded(x: Tensor) -> Tensor:
    return x * x.detach().mean(-1, keepdim=True).round()


def nonzero(x: Tensor) -> Tensor:
    """Tokens weighted by how many there are that hold something."""
    return x.relu() / (1 + len(x.relu().sum(-1).nonzero()))


def skipped(x: Tensor) -> Tensor:
    """Samples of little energy are left out: one number for each."""
    return x * (x.detach().flatten(1).norm(dim=1) > 4.0)[:, None, None]


def gated(x: Tensor) -> Tensor:
    """Samples are left out by one number for each."""
    return x * (x.detach().sum(-1).amin(1, keepdim=True) > -0.5)[..., None]


MIXED = (merged, longest, without_padding, brightest, in_order, rounded, nonzero, skipped, gated)
FAR = 1000.0
# name -> what x [N, 2, WIDTH] is multiplied with, by one number `s` [N, 2] for each token, which is never as far from
# 0 as FAR: no change of a value changes what is chosen
HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rank": lambda x, s: torch.unique((s / FAR).round(), return_inverse=True)[1],
    "changes": lambda x, s: torch.unique_consecutive((s / FAR).round(), return_inverse=True)[1],
    "runs": lambda x, s: torch.unique_consecutive(s, return_inverse=True)[1],
    "same class": lambda x, s: (best := (x + FAR * torch.eye(WIDTH)[3]).argmax(-1))[:, :1] == best[:, 1:],
    "other class": lambda x, s: (best := (x + FAR * torch.eye(WIDTH)[3:5]).argmax(-1))[:, :1] == best[:, 1:],
    "other step": lambda x, s: (step := (s / FAR + torch.tensor([2, 7])).round())[:, :1] == step[:, 1:],
    "other number": lambda x, s: (step := (s / FAR + torch.tensor([2.5, 7.5])).long())[:, :1] == step[:, 1:],
    "same side": lambda x, s: (s[:, :1] > FAR) == (s[:, 1:] > FAR),
    "either side": lambda x, s: (s[:, :1] > FAR) ^ (s[:, 1:] > FAR),
    "same step": lambda x, s: (step := (s / FAR).round().long())[:, :1] - step[:, 1:],
    "median": lambda x, s: (s + FAR * torch.arange(x.shape[1])).median(1, keepdim=True).indices,
    "largest so far": lambda x, s: (s + FAR * torch.arange(x.shape[1])).cummax(1).indices,
    "steps": lambda x, s: torch.div(s.detach() + FAR, FAR**2, rounding_mode="floor"),
    "whole steps": lambda x, s: (s.detach() + FAR) // FAR**2,
    "negative": lambda x, s: torch.signbit(s - FAR),
    "histogram": lambda x, s: torch.histc(s.detach(), 3, FAR, 2 * FAR)[1],
    "equal": lambda x, s: torch.tensor(float(torch.equal(s[:, 0], s[:, 1]))),
    "item": lambda x, s: torch.tensor(float(s[0, 0].item() > FAR)),
    "list": lambda x, s: torch.tensor([[float(value > FAR) for value in row] for row in s.tolist()]),
    "numpy": lambda x, s: torch.from_numpy(s.detach().numpy() > FAR),
    "rounded in place": lambda x, s: (s / FAR).detach().round_(),
    "compared in place": lambda x, s: s.detach().clone().gt_(FAR),
    "divided in place": lambda x, s: (s.detach() + FAR).floor_divide_(FAR**2),
    "in out=": lambda x, s: torch.gt(s.detach(), FAR, out=torch.empty(s.shape, dtype=torch.bool)),
    "grown out=": lambda x, s: torch.argmax(s.detach() + FAR * torch.arange(x.shape[1]), -1, keepdim=True,
                                            out=torch.empty(0, dtype=torch.long)),
    "put among whole numbers": lambda x, s: torch.zeros(s.shape, dtype=torch.long).copy_(s.detach() / FAR + 2.5),
    "place in a window": lambda x, s: F.max_pool1d(
        (s + FAR * torch.arange(x.shape[1]))[:, None], 2, return_indices=True)[1][:, 0],
    "place in all": lambda x, s: F.adaptive_max_pool2d(
        (x.mT + FAR * torch.eye(x.shape[1])[0])[..., None], 1, return_indices=True)[1][:, :2, 0, 0],
    "clamped": lambda x, s: s.detach().clamp(min=FAR),
    "flat in place": lambda x, s: (s.detach() - FAR).relu_(),
    "bucket": lambda x, s: torch.bucketize(s.detach(), FAR * torch.arange(1, 4)),
    "buckets": lambda x, s: torch.bucketize(FAR * torch.arange(2).to(s), (s.detach() + FAR / 2).flatten()),
    "searched": lambda x, s: torch.searchsorted((s.detach() + FAR / 2)[:, :1].contiguous(),
                                                torch.tensor([[0.0, FAR]] * len(s)).to(s)),
    "among": lambda x, s: torch.isin((s.detach() / FAR).round(), torch.tensor([3.0, 4.0, 5.0])),
    "drawn": lambda x, s: torch.bernoulli((s.detach() / FAR).sigmoid() / FAR),
}
# name -> a choice for each channel by itself, or none at all
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky by hand": lambda x: torch.where(x > 0, x, 0.1 * x),
    "sparse": lambda x: x * (x.abs() > 0.5),
    "gated by means": lambda x: x * (x.mean(1, keepdim=True) > 0),
    "sorted": lambda x: x.sort(1).values * torch.arange(x.shape[1])[:, None],
    "largest": lambda x: x.max(1, keepdim=True).values,
    "quantized": lambda x: (x * 8).round() / 8,
    "largest of two": lambda x: F.max_pool1d(x.mT, 2).mT,
    "back in their places": lambda x: F.max_unpool1d(*F.max_pool1d(x.mT, 2, return_indices=True), 2).mT,
    "dead": lambda x: torch.cat([x, (x - 1000.0).relu() + x, x.clamp(-1000, 1000)], 1),
    "zeroed in place": lambda x: x * (x.detach() - 0.5).gt_(0),
    "by place": lambda x: x * torch.bucketize(torch.arange(x.shape[1]) / x.shape[1],
                                              torch.tensor([0.1, 0.4, 0.8]))[:, None],
    "counted": lambda x: x * torch.isin(torch.arange(3.0), torch.arange(7.0)).sum(),
    "without NaN": lambda x: torch.where(torch.isnan(x) | torch.isinf(x), 0.0, x),
    "checked": lambda x: x if bool(torch.isfinite(x).all()) else x.nan_to_num(),
}


def network(choose: Callable[[Tensor], Tensor], seed: int) -> Chosen:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Chosen(choose).double().eval()


def tokens(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("choose", MIXED)
def test_channels_that_choose_among_rows_are_kept(choose: Callable[[Tensor], Tensor]) -> None:
    """Whatever the weights are, and the batch."""
    for seed, samples in enumerate((1, 4, 2, 1)[:None if NIGHTLY else 2]):
        scores = fastscore.score(network(choose, seed), [tokens(samples, seed)], progress=False)
        assert list(scores) == ["read"]
        assert any(reason in scores.skipped["make"] for reason in REASONS)


@pytest.mark.parametrize("kind", list(HIDDEN))
def test_choices_that_no_change_of_a_value_shows(kind: str) -> None:
    model = network(lambda x: x * (1 + HIDDEN[kind](x, x.sum(-1)).to(x))[..., None], 0)
    graph = trace(model, tokens(1, 0)[:, :2])
    assert [group.name for group in graph.groups] == ["read"]
    assert "they choose what comes to" in graph.skipped["make"] or "makes Python numbers" in graph.skipped["make"]


@pytest.mark.parametrize("kind", list(ALONE))
def test_choices_of_each_channel_by_itself(kind: str) -> None:
    model, x = network(ALONE[kind], 0), tokens(4, 0)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["make", "read"]
    small = fastscore.prune(model, scores, x, channels=0.5, scope="layer").model
    other = tokens(64, 1)
    with fastscore.mask(model, scores, 0.5, x, scope="layer"), torch.no_grad():
        torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-12)


def test_complex_numbers_are_no_choice() -> None:
    """What FNet does between a layer and those that read it hinders none of the others."""
    scores = fastscore.score(network(lambda x: torch.fft.fft2(x).real, 0), [tokens(4, 0)], progress=False)
    assert list(scores) == ["read"]
    assert "choose" not in scores.skipped["make"]


class Merged(Chosen):
    """The tokens that `metric` finds alike are merged; nothing else is made of what it gives."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.metric = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        made, alike = self.make(x), self.metric(x)
        nearest = (alike[:, ::2] @ alike[:, 1::2].mT).argmax(-1, keepdim=True).expand(-1, -1, made.shape[-1])
        return self.head(self.read(made[:, 1::2].scatter_reduce(1, nearest, made[:, ::2], "mean")).relu().mean(1))


class Switched(Merged):
    """`metric` says for each sample whether it is read at all."""

    def forward(self, x: Tensor) -> Tensor:
        on = self.metric(x).mean(1).argmax(-1) > 0
        return self.head(self.read(self.make(x) * on[:, None, None]).relu().mean(1))


class Clustered(Merged):
    """Tokens that `metric` puts into one class are averaged."""

    def forward(self, x: Tensor) -> Tensor:
        best = self.metric(x).argmax(-1)
        alike = (best[:, :, None] == best[:, None]).to(x)
        return self.head(self.read(alike @ self.make(x) / alike.sum(-1, keepdim=True)).relu().mean(1))


@pytest.mark.parametrize("kind", [Merged, Switched, Clustered])
@pytest.mark.parametrize("seed", range(2))
def test_a_layer_that_only_chooses_is_not_said_to_be_idle(kind: type[Merged], seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind().double().eval()
    scores = fastscore.score(model, [tokens(4, seed)], progress=False)
    assert scores.skipped["metric"] == \
        "read reads its channels where no gradient comes back (detach(), a choice by them, or an operation that has " \
        "none, as those of quantized layers)"
    assert "make" in scores


class Averaging(Chosen):
    """It adds what it keeps from call to call."""

    average: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x)
        self.average = 0.5 * self.average + made.mean().detach()
        return self.head(self.read(made).relu().mean(1)) + self.average


def test_a_model_that_gives_something_else_each_time() -> None:
    graph = trace(Averaging(lambda x: x).double().eval(), tokens(2, 0))
    assert not graph.groups
    assert all("each time the model runs on the same input" in graph.skipped[layer] for layer in ("make", "read"))


class Paired(Chosen):
    """Two others to each sample."""

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        means = self.head(self.read(self.make(others)).relu().mean(1)).view(len(x), 2, 3).mean(1)
        return self.head(self.read(self.make(x)).relu().mean(1)) + means


def test_a_batch_of_which_one_sample_does_not_run() -> None:
    model, batch = Paired(lambda x: x).double().eval(), {"x": tokens(3, 0), "others": tokens(6, 1)}
    with pytest.raises(ValueError, match=r"not on one sample of it .* forward=lambda model, batch: model\(\*\*batch\)"):
        fastscore.score(model, [batch], progress=False)
    assert list(fastscore.score(model, [batch], progress=False, forward=lambda model, batch: model(**batch))) == \
        ["make", "read"]


def dropped(x: Tensor) -> Tensor:
    """Tokens whose channels add up to little are left out, as they are pruned while a model runs."""
    return x[x.detach().sum(-1) > 0][None] if len(x) == 1 else x


def test_tokens_that_are_left_out_by_a_threshold_are_chosen() -> None:
    scores = fastscore.score(network(dropped, 0), [tokens(1, 0)], progress=False)
    assert scores.skipped["make"].startswith("they choose what comes to read")


class LookedUp(Chosen):
    """Scaled by a row of a table for each token, by how large it is."""

    def __init__(self) -> None:
        super().__init__(lambda x: torch.bucketize(x.detach().mean(-1), torch.tensor([-0.5, 0.0, 0.5])))
        self.table = nn.Embedding(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        return self.head(self.read(x * self.table(self.choose(x))).relu().mean(1))


def test_rows_of_a_table_are_chosen() -> None:
    said = trace(LookedUp().double().eval(), tokens(2, 0)).skipped["make"]
    assert said.startswith("table reads its channels where no gradient comes back")


class Counts(Chosen):
    """Does something else in every `period`-th call."""

    def __init__(self, period: int, scale: float) -> None:
        super().__init__(lambda x: x)
        self.step, self.period, self.scale = 0, period, scale

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        made = self.make(x) * (self.scale if self.step % self.period == 0 else 1.0)
        return self.head(self.read(made).relu().mean(1))


@pytest.mark.parametrize("period", [2, 3])
@pytest.mark.parametrize("first", range(3))
def test_a_model_that_counts_its_calls_is_said_to(period: int, first: int) -> None:
    model = Counts(period, 2.0).double().eval()
    model.step = first
    assert "something else comes to read each time the model runs" in trace(model, tokens(2, 0)).skipped["make"]
    assert [group.name for group in trace(Counts(period, 1.0).double().eval(), tokens(2, 0)).groups] == ["make", "read"]
