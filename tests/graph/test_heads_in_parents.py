"""Heads of attentions that the code of one module computes, several of them, or token by token."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_layouts import tokens
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

WIDTH, HEADS, TOKENS = 8, 4, 4


class Layer(nn.Module):
    """Self-attention, then attention to a memory, in its own code, which takes the number of heads as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.k1, self.v1, self.o1, self.q2, self.k2, self.v2, self.o2 = (
            nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.norm, self.h = nn.LayerNorm(WIDTH), HEADS

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q1, self.k1, self.v1))
        x = x + self.o1(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q, k, v = self.split(self.q2(self.norm(x))), self.split(self.k2(memory)), self.split(self.v2(memory))
        return x + self.o2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Counted(Layer):
    """One number counts the heads of both."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.h, WIDTH // HEADS).transpose(1, 2)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Beside(Layer):
    """The first is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.q1, self.k1, self.v1, self.o1
        self.own = Inner()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x)
        q, k, v = self.split(self.q2(self.norm(x))), self.split(self.k2(memory)), self.split(self.v2(memory))
        return x + self.o2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.memory, self.layer = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH - 1), layer()
        self.layer.k2, self.layer.v2 = nn.Linear(WIDTH - 1, WIDTH), nn.Linear(WIDTH - 1, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x), self.memory(x[:, :3]).tanh()))


@pytest.mark.parametrize(("layer", "heads"), [(Layer, ["q1", "q2"]), (Counted, ["q1"]), (Beside, ["own.a", "q2"])])
def test_all_attentions_of_a_module(layer: type[nn.Module], heads: list[str], tmp_path: Path) -> None:
    groups = ["stem", "memory", *(f"layer.{name}" for name in heads)]
    small = check(lambda: Decoder(layer), tokens(), groups, tmp_path).model.layer
    assert small.o2.in_features == small.q2.out_features < WIDTH
    assert small.h == (small.o2.in_features // 2 if layer is Counted else HEADS)


def test_each_attention_loses_heads_of_its_own() -> None:
    model, x = noisy(lambda: Decoder(Layer)), tokens()
    scores = fastscore.score(model, [x], progress=False)
    one, other = torch.tensor([9., 9, 1, 1, 8, 8, 8, 8]), torch.tensor([1., 1, 2, 2, 9, 9, 9, 9])
    scores = replace(scores, totals={name: values.double() * scores.passes for name, values in {
        "stem": 9 * torch.ones(8), "memory": 9 * torch.ones(7), "layer.q1": one, "layer.q2": other}.items()})
    ignore = ["stem", "memory"]
    result = fastscore.prune(model, scores, x, channels=0.65, compensate=False, ignore=ignore)
    gone = {name: channels.tolist() for name, channels in result.removed.items()}
    assert gone == {"layer.q1": [2, 3], "layer.q2": [0, 1, 2, 3]}
    assert [row.heads for row in result.report.groups if row.heads] == [(4, 3), (4, 2)]
    assert result.report.channels == (16, 10)
    with torch.no_grad(), fastscore.mask(model, scores, result, x, compensate=False, ignore=ignore):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


class Fused(nn.Module):
    """One projection, cut by the width that comes out of it."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.stem, self.qkv, self.out, self.head = (
            nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in self.cut(self.qkv(x)))
        return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def _slices(x: Tensor) -> list[Tensor]:
    width = x.shape[-1] // 3
    return [x[..., :width], x[..., width:2 * width], x[..., 2 * width:]]


@pytest.mark.parametrize("cut", [lambda x: x.tensor_split(3, -1), lambda x: x.split(x.shape[-1] // 3, -1), _slices])
def test_a_projection_that_is_cut_by_its_width(cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """As with chunk(3), which is followed by itself."""
    x = tokens()
    graphs = [trace(noisy(lambda way=way: Fused(way)), x) for way in (cut, lambda x: x.chunk(3, -1))]
    one, other = ({group.name: group for group in graph.groups} for graph in graphs)
    assert list(one) == list(other) == ["stem", "qkv"]
    assert torch.equal(one["qkv"].unit, other["qkv"].unit)
    model = noisy(lambda: Fused(cut))
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False)
    with fastscore.mask(model, scores, result, x, compensate=False):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert result.model.qkv.out_features == 3 * result.model.out.in_features < 3 * WIDTH


class Cached(Inner):
    """Keys and values of earlier tokens are handed back to it."""

    def forward(self, x: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        cache.append((k, v))
        k, v = (torch.cat(made, 2) for made in zip(*cache, strict=True))
        return self.d(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class TokenByToken(nn.Module):
    """The first token has one key, which shows in what is read of it whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(3, WIDTH), Cached(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, cache = self.stem(x), []
        return self.head(torch.cat([token + self.attention(token, cache) for token in x.split(1, 1)], 1))


def test_heads_of_one_token_at_a_time(tmp_path: Path) -> None:
    check(TokenByToken, tokens(), ["stem", "attention.a"], tmp_path)


class AcrossHeads(Inner):
    """A softmax across heads, in the code that makes what the attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        return self.head(x + self.d(((q @ k.mT).softmax(1) @ v).transpose(1, 2).flatten(2)))


def test_heads_that_read_each_other_are_not_those_of_what_they_read() -> None:
    graph = trace(noisy(AcrossHeads), tokens())
    assert [group.name for group in graph.groups] == ["d"]  # what stem makes, too
    assert graph.skipped["a"] == "its heads read each other"
    assert {graph.skipped[name] for name in "bc"} == {"its channels go with those of a"}
