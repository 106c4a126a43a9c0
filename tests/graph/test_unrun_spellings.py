"""Branches that no example runs, spelled in many ways, and those that put channels of several layers together."""

import linecache
import math
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_unrun import Net, X
from test_unrun_heads import Attention
from torch import Tensor, nn
from whole_way import noisy

from fastscore.graph.tracing import trace

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")


def along_channels(name: str, *lines: str) -> type[Net]:
    """A network of that name whose branch has these lines."""
    code = "\n".join([f"class {name}(Net):", "    def between(self, h):", "        if self.other:",
                      *(f"            {line}" for line in lines), "        return h"])
    file = f"<{name} of test_unrun_spellings.py>"
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


class ByMask(Net):
    """Another layer reads channels by a mask, which is none where the branch is passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.first(x).relu()
        if mask is not None:
            return self.masked(h * mask)
        return self.second(h)


class ByMaskBefore(ByMask):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.first(x).relu()
        if mask is None:
            return self.second(h)
        h = mask * h
        return self.masked(h)


@pytest.mark.parametrize(("kind", "said"), [(ByMask, "self.masked(h * mask)"), (ByMaskBefore, "self.masked(h)")])
def test_what_another_layer_reads_by_a_mask_stays(kind: type[nn.Module], said: str) -> None:
    assert trace(noisy(kind), X).skipped["first"].startswith(f"{said} in {kind.__name__}.forward")


class NotSelf(Net):
    """Methods that call their object something else."""

    def __init__(me) -> None:
        super().__init__()
        me.beside = nn.Conv2d(16, 4, 3, padding=1)

    def forward(me, x: Tensor) -> Tensor:
        h = me.first(x).relu()
        return (me.beside(h) if me.other else me.second(h)).mean((2, 3))


class ByStaticMethod(Net):
    @staticmethod
    def turned(h: Tensor) -> Tensor:
        return h.flip(1)

    def between(self, h: Tensor) -> Tensor:
        return self.turned(h) if self.other else h


class ByClassMethod(ByStaticMethod):
    @classmethod
    @torch.no_grad()
    def turned(cls, h: Tensor) -> Tensor:
        return h.roll(2, 1)


@pytest.mark.parametrize("kind", [NotSelf, ByStaticMethod, ByClassMethod])
def test_so_it_does_whatever_methods_are(kind: type[Net]) -> None:
    assert "which example_inputs do not come to" in trace(noisy(kind), X).skipped["first"]
