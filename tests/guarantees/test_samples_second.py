"""Samples that come second, or in a loop: refused with a way out, which leads there."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore


class SequenceFirst(nn.Module):
    """[T, N, 6] -> [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).relu().mean(0)).relu())


class SampleBySample(SequenceFirst):
    """[N, T, 6] -> [N, 2], in a loop."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(SampleBySample, self).forward(rows) for rows in x])


@pytest.mark.parametrize("frames", [4, 3])
def test_samples_that_come_second_have_a_way_out(frames: int) -> None:
    """As many frames as samples, or not; and the way leads there."""
    model, x = SequenceFirst().double().eval(), torch.randn(3, frames, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no channel that can be scored\n(.*\n)*give batches \[N, \.\.\.\];.* where "
                                         r"the model takes samples second, forward=lambda model, batch: model\(batch\."
                                         r"transpose\(0, 1\)\)$"):
        fastscore.score(model, [x.transpose(0, 1)], progress=False)
    scores, *alone = (fastscore.score(model, [part], forward=lambda model, batch: model(batch.transpose(0, 1)),
                                      progress=False) for part in (x, *x.split(1)))
    for name in ("one", "two"):
        torch.testing.assert_close(scores[name], torch.stack([each[name] for each in alone]).mean(0))


class OneKey(dict):
    """That no model takes as keywords."""


@dataclass
class Pair:
    """Of sequences."""

    src: Tensor
    tgt: Tensor
    scale: Tensor


class FromTo(SequenceFirst):
    """src [T, N, 6], tgt [S, N, 6] -> [S, N, 2]."""

    def forward(self, src: Any, tgt: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        if tgt is None:
            src, tgt, scale = (src.src, src.tgt, src.scale) if isinstance(src, Pair) else src
        return self.last(self.two((self.one(tgt) + self.one(src * scale).mean(0)).relu()).relu())


@pytest.mark.parametrize("lengths", [(5, 4), (4, 4)])
@pytest.mark.parametrize("wrap", [
    lambda *parts: dict(zip(("src", "tgt", "scale"), parts, strict=True)), Pair, lambda *parts: (parts, torch.zeros(3)),
    lambda *parts: OneKey(all=[*parts])], ids=["dict", "dataclass", "tuple", "forward="])
def test_samples_that_come_second_in_a_container_have_a_way_out(wrap: Callable[..., Any], lengths: tuple[int, int]
                                                                ) -> None:
    """As many steps as each other, or not; and the code that is named leads there."""
    torch.manual_seed(0)
    model, scale = FromTo().double().eval(), torch.rand(2, 6, dtype=torch.float64)[0]
    parts = [torch.randn(3, length, 6, dtype=torch.float64) for length in lengths]
    own = {"forward": lambda model, batch: model(*batch["all"])} if isinstance(wrap(*parts, scale), OneKey) else {}
    with pytest.raises(ValueError, match="counts samples") as raised:
        fastscore.score(model, [wrap(*(part.transpose(0, 1) for part in parts), scale)], progress=False, **own)
    (code,) = re.findall(r"forward=(lambda model, batch: .*?)(?:, own being the one given)?$", str(raised.value))
    assert not re.search(r"no dimension", str(raised.value))
    forward = eval(code, {"dataclasses": dataclasses, "own": own.get("forward")})
    scores, *alone = (fastscore.score(model, [wrap(*each, scale)], forward=forward, progress=False)
                      for each in (parts, *zip(*(part.split(1) for part in parts), strict=True)))
    assert list(scores) == ["one", "two"]
    for name, value in scores.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in alone]).mean(0))


class FixedLength(SequenceFirst):
    """[4, N, 6] -> [4, N, 2]; a batch of another length does not fit its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x + self.positions).relu()
        return self.last(self.two(x + x.mean(0)).relu())


def test_samples_that_come_second_in_sequences_of_one_length_have_a_way_out() -> None:
    """Steps are not taken for samples."""
    torch.manual_seed(0)
    model, x = FixedLength().double().eval(), torch.randn(3, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second dimension counts samples.* and forward=") as raised:
        fastscore.score(model, [x.transpose(0, 1)], progress=False)
    forward = eval(str(raised.value).rpartition("forward=")[2])
    scores, *alone = (fastscore.score(model, [part], forward=forward, progress=False) for part in (x, *x.split(1)))
    for name in ("one", "two"):
        torch.testing.assert_close(scores[name], torch.stack([each[name] for each in alone]).mean(0))


def test_a_loop_over_samples_is_followed() -> None:
    """In batches of several samples, and of one each."""
    model, x = SampleBySample().double().eval(), torch.randn(3, 4, 6, dtype=torch.float64)
    expected = fastscore.score(model, [x], forward=lambda model, batch: SequenceFirst.forward(
        model, batch.transpose(0, 1)), progress=False)
    for batches in ([x], x.split(1)):
        scores = fastscore.score(model, batches, progress=False)
        assert list(scores) == ["one", "two"]
        for name in scores:
            torch.testing.assert_close(scores[name], expected[name])
    fastscore.prune(model, scores, x, channels=0.5)
