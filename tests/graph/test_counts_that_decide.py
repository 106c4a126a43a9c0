"""Numbers of heads by which code decides something, in branches that the traced batch does not take, too."""

import re

import pytest
import torch
import torch.nn.functional as F
from one_attention import Net
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        if x.shape[2] != self.num_heads * self.head_dim and t < 0:
            raise ValueError(f"not {self.num_heads}")
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.more(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)))

    def more(self, y: Tensor) -> Tensor:
        return y


class Compared(Attention):
    def more(self, y: Tensor) -> Tensor:
        return 2 * y if len(y) > self.num_heads else y


class Sliced(Attention):
    def more(self, y: Tensor) -> Tensor:
        return torch.cat([2 * y[:, :self.num_heads], y[:, self.num_heads:]], 1) if len(y) > 5 else y


class Repeated(Attention):
    def more(self, y: Tensor) -> Tensor:
        mask = torch.ones(len(y), 1)
        if mask.shape[0] < len(y) * self.num_heads:
            mask = mask.repeat_interleave(self.num_heads, 0)
        return y * mask.unflatten(0, (len(y), self.num_heads)).mean(1)[:, None]


class Least(Attention):
    def more(self, y: Tensor) -> Tensor:
        return y * min(len(y), self.num_heads)


class Unnamed(nn.Module):
    """Whose heads no name shows, nor their number."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 4
        self.asks, self.says = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.asks(x).view(*x.shape[:2], 3, self.n, -1).permute(2, 0, 3, 1, 4)
        y = self.says(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return 2 * y if len(y) > self.n else y


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "quoted"), [
    (Compared, r"\(len\(y\) > self.num_heads\)"), (Sliced, r"\(y\[:, (:self.num_heads|self.num_heads:)\]\)"),
    (Least, r"\(min\(len\(y\), self.num_heads\)\)")])
def test_heads_stay_by_whose_number_code_decides(kind: type[Attention], quoted: str) -> None:
    reason = trace(Net(kind).eval(), X).skipped["attn.qkv"]
    assert reason.startswith(f"num_heads of {kind.__name__} counts heads, or their channels, and is more than a size")
    assert re.search(quoted, reason), reason


def test_so_do_those_that_no_name_shows() -> None:
    reason = trace(Net(Unnamed).eval(), X).skipped["attn.asks"]
    assert reason.startswith("n of Unnamed counts heads, or their channels, and is more than a size")
    assert "(len(y) > self.n)" in reason


@pytest.mark.parametrize("kind", [Attention, Repeated])
def test_a_number_that_only_says_whether_something_is_wrong_or_repeated_decides_nothing(kind: type[Attention]) -> None:
    model = Net(kind).eval()
    scores = fastscore.score(model, [X], progress=False)
    small = fastscore.prune(model, scores, X, channels=0.5, compensate=False)
    assert small.model.attn.num_heads == 2
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, compensate=False):
        torch.testing.assert_close(small.model(X), model(X))
