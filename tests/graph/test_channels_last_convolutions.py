"""Convolutions whose own code takes channels last, as Parakeet's head does, against Linears and brute force."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from thinned import thinned
from torch import Tensor, nn
from whole_way import check

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.weights.channels_last import takes_channels_last

WIDTH = 12


class Turned(nn.Conv1d):
    """[N, L, C] -> [N, L', C']."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Turned2d(nn.Conv2d):
    """[N, L, C] within as [N, L, 2, C] -> as many."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Remembering(Turned):
    """One that keeps what it has seen."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class Either(nn.Conv1d):
    """One that takes channels wherever there are as many."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.shape[1] != self.in_channels
        y = super().forward(x.transpose(1, 2) if last else x)
        return y.transpose(1, 2) if last else y


class Model(nn.Module):
    """A residual stream that two such layers read. steps: of which places the first reads one."""

    def __init__(self, made: Callable[..., nn.Module], steps: int = 1, image: bool = False) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.norm, self.mid, self.head = nn.LayerNorm(WIDTH), made(WIDTH, 10), made(10, 4)
        self.steps, self.image = steps, image

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.b(self.a(x).relu()))[:, ::self.steps]
        if self.image:
            x = x.unflatten(1, (-1, 2))
        return self.head(self.mid(x).relu())


def _x(places: int, samples: int = 2) -> Tensor:
    return torch.randn(samples, places, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("places", "kernel"), thinned([6, WIDTH, 30], [1, 3]))
def test_everything_goes(places: int, kernel: int, tmp_path: Path) -> None:
    """As many places as channels, fewer or more: by brute force."""
    check(lambda: Model(lambda *widths: Turned(*widths, kernel, padding=kernel // 2)), _x(places).double(),
          ["embed", "a", "mid"], tmp_path)


def test_images_go(tmp_path: Path) -> None:
    """With channels after both of their sides."""
    check(lambda: Model(lambda *widths: Turned2d(*widths, 3, padding=1), image=True), _x(8).double(),
          ["embed", "a", "mid"], tmp_path)


@pytest.mark.parametrize(("options", "steps"), thinned(
    [{"compensate": True}, {"repair": "auto"}, {"repair": "linear"}], [1, 2]))
def test_as_linears_do(steps: int, options: dict[str, Any]) -> None:
    """The same numbers, computed in another layout: scores, what goes, what is counted and what repairs give."""
    strides = iter([steps, 1])
    torch.manual_seed(0)
    turned = Model(lambda *widths: Turned(*widths, 1, stride=next(strides))).eval()
    plain, x = Model(nn.Linear, steps).eval(), _x(6, 16)
    plain.load_state_dict({name: value.squeeze(-1) if value.dim() == 3 else value
                           for name, value in turned.state_dict().items()})
    batches = {"calibration": x.split(4)} if "repair" in options else {}
    scores = [fastscore.score(model, x.split(4), progress=False) for model in (turned, plain)]
    assert set(scores[0]) == set(scores[1]) == {"embed", "a", "mid"}
    for name in scores[0]:
        torch.testing.assert_close(scores[0][name], scores[1][name], rtol=1e-4, atol=1e-7)
    one, other = (fastscore.prune(model, of_model, x[:1], channels=0.6, **batches, **options)
                  for model, of_model in zip((turned, plain), scores, strict=True))
    assert one.report.macs == other.report.macs
    assert {name: gone.tolist() for name, gone in one.removed.items()} == \
        {name: gone.tolist() for name, gone in other.removed.items()}
    torch.testing.assert_close(one.model(x), other.model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("places", [6, 30])
def test_layers_that_take_either_keep_what_they_read(places: int) -> None:
    """And the reason is theirs, not an error of ours."""
    graph = trace(Model(lambda *widths: Either(*widths, 1)).eval(), _x(places))
    assert [group.name for group in graph.groups] == ["a"]
    assert "mid" in graph.skipped["embed"]
    assert not any("IndexError" in reason for reason in graph.skipped.values())


def test_what_takes_channels_last() -> None:
    """Of plain convolutions, and others whose code turns nothing, none."""
    assert takes_channels_last(Turned(3, 4, 2, dilation=3, groups=1))
    assert takes_channels_last(Turned2d(4, 8, (3, 1), groups=2))
    assert takes_channels_last(remembering := Remembering(3, 4, 1))
    assert not remembering.seen
    for layer in (nn.Conv1d(3, 4, 1), Either(3, 4, 1), type("Plain", (nn.Conv1d,), {})(3, 3, 1)):
        assert not takes_channels_last(layer)
