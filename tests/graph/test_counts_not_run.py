"""What code computes with a number of heads where the traced batch does not come to: heads stay by it. Where it has
come to, or only makes sizes, they go, and the other branch makes of fewer heads what it makes of masked ones."""

import re

import pytest
import torch
import torch.nn.functional as F
from one_attention import Net
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace


class Attention(nn.Module):
    """Of at most five positions the example is; of more, or with a mask, another branch may run."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dim = 4, 4, 16
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def apart(self, y: Tensor, n: int, t: int) -> Tensor:
        return y.view(n, t, 3, self.num_heads, self.head_dim)

    def queries(self, q: Tensor) -> Tensor:
        return q

    def heads(self, h: Tensor) -> Tensor:
        return h

    def more(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t = x.shape[:2]
        q, k, v = self.apart(self.qkv(x), n, t).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(self.queries(q), k, v, mask)
        return self.more(self.proj(self.heads(h).transpose(1, 2).reshape(n, t, -1)))


class Multiplied(Attention):
    def more(self, y: Tensor) -> Tensor:
        if y.shape[1] > 5:
            y = y * self.num_heads
        return y


class InPlace(Attention):
    def more(self, y: Tensor) -> Tensor:
        if y.shape[1] > 5:
            y *= self.num_heads
        return y


class InOneLine(Attention):
    def more(self, y: Tensor) -> Tensor:
        return y if y.shape[1] <= 5 else y / self.num_heads ** 0.5


class BehindAnIf(Attention):
    def more(self, y: Tensor) -> Tensor:
        if y.shape[1] > 5: y = y + self.num_heads  # noqa: E701
        return y


class WithAMask(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if mask is None and x.shape[1] <= 5:
            return y
        share = 1 / self.num_heads
        return y * share


class InTraining(Attention):
    def more(self, y: Tensor) -> Tensor:
        return y - self.num_heads if self.training else y


class Scaled(Attention):
    def queries(self, q: Tensor) -> Tensor:
        if q.shape[2] > 5:
            q = q * (self.dim // self.num_heads) ** -0.5
        return q


class Summed(Attention):
    def heads(self, h: Tensor) -> Tensor:
        return h if h.shape[2] <= 5 else h + h.sum(1, keepdim=True) / self.num_heads


class Numbered(Attention):
    def heads(self, h: Tensor) -> Tensor:
        if h.shape[2] > 5:
            h = h * torch.arange(1, self.num_heads + 1).view(-1, 1, 1)
        return h


class IntoALayer(Attention):
    def more(self, y: Tensor) -> Tensor:
        if y.shape[1] > 5:
            return self.proj(self.num_heads * y)
        return y


class ByAFunction(Attention):
    def more(self, y: Tensor) -> Tensor:
        if y.shape[1] > 5:
            return torch.mul(y, self.num_heads)
        return y


class ByALambda(Attention):
    def more(self, y: Tensor) -> Tensor:
        grown = lambda: y * self.num_heads  # noqa: E731
        return grown() if y.shape[1] > 5 else y


class Outside(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.attn.num_heads if x.shape[1] > 5 else y


STAY = (Multiplied, InPlace, InOneLine, BehindAnIf, WithAMask, InTraining, Scaled, Summed, Numbered, IntoALayer,
        ByAFunction, ByALambda)


class OtherViews(Attention):
    def apart(self, y: Tensor, n: int, t: int) -> Tensor:
        if t > 5:
            return y.view(n * t, -1, self.num_heads, self.head_dim).view(n, t, 3, self.num_heads, -1)
        return super().apart(y, n, t)


class Products(Attention):
    def heads(self, h: Tensor) -> Tensor:
        if h.shape[2] > 5:
            n, heads, *shape = h.shape
            assert heads == self.num_heads
            rows = n * self.num_heads
            h = h.reshape(rows, *shape).tanh().view(rows // self.num_heads, self.num_heads, *shape)
        return h


class Repeated(Attention):
    def heads(self, h: Tensor) -> Tensor:
        return h if h.shape[2] <= 5 else h * h.new_ones(1, 1, 1, 4).repeat(1, self.num_heads, 1, 1).sigmoid()


class Listed(Attention):
    def heads(self, h: Tensor) -> Tensor:
        if h.shape[2] > 5:
            sizes = [count * h.shape[2] for count in (self.num_heads, 0)]
            h = h.flatten(1, 2).split(sizes, 1)[0].view_as(h)
        return h


class AskedWhetherRepeated(Attention):
    """As diffusers does, of a mask that the example lacks."""

    def heads(self, h: Tensor) -> Tensor:
        if h.shape[2] > 5:
            mask = h.new_ones(len(h), 1)
            if mask.shape[0] < len(h) * self.num_heads:
                mask = mask.repeat_interleave(self.num_heads, 0)
            h = h * mask.view(len(h), self.num_heads, 1, 1)
        return h


class Twice(Attention):
    """What has run is shown, on one line or several, and what comes of it."""

    def more(self, y: Tensor) -> Tensor:
        scale = 1 if self.num_heads else 2
        heads = self.num_heads // 2
        z = y.new_zeros(len(y), heads * 2)
        return y + z.sum() * (scale
                              if y.shape[1] <= 5
                              else 3)


GO = (Attention, OtherViews, Products, Repeated, Listed, AskedWhetherRepeated, Twice)
X, LONG = (torch.randn(2, t, 16, generator=torch.Generator().manual_seed(t)).double() for t in (5, 8))


@pytest.mark.parametrize("kind", STAY)
def test_heads_stay_by_what_is_computed_where_nothing_ran(kind: type[Attention]) -> None:
    reason = trace(noisy(lambda: Net(kind)), X).skipped["attn.qkv"]
    assert reason.startswith(f"num_heads of {kind.__name__} counts heads, or their channels, and is more than a size")
    assert re.search(rf"the code of {kind.__name__}\.\w+ \(.*\)", reason), reason


def test_heads_stay_by_what_another_module_computes() -> None:
    reason = trace(noisy(lambda: Outside(Attention)), X).skipped["attn.qkv"]
    assert "the code of Outside.forward (" in reason


@pytest.mark.parametrize("kind", GO)
def test_heads_go_where_it_is_only_sizes(kind: type[Attention]) -> None:
    model = noisy(lambda: Net(kind))
    scores = fastscore.score(model, [X], progress=False)
    small = fastscore.prune(model, scores, X, channels=0.5, compensate=False).model
    assert small.attn.num_heads == 2
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, compensate=False):
        for x in (X, LONG):
            torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


def test_what_has_run_computes_what_it_shows() -> None:
    """The same line, of an example that comes to it: a trial says why."""
    reason = trace(noisy(lambda: Net(Multiplied)), LONG).skipped.get("attn.qkv", "")
    assert "is more than a size" not in reason
