"""Branches that no example runs: where they mean channels that a variable holds there, the group stays, and the reason
quotes them; where they do not, it goes, and what is left computes the same in them."""

import linecache
import math
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Images -> 4 numbers. other: whether a branch is taken."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).relu())).mean((2, 3))

    def between(self, h: Tensor) -> Tensor:
        return h


class View(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            n, _, height, width = h.shape
            h = h.view(n, 4, 4, height, width).flip(2).flatten(1, 2)
        return h


class Shuffle(Net):
    def between(self, h: Tensor) -> Tensor:
        if not self.other:
            return h
        n, _, height, width = h.shape
        return h.view(n, 2, -1, height, width).transpose(1, 2).flatten(1, 2)


class Neighbours(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            n, _, height, width = h.shape
            h = h.reshape((n, -1, 4, height, width)).flip(2).flatten(1, 2)
        return h


class Chunk(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            one, two = h.chunk(2, 1)
            h = torch.cat([2 * one, two], 1)
        return h


class Split(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            one, two = torch.split(h, [4, 12], dim=1)
            h = torch.cat([2 * one, two], 1)
        return h


class SplitAlike(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other: h = torch.cat([i * part for i, part in enumerate(h.split(4, 1))], 1)  # noqa: E701
        return h


class Unflatten(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (4, -1)).cumsum(1).flatten(1, 2) if self.other else h


class Slice(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([2 * h[:, :4], h[:, 4:]], 1) if self.other else h


class Half(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            half = h.shape[1] // 2
            if len(h) > 1:
                h = torch.cat([2 * h[:, :half], h[:, half:]], 1)
        return h


class Last(Net):
    def between(self, h: Tensor) -> Tensor:
        return h * h[..., -1, None, None, None] if self.other and h.dim() == 1 else h * h[:, -1:] if self.other else h


class Mean(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h * h.mean(1, keepdim=True)
        return h


class Total(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h / (1 + h.sum(dim=1, keepdim=True))
        return h


class Softmax(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = F.softmax(h, dim=-3)
        return h


class Roll(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = torch.roll(h, 1, 1)
        return h


class Scaled(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h * h.shape[1] ** -0.5
        return h


class Attention(Net):
    """Of four heads, 4 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj = nn.Linear(4, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).flatten(2).mT
        n, t, _ = x.shape
        q, k, v = self.taken(self.qkv(x)).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        h = self.between(F.scaled_dot_product_attention(q, k, v))
        return self.proj(h.transpose(1, 2).reshape(n, t, -1)).mean(1)

    def taken(self, x: Tensor) -> Tensor:
        return x


class HeadSlice(Attention):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([2 * h[:, :2], h[:, 2:]], 1) if self.other else h


class HeadMean(Attention):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h + h.mean(1, keepdim=True)
        return h


class HeadView(Attention):
    def taken(self, x: Tensor) -> Tensor:
        if self.other:
            x = x.view(2, 36, 3, 4, -1).flip(3).flatten(2)
        return x


class SecondHead(Net):
    """Of a layer that the example does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.aux(h.mean((2, 3))) if self.other else self.second(h).mean((2, 3))


class Scale(Net):
    """Of a parameter that the example does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def between(self, h: Tensor) -> Tensor:
        return h * self.scale.view(1, -1, 1, 1) if self.other else h


class Renamed(Net):
    """By another name, in another order."""

    def between(self, h: Tensor) -> Tensor:
        if self.other:
            y = h.permute(0, 2, 3, 1)
            h = h * y.softmax(-1).permute(0, 3, 1, 2)
        return h


def averaged(x: Tensor) -> Tensor:
    return x * x.mean(1, keepdim=True)


class ByFunction(Net):
    def between(self, h: Tensor) -> Tensor:
        return averaged(h) if self.other else h


class ByMethods(Net):
    def outer(self, z: Tensor) -> Tensor:
        return self.inner(2 * z)

    def inner(self, x: Tensor) -> Tensor:
        return torch.cat([2 * x[:, :4], x[:, 4:]], 1)

    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = self.outer(h)
        return h


class Loop(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h + sum(h[:, i:i + 1] for i in range(3))
        return h


class ByAttribute(Net):
    width = 8

    def between(self, h: Tensor) -> Tensor:
        return torch.cat([2 * h[:, :self.width], h[:, self.width:]], 1) if self.other else h


class OfAll(Net):
    def between(self, h: Tensor) -> Tensor:
        return h / h.std() if self.other else h


class Normalized(Net):
    def between(self, h: Tensor) -> Tensor:
        return F.normalize(h) if self.other else h


class Einsum(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.einsum("nchw,ndhw->nchw", h, h) if self.other else h


def along_channels(name: str, *lines: str) -> type[Net]:
    """A network of that name whose branch has these lines."""
    code = "\n".join([f"class {name}(Net):", "    def between(self, h):", "        if self.other:",
                      *(f"            {line}" for line in lines), "        return h"])
    file = f"<{name} of test_unrun.py>"
    linecache.cache[file] = (len(code), None, code.splitlines(True), file)
    names: dict[str, Any] = {"Net": Net, "F": F, "functional": F, "softmax": F.softmax, "torch": torch, "math": math,
                             "__name__": __name__}
    exec(compile(code, file, "exec"), names)
    return names[name]


SPELLINGS = {
    "RmsByHand": ["h = h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6)"],
    "OfFlat": ["h = h - h.flatten(1).mean(1)[:, None, None, None]"],
    "Functional": ["h = torch.nn.functional.softmax(h, dim=1)"],
    "Renamed_": ["h = functional.softmax(h, dim=1)"],
    "Imported": ["h = softmax(h, dim=1)"],
    "Word": ["h = h - torch.mean(input=h, dim=1, keepdim=True)"],
    "GroupNorm": ["h = F.group_norm(h, 1)"],
    "LayerNorm": ["h = F.layer_norm(h, h.shape[1:])"],
    "Response": ["h = F.local_response_norm(h, 3)"],
    "Norm": ["h = h / torch.linalg.vector_norm(h, dim=1, keepdim=True)"],
    "Quantile": ["h = h - h.quantile(0.5, dim=1, keepdim=True)"],
    "CumulativeMax": ["h = h.cummax(1).values"],
    "FlippedTwice": ["h = h.flip(2, 1)"],
    "Unbound": ["h = h * h.unbind(1)[3][:, None]"],
    "Sections": ["h = torch.cat([2 * h.tensor_split(2, 1)[0], h.tensor_split(2, 1)[1]], 1)"],
    "ByCount": ["n, c, height, width = h.shape", "h = h / c"],
    "ByRoot": ["h = h / math.sqrt(h.shape[1])"],
    "Starred": ["h = h.view(len(h), 2, -1, *h.shape[2:]).transpose(1, 2).flatten(1, 2)"],
    "Caught": ["try:", "    raise ValueError", "except ValueError:", "    h = h - h.mean(1, keepdim=True)"],
    "Matched": ["match self.other:", "    case True:", "        h = h - h.mean(1, keepdim=True)"],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_stays_however_the_branch_spells_it(name: str) -> None:
    graph = trace(noisy(along_channels(name, *SPELLINGS[name])), X)
    assert re.search(rf"in {name}.between \(line .* do not come to", graph.skipped["first"])


class SoftmaxOfHeads(Attention):
    """Rows that sum up to one, whatever heads do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).flatten(2).mT
        n, p, _ = x.shape
        q, k, v = self.qkv(x).view(n, p, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT).softmax(-1)
        if self.other:
            a = a + a.mean(1, keepdim=True)
        return self.proj((a @ v).transpose(1, 2).flatten(2)).mean(1)


def test_heads_show_behind_a_softmax() -> None:
    assert "a.mean(1, keepdim=True) in SoftmaxOfHeads" in trace(noisy(SoftmaxOfHeads), X).skipped["qkv"]


class Two(nn.Module):
    """Two layers, read by one each."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu(), self.beside(x).relu()
        if self.other:
            a = a + b
        return (self.second(a) + self.third(b)).mean((2, 3))


class Turned(Two):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu(), self.beside(x).relu()
        y = torch.cat([b, a], 1) if self.other else torch.cat([a, b], 1)
        return self.second(y).mean((2, 3))


@pytest.mark.parametrize(("kind", "said"), [(Two, "a + b"), (Turned, "torch.cat([b, a], 1)")])
def test_channels_that_only_the_branch_puts_together_stay(kind: type[nn.Module], said: str) -> None:
    skipped = trace(noisy(kind), X).skipped
    assert [skipped[layer].partition(" in ")[0] for layer in ("first", "beside")] == [said] * 2


class Chosen(Net):
    """What a constructor chose is not what another call chooses."""

    kind: Any = nn.ReLU

    def between(self, h: Tensor) -> Tensor:
        if self.kind is nn.Softmax:
            return h.softmax(1)
        if self.kind not in (nn.ReLU, nn.GELU):
            h = h - h.mean(1, keepdim=True)
        return h


class Flagged(Net):
    """A flag that the constructor set, by itself and beside an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = False

    def between(self, h: Tensor) -> Tensor:
        h = h - h.mean(1, keepdim=True) if self.shared else h
        return h.softmax(1) if getattr(self, "shared", True) and len(h) > 7 else h


class OfRows(Net):
    """Dimensions that rows do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.mean((1, 2)) if x.dim() > 2 else x).relu()
        return self.second(h.mean((2, 3)) if h.dim() > 2 else h)


STAY: dict[type[Net], str] = {
    View: "h.view(n, 4, 4, height, width)", Shuffle: "h.view(n, 2, -1, height, width)",
    Neighbours: "h.reshape((n, -1, 4, height, width))", Chunk: "h.chunk(2, 1)", Split: "torch.split(h, [4, 12], dim=1)",
    SplitAlike: "h.split(4, 1)", Unflatten: "h.unflatten(1, (4, -1))", Slice: "h[:, :4]", Half: "h[:, :half]",
    Last: "h[:, -1:]", Mean: "h.mean(1, keepdim=True)", Total: "h.sum(dim=1, keepdim=True)",
    Softmax: "F.softmax(h, dim=-3)", Roll: "torch.roll(h, 1, 1)",
    Scaled: "h.shape[1] ** (-0.5)", HeadSlice: "h[:, :2]", HeadMean: "h.mean(1, keepdim=True)",
    HeadView: "x.view(2, 36, 3, 4, -1)", SecondHead: "self.aux(h.mean((2, 3)))",
    Scale: "h * self.scale.view(1, -1, 1, 1)", Renamed: "y.softmax(-1)", ByAttribute: "h[:, :self.width]",
    Loop: "h[:, i:i + 1]", OfAll: "h.std()", Normalized: "F.normalize(h)",
    Einsum: "torch.einsum('nchw,ndhw->nchw', h, h)", ByFunction: "x.mean(1, keepdim=True)", ByMethods: "x[:, :4]"}


@pytest.mark.parametrize("kind", STAY)
def test_what_means_channels_keeps_them(kind: type[Net]) -> None:
    graph = trace(noisy(kind), X)
    name = "qkv" if issubclass(kind, Attention) else "first"
    assert graph.skipped[name].startswith(f"{STAY[kind]} in {'averaged' if kind is ByFunction else kind.__name__}")
    line = int(re.search(r"\(line (\d+) of test_unrun.py\), which example_inputs do not", graph.skipped[name])[1])
    assert re.sub("[() ]", "", STAY[kind]) in re.sub("[() ]", "", linecache.getline(__file__, line).replace('"', "'"))


class Doubled(Attention):
    """What it averages over heads adds nothing."""

    def between(self, h: Tensor) -> Tensor:
        return h + 0 * h.mean(1, keepdim=True) if self.other else h


class Averaged(Doubled):
    def between(self, h: Tensor) -> Tensor:
        return h + h.mean(1, keepdim=True) if self.other else h


@pytest.mark.parametrize("kind", [Doubled, Averaged])
def test_a_forward_that_calls_both_ways_shows_whether_channels_can_go(kind: type[Net]) -> None:
    """As the reason says."""
    def both(model: Any, x: Tensor) -> Tensor:
        outputs = []
        for model.other in (True, False):
            outputs.append(model(x))
        return torch.cat(outputs, 1)

    model: Any = noisy(kind)
    assert "a forward= that calls the model that way, too, shows" in trace(model, X).skipped["qkv"]
    found = trace(model, X, both)
    assert ("qkv" in found.skipped) == (kind is Averaged)
    assert "example_inputs" not in found.skipped.get("qkv", "")


class Positions(Net):
    """Of places."""

    def between(self, h: Tensor) -> Tensor:
        if self.other:
            n, c, height, width = h.shape
            h = h.flip(2).roll(1, 3).view(n, c, height // 2, 2, width).mean(3, keepdim=True).repeat(1, 1, 1, 2, 1)
            h = h.flatten(2, 3)
            h = (h[:, :, :2].mean(2, keepdim=True) + h[..., 1:2] + h.softmax(-1)).reshape(n, -1, height, width)
        return h + 0


class SomethingElse(Net):
    """A variable of that name holds channels elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.other:
            h = h + 1
        h = self.second(h)
        if self.other:
            h = h.flip(1)
        return h.mean((2, 3))


class Thirds(Attention):
    """Queries, keys and values, all heads of each; and channels of each head."""

    def taken(self, x: Tensor) -> Tensor:
        if self.other:
            x = torch.cat([2 * part for part in x.chunk(3, -1)], -1)
        return x

    def between(self, h: Tensor) -> Tensor:
        return torch.cat([-h[..., 2:], h[..., :2]], -1) if self.other else h


class SameLayer(Net):
    """The layer that reads them is called, with or without one that holds nothing before it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.unused = nn.Dropout(0.1), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.other:
            return self.second(self.before(h * h.mean((2, 3), keepdim=True))).mean((2, 3))
        return self.second(h).mean((2, 3))


@pytest.mark.parametrize("kind", [Positions, SomethingElse, Thirds, SameLayer, Chosen, Flagged, OfRows])
def test_what_means_something_else_does_not(kind: type[Net]) -> None:
    model: Any = noisy(kind)
    scores = fastscore.score(model, [X], progress=False)
    assert ("qkv" if kind is Thirds else "first") in scores
    small = fastscore.prune(model, scores, X, channels=0.5, compensate=False).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, compensate=False):
        for other in (False, True):
            model.other = small.other = other
            torch.testing.assert_close(small(X), model(X), rtol=1e-8, atol=1e-9)
