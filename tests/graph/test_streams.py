"""Residual streams through normalisations over channels: found, scored, masked, cut, saved, exported and trained.

A stream's gate multiplies a channel where it counts towards the statistics of a normalisation, and where a layer reads
what became of it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from stream_networks import (
    KINDS,
    TOKENS,
    WIDTH,
    WORDS,
    LayerNorm2d,
    OffsetRMSNorm,
    noise,
    words,
)
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

import fastscore
from fastscore import Scorer
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.tracing import trace
from fastscore.modules.norms import channel_norms
from fastscore.modules.norms.channel_norms import NarrowedNorm, norm_of
from fastscore.pruning.budgets.costs import total_macs


def _network(kind: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind][0]().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return model


def _stream(kind: str, model: nn.Module) -> ChannelGroup:
    groups = trace(model, KINDS[kind][1](2)).groups
    return next(group for group in groups if group.name == KINDS[kind][2])


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """[N, C] in the shape of x, which has its channels along `dim`."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = values.shape
    return values.reshape(shape)


def gated(model: nn.Module, group: ChannelGroup, x: Tensor, gate: Tensor) -> Tensor:
    """model(x) with a gate [N, C] on a group's channels, by the definition of each normalisation."""
    model = copy.deepcopy(model)

    def factors(index: Tensor, channel: Tensor, width: int) -> Tensor:
        return torch.ones(len(gate), width, dtype=gate.dtype).index_put(
            (torch.arange(len(gate))[:, None], index[None]), gate[:, channel])

    for member in group.members:
        layer = model.get_submodule(member.layer)
        if member.role == "consumer":
            dim = -1 if isinstance(layer, nn.Linear) else 1
            layer.register_forward_pre_hook(lambda _, args, member=member, dim=dim: (
                args[0] * _along(factors(member.index, member.channel, args[0].shape[dim]), args[0], dim),))
        elif member.role == "norm":
            images = isinstance(layer, LayerNorm2d) or getattr(layer, "channel_dim", -1) == 1
            dim = 1 if images else -1

            def responses(x: Tensor, layer: nn.Module = layer, dim: int = dim, member: object = member) -> Tensor:
                counted = x * _along(factors(member.index, member.channel, x.shape[dim]), x, dim)
                image = (2, 3) if dim == 1 else (1, 2)
                own, norms = (each.square().sum(image, keepdim=True).sqrt() for each in (x, counted))
                y = x * own / (norms.mean(dim, keepdim=True) + 1e-6)
                return x + y * _along(layer.weight.view(1, -1), x, dim) + _along(layer.bias.view(1, -1), x, dim)

            if isinstance(layer, (ConvNextV2GRN, GlobalResponseNorm)):
                layer.forward = responses
                continue

            def normalized(x: Tensor, layer: nn.Module = layer, dim: int = dim, member: object = member) -> Tensor:
                counted = x * _along(factors(member.index, member.channel, x.shape[dim]), x, dim)
                centered = isinstance(layer, nn.LayerNorm)
                mean = counted.mean(dim, keepdim=True) if centered else torch.zeros((), dtype=x.dtype)
                variance = (counted - mean).square().mean(dim, keepdim=True)
                eps = layer.variance_epsilon if isinstance(layer, OffsetRMSNorm) else layer.eps
                y = (x - mean) / (variance + eps).sqrt()
                if layer.weight is not None:
                    y = y * _along(layer.weight[None] + isinstance(layer, OffsetRMSNorm), x, dim)
                return y if getattr(layer, "bias", None) is None else y + _along(layer.bias[None], x, dim)

            layer.forward = normalized
    return model(x)


def _only(scores: fastscore.Scores, name: str) -> fastscore.Scores:
    """Scores of one group: what has none stays. (ignore= would keep the stream, which every layer touches.)"""
    return replace(scores, totals={name: scores.totals[name]})


def _v(z: Tensor) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stream_is_a_group(kind: str) -> None:
    _, _, _, channels, norms = KINDS[kind]
    model = _network(kind)
    with untouched(model):
        stream = _stream(kind, model)
    assert (stream.channels, int(stream.unit.max()) + 1) == (channels, channels)
    assert sum(1 for _ in stream.role("norm")) == norms


