"""Channel groups against the ones written down by hand, and what must not be taken for a group."""

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from computed_elsewhere import computed_elsewhere
from network_modules import Head
from networks import NETWORKS, REARRANGED, straight
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.following import dependencies
from fastscore.graph.groups import Ignore
from fastscore.graph.tracing import trace


@pytest.mark.parametrize("name", [*NETWORKS, *REARRANGED])
def test_groups_are_those_written_by_hand(name: str) -> None:
    network = (NETWORKS | REARRANGED)[name]
    model = network.model().train()
    with untouched(model):
        graph = trace(model, network.inputs())
    assert {group.name for group in graph.groups} == set(network.groups)
    assert network.skipped <= set(graph.skipped)
    for group in graph.groups:
        spec = network.groups[group.name]
        assert group.channels == spec.channels
        assert tuple(group.unit.tolist()) == (spec.units or tuple(range(spec.channels)))
        assert tuple(member.layer for member in group.role("producer")) == spec.producers
        edges = {member.layer: [member.index[member.channel == c].tolist() for c in range(group.channels)]
                 for member in group.role("consumer")}
        assert set(edges) == set(spec.edges)
        for layer, places in spec.edges.items():
            assert edges[layer] == [list(place) for place in places], layer


class Between(nn.Module):
    """Two convolutions with any function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 6, 3, padding=1)
        self.head, self.function = Head(6), function
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.function(x) if self.between is None else self.between(x)
        return self.head(F.relu(self.second(x)))


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "flip": (lambda x: x.flip(1), 8),
    "roll": (lambda x: x.roll(3, 1), 8),
    "softmax": (lambda x: x.softmax(1), 8),
    "normalize": (lambda x: F.normalize(x, dim=1), 8),
    "local response norm": (lambda x: F.local_response_norm(x, 3), 8),
    "layer norm": (lambda x: F.layer_norm(x, (8, 8, 8)), 8),
    "cumulative sum": (lambda x: x.cumsum(1), 8),
    "channel shuffle": (lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 8),
    "mean": (lambda x: x.mean(1, keepdim=True), 1),
    "maximum": (lambda x: x.amax(1, keepdim=True), 1),
    "cropped": (lambda x: F.pad(x, (0, 0, 0, 0, -2, 0)), 6),
    "index": (lambda x: x[:, torch.arange(7, -1, -1)], 8),
    "slice": (lambda x: x[:, 2:6], 4),
    "select": (lambda x: x[:, 1:2] * x[:, 5:6], 1),
    "split": (lambda x: torch.split(x, [3, 5], 1)[1], 5),
    "split into equal parts": (lambda x: torch.add(*x.split(4, 1)), 4),
    "einsum": (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.ones(8, 8) / 8), 8),
    "spatial attention": (lambda x: (x.flatten(2) @ torch.softmax(x.flatten(2).mT @ x.flatten(2), -1)
                                     ).unflatten(2, (8, 8)), 8),
}


@pytest.mark.parametrize("name", list(MIXING))
def test_channels_that_cannot_be_followed_are_left_alone(name: str) -> None:
    """The tracer takes most of these for elementwise; removing channels then would compute something else."""
    model = Between(*MIXING[name]).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    assert "first" in graph.skipped
    assert [group.name for group in graph.groups] == ["second"]
    with pytest.raises(KeyError, match="first has no score: "):
        fastscore.score(model, [x], progress=False)["first"]


FOLLOWED: dict[str, tuple[Callable[[Tensor], Tensor], list[list[int]]]] = {
    "spatial slice": (lambda x: x[:, :, 1:5], straight(8)),
    "permuted and back": (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), straight(8)),
    "upsampled": (lambda x: F.interpolate(x, scale_factor=2), straight(8)),
    "twice side by side": (lambda x: torch.cat([x, x], 1), [[c, c + 8] for c in range(8)]),
    "interleaved": (lambda x: torch.stack([x, x], 2).flatten(1, 2), [[2 * c, 2 * c + 1] for c in range(8)]),
    "apart and together": (lambda x: torch.stack(x.unbind(1), 1), straight(8)),
    "halves added": (lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1], straight(4) + [[]] * 4),
    "halves swapped": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), [[(c + 4) % 8] for c in range(8)]),
    "channels last and flat": (lambda x: x.movedim(1, -1).flatten(1, 2).mT.unflatten(2, (8, 8)), straight(8)),
    "squeezed and back": (lambda x: x.flatten(2).unsqueeze(1).squeeze(1).unflatten(2, (8, 8)), straight(8)),
    "side by side, last": (lambda x: torch.cat([x.movedim(1, -1), x.movedim(1, -1)], -1).movedim(-1, 1),
                           [[c, c + 8] for c in range(8)]),
    "where": (lambda x: torch.where(x > 0.1, x, 0.5 * x), straight(8)),
    "padded": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 0), value=3.0), straight(8, 2)),
    "padded in space": (lambda x: F.pad(x, (1, 1, 2, 0)), straight(8)),
    "pixels shuffled": (lambda x: F.pixel_shuffle(x, 2), [[0], [], [], [], [1], [], [], []]),
    "pixels unshuffled": (lambda x: F.pixel_unshuffle(x, 2), straight(8, width=4)),
    "gated by its other half": (lambda x: F.glu(x, 1), straight(4) + [[]] * 4),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1), [[c, c + 8] for c in range(8)]),
    "after what no layer made": (lambda x: torch.cat([torch.ones(len(x), 3, 8, 8), torch.zeros(len(x), 1, 8, 8), x], 1),
                                 straight(8, 4)),
    "multiplied": (nn.Conv2d(8, 24, 3, padding=1, groups=8), [[3 * c, 3 * c + 1, 3 * c + 2] for c in range(8)]),
    "added up in sets": (nn.Conv2d(8, 4, 3, padding=1, groups=4), [[c // 2] if c % 2 == 0 else [] for c in range(8)]),
    "times one number": (lambda x: x * torch.nn.Parameter(torch.tensor(0.5)), straight(8)),
    "times one number for all channels": (lambda x: x * torch.ones(1, 1, 8, 8, requires_grad=True), straight(8)),
}


@pytest.mark.parametrize("name", list(FOLLOWED))
def test_channels_are_followed_through(name: str) -> None:
    function, places = FOLLOWED[name]
    between = function if isinstance(function, nn.Module) else None
    model = Between(function, 1 + max(p for place in places for p in place), between).eval()
    (group,) = (group for group in trace(model, torch.randn(2, 3, 8, 8)).groups if group.name == "first")
    (edge,) = group.role("consumer")
    assert [edge.index[edge.channel == c].tolist() for c in range(8)] == places


LAYERS: dict[str, tuple[nn.Module, int, str]] = {
    "grouped transposed": (nn.ConvTranspose2d(8, 6, 3, padding=1, groups=2), 6, "grouped transposed"),
    "layer norm": (nn.LayerNorm([8, 8, 8]), 8, "LayerNorm"),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_that_cannot_lose_channels_are_named(name: str) -> None:
    layer, width, reason = LAYERS[name]
    graph = trace(Between(torch.relu, width, layer).eval(), torch.randn(2, 3, 8, 8))
    assert reason in graph.skipped["first"]


RUNS_OVER = {"mean": lambda x: x.mean(1, keepdim=True) * x, "maximum": lambda x: x.amax(1, keepdim=True) * x,
             "softmax": lambda x: x.softmax(1)}


@pytest.mark.parametrize("name", list(RUNS_OVER))
def test_an_operation_over_all_channels_is_named(name: str) -> None:
    graph = trace(Between(RUNS_OVER[name]).eval(), torch.randn(2, 3, 8, 8))
    assert graph.skipped["first"].startswith("an operation runs over all its channels (")


def test_layers_that_run_in_training_alone_are_followed_too() -> None:
    class Network(nn.Module):
        def __init__(self, aside: int) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(8)
            self.head, self.auxiliary, self.between = nn.Linear(6, 4), nn.Linear(aside, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.norm(self.one(x))
            logits = self.head(self.two(F.relu(x)).mean((2, 3)))
            return (logits, self.between(self.auxiliary(x.mean((2, 3))))) if self.training else logits

    x = torch.randn(1, 3, 8, 8)  # a single sample, which a BatchNorm in training mode would refuse after the mean
    model = Network(8)
    with untouched(model):
        graph = trace(model, x)
    (first, _) = graph.groups
    assert [member.layer for member in first.role("consumer")] == ["auxiliary", "two"]
    assert graph.skipped == {"auxiliary": "it is read by layers that run in training alone",
                             "head": "its channels are the model's output",
                             "between": "its channels are the model's output"}
    model = Network(7)  # an auxiliary head that does not fit
    with untouched(model):
        graph = trace(model, x)
    assert [group.name for group in graph.groups] == ["one", "two"]
    assert all("does not run on example_inputs" in graph.skipped[layer] for layer in ("auxiliary", "between"))


def test_every_layer_without_a_group_says_why() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.tied, self.normed, self.late = (nn.Linear(5, 5, bias=False) for _ in range(4))
            self.tied.weight = self.one.weight
            computed_elsewhere(self.normed)
            self.scale = nn.Parameter(torch.rand(5, 5))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.tied(torch.relu(self.one(x)))
            return self.head(self.late(self.normed(torch.relu(x))) @ self.scale)

    graph = trace(Network(), torch.randn(2, 5))
    assert [group.name for group in graph.groups] == ["scale", "late"]
    assert "shares its weight" in graph.skipped["one"]
    assert "computes its weight from more" in graph.skipped["normed"]
    assert graph.skipped["head"] == "its channels are the model's output"


def test_ignore() -> None:
    network = NETWORKS["residual"]
    model = network.model()
    graph = trace(model, network.inputs())

    def left(ignore: Ignore) -> set[str]:
        return {group.name for group in graph.without(model, ignore).groups}

    everything = set(network.groups)
    assert left(()) == everything
    assert left(["stem.0"]) == left("stem.0") == left(["stem"]) == everything - {"stem.0"}
    assert left(["block1.bn2"]) == everything - {"stem.0"}  # a layer between counts for its group
    # both blocks read the stem's group, and it stays with them
    assert left(["block2"]) == left("block2.*") == everything - {"stem.0", "block2.conv1", "block2.conv2"}
    assert left(["*.conv1"]) == everything - {"stem.0", "block1.conv1", "block2.conv1"}
    assert left([model.block1.conv1]) == left(model.block1.conv1) == everything - {"stem.0", "block1.conv1"}
    assert left([model.block2, "stem"]) == {"block1.conv1"}
    assert left(nn.Conv2d) == left([nn.Conv2d, nn.Linear]) == left([nn.BatchNorm2d]) == set()
    assert left([nn.Linear]) == everything - {"block2.conv2"}  # which it reads; it makes the output


@pytest.mark.parametrize(("entry", "near"), [("block1.conv3", "block1.conv"), ("blok1", "block1"), ("layer9.*", ""),
                                             (nn.LSTM, ""), (nn.Conv2d(3, 6, 3), "")])
def test_an_entry_of_ignore_that_matches_nothing_is_an_error(entry: object, near: str) -> None:
    network = NETWORKS["residual"]
    model = network.model()
    with pytest.raises(ValueError, match=f"^ignore: .* matches no layer.*{near}"):
        trace(model, network.inputs()).without(model, [entry])  # type: ignore[list-item]


def test_fingerprint_depends_on_the_channels_and_nothing_else() -> None:
    network = NETWORKS["flattening"]
    fingerprint = trace(network.model(0), network.inputs(2)).fingerprint
    assert trace(network.model(1).float(), network.inputs(5).float()).fingerprint == fingerprint
    wider = network.model()
    wider[4], wider[6] = nn.Linear(64, 7).double(), nn.Linear(7, 4).double()
    assert trace(wider, network.inputs()).fingerprint != fingerprint
    deeper = nn.Sequential(*list(network.model())[:-1], nn.Linear(6, 4), nn.Linear(4, 4)).double()
    assert trace(deeper, network.inputs()).fingerprint != fingerprint


def test_inputs_by_keyword_and_by_a_forward_of_ones_own() -> None:
    network = NETWORKS["residual"]
    model, x = network.model(), network.inputs()
    plain = trace(model, x).fingerprint
    assert trace(model, (x, torch.zeros(4))).fingerprint == plain
    assert trace(model, {"x": x}).fingerprint == plain
    assert trace(model, {"images": x}, lambda model, batch: model(batch["images"])).fingerprint == plain


def test_a_model_is_traced_once_until_something_of_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = 0

    class Counted(dependencies.Graph):
        def build(self, *args: Any, **kwargs: Any) -> None:
            nonlocal traces
            traces += 1
            super().build(*args, **kwargs)

    monkeypatch.setattr(dependencies, "Graph", Counted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(8, 4)
    scores = fastscore.score(model, [x], progress=False)
    with fastscore.mask(model, scores, 0.3, x), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # weights may go on
    fastscore.prune(model.train(), scores, x, channels=0.8)
    assert traces == 1

    def called(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    changes: list[Callable[[], object]] = [
        lambda: model.__setitem__(1, nn.Tanh()), lambda: setattr(model[3], "inplace", True),
        lambda: setattr(model[1], "forward", torch.sin), lambda: setattr(model[2], "bias", None),
        lambda: setattr(model, "widths", [1, 2]), lambda: model.widths.append(3),
        lambda: model[0].register_forward_hook(lambda *args: None), lambda: model.append(nn.ReLU()),
        lambda: fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.8, inplace=True)]
    for change in changes:
        change()
        before = traces
        assert trace(model, x).groups
        assert traces == before + 1
        trace(model, x)
        assert traces == before + 1
    for batch, forward in ((x.double(), None), ((x,), None), (x, called)):
        before = traces
        with contextlib.suppress(ValueError):  # the weights are single
            trace(model, batch, forward) if forward else trace(model, batch)
        assert traces == before + 1


def test_a_traced_model_can_be_forgotten() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    alive = weakref.ref(model)
    trace(model, torch.randn(2, 4), lambda model, batch, own=model: model(batch) * len([own]))  # type: ignore[misc]
    trace(model, torch.randn(2, 4))
    del model
    gc.collect()
    assert alive() is None
