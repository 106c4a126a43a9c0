"""Normalisations over channels that users write, known by what they compute, whatever they call it."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.norms import channel_norms
from fastscore.modules.norms.channel_norms import norm_of

WIDTH = 8
Way = Callable[["Norm", Tensor], Tensor]


class Norm(nn.Module):
    """One that computes in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, names, shape, _ = way, *WAYS[way]
        for number, name in enumerate(names):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values))
        self.eps, self.d = 1e-3, WIDTH

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way][2](self, x)


def _squares(x: Tensor, dim: int = -1) -> Tensor:
    return x.square().mean(dim, keepdim=True)


def _less(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


# names of parameters, their shape, what is computed
WAYS: dict[str, tuple[tuple[str, ...], tuple[int, ...], Way]] = {
    "gamma": (("gamma",), (WIDTH,), lambda m, x: x * torch.rsqrt(_squares(x) + m.eps) * m.gamma),
    "in float32": (("scale",), (WIDTH,), lambda m, x: (x.float() * torch.rsqrt(_squares(x.float()) + m.eps)).to(x.dtype)
                   * m.scale),
    "eps in the code": (("g",), (WIDTH,), lambda m, x: x * torch.rsqrt(_squares(x) + 1e-3) * m.g),
    "eps outside": (("g",), (WIDTH,), lambda m, x: x / (_squares(x).sqrt() + m.eps) * m.g),
    "no eps": (("g",), (WIDTH,), lambda m, x: x / _squares(x).sqrt() * m.g),
    "normalize": (("g",), (WIDTH,), lambda m, x: F.normalize(x, dim=-1, eps=1e-3) * m.g * m.d ** 0.5),
    "of length 1": (("g",), (WIDTH,), lambda m, x: F.normalize(x, dim=-1) * m.g),
    "from 1": (("gamma",), (WIDTH,), lambda m, x: F.normalize(x, dim=-1) * m.d ** 0.5 * (m.gamma + 1)),
    "by its norm": (("alpha",), (WIDTH,), lambda m, x: m.alpha * x / (x.norm(2, -1, True) * m.d ** -0.5 + 1e-3)),
    "std": (("a_2", "b_2"), (WIDTH,), lambda m, x: m.a_2 * _less(x) / (x.std(-1, keepdim=True) + m.eps) + m.b_2),
    "var": (("beta", "gamma"), (WIDTH,), lambda m, x: m.gamma * _less(x) / (x.var(-1, keepdim=True) + 1e-3).sqrt()
            + m.beta),
    "layer_norm": (("shift", "factor"), (WIDTH,), lambda m, x: F.layer_norm(x, (x.shape[-1],), m.factor, m.shift)),
    "simple": (("g",), (WIDTH,), lambda m, x: x * torch.rsqrt(x.var(-1, keepdim=True) + m.eps) * m.g),
    "of its spread": (("g", "b"), (WIDTH,), lambda m, x: x / (_less(x).norm(dim=-1, keepdim=True) + 1e-3) * m.g + m.b),
    "images": (("g", "b"), (1, WIDTH, 1, 1), lambda m, x: _less(x, 1) / (_squares(_less(x, 1), 1) + 1e-3).sqrt() * m.g
               + m.b),
    "sequences": (("g",), (1, WIDTH, 1), lambda m, x: F.normalize(x, dim=1) * m.g * m.d ** 0.5),
    "clamped variance": (("g",), (WIDTH,), lambda m, x: x * _squares(x).clamp(min=1e-3).rsqrt() * m.g),
    "clamped var": (("g", "b"), (WIDTH,), lambda m, x: m.g * _less(x) / x.var(-1, keepdim=True).clamp(min=3e-3).sqrt()
                    + m.b),
    "long constants": (("g",), (WIDTH,), lambda m, x: x * torch.rsqrt(_squares(x) + 1.2345678912e-3) * m.g),
    "a root in the code": (("g",), (WIDTH,), lambda m, x: x / (_squares(x).sqrt() + 1e-3 ** 0.5) * m.g),
    "videos": (("g",), (WIDTH, 1, 1, 1), lambda m, x: F.normalize(x, dim=1) * m.d ** 0.5 * m.g),
}
OF_CONSTANTS = [way for way in WAYS if "eps" not in way] + ["eps in the code"]
OTHERS: dict[str, tuple[tuple[str, ...], tuple[int, ...], Way]] = {
    "a scale": (("g",), (WIDTH,), lambda m, x: x * m.g),
    "tanh": (("g",), (WIDTH,), lambda m, x: torch.tanh(x) * m.g),
    "softmax": (("g",), (WIDTH,), lambda m, x: x.softmax(-1) * m.g),
    "of sizes": (("g",), (WIDTH,), lambda m, x: x / x.abs().mean(-1, keepdim=True) * m.g),
    "over rows": (("g",), (WIDTH,), lambda m, x: (x - x.mean(0)) / x.std(0) * m.g),
    "twice the gain": (("g",), (WIDTH,), lambda m, x: x / _squares(x).sqrt() * m.g.square()),
    "roots": (("g",), (WIDTH,), lambda m, x: x.sqrt() * m.g),
    "one number": (("g",), (1,), lambda m, x: F.normalize(x, dim=-1) * m.d ** 0.5 * m.g),
    "in place": (("g",), (WIDTH,), lambda m, x: x.mul_(torch.rsqrt(_squares(x) + m.eps)) * m.g),
    "clamped": (("g",), (WIDTH,), lambda m, x: (x / _squares(x).sqrt() * m.g).clamp(-9, 9)),
    "of a clamped scale": (("g",), (WIDTH,), lambda m, x: x / _squares(x).sqrt().clamp(max=500.0) * m.g),
    "detached": (("g",), (WIDTH,), lambda m, x: x / _squares(x).sqrt().detach() * m.g),
    "dropout": (("g",), (WIDTH,), lambda m, x: F.dropout(x / _squares(x).sqrt(), 0.5, m.training) * m.g),
    "noise": (("g",), (WIDTH,), lambda m, x: x / _squares(x).sqrt() * m.g + torch.randn_like(x))}
EVERY = dict(WAYS)
WAYS |= OTHERS


def _x(way: str) -> tuple[Tensor, int]:
    shape, dim = {"images": ((2, WIDTH, 3, 4), 1), "sequences": ((2, WIDTH, 5), 1), "videos": ((2, WIDTH, 2, 3, 4), 1)
                  }.get(way, ((2, 5, WIDTH), 2))
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5, dim


@pytest.mark.parametrize("way", OF_CONSTANTS)
def test_constants_are_found_to_their_last_digit(way: str) -> None:
    """Of small inputs they are all that counts."""
    norm, x = Norm(way), 1e-4 * _x(way)[0]
    known, held = norm_of(norm), norm._parameters
    shift = held.get(known.shift)
    found = known(x, held[known.gain].flatten(), None if shift is None else shift.flatten(), WIDTH)
    torch.testing.assert_close(found, norm(x), rtol=1e-6 if way == "in float32" else 1e-11, atol=0)


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_narrowed_by_definition(way: str, scale: float) -> None:
    """With fewer channels it makes what its own code does of zeros, with the gradients of that; and what of a gradient
    goes through statistics is what is left of its own without the direct way."""
    norm, (x, dim) = Norm(way), _x(way)
    gone = torch.tensor([1, 5, 6])
    stays = torch.tensor([0, 2, 3, 4, 7])
    small = copy.deepcopy(norm)
    channel_norms.narrow(small, gone)
    close = {"rtol": 1e-4, "atol": 1e-5} if way == "in float32" else {"rtol": 1e-5, "atol": 1e-9}
    zeros, some = ((x * scale).index_fill(dim, gone, 0).requires_grad_(), (x * scale).index_select(dim, stays))
    some.requires_grad_()
    want, got = norm(zeros).index_select(dim, stays), small(some)
    torch.testing.assert_close(got, want, **close)
    g = torch.randn_like(got)
    wanted = torch.autograd.grad(want, zeros, g)[0].index_select(dim, stays)
    (found,) = torch.autograd.grad(got, some, g)
    torch.testing.assert_close(found, wanted, rtol=close["rtol"], atol=close["atol"] * float(wanted.abs().max()))
    known = norm_of(norm)
    shift = norm._parameters.get(known.shift)
    g, y = torch.randn_like(x), norm(x := (x * scale).requires_grad_())
    (whole,) = torch.autograd.grad(y, x, g)
    read = x - x.mean(dim, keepdim=True) if known.centered else x
    direct = g * (y - (0 if shift is None else shift)) / read
    torch.testing.assert_close(channel_norms.gradient_of_statistics(norm, x.detach(), g), (whole - direct).detach(),
                               rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("way", OTHERS)
def test_what_is_none(way: str) -> None:
    state = torch.get_rng_state()
    assert norm_of(Norm(way)) is None
    assert torch.equal(torch.get_rng_state(), state)


class Shaped(nn.Module):
    """Whose gain says by its shape where channels lie."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-self.g.dim()) * self.g


def test_norms_of_one_class_are_told_apart_by_shapes() -> None:
    assert [norm_of(Shaped(*shape)).dim for shape in ((8,), (8, 1), (8, 1, 1), (8, 1, 1, 1))] == [
        -1, -2, -3, -4]


class Row(nn.Module):
    """A stream that is normalised."""

    def __init__(self, way: str) -> None:
        super().__init__()
        kind = {"images": nn.Conv2d, "sequences": nn.Conv1d, "videos": nn.Conv3d}.get(way)
        more = () if kind is None else (1,)
        kind = kind or nn.Linear
        self.embed, self.head = kind(4, WIDTH, *more), kind(WIDTH, 3, *more)
        self.norm = Norm(way)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


@pytest.mark.parametrize("way", EVERY)
def test_the_stream_goes(way: str) -> None:
    """And the smaller model is the one whose stream has zeros."""
    torch.manual_seed(0)
    model, (x, dim) = Row(way).double().eval(), _x(way)
    x = x.narrow(dim, 0, 4)
    assert [group.name for group in trace(model, x).groups] == ["embed"]
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        result = fastscore.prune(model, scores, x, channels=0.7, compensate=False)
    gone = result.removed["embed"]
    assert len(gone)
    with torch.no_grad():
        y = model.norm(model.embed(x).index_fill(dim, gone, 0)).index_fill(dim, gone, 0)
        close = 1e-5 if way == "in float32" else 1e-6
        torch.testing.assert_close(result.model(x), model.head(y), rtol=close, atol=close)
        with fastscore.mask(model, scores, result, x, compensate=False):
            torch.testing.assert_close(result.model(x), model(x), rtol=close, atol=close)
