"""Parameters that channels meet in training alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import whole_way
from thinned import thinned
from torch import Tensor, nn

import fastscore


class Augmented(nn.Module):
    """Puts an embedding in place of some frames, adds it, or otherwise meets it, where it is trained. Two streams of
    the same width: one meets it."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.one, self.two, self.three, self.last = (nn.Linear(*widths) for widths in ((4, 6), (6, 6), (6, 5), (5, 2)))
        self.masked, self.meet = nn.Parameter(torch.rand(shape or 6)), meet

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 4] -> [N, T, 2]."""
        x = self.one(x)
        if self.training:
            x = self.meet(x, self.masked)
        return self.last(self.three(self.two(x.relu()).relu()).relu())


class Apart(Augmented):
    """The same, where the code that reads the embedding asks nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 4] -> [N, T, 2]."""
        x = self.one(x)
        x = self._augmented(x) if self.training else x
        return self.last(self.three(self.two(x.relu()).relu()).relu())

    def _augmented(self, x: Tensor) -> Tensor:
        return self.meet(x, self.masked)


def _put(x: Tensor, masked: Tensor) -> Tensor:
    x[:, ::2] = masked
    return x


def _put_at_random(x: Tensor, masked: Tensor) -> Tensor:
    rows = torch.from_numpy(np.random.rand(*x.shape[:2]) < 0.5)
    rows[:, 0] = True
    x[rows] = masked.to(x.dtype)
    return x


def _where(x: Tensor, masked: Tensor) -> Tensor:
    return torch.where(torch.rand(x.shape[:2]).unsqueeze(-1) < 0.7, masked, x)


def _fails(x: Tensor, masked: Tensor) -> Tensor:
    raise ValueError(x.shape)


MEETINGS: dict[str, Any] = {
    "put": (_put,), "put at random": (_put_at_random,), "where": (_where, 1, 1, 6),
    "added": (lambda x, masked: x + masked, 1, 6), "scaled": (lambda x, masked: x * (1 + masked),)}
NOT_FOLLOWED: dict[str, Any] = {
    "turned": lambda x, masked: x + masked.flip(0), "mixed": lambda x, masked: x + masked.sum(),
    "fails": _fails, "unread": lambda x, masked: x, "outer": lambda x, masked: x + (masked[:, None] * masked).mean(0)}


@pytest.mark.parametrize(("meeting", "kind"), thinned(MEETINGS, [Augmented, Apart]))
def test_its_entries_go_with_the_channels_that_they_meet(meeting: str, kind: type[Augmented]) -> None:
    """Half of all channels go; in training, too, the smaller model computes what the whole one does where they are read
    as zero."""
    torch.manual_seed(0)
    model, x = kind(*MEETINGS[meeting]).double(), torch.randn(3, 4, 4, dtype=torch.float64)
    scores = fastscore.score(model.eval(), [x], progress=False)
    assert list(scores) == ["one", "two", "three"]
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False)
    assert result.model.masked.shape == (*MEETINGS[meeting][1:-1], 3)
    whole = copy.deepcopy(model)
    for made, reader in ("one", whole.two), ("two", whole.three), ("three", whole.last):
        reader.weight.data[:, result.removed[made]] = 0
    outputs = []
    for each in (whole.train(), result.model.train()):
        torch.manual_seed(1)
        np.random.seed(1)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs)
    outputs[1].sum().backward()
    assert result.model.masked.grad.abs().min() > 0


@pytest.mark.parametrize("meeting", NOT_FOLLOWED)
def test_where_that_cannot_be_shown_all_channels_stay_that_it_may_meet(meeting: str) -> None:
    """Of its width; the rest goes, and what is left trains."""
    model, x = Augmented(NOT_FOLLOWED[meeting]).eval(), torch.randn(3, 4, 4)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["three"]
    assert scores.skipped["one"] == \
        "the code of Augmented reads its masked [6] in training alone, where channels are not followed"
    small = fastscore.prune(model, scores, x, channels=0.6).model.train()
    if meeting != "fails":
        small(x).sum().backward()


class Flagged(nn.Module):
    """Whether it does so the constructor decides, by a flag, or by one of a config, which ends a method."""

    def __init__(self, augments: bool) -> None:
        super().__init__()
        self.one, self.two, self.three, self.last = (nn.Linear(*widths) for widths in ((4, 6), (6, 6), (6, 5), (5, 2)))
        self.masked, self.meet = nn.Parameter(torch.rand(6)), _fails
        self.augments, self.config = augments, SimpleNamespace(augments=augments)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 4] -> [N, T, 2]."""
        x = self.one(x)
        if self.training and self.augments:
            x = self.meet(x, self.masked)
        return self.last(self.three(self.two(self.augmented(x).relu()).relu()).relu())

    def augmented(self, x: Tensor) -> Tensor:
        """In training: what the config says."""
        if not getattr(self.config, "augments", True):
            return x
        return self.meet(x, self.masked) if self.training else x


