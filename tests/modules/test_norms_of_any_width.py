"""Normalisations over channels whose parameters, if there are, hold one number: they are for any number of channels."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.norms import channel_norms
from fastscore.modules.norms.channel_norms import NarrowedNorm, norm_of

WIDTH = 8


class Norm(nn.Module):
    """One that computes in one of many ways, along one dimension."""

    def __init__(self, way: str, dim: int = -1) -> None:
        super().__init__()
        self.way, self.dim, self.eps, self.scale = way, dim, 1e-3, WIDTH ** -0.5
        self.weight = None  # as diffusers' have it that learn none
        for name in ("gain", "shift"):
            if name in NAMES.get(way, ()):
                self.register_parameter(name, nn.Parameter(torch.tensor([1.7])))
        if way == "says so":
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return normalized(self, x)  # by whose name it may be one


def normalized(norm: Norm, x: Tensor) -> Tensor:
    return {**WAYS, **CENTERED, **OTHERS}[norm.way](norm, x)


def _mean(m: Norm, x: Tensor) -> Tensor:
    return x.mean(m.dim, keepdim=True)


def _less(m: Norm, x: Tensor) -> Tensor:
    return x - _mean(m, x)


NAMES = {"ScaleNorm": ("gain",), "by the mean": ("gain",), "one gain": ("gain",), "both": ("gain", "shift"),
         "another gain": ("gain",)}
Way = Callable[[Norm, Tensor], Tensor]
# of these a gate before them is the same behind them
WAYS: dict[str, Way] = {
    "ScaleNorm": lambda m, x: x / x.norm(dim=m.dim, keepdim=True).clamp(min=1e-5) * m.gain,
    "by the mean": lambda m, x: x / (x.norm(dim=m.dim, keepdim=True) * m.scale).clamp(min=1e-5) * m.gain,
    "PixelNorm": lambda m, x: x * torch.rsqrt(_mean(m, x.square()) + 1e-8),
    "RMSNorm": lambda m, x: x * torch.rsqrt(_mean(m, x.pow(2)) + m.eps),
    "says so": lambda m, x: x * torch.rsqrt(_mean(m, x.square()) + m.eps),
    "in float32": lambda m, x: (x.float() * torch.rsqrt(_mean(m, x.float().square()) + m.eps)).to(x.dtype),
    "of length 1": lambda m, x: F.normalize(x, dim=m.dim),
    "times a number": lambda m, x: F.normalize(x, dim=m.dim) * 5.0,
    "one gain": lambda m, x: x * torch.rsqrt(_mean(m, x.square()) + m.eps) * m.gain,
}
CENTERED: dict[str, Way] = {
    "LayerNorm": lambda m, x: _less(m, x) * torch.rsqrt(_mean(m, _less(m, x).square()) + m.eps),
    "std": lambda m, x: _less(m, x) / (x.std(m.dim, keepdim=True) + 1e-4),
    "both": lambda m, x: _less(m, x) / (_mean(m, _less(m, x).square()) + m.eps).sqrt() * m.gain + m.shift,
}
OTHERS: dict[str, Way] = {
    "a scale": lambda m, x: x * m.scale + _mean(m, x),
    "softmax": lambda m, x: x.softmax(m.dim) * x.sqrt().square(),
    "of sizes": lambda m, x: x / _mean(m, x.abs()),
    "over everything": lambda m, x: x / x.square().mean().sqrt(),
    "over rows": lambda m, x: (x - x.mean(0)) / x.std(0),
    "detached": lambda m, x: x / _mean(m, x.square()).sqrt().detach(),
    "another gain": lambda m, x: x / _mean(m, x.square()).sqrt() * m.gain.square(),
    "one sample's": lambda m, x: x / _mean(m, x[:1].square()).sqrt(),
    "for one width": lambda m, x: F.layer_norm(x, (WIDTH,)) if x.shape[-1] == WIDTH else x.square().sum().sqrt() * x,
}
LAYOUTS: dict[str, tuple[int, tuple[int, ...], type[nn.Module]]] = {
    "tokens": (-1, (3, 5), nn.Linear), "a row": (-1, (5,), nn.Linear), "a row, 1": (1, (5,), nn.Linear),
    "images": (1, (5, 3, 4), nn.Conv2d), "sequences": (1, (5, 3), nn.Conv1d), "from behind": (-3, (5, 3, 4), nn.Conv2d)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("way", [*WAYS, *CENTERED])
@pytest.mark.parametrize("dim", [-1, 1])
def test_narrowed_by_definition(way: str, dim: int) -> None:
    """With fewer channels it makes what its own code does of zeros, with the gradients of that, and once more with yet
    fewer; and what of a gradient goes through statistics is what is left of its own without the direct way."""
    norm = Norm(way, dim).double()
    close = 1e-5 if way == "in float32" else 1e-9
    small, stays = copy.deepcopy(norm), torch.arange(WIDTH)
    x = _noise(2, 5, WIDTH) if dim == -1 else _noise(2, WIDTH, 5)
    for gone in ([1, 5, 6], [0, 3]):
        channel_norms.narrow(small, torch.tensor(gone))
        stays = stays[[at for at in range(len(stays)) if at not in gone]]
        zeros = torch.zeros_like(x).index_copy(dim, stays, x.index_select(dim, stays)).requires_grad_()
        some = x.index_select(dim, stays).requires_grad_()
        want, got = norm(zeros).index_select(dim, stays), small(some)
        torch.testing.assert_close(got, want, rtol=close, atol=close)
        g = _noise(*want.shape)
        wanted = torch.autograd.grad(want, zeros, g)[0].index_select(dim, stays)
        torch.testing.assert_close(torch.autograd.grad(got, some, g)[0], wanted, rtol=10 * close, atol=close)
        for module, read in ((small, some), (norm, zeros)):
            known = norm_of(module)
            y, g = module(read), _noise(*read.shape)
            (whole,) = torch.autograd.grad(y, read, g)
            centered = read - _mean(norm, read) * read.shape[dim] / WIDTH if known.centered else read
            y = y - getattr(module, "shift", 0)
            direct = torch.where(centered == 0, 0, g * y / centered)
            if module is small:
                found = channel_norms.gradient_of_statistics(module, read.detach(), g)
                torch.testing.assert_close(found, (whole - direct).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", OTHERS)
def test_what_is_none(way: str) -> None:
    state = torch.get_rng_state()
    assert norm_of(Norm(way)) is None
    assert torch.equal(torch.get_rng_state(), state)


class Stream(nn.Module):
    """A stream that is normalised before a branch and before the head."""

    def __init__(self, way: str, layout: str) -> None:
        super().__init__()
        dim, _, kind = LAYOUTS[layout]
        more = () if kind is nn.Linear else (1,)
        self.embed, self.head = kind(5, WIDTH, *more), kind(WIDTH, 3, *more)
        self.up, self.down = kind(WIDTH, 6, *more), kind(6, WIDTH, *more)
        self.norm1, self.norm2 = Norm(way, dim), Norm(way, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm2(x + self.down(F.gelu(self.up(self.norm1(x))))))


def _gate(x: Tensor, gate: Tensor, layer: nn.Module) -> Tensor:
    return x * (gate if isinstance(layer, nn.Linear) else gate.reshape(-1, *[1] * len(layer.kernel_size)))


def _gated(model: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """With a gate [C] on what the stream is made of, before every normalisation."""
    model = copy.deepcopy(model)
    for layer in (model.embed, model.down):
        layer.register_forward_hook(lambda layer, _, y: _gate(y, gate, layer))
    return model(x)


def _of_statistics(model: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """With a gate [C] where statistics count it, and where a layer reads it."""
    model = copy.deepcopy(model)

    def defined(norm: Norm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            channels = gate.reshape([-1 if dim == norm.dim % x.dim() else 1 for dim in range(x.dim())])
            counted, mean = x * channels, _mean(norm, x * channels)
            squares = _mean(norm, (counted - mean).square())
            if norm.way == "std":
                return (x - mean) / ((squares * WIDTH / (WIDTH - 1)).sqrt() + 1e-4)
            y = (x - mean) / (squares + norm.eps).sqrt()
            return y * norm.gain + norm.shift if norm.way == "both" else y
        return forward

    for norm in (model.norm1, model.norm2):
        norm.forward = defined(norm)
    for layer in (model.up, model.head):
        layer.register_forward_pre_hook(lambda layer, args: (_gate(args[0], gate, layer),))
    return model(x)


def _cases() -> Iterator[tuple[str, str]]:
    yield from ((way, "tokens") for way in [*WAYS, *CENTERED])
    yield from ((way, layout) for layout in LAYOUTS for way in ("ScaleNorm", "PixelNorm", "both") if layout != "tokens")


@pytest.mark.parametrize(("way", "layout"), list(_cases()))
def test_scores_are_those_of_a_gate_and_smaller_is_masked(way: str, layout: str) -> None:
    torch.manual_seed(0)
    model, x = Stream(way, layout).double().eval(), _noise(4, *LAYOUTS[layout][1])
    gated = _of_statistics if way in CENTERED else _gated
    close = 1e-4 if way == "in float32" else 1e-6
    v = _noise(*model(x).shape)
    gate = torch.ones(WIDTH, dtype=torch.float64)
    s = torch.stack([torch.func.jacrev(lambda g, n=n: (gated(model, x[n:n + 1], g) * v[n:n + 1]).sum())(gate)
                     for n in range(len(x))])
    with torch.no_grad():
        torch.testing.assert_close(gated(model, x, gate), model(x))
        step = 1e-5 * torch.eye(WIDTH, dtype=torch.float64)
        ends = [(gated(model, x, gate + sign * row) * v).flatten(1).sum(1) for row in step for sign in (1, -1)]
    if way != "in float32":
        torch.testing.assert_close(s, (torch.stack(ends[::2], 1) - torch.stack(ends[1::2], 1)) / 2e-5, rtol=1e-4,
                                   atol=1e-7)
    assert "embed" in [group.name for group in trace(model, x).groups]
    with untouched(model):
        scores = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, _: (output * v).sum())
        result = fastscore.prune(model, scores, x, channels=0.6, compensate=False)
    torch.testing.assert_close(scores["embed"].double(), s.square().mean(0), rtol=close, atol=close * 1e-3)
    gone, closed = result.removed["embed"], gate.clone()
    assert len(gone)
    closed[gone] = 0
    fewer = copy.deepcopy(model)
    fewer.down.weight.data[:, result.removed.get("up", [])] = 0
    with torch.no_grad():
        want = gated(fewer, x, closed)
        torch.testing.assert_close(result.model(x), want, rtol=close, atol=close)
        assert not torch.allclose(model(x), want)
        with fastscore.mask(model, scores, result, x, compensate=False):
            torch.testing.assert_close(model(x), want, rtol=close, atol=close)


@pytest.mark.parametrize("way", ["ScaleNorm", "PixelNorm", "both"])
def test_saved_exported_and_pruned_again(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stream(way, "tokens").double().eval(), _noise(4, 3, 5)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.7, compensate=False)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(Stream(way, "tokens").double().eval(), tmp_path / "small.safetensors")
    with torch.no_grad():
        want = result.model(x)
        assert torch.equal(loaded(x), want)
        torch.testing.assert_close(torch.export.export(result.model, (x,)).module()(x), want)
    scores = fastscore.score(loaded, [x], progress=False)
    again = fastscore.prune(loaded, scores, x, channels=0.7, compensate=False)
    assert len(again.removed["embed"])
    with torch.no_grad(), fastscore.mask(loaded, scores, again, x, compensate=False):
        torch.testing.assert_close(again.model(x), loaded(x))


class Across(nn.Module):
    """Whose normalisation runs over tokens, or over the second of a view's dimensions."""

    def __init__(self, way: str, grouped: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, WIDTH), Norm(way, -1 if grouped else 1), nn.Linear(WIDTH, 3)
        self.grouped = grouped

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x.unflatten(-1, (2, 4))).flatten(-2) if self.grouped else self.norm(x))


@pytest.mark.parametrize("way", ["PixelNorm", "of length 1", "LayerNorm"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tokens", [6, WIDTH])
def test_where_it_runs_over_something_else_scores_are_right_or_it_stays(way: str, grouped: bool, tokens: int) -> None:
    torch.manual_seed(0)
    model, x = Across(way, grouped).double().eval(), _noise(3, tokens, 5)
    graph = trace(model, x)
    for group in graph.groups:
        scores = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, _: output.square().sum())
        gate = torch.ones(3, WIDTH, dtype=torch.float64, requires_grad=True)
        z = model.norm(model.embed(x)) * gate[:, None]
        (s,) = torch.autograd.grad(model.head(z).square().sum(), gate)
        torch.testing.assert_close(scores[group.name].double(), s.square().mean(0))
        assert not grouped
    assert graph.groups or "embed" in graph.skipped


def test_one_whose_own_code_does_stays_itself() -> None:
    """Lengths are the same without channels that are zero; means are not."""
    one, other = Norm("ScaleNorm"), Norm("PixelNorm")
    for norm in (one, other):
        channel_norms.narrow(norm, torch.tensor([1]))
    assert (type(one), type(other)) == (Norm, NarrowedNorm)
