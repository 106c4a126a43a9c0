"""Nested tensors inside of a model: what sees them stays, with the reason, and everything else goes."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.graph.following import nested
from fastscore.graph.tracing import trace


def jagged(parts: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)


def strided(parts: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(parts))


def of_values(parts: Sequence[Tensor]) -> Tensor:
    offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.cat(list(parts)), offsets, max_seqlen=max(map(len, parts)))


KINDS = [jagged, strided, of_values]


class Joined(nn.Module):
    """Joins its samples in a nested tensor; or, without `join`, does the same on them as they are. beside: what goes in
    is added to what comes out."""

    def __init__(self, join: Callable[[Sequence[Tensor]], Tensor] | None, beside: bool) -> None:
        super().__init__()
        self.before, self.into, self.a, self.b, self.c, self.last = (nn.Linear(6, 6) for _ in range(6))
        self.norm, self.join, self.beside = nn.LayerNorm(6), join, beside

    def forward(self, x: Tensor) -> Tensor:
        y = x = self.into(self.before(x).relu())
        y = y if self.join is None else self.join(list(x))
        y = self.a(y).relu()
        y = self.norm(y + self.b(y))
        y = torch.nested.to_padded_tensor(y, 0.0) if self.join else y
        return self.last(self.c(x + y if self.beside else y).relu()).mean(1)


@pytest.mark.parametrize(("join", "beside"), thinned(KINDS, [False, True]))
def test_what_sees_nested_tensors_stays_and_the_rest_goes(join: Callable[[Sequence[Tensor]], Tensor], beside: bool
                                                          ) -> None:
    torch.manual_seed(0)
    model, x = Joined(join, beside).double().eval(), torch.randn(3, 5, 6).double()
    padded = copy.deepcopy(model)
    padded.join = None
    graph = trace(model, x)
    assert ([group.name for group in graph.groups], graph.skipped) == (["before", "c"], {
        "into": nested.INTO, "a": f"it reads a nested tensor, {nested.WAY_OUT}",
        "b": f"it reads a nested tensor, {nested.WAY_OUT}", "last": "its channels are the model's output"})
    scores = fastscore.score(model, [x], progress=False)
    all_scores = fastscore.score(padded, [x], progress=False)
    for name in ("before", "c"):
        torch.testing.assert_close(scores[name], all_scores[name])
    result = fastscore.prune(model, scores, x, macs=0.8, scope="layer", compensate=False)
    assert result.report.macs[0] == fastscore.prune(padded, all_scores, x, macs=0.8).report.macs[0]
    with torch.no_grad(), fastscore.mask(model, scores, result, x, compensate=False):
        torch.testing.assert_close(result.model(x), model(x))
    repaired = fastscore.prune(model, scores, x, macs=0.8, calibration=[x, x + 1], progress=False)
    assert repaired.model(x).isfinite().all()


class Attends(nn.Module):
    """By attention over nested tensors, with nothing beside it that goes but the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6))
        self.c, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = jagged(list(x))
        q, k, v = (layer(x).unflatten(-1, [2, 4]).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return self.last(self.c(torch.stack([sample.mean(0) for sample in x.unbind()])).relu())


def test_attention_over_nested_tensors_stays() -> None:
    model, x = Attends().double().eval(), torch.randn(3, 5, 6).double()
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["c"]
    assert {scores.skipped[name] for name in ("q", "k", "v", "out")} == {f"it reads a nested tensor, {nested.WAY_OUT}"}
    assert any("nested" in operation for operation in trace(model, x).uncounted)