@pytest.mark.parametrize("kind", list(KINDS))
def test_scores_are_those_of_a_gate(kind: str) -> None:
    model, batch = _network(kind), KINDS[kind][1](3)
    stream = _stream(kind, model)
    gate = torch.ones(3, stream.channels, dtype=torch.float64, requires_grad=True)
    z = gated(model, stream, batch, gate)
    torch.testing.assert_close(z, model(batch))
    v = _v(z)
    (s,) = torch.autograd.grad((z * v).sum(), gate)

    def loss(output: Tensor, batch: object) -> Tensor:
        return (output * v).sum()

    with untouched(model):
        scores = fastscore.score(model, [batch], gradient="loss", normalize=False, loss=loss, progress=False)
    torch.testing.assert_close(scores[stream.name].double(), s.square().mean(0), rtol=1e-6, atol=1e-30)
    with torch.no_grad():  # and of the gate's definition, without autograd
        step = 1e-6 * torch.eye(stream.channels, dtype=torch.float64)
        ends = [((gated(model, stream, batch, (1 + sign * row).expand(3, -1)) * v).flatten(1).sum(1))
                for row in step for sign in (1, -1)]
    differences = (torch.stack(ends[::2], 1) - torch.stack(ends[1::2], 1)) / 2e-6
    torch.testing.assert_close(s, differences, rtol=1e-5, atol=1e-7)
    scorer = Scorer(model, batch, importance="taylor-abs", normalize=False)
    with scorer:
        loss(model(batch), batch).backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss(model(batch), batch).backward()
    assert all(torch.equal(own[name], p.grad) for name, p in model.named_parameters())  # to the bit
    torch.testing.assert_close(scorer.scores()[stream.name].double(), s.abs().mean(0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("kind", list(KINDS))
def test_smaller_is_masked(kind: str, tmp_path: Path) -> None:
    model, batch = _network(kind), KINDS[kind][1](3)
    stream = _stream(kind, model)
    scores = _only(fastscore.score(model, [batch], progress=False), stream.name)
    count = stream.channels
    with untouched(model):
        result = fastscore.prune(model, scores, batch, channels=1 - 3 / count, compensate=False)
        gone = result.removed[stream.name]
        assert len(gone) == 3
        gate = torch.ones(3, count, dtype=torch.float64)
        gate[:, gone] = 0
        with torch.no_grad():
            want, got = gated(model, stream, batch, gate), result.model(batch)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            assert not torch.allclose(model(batch), want)
            with fastscore.mask(model, scores, 3 / count, batch, compensate=False):
                torch.testing.assert_close(model(batch), want, rtol=1e-10, atol=1e-12)
    small = result.model
    assert sum(p.numel() for p in small.parameters()) == result.report.params[1]
    assert total_macs(small, batch) == result.report.macs[1]
    for unit in ("params", "macs"):
        before, after = getattr(result.report, unit)
        again = fastscore.prune(model, scores, batch, compensate=False, **{unit: after / before})
        assert {k: v.tolist() for k, v in again.removed.items()} == {k: v.tolist() for k, v in result.removed.items()}
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(small, (batch,)).module()(batch), got, rtol=0, atol=1e-12)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(_network(kind, seed=1), tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), got)
    if "tied" in kind:
        assert small.head.weight is small.embed.weight
        assert loaded.head.weight is loaded.embed.weight
    optimizer = fastscore.rebuild_optimizer(torch.optim.SGD(model.parameters(), 1e-3), model, result)
    first = small(batch).square().mean()
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    optimizer.step()
    assert small(batch).square().mean() < first
    scores = _only(fastscore.score(small, [batch], progress=False), stream.name)  # and once more
    again = fastscore.prune(small, scores, batch, channels=1 - 1 / (count - 3), compensate=False)
    stream, gate = _stream(kind, small), torch.ones(3, count - 3, dtype=torch.float64)
    norms = [again.model.get_submodule(member.layer) for member in stream.role("norm")]
    assert all(isinstance(norm, NarrowedNorm) and norm.lost == 4 * (norm.lost + norm.width) // count
               for norm in norms)


