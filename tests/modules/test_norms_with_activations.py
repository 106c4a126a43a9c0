"""Normalisations over channels that hold an activation: known, scored with what it does to gradients, made smaller."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import whole_way
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.norms.channel_norms import norm_of

WIDTH = 8


class NormAct(nn.LayerNorm):
    """Over the channels of images, and then what it holds, in place or not."""

    def __init__(self, *parts: nn.Module, width: int = WIDTH) -> None:
        super().__init__(width)
        self.parts = nn.Sequential(*parts[:-1])
        self.act = parts[-1]

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(self.parts(y.permute(0, 3, 1, 2)))


class Own(nn.Module):
    """An RMSNorm by its definition; without a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.act, self.none = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.SiLU(), None

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x * (x.square().mean(1, keepdim=True) + 1e-3).rsqrt() * self.gamma[:, None, None])


def _timm(name: str) -> nn.Module:
    return getattr(pytest.importorskip("timm.layers.norm_act"), name)(WIDTH)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "ReLU in place": lambda: NormAct(nn.ReLU(inplace=True)), "two": lambda: NormAct(nn.Tanh(), nn.SiLU()),
    "not zero at zero": lambda: NormAct(nn.Sigmoid()), "own": Own, "LayerNormAct2d": lambda: _timm("LayerNormAct2d"),
    "RmsNormAct2d": lambda: _timm("RmsNormAct2d")}


class Stream(nn.Module):
    """A stream of channels that comes to such a normalisation, and past it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, WIDTH, 1), KINDS[kind]()
        self.mix, self.head = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2, 1)
        for parameter in self.norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.mix(self.norm(x)))


def _gated(model: Stream, x: Tensor, gate: Tensor) -> Tensor:
    """With a factor on each channel where layers read it, and in statistics; written out."""
    gate, norm = gate[:, None, None], model.norm
    x = model.embed(x)
    counted, of = x * gate, norm_of(norm)
    mean = counted.mean(1, keepdim=True) if of.centered else 0.0
    y = (x - mean) * ((counted - mean).square().mean(1, keepdim=True) + of.eps).rsqrt()
    y = y * norm._parameters[of.gain][:, None, None]
    y = y if not of.shift else y + norm._parameters[of.shift][:, None, None]
    for part in norm.children():
        y = part(y.clone())
    return model.head((x + model.mix(y * gate)) * gate)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_gate_and_smaller_is_masked(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stream(kind).double().eval(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    v, gate = torch.randn_like(model(x)), torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    s = torch.stack([torch.autograd.grad((_gated(model, x[n:n + 1], gate) * v[n:n + 1]).sum(), gate)[0]
                     for n in range(len(x))])
    told = []
    model.norm.act.register_forward_hook(lambda *_: told.append(0))  # of the user's
    assert norm_of(model.norm) is not None
    assert not told
    del model.norm.act._forward_hooks[next(iter(model.norm.act._forward_hooks))]
    with untouched(model):
        scores = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, _: (output * v).sum())
        result = fastscore.prune(model, scores, x, channels=0.6, compensate=False)
    torch.testing.assert_close(scores["embed"].double(), s.square().mean(0), rtol=1e-5, atol=1e-8)
    closed = gate.detach().index_fill(0, result.removed["embed"], 0)
    assert len(result.removed["embed"])
    with torch.no_grad():
        want = _gated(model, x, closed)
        torch.testing.assert_close(result.model(x), want)
        with fastscore.mask(model, scores, result, x, compensate=False):
            torch.testing.assert_close(model(x), want)
        torch.testing.assert_close(torch.export.export(result.model, (x,)).module()(x), want)
        fastscore.save_pruned(result, tmp_path / "small.safetensors")
        loaded = fastscore.load_pruned(Stream(kind).double().eval(), tmp_path / "small.safetensors")
        torch.testing.assert_close(loaded(x), want)
    again = fastscore.prune(loaded, fastscore.score(loaded, [x], progress=False), x, channels=0.7, compensate=False)
    assert len(again.removed["embed"])
    loaded.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_training_loop_counts_the_same() -> None:
    torch.manual_seed(0)
    model, x = Stream("ReLU in place").double(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    v = torch.randn_like(model(x))
    scorer = fastscore.Scorer(model, x[:1], normalize=False)
    with scorer:
        (model(x) * v).sum().backward()
    once = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                           loss=lambda output, _: (output * v).sum())
    torch.testing.assert_close(scorer.scores()["embed"], once["embed"])


class Otherwise(NormAct):
    """Gives each number to what it holds, and puts back what it was."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Twice(NormAct):
    """Calls what it holds twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize("norm", [
    NormAct(nn.Softmax(1)), NormAct(nn.Softmax(-1)), NormAct(nn.Dropout(0.5)), NormAct(nn.PReLU()),
    NormAct(nn.BatchNorm2d(WIDTH, affine=False)), NormAct(nn.AvgPool2d(3, 1, 1)), NormAct(nn.Flatten()),
    Otherwise(nn.SiLU()), Twice(nn.SiLU())])
def test_what_is_none(norm: NormAct) -> None:
    assert norm_of(norm) is None
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), norm, nn.Flatten(), nn.Linear(WIDTH * 16, 2)).eval()
    assert "0" in trace(model, torch.randn(2, 3, 4, 4)).skipped


class GroupNormAct(nn.GroupNorm):
    """As timm's: in groups of channels, and then what it holds."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(4, WIDTH * 2)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


@pytest.mark.parametrize("act", [lambda: nn.ReLU(inplace=True), lambda: nn.Sequential(nn.Tanh(), nn.SiLU())])
def test_those_of_groups_go(act: Callable[[], nn.Module], tmp_path: Path) -> None:
    x = torch.randn(3, 3, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    whole_way.check(lambda: nn.Sequential(nn.Conv2d(3, 2 * WIDTH, 3), GroupNormAct(act()),
                                          nn.Conv2d(2 * WIDTH, WIDTH, 1), nn.Tanh(), nn.Conv2d(WIDTH, 2, 3)), x,
                    ["0", "2"], tmp_path)
