"""Attention that is written out, of one head: values go by themselves; queries and keys stay together, and say why."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

# as many places as `wide` has channels: sizes tell nothing
X = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)).double()
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class OneHead(nn.Module):
    """attend: of queries, keys [N, T, 8] and values [N, T, 6], what is read."""

    def __init__(self, attend: Attend, width: int = 6) -> None:
        super().__init__()
        self.stem, self.k, self.q, self.v = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, width)
        self.out, self.last, self.attend = nn.Linear(width, 8), nn.Linear(8, 4), attend

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).mT).tanh()
        k, q, v = self.k(x), self.q(x), self.v(x)
        return self.last((x + self.out(self.attend(q, k, v))).relu()).mean(1)


ATTEND: dict[str, Attend] = {
    "matmul": lambda q, k, v: (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v,
    "causal": lambda q, k, v: (q @ k.mT).masked_fill(torch.ones(8, 8).tril() == 0, -torch.inf).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v),
    "values first": lambda q, k, v: torch.bmm(v.mT, torch.bmm(k, q.mT).softmax(1)).mT,
}


class SelfAttention(nn.Module):
    """Of images, as generators have it: what it makes is added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.v = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.q, self.k = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.last, self.gamma = nn.Conv2d(8, 4, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        n, c, h, w = x.shape
        q, k = self.q(x).view(n, -1, h * w).permute(0, 2, 1), self.k(x).view(n, -1, h * w)
        attention = torch.bmm(q, k).softmax(-1)
        v = torch.bmm(self.v(x).view(n, -1, h * w), attention.permute(0, 2, 1)).view(n, c, h, w)
        return self.last(self.gamma * v + x)


class Halves(OneHead):
    """Keys and values are halves of what one layer makes."""

    def __init__(self) -> None:
        super().__init__(ATTEND["matmul"], 8)
        self.kv = nn.Linear(8, 16)
        del self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).mT).tanh()
        return self.last((x + self.out(self.attend(self.q(x), *self.kv(x).chunk(2, -1)))).relu()).mean(1)


_SUMMED = "a product with other activations ({0}Backward0) sums over its channels, where nothing can be measured"


@pytest.mark.parametrize("kind", list(ATTEND))
def test_values_go_and_queries_stay_with_keys(kind: str, tmp_path: Path) -> None:
    check(lambda: OneHead(ATTEND[kind]), X, ["stem", "v"], tmp_path)
    assert trace(noisy(lambda: OneHead(ATTEND[kind])), X).skipped == {
        "k": _SUMMED.format("Bmm"), "q": "its channels go with those of k",
        "last": "its channels are the model's output"}


def test_values_that_are_added_to_a_stream_go_with_it(tmp_path: Path) -> None:
    check(SelfAttention, X, ["stem"], tmp_path)
    kept = trace(noisy(SelfAttention), X).skipped
    assert (kept["q"], kept["k"]) == (_SUMMED.format("Bmm"), "its channels go with those of q")


def test_pytorchs_own_function(tmp_path: Path) -> None:
    model = noisy(lambda: OneHead(F.scaled_dot_product_attention, 8))
    assert [group.name for group in trace(model, X).groups] == ["stem", "v"]
    assert trace(model, X).skipped["q"] == "its channels go with those of k"


def test_values_that_lie_beside_keys_stay_with_them() -> None:
    kept = trace(noisy(Halves), X).skipped
    assert (kept["kv"], kept["q"]) == (_SUMMED.format("Bmm"), "its channels go with those of kv")
