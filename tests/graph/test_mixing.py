"""Of channels that the tracer cannot follow, the reason names the operation that mixes or moves them, and whose code it
is in: not those before it, which keep them where they are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.graph.tracing import trace


class Step(nn.Module):
    def __init__(self, do: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: Tensor) -> Tensor:
        return self.do(x)


class Net(nn.Module):
    """Images -> 2 numbers, with `do` in a module between the layers, or in the model's own code."""

    def __init__(self, do: Callable[[Tensor], Tensor], inside: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1)
        self.step, self.last = Step(do) if inside else do, nn.Conv2d(8, 2, 1)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu().flip(3)  # of positions: dead ones come elsewhere
        x = F.max_pool2d(self.second(x).relu().roll(1, 2).permute(0, 3, 2, 1).transpose(1, 3), 2)
        return self.last(self.step(x)).mean((2, 3))


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def scaled_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :] = y.flip(1)
    return y


DO: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "flip": (lambda x: x.flip(1), "flip"),
    "roll": (lambda x: (x + 1).roll(3, 1), "roll"),
    "outer": (lambda x: (x[:, :, None] * x[:, None]).sum(1), "mul"),
    "matmul": (lambda x: (x.transpose(1, 3) @ torch.ones(8, 8).to(x)).transpose(1, 3), "matmul"),
    "pool": (lambda x: F.avg_pool1d(x.flatten(2).mT, 3, 1, 1).mT.reshape(x.shape), "avg_pool1d"),
    "no gradient": (lambda x: x / (1 + mean(x)), "mean"),
    "data": (lambda x: x * x.data.mean(1, keepdim=True), "mean"),
    "written": (scaled_in_place, "flip"),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", DO)
def test_the_operation_is_named(kind: str, inside: bool) -> None:
    do, name = DO[kind]
    torch.manual_seed(0)
    graph = trace(Net(do, inside).double().eval(), torch.randn(2, 3, 7, 7, dtype=torch.float64))
    assert [group.name for group in graph.groups] == ["first"]
    where = "step (Step)" if inside else "Net"
    assert graph.skipped["second"] == \
        f"the tracer cannot follow its channels to last: {name} in the code of {where} mixes or moves them"


def test_each_group_has_its_own() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).flip(1)).roll(3, 1)).mean((2, 3))

    graph = trace(Two(torch.tanh, False).double().eval(), torch.randn(2, 3, 7, 7, dtype=torch.float64))
    assert graph.skipped["first"] == "the tracer cannot follow its channels to second: flip in the code of Two mixes " \
                                     "or moves them"
    assert "roll in the code of Two" in graph.skipped["second"]


class Separable(nn.Module):
    """Self-attention whose one row of queries meets all keys, as of MobileViTv2."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.first, self.qkv, self.last = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 13, 1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.first(x)).split([1, self.width, self.width], 1)
        context = (key * query.softmax(-1)).sum(-1, keepdim=True)
        return self.last(value.relu() * context.expand_as(value))


class Gated(Separable):
    """By a part of its channels, which is as wide as what it meets: a sum over them mixes it, not the cut."""

    def forward(self, x: Tensor) -> Tensor:
        _, key, value = self.qkv(self.first(x)).split([1, self.width, self.width], 1)
        return self.last(value.relu() * key.flip(1))


@pytest.mark.parametrize(("kind", "what"), [
    (Separable, "mul in the code of Separable spreads one of them, which is cut off, over others"),
    (Gated, "flip in the code of Gated mixes or moves them"),
])
def test_a_cut_is_none_of_them(kind: type[nn.Module], what: str) -> None:
    torch.manual_seed(0)
    graph = trace(kind().double().eval(), torch.randn(2, 3, 7, dtype=torch.float64))
    assert [group.name for group in graph.groups] == ["first"]
    assert graph.skipped["qkv"] == f"the tracer cannot follow its channels to last: {what}"
