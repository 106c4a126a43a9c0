"""Channels pass layers that work along another dimension: tokens that are mixed, gate each other, are normalised."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

ALONG = "works along another dimension than that of its channels: its kernel runs over the channels themselves, of " \
        "which others would be neighbours"
X = torch.randn(3, 3, 5, 4, dtype=torch.float64)[:, 0]  # [N, 5 tokens, 4]


class TokenLinears(nn.Module):
    """What an MLP-Mixer does between tokens."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, hidden), nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(F.gelu(self.up(x.mT))).mT
        return mixed


class TokenConvs(TokenLinears):
    """The same of convolutions of one place, which take tokens for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(5, 7, 1), nn.Conv1d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(F.gelu(self.up(x)))
        return mixed


class TokenMatrices(nn.Module):
    """The same of parameters, by which its own code multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return (F.gelu(x.mT @ self.up.T) @ self.down.T).mT


class SpatialGate(nn.Module):
    """What a gMLP does: one half of the channels gates the other, mixed by tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.tokens = nn.LayerNorm(4), nn.Linear(5, 5)
        self.expand, self.out = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.expand(x)).chunk(2, -1)
        out: Tensor = self.out(u * self.tokens(self.norm(v).mT).mT)
        return out


class Blocks(nn.Module):
    """Two residual blocks that mix tokens, and channels. norm: of what the blocks read."""

    def __init__(self, mixing: Callable[[], nn.Module],
                 norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(6)) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.mix, self.norms = (nn.ModuleList(make() for _ in range(2)) for make in (mixing, norm))
        self.up, self.down = (nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((6, 5), (5, 6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for mix, norm, up, down in zip(self.mix, self.norms, self.up, self.down, strict=True):
            x = x + mix(norm(x))
            x = x + down(up(x).relu())
        return self.head(x.mean(1))


class Forecast(nn.Module):
    """A TSMixer, whose last layer makes other times of those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.time = nn.Linear(4, 6), nn.BatchNorm1d(5), nn.Linear(5, 5)
        self.up, self.down, self.head, self.horizon = (nn.Linear(*sizes) for sizes in ((6, 7), (7, 6), (6, 2), (5, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.time(self.norm(x).mT).relu().mT
        x = x + self.down(self.up(x).relu())
        times: Tensor = self.head(self.horizon(x.mT).mT)
        return times


MIXERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linears": (partial(Blocks, TokenLinears), ["stem", "up.0", "up.1", "mix.0.up", "mix.1.up"]),
    "convolutions": (partial(Blocks, TokenConvs, nn.Identity), ["stem", "up.0", "up.1", "mix.0.up", "mix.1.up"]),
    "spatial gates": (partial(Blocks, SpatialGate), ["stem", "up.0", "up.1", "mix.0.expand", "mix.1.expand"]),
    "a forecast": (Forecast, ["stem", "up"])}


@pytest.mark.parametrize("kind", list(MIXERS))
def test_channels_pass_what_mixes_tokens(kind: str, tmp_path: Path) -> None:
    build, groups = MIXERS[kind]
    check(build, X, groups, tmp_path)
    assert {group.name for group in trace(noisy(build), X[:1]).groups} == set(groups)


def test_hidden_channels_of_matrices_between_tokens_go(tmp_path: Path) -> None:
    check(partial(Blocks, TokenMatrices), X, ["up.0", "up.1", "mix.0.up", "mix.1.up"], tmp_path)


@pytest.mark.parametrize(("kind", "samples"), [("linears", 6), ("spatial gates", 4), ("a forecast", 6)])
def test_samples_are_not_taken_for_channels_where_there_are_as_many(kind: str, samples: int) -> None:
    build, groups = MIXERS[kind]
    assert {group.name for group in trace(noisy(build), torch.randn(samples, 5, 4).double()).groups} == set(groups)


class AcrossChannels(nn.Module):
    """A kernel runs along the channels, as in ECA."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.along, self.head = nn.Linear(4, 6), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.along(self.stem(x)).relu().mean(1))


def test_channels_that_a_kernel_runs_along_stay() -> None:
    graph = trace(noisy(AcrossChannels), X)
    assert not graph.groups
    assert graph.skipped["stem"] == f"along {ALONG}"


class Eca(nn.Module):
    """A gate for each channel, of those beside it. way: how the channels are laid along the kernel, and back."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.along, self.way = nn.Conv2d(3, 6, 1), nn.Conv1d(1, 1, 3, padding=1), way
        self.inner, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, None].expand(-1, 3, -1, -1)).relu()
        gate = self.way(self.along, x.mean((2, 3))).sigmoid()
        return self.head(self.inner(x * gate[..., None, None]).relu().mean((2, 3)))


@pytest.mark.parametrize("way", [
    lambda along, y: along(y[:, None])[:, 0], lambda along, y: along(y.view(len(y), 1, -1)).view(y.shape),
    lambda along, y: along(y[..., None].mT).mT.squeeze(-1), lambda along, y: along(y.unsqueeze(1)).flatten(1)])
def test_channels_of_which_a_kernel_makes_gates_stay_and_the_reason_is_the_kernel(way: Callable[..., Tensor]) -> None:
    graph = trace(noisy(partial(Eca, way)), X)
    assert [group.name for group in graph.groups] == ["inner"]
    assert graph.skipped["stem"] == f"along {ALONG}"


class Folded(nn.Module):
    """Each channel by itself through one filter, as if it were a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filter = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.mix, self.head = nn.Conv1d(4, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.mix(self.filter(x.reshape(-1, 1, x.shape[2])).tanh().view_as(x)).relu().mean(2))


def test_a_kernel_does_not_run_over_channels_that_lie_among_samples() -> None:
    for samples in (1, 3):
        skipped = trace(Folded().double(), torch.randn(samples, 2, 7, dtype=torch.float64)).skipped
        assert skipped["stem"] == f"filter {ALONG.partition(':')[0]}"
        assert skipped["filter"] == "it is one channel, which has to stay"


def test_a_layer_is_refitted_where_it_reads_as_many_places_as_the_dense_one() -> None:
    model, x = noisy(partial(Blocks, TokenLinears)).float(), torch.randn(64, 5, 4)
    scores = fastscore.score(model, x.split(16), ablation="mean", progress=False)
    result = fastscore.prune(model, scores, x[:1], channels=0.6, scope="layer", calibration=x.split(16),
                             repair="asymmetric")
    assert len(result.removed["stem"]) == 2
    kl = {repair.name: repair.kl for repair in result.report.repairs}
    assert kl["asymmetric"] < kl["none"]
