"""Layers that run, and that nothing is asked of: they read channels that go, and lose them too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace


class TwoHeads(nn.Module):
    """Returns what one of its heads makes, and keeps what the other does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.other, self.last = nn.Linear(8, 6), nn.Linear(6, 2)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).tanh())
        self.kept = self.last(self.other(x).relu()).detach()
        return self.head(x)


def test_a_head_that_is_not_asked_for(tmp_path: Path) -> None:
    """The channels that it reads go, by brute force; what it makes stays, with the reason, and it runs on."""
    small = check(TwoHeads, torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double(), ["embed"],
                  tmp_path).model
    assert small.other.in_features == small.head.in_features < 8
    assert (small.other.out_features, small.last.in_features) == (6, 6)
    assert small.kept.shape == (2, 2)


def test_an_output_that_a_forward_drops() -> None:
    """As a model does that returns features and logits, of which one is wanted."""
    class Both(TwoHeads):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(self.embed(x).tanh())
            return self.head(x), self.last(self.other(x).relu())

    def logits(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[0]

    model, x = noisy(Both), torch.randn(2, 5).double()
    graph = trace(model, x, logits)
    (group,) = graph.groups
    assert {member.layer for member in group.role("consumer", "reader")} == {"head", "other"}
    assert graph.skipped["other"] == graph.skipped["last"] == "the output does not depend on it"
    scores = fastscore.score(model, [x], forward=logits, progress=False)
    small = fastscore.prune(model, scores, x, channels=0.5, forward=logits).model
    assert [part.shape for part in small(x)] == [(2, 3), (2, 2)]


class _Detached(TwoHeads):
    """What the head makes that is not asked for comes to what is returned by way of detach(), late or early."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, self.first, self.third = early, nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.first(x).relu())
        if not self.early:
            return super().forward(x) + self.kept.sum(1, keepdim=True)
        x = self.norm(self.embed(x).tanh())
        return self.head(x * self.other(x).detach().mean(1, keepdim=True))


@pytest.mark.parametrize("early", [False, True])
def test_what_autograd_does_not_see_is_no_unread_layer(early: bool) -> None:
    """Nothing can be said of what channels do there: they are kept, with the reason, and others are scored."""
    model, x = noisy(lambda: _Detached(early)), torch.randn(2, 5).double()
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["first", "third"]
    assert scores.skipped["embed"] == "other reads its channels where no gradient comes back (detach(), a choice by " \
                                      "them, or an operation that has none, as those of quantized layers)"


class DeadNorm(TwoHeads):
    """The head that is not asked for begins with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        self.kept = self.last(self.other(self.inner(x)).relu()).detach()
        return self.head(self.norm(x))


def test_a_norm_that_nothing_comes_of(tmp_path: Path) -> None:
    """It is narrowed, and no edge."""
    small = check(DeadNorm, torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double(), ["embed"],
                  tmp_path).model
    assert small.inner.width == small.head.in_features < 8


class _Chosen(nn.Module):
    """Tokens that a layer chooses, whose output is nothing but a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.choice = nn.Linear(5, 7), nn.Linear(7, 1)
        self.next, self.last = nn.Linear(7, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden(x).relu()
        index = self.choice(y)[..., 0].topk(3, 1).indices
        return self.last(self.next(y.gather(1, index[..., None].expand(-1, -1, y.shape[-1]))).relu().mean(1))


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6])
def test_a_choice_reads_zero_where_channels_are_masked(fraction: float) -> None:
    torch.manual_seed(0)
    model, x = _Chosen().double().eval(), torch.randn(8, 6, 5, dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    small = fastscore.prune(model, scores, x, channels=1 - fraction, scope="layer", compensate=False).model
    with torch.no_grad(), fastscore.mask(model, scores, fraction, x, scope="layer", compensate=False):
        torch.testing.assert_close(small(x), model(x))


class _Gated(nn.Module):
    """A WaveNet in small: each block adds to the stream and to what is returned; nobody reads the last stream."""

    def __init__(self, in_place: bool, blocks: int = 2, width: int = 6) -> None:
        super().__init__()
        self.in_place, self.embed = in_place, nn.Conv1d(3, width, 1)
        self.gate = nn.ModuleList(nn.Conv1d(width, 8, 2, padding=1) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Conv1d(4, width, 1) for _ in range(blocks))
        self.skip = nn.ModuleList(nn.Conv1d(4, 5, 1) for _ in range(blocks))
        self.head = nn.Conv1d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.embed(x), []
        for gate, back, skip in zip(self.gate, self.back, self.skip, strict=True):
            values, weights = gate(x)[..., :-1].chunk(2, 1)
            y = values.tanh() * weights.sigmoid()
            skips.append(skip(y))
            added = back(y)
            if self.in_place:
                added += x
            x = added if self.in_place else x + added
        return self.head(sum(skips)).mean(2)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_stream_whose_last_sum_nobody_reads(in_place: bool, tmp_path: Path) -> None:
    """Of the layer that is added to it last, no number counts: it loses the stream's channels with the others."""
    x = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(1)).double()
    small = check(lambda: _Gated(in_place), x, ["embed", "gate.0", "gate.1", "skip.0"], tmp_path).model
    assert [layer.out_channels for layer in (small.embed, *small.back)] == [3, 3, 3]
    assert [layer.in_channels for layer in small.back] == [2, 2]
    (stream,) = (group for group in trace(_Gated(in_place), x.float()).groups if group.name == "embed")
    assert {member.layer for member in stream.role("producer")} == {"embed", "back.0", "back.1"}
    assert {edge.layer for edge in stream.edges} == {"gate.0", "gate.1"}


