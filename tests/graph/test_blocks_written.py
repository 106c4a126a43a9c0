"""Residual branches however their sum is written: found, with the score of one gate, and gone as where it is shut; or
kept with the reason."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import fastscore


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Net(nn.Module):
    """`way` adds what `f`, and maybe `g`, make of x to it, maybe by a `gate`."""

    def __init__(self, way: "Callable[[Net, Tensor], Tensor]") -> None:
        super().__init__()
        self.embed, self.gate, self.head, self.way = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), way
        self.f, self.g = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
                          for _ in range(2))
        self.gamma, self.mix = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8, 8))
        self.scale, self.drop_path = Scale(), StochasticDepth(0.1, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self, self.embed(x)).tanh())


WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "stacked": lambda net, x: torch.stack([x, net.f(x)]).sum(0),
    "stacked last, averaged": lambda net, x: torch.stack([net.f(x), x, net.g(x)], -1).mean(-1),
    "concatenated": lambda net, x: torch.cat([x[None], net.f(x)[None]]).sum(0),
    "addcmul": lambda net, x: torch.addcmul(x, net.gamma, net.f(x)),
    "addcmul, gated": lambda net, x: torch.addcmul(x, net.f(x), net.gate(x).sigmoid(), value=0.3),
    "baddbmm": lambda net, x: torch.baddbmm(x, net.f(x), net.mix.expand(len(x), 8, 8)),
    "lerp": lambda net, x: torch.lerp(x, net.f(x), 0.3),
    "lerp by a parameter": lambda net, x: torch.lerp(x, net.f(x), net.gamma),
    "in place": lambda net, x: x.clone().add_(net.f(x)),
    "in the branch's place": lambda net, x: net.f(x).add_(x),
    "scaled": lambda net, x: x + 0.1 * net.f(x),
    "both scaled": lambda net, x: 0.9 * x + 0.1 * net.f(x),
    "layers behind it": lambda net, x: x + net.drop_path(net.scale(net.f(x))),
    "sum of a list": lambda net, x: sum([x, net.f(x), net.g(x)], torch.zeros(())),
    "alpha": lambda net, x: torch.add(x, net.f(x), alpha=0.5),
    "difference": lambda net, x: x - net.f(x),
    "gate of einsum": lambda net, x: x + torch.einsum("btn,b->btn", net.f(x), net.gate(x).mean((1, 2)).sigmoid()),
    "turned and back": lambda net, x: x + net.f(x.permute(0, 2, 1).mT).permute(1, 0, 2).transpose(0, 1),
    "highway": lambda net, x: (1 - (gate := net.gate(x).sigmoid())) * x + gate * net.f(x),
    "index_add": lambda net, x: x.index_add(1, torch.arange(4), net.f(x)),
    "padded": lambda net, x: x + F.pad(net.f(x[:, 1:]), (0, 0, 1, 0)),
    "a part": lambda net, x: torch.cat([x[:, :1], x[:, 1:] + net.f(x[:, 1:])], 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_branch_goes_however_it_is_added(way: str) -> None:
    torch.manual_seed(0)
    model, x, v = Net(WAYS[way]).double().eval(), torch.randn(3, 4, 5).double(), torch.randn(3, 4, 3).double()
    scores = fastscore.score(model, [x], units="blocks", gradient="loss", normalize=False, progress=False,
                             loss=lambda output, _: (output * v).sum())
    branches = [name for name in scores if len(scores[name]) == 1]
    assert branches == ["f", "g"][:1 + ("list" in way or "averaged" in way)]
    assert not [name for name in scores.skipped if "whole branch" in name]
    for name in branches:
        gated, gate = copy.deepcopy(model), torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
        gated.get_submodule(name).register_forward_hook(lambda module, args, output, gate=gate: output * gate)
        s, = torch.autograd.grad((gated(x) * v).sum(), gate)
        torch.testing.assert_close(scores[name].double(), s.square().mean()[None], rtol=1e-6, atol=1e-20)
        one = replace(scores, totals={name: scores.totals[name]})
        result = fastscore.prune(model, one, x, params=0.99, compensate=False)
        assert list(result.removed) == [name]
        with torch.no_grad():
            gate.zero_()
            torch.testing.assert_close(result.model(x), gated(x))


STAY: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "a product before": (lambda net, x: x + net.f(x) @ net.mix, "goes through Mm in the code around it"),
    "bent": (lambda net, x: torch.stack([x, net.f(x).relu()]).sum(0), "goes through Relu in the code around it"),
    "bent, by addcmul": (lambda net, x: torch.addcmul(x, net.gamma, net.f(x).relu()), "goes through Relu"),
    "of another shape": (lambda net, x: F.pad(x[:, ::2], (0, 0, 1, 0)) + net.f(x)[:, :3] * net.f(x)[:, 1:],
                         "it runs 2 times"),
    "fewer places": (lambda net, x: x[:, ::2] + F.avg_pool1d(net.f(x).mT, 2).mT, "goes through"),
}


@pytest.mark.parametrize("way", STAY)
def test_a_branch_that_stays_is_named(way: str) -> None:
    torch.manual_seed(0)
    written, reason = STAY[way]
    scores = fastscore.score(Net(written).eval(), [torch.randn(3, 4, 5)], units="blocks", progress=False)
    assert "f" not in scores or len(scores["f"]) > 1
    assert reason in scores.skipped["f (whole branch)"]
