"""Channels that code cuts where other widths say, or at a share of the whole, go; where it fixes that, they stay."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

X = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
Parts = Callable[["Net", Tensor, Tensor, Tensor], Tensor]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "z": lambda: nn.Conv2d(3, 6, 1), "style": lambda: nn.Linear(3, 16), "joint": lambda: nn.Conv2d(14, 14, 1),
    "part": lambda: nn.Conv2d(4, 4, 1), "norm": lambda: nn.BatchNorm2d(14), "made": lambda: nn.Conv2d(8, 18, 1),
    "two": lambda: nn.Conv2d(8, 16, 1), "mixed": lambda: nn.Conv2d(8, 8, 1)}


class Net(nn.Module):
    """parts(self, x, y, z): of the input [N, 3, H, W], of y [N, 8, H, W] and of z [N, 6, H, W], if there is such a
    layer, what `last` reads. layers: of LAYERS."""

    def __init__(self, parts: Parts, width: int, *layers: str) -> None:
        super().__init__()
        self.y = nn.Conv2d(3, 8, 1)
        for name in layers:
            self.add_module(name, LAYERS[name]())
        self.last, self.parts = nn.Linear(width, 4), parts

    def forward(self, x: Tensor) -> Tensor:
        y = self.y(x).tanh()
        return self.last(self.parts(self, x, y, self.z(x).tanh() if hasattr(self, "z") else y).mean((2, 3)))


def modulated(gamma: Tensor, y: Tensor, beta: Tensor) -> Tensor:
    return (y * (1 + gamma[..., None, None]) + beta[..., None, None]).relu()


def styled(net: Net, x: Tensor) -> Tensor:
    made: Tensor = net.style(x.mean((2, 3)))
    return made


def sliced(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    style, width = styled(net, x), y.shape[1]
    return modulated(style[:, :width], y, style[:, width:])


def narrowed(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    style, width = styled(net, x), y.size(1)
    return modulated(style.narrow(1, 0, width), y, style.narrow(1, width, width))


def halves(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    style = styled(net, x)
    half = style.shape[1] // 2
    return modulated(style[:, :half], y, style[:, half:])


def gathered(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Two streams come together, and part again."""
    of_y, of_z = net.norm(torch.cat([y, z], 1)).split([y.shape[1], z.shape[1]], 1)
    return torch.cat([of_y.relu(), of_z.sigmoid()], 1)


def exchanged(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Each stream is added what both make of each other."""
    of_y, of_z = net.joint(torch.cat([y, z], 1)).split([y.shape[1], z.shape[1]], 1)
    return torch.cat([(y + of_y).relu(), (z + of_z).relu()], 1)


def partly(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    width = net.part.in_channels
    return torch.cat([net.part(y[:, :width]).relu(), y[:, width:]], 1)


def quarter(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    width = y.shape[1] // 4
    return torch.cat([y[:, :width].relu(), y[:, width:].sigmoid()], 1)


def half(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """ShuffleNet's, but for the shuffling."""
    width = y.size(1) // 2
    return torch.cat([net.part(y[:, width:]).relu(), y[:, :width]], 1)


def every_other(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return y[:, ::2] * y[:, 1::2].sigmoid()


def focal(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """FocalNet's modulation: queries and context are as wide as what the module reads, whatever that is."""
    width = y.shape[1]
    query, context, gates = net.made(y).split([width, width, 2], 1)
    context = context * gates[:, :1] + context.mean((2, 3), keepdim=True).relu() * gates[:, 1:]
    return y + query * net.mixed(context)


def gated(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    value, gate = net.two(y).split(y.shape[1], 1)
    return y + net.mixed(value * gate.sigmoid())


def gated_slices(net: Net, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    both, width = net.two(y), y.shape[1]
    return y + net.mixed(both[:, :width] * both[:, width:].sigmoid())


# name -> what the parts are, how wide, the groups, layers
GO: dict[str, tuple[Parts, int, list[str], tuple[str, ...]]] = {
    "split": (lambda net, x, y, z: modulated((two := styled(net, x).split(y.shape[1], 1))[0], y, two[1]), 8, ["y"],
              ("style",)),
    "sliced": (sliced, 8, ["y"], ("style",)), "narrowed": (narrowed, 8, ["y"], ("style",)),
    "halves": (halves, 8, ["y"], ("style",)),
    "sections": (lambda net, x, y, z: modulated((two := styled(net, x).tensor_split(2, 1))[0], y, two[1]), 8, ["y"],
                 ("style",)),
    "gathered": (gathered, 14, ["y", "z"], ("z", "norm")), "exchanged": (exchanged, 14, ["y", "z"], ("z", "joint")),
    "partly": (partly, 8, ["y", "part"], ("part",)), "quarter": (quarter, 8, ["y"], ()),
    "half": (half, 8, ["y", "part"], ("part",)), "every other": (every_other, 4, ["y"], ()),
    "even": (lambda net, x, y, z: y[:, ::2], 4, ["y"], ()),
    "focal": (focal, 8, ["y"], ("made", "mixed")), "gated": (gated, 8, ["y"], ("two", "mixed")),
    "gated slices": (gated_slices, 8, ["y"], ("two", "mixed")),
}
FIXED: dict[str, tuple[Parts, int, str | None]] = {
    "slices": (lambda net, x, y, z: modulated(styled(net, x)[:, :8], y, styled(net, x)[:, 8:]), 8, "style"),
    "sizes": (lambda net, x, y, z: torch.cat([y, z], 1).split([8, 6], 1)[0], 8, "z"),
    "halves": (lambda net, x, y, z: torch.cat([y[:, 4:].relu(), y[:, :4]], 1), 8, None),
    "thirds": (lambda net, x, y, z: torch.cat([y.split(3, 1)[1], y], 1), 11, None),
    "as wide": (lambda net, x, y, z: (both := net.two(y))[:, :8] * both[:, 8:].sigmoid() + y, 8, "two"),
}


@pytest.mark.parametrize("kind", list(GO))
def test_what_widths_say_goes(kind: str, tmp_path: Path) -> None:
    parts, width, groups, layers = GO[kind]
    check(lambda: Net(parts, width, *layers), X, groups, tmp_path)


@pytest.mark.parametrize("kind", list(FIXED))
def test_what_is_fixed_stays(kind: str) -> None:
    parts, width, layer = FIXED[kind]
    graph = trace(noisy(lambda: Net(parts, width, *((layer,) if layer else ()))), X)
    assert "y" not in [group.name for group in graph.groups]
    assert "at positions that the model's code fixes" in graph.skipped["y"]


def test_no_part_goes_whole() -> None:
    """However little its channels are worth."""
    model = noisy(lambda: Net(partly, 8, "part"))
    scores = fastscore.score(model, [X], progress=False)
    for low in (slice(0, 4), slice(4, 8)):
        for name, total in scores.totals.items():
            total.fill_(1e6)
            if name == "y":
                total[low] = 0
        small = fastscore.prune(model, scores, X, channels=0.6, cost_aware=False, compensate=False).model
        with torch.no_grad(), fastscore.mask(model, scores, 0.4, X, compensate=False):
            torch.testing.assert_close(small(X), model(X))