class Crossing(nn.Module):
    """Two streams that the same layers read and add to, as LXMERT's; of one, nothing is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.end = nn.Linear(5, 8), nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x.flip(-1))
        one, two = one + self.down(self.up(self.norm(two)).tanh()), two + self.down(self.up(self.norm(one)).tanh())
        self.kept = self.end(two).detach()
        return self.made(one)

    def made(self, one: Tensor) -> Tensor:
        return self.head(self.norm(one)).mean(1)


class Returned(Crossing):
    """And the other is returned."""

    def made(self, one: Tensor) -> Tensor:
        return one


def test_a_stream_of_which_nothing_is_read_at_the_end(tmp_path: Path) -> None:
    """It goes with the one that the same layers read, and what nobody reads is narrowed."""
    small = check(Crossing, torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).double(), ["one", "up"],
                  tmp_path).model
    assert small.two.out_features == small.end.width == small.head.in_features < 8


def test_layers_called_on_two_streams_are_no_products_of_activations() -> None:
    skipped = trace(noisy(Returned), torch.randn(2, 4, 5).double()).skipped
    assert {skipped[layer] for layer in ("one", "two", "down")} <= {
        "its channels are the model's output", "its channels go with those of one"}


class SharedAtTheEnd(nn.Module):
    """Two streams that one MLP works on in each block, as diffusers' CogView 4 has them; one is the output, so that
    nothing comes of the MLP's last call on the other, but where it is `late`: by way of detach()."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.embed, self.embed_other, self.head, self.late = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3), late
        self.norms, self.others = (nn.ModuleList(nn.LayerNorm(8) for _ in range(2)) for _ in range(2))
        self.mixes, self.ups, self.downs = (nn.ModuleList(nn.Linear(*widths) for _ in range(2))
                                            for widths in ((8, 8), (8, 6), (6, 8)))

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.embed_other(x.flip(-1)), self.embed(x)
        for norm, other, mix, up, down in zip(self.norms, self.others, self.mixes, self.ups, self.downs, strict=True):
            x, y = x + mix(y).tanh(), y + mix(x).tanh()
            x = x + down(up(norm(x)).relu())
            y = y + down(up(other(y)).relu())
        return self.head(x + y.detach() if self.late else x)


def test_a_call_that_nothing_comes_of_of_a_layer_that_has_others(tmp_path: Path) -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double()
    small = check(SharedAtTheEnd, x, ["embed", "ups.0", "ups.1"], tmp_path).model
    assert small.embed.out_features == small.head.in_features == small.others[1].width < 8


def test_a_call_that_shows_where_autograd_does_not_see_it_counts() -> None:
    graph = trace(noisy(lambda: SharedAtTheEnd(late=True)), torch.randn(2, 5).double())
    assert "embed" not in [group.name for group in graph.groups]
    assert "no gradient comes back" in graph.skipped["embed"]