def test_a_repair_sees_the_stream_too() -> None:
    model = _network("LayerNorm before")
    batches = [torch.randint(0, WORDS, (8, TOKENS), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    scores = _only(fastscore.score(model, batches, progress=False), "embed")
    cut = fastscore.prune(model, scores, batches[0], channels=0.75, compensate=False)
    repaired = fastscore.prune(model, scores, batches[0], channels=0.75, calibration=batches)
    assert len(cut.removed["embed"]) == len(repaired.removed["embed"]) == 2
    with torch.no_grad():
        far, near = (sum(float((small(x) - model(x)).square().mean()) for x in batches)
                     for small in (cut.model, repaired.model))
    assert near < far


def test_too_many_readers_for_the_mean_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastscore.scoring.group_sums._MAX_PRODUCTS", 1000)
    model, batch = _network("LayerNorm before"), words(3)
    scores = fastscore.score(model, [batch], ablation="mean", progress=False)
    assert "embed" not in scores
    assert "too many" in scores.skipped["embed"]
    monkeypatch.undo()
    assert "embed" in fastscore.score(model, [batch], ablation="mean", progress=False)


LEFT_ALONE: dict[str, Callable[[int], nn.Module]] = {
    "over tokens too": lambda n: nn.LayerNorm((TOKENS, n)),
    "a group of them": lambda n: nn.GroupNorm(2, n),
}


class Row(nn.Module):
    def __init__(self, norm: nn.Module, channels_first: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, WIDTH), norm, nn.Linear(WIDTH, 3)
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x.mT).mT if self.channels_first else self.norm(x)
        return self.head(x.tanh()).mean(1)


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_what_computes_something_else_is_no_norm(name: str) -> None:
    norm = LEFT_ALONE[name](WIDTH)
    assert norm_of(norm) is None
    model = Row(norm, isinstance(norm, nn.GroupNorm)).double().eval()
    graph = trace(model, noise(TOKENS, 5)(2))
    if not isinstance(norm, nn.GroupNorm):  # whose groups of channels shrink alike
        assert not graph.groups
        assert "runs over all its channels" in graph.skipped["embed"] or "norm" in graph.skipped["embed"]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dim", [-1, -3])
def test_narrowed_norms_by_definition(centered: bool, dim: int) -> None:
    """Values and gradients of a norm of fewer channels are those of the dense one of zeros, in every dtype."""
    kind = {(True, -1): nn.LayerNorm, (True, -3): LayerNorm2d, (False, -1): nn.RMSNorm}.get((centered, dim))
    if kind is None:
        return
    shape = (2, 5, WIDTH) if dim == -1 else (2, WIDTH, 3, 4)
    gone = torch.tensor([1, 5, 6])
    stays = torch.tensor([0, 2, 3, 4, 7])
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        norm = kind(WIDTH, eps=1e-3).to(dtype)
        nn.init.normal_(norm.weight)
        small = copy.deepcopy(norm)
        channel_norms.narrow(small, gone)
        x = torch.randn(shape, dtype=dtype) + 1
        zeros, some = (each.requires_grad_() for each in (x.index_fill(dim, gone, 0), x.index_select(dim, stays)))
        want, got = norm(zeros).index_select(dim, stays), small(some)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=close, atol=close)
        g = torch.randn_like(got)
        wanted = torch.autograd.grad(want, (zeros, norm.weight), g)
        found = torch.autograd.grad(got, (some, small.weight), g)
        torch.testing.assert_close(found[0], wanted[0].index_select(dim, stays), rtol=close, atol=5 * close)
        torch.testing.assert_close(found[1], wanted[1][stays], rtol=close, atol=5 * close)


class AddingRMSNorm(nn.Module):
    """A norm that takes the stream beside the branch, and returns both, as those of inference kernels do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-3

    def forward(self, x: Tensor, stream: Tensor | None = None) -> Any:
        x = x if stream is None else x + stream
        y = self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return y if stream is None else (y, x)


class Adding(nn.Module):
    """A branch and such norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(5, WIDTH), AddingRMSNorm(WIDTH), AddingRMSNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, x = self.two(self.down(F.gelu(self.up(self.one(x)))), x)
        return self.head(y + x)


def test_a_norm_that_is_called_with_more_is_kept_and_the_rest_goes_on() -> None:
    graph = trace(Adding().eval(), torch.randn(3, TOKENS, 5))
    assert [group.name for group in graph.groups] == ["up"]
    assert {"embed", "down"} <= set(graph.skipped)