@pytest.mark.parametrize("augments", [False, True])
def test_a_branch_that_the_constructor_ruled_out_keeps_nothing(augments: bool) -> None:
    scores = fastscore.score(Flagged(augments).eval(), [torch.randn(3, 7, 4)], progress=False)
    assert set(scores) == ({"three"} if augments else {"one", "two", "three"})


class Prenet(nn.Module):
    """Puts an embedding in place of some frames of what it makes, where it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.masked = nn.Linear(4, 6), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 4] -> [N, T, 6]."""
        x = self.one(x)
        return _put(x, self.masked) if self.training else x


class Stream(nn.Module):
    """Layers outside of it add to that. skips: where they are trained, some are left out at random, as LayerDrop does.
    """

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips, self.prenet, self.three, self.last = skips, Prenet(), nn.Linear(6, 5), nn.Linear(5, 2)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 4] -> [N, T, 2]."""
        x = self.prenet(x)
        for branch in self.branches:
            if not (self.skips and self.training) or torch.rand(9).min() > 0.4:
                x = x + branch(x).relu()
        return self.last(self.three(x).relu())


@pytest.mark.parametrize("skips", [False, True])
def test_its_entries_go_with_a_stream(skips: bool) -> None:
    torch.manual_seed(0)
    model, x = Stream(skips).double(), torch.randn(3, 4, 4, dtype=torch.float64)
    scores = fastscore.score(model.eval(), [x], progress=False)
    assert list(scores) == ["prenet.one", "three"]
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False)
    assert result.model.prenet.masked.shape == (3,)
    whole = copy.deepcopy(model)
    for made, reader in ("prenet.one", whole.branches[0]), ("prenet.one", whole.branches[1]), \
            ("prenet.one", whole.three), ("three", whole.last):
        reader.weight.data[:, result.removed[made]] = 0
    for seed in range(9):  # those that are left out differ
        outputs = []
        for each in (whole.train(), result.model.train()):
            torch.manual_seed(seed)
            outputs.append(each(x))
        torch.testing.assert_close(*outputs)


def test_the_whole_way(tmp_path: Path) -> None:
    """Scores by brute force, smaller = masked, export, a training step, save and load."""
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    whole_way.check(lambda: Augmented(_put), x, ["one", "two", "three"], tmp_path)


class Beside(Stream):
    """Returns the stream beside its output, as encoders return their last states."""

    def forward(self, x: Tensor) -> Any:
        """[N, T, 4] -> [N, T, 2], [N, T, 6]."""
        x = self.prenet(x)
        for branch in self.branches:
            x = x + branch(x).relu()
        return self.last(self.three(x).relu()), x


def test_a_stream_that_is_returned_beside_the_output_goes_with_them() -> None:
    """In training, as in evaluation mode, its channels are fewer there."""
    torch.manual_seed(0)
    model, x = Beside(False).double(), torch.randn(3, 4, 4, dtype=torch.float64)
    scores = fastscore.score(model.eval(), [x], forward=lambda model, x: model(x)[0], progress=False)
    assert list(scores) == ["prenet.one", "three"]
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False,
                             forward=lambda model, x: model(x)[0])
    whole = copy.deepcopy(model)
    for layer in (*whole.branches, whole.three):
        layer.weight.data[:, result.removed["prenet.one"]] = 0
    whole.last.weight.data[:, result.removed["three"]] = 0
    for training in (False, True):
        (y, stream), (small, narrow) = whole.train(training)(x), result.model.train(training)(x)
        torch.testing.assert_close(small, y)
        kept = [channel for channel in range(6) if channel not in result.removed["prenet.one"]]
        torch.testing.assert_close(narrow, stream[..., kept])
