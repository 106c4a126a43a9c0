"""What a layer made of a sample is made of it once while samples are told apart; and is what it would be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastscore.graph.routing import Decisions
from fastscore.graph.trials import known_samples
from fastscore.graph.trials.known_samples import KnownSamples
from fastscore.graph.trials.row_gradients import rows_alone
from fastscore.modules.weights.experts import ExpertLinear


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that compute next to nothing are not run again, either."""
    for floor in ("_LEAST", "_EACH"):
        monkeypatch.setattr(known_samples, floor, 0)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Routed(nn.Module):
    """An expert for each row, by its first number."""

    def __init__(self) -> None:
        super().__init__()
        held = nn.Module()
        held.weight = nn.Parameter(rows(3, 5, 4))
        self.experts = ExpertLinear(held, "weight")
        self.after = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return self.after(self.experts(flat, (flat[:, 0] > 0).long()).view(*x.shape[:2], 5))


LAYERS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (lambda: nn.Linear(4, 5), rows(3, 4)), (lambda: nn.Linear(4, 5, bias=False), rows(3, 6, 4)),
    (lambda: nn.Conv2d(4, 5, 3, 2, 1), rows(3, 4, 6, 5)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), rows(3, 4, 6, 5).to(memory_format=torch.channels_last)),
    (lambda: nn.ConvTranspose1d(4, 5, 3), rows(3, 4, 6)), (Routed, rows(3, 6, 4))]


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize(("build", "x"), LAYERS)
def test_samples_that_were_read_give_what_they_gave(build: Callable[[], nn.Module], x: Tensor) -> None:
    model = nn.Sequential(build()).eval()
    others = torch.cat([x[2:], 2 * x[:1]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expected = model(others)
        whole = counter.get_total_flops()
        known = KnownSamples(model)
        with known.used(3):
            made = model(x)
        with known.used(1):
            before = counter.get_total_flops()
            assert torch.equal(model(x[1:2]), made[1:2])
            assert counter.get_total_flops() == before
        with known.used(2):
            of_others = model(others)
            assert counter.get_total_flops() - before == whole // 2
    assert torch.equal(of_others[:1], made[2:])
    assert torch.allclose(of_others, expected, atol=1e-6)
    assert of_others.stride() == expected.stride()
    with known.run(2), rows_alone(model, known=known):
        y = model(others.requires_grad_())
    assert torch.allclose(y, of_others, atol=1e-6)
    assert torch.autograd.grad(y[0].sum(), others)[0][1].count_nonzero() == 0


class Writes(nn.Module):
    """Its code writes to what its part holds, in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.mul_(2)
        return self.layer(x)


def twice(model: nn.Module, x: Tensor, written: Callable[..., Any] = lambda model, x, y: None) -> tuple[Tensor, Tensor]:
    """The second of two runs, after something was written; and what it would be."""
    known = KnownSamples(model)
    with torch.no_grad():
        for _ in range(2):
            with known.used(len(x)):
                made = model(x)
            written(model, x, made)
        with known.used(len(x)):
            return model(x), torch.nn.functional.linear(x, *model.state_dict().values())


@pytest.mark.parametrize(("layer", "shape", "cost"), [
    (nn.Linear(800, 800), (2, 14, 800), 1), (nn.Linear(800, 800), (2, 13, 800), 2),
    (nn.Conv2d(64, 800, 3), (2, 64, 20, 20), 1), (nn.Conv2d(64, 800, 1), (2, 64, 40, 40), 2)])
def test_what_is_soon_done_is_done_again(layer: nn.Module, shape: tuple[int, ...], cost: int) -> None:
    model, x = nn.Sequential(layer), rows(*shape)
    known = KnownSamples(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with known.used(2):
            model(x)
        once = counter.get_total_flops()
        with known.used(2):
            model(x)
    assert counter.get_total_flops() == cost * once


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("written", [
    lambda model, x, y: model.weight.add_(1), lambda model, x, y: y.add_(1), lambda model, x, y: x.add_(1),
    lambda model, x, y: setattr(model, "weight", nn.Parameter(model.weight + 1))])
def test_what_is_written_to_is_made_anew(written: Callable[..., Any]) -> None:
    class Outer(nn.Linear):
        forward = nn.Linear.forward

    model = Outer(4, 5)
    made, expected = twice(nn.Sequential(model), rows(3, 4), lambda outer, x, y: written(model, x, y))
    assert torch.equal(made, expected)


@pytest.mark.usefixtures("small_layers")
def test_a_weight_that_code_writes_to_unseen_is_another() -> None:
    made, expected = twice(Writes(), rows(3, 4))
    assert torch.equal(made, expected)


@pytest.mark.usefixtures("small_layers")
def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_samples, "_KEPT", 50)  # of one sample
    model, x = nn.Sequential(nn.Linear(4, 5)), rows(3, 4)
    known = KnownSamples(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for cost in (3, 2):
            before = counter.get_total_flops()
            with known.used(3):
                model(x)
            assert counter.get_total_flops() - before == cost * 40


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.where(y > 0, y, -y)


@pytest.mark.usefixtures("small_layers")
def test_what_is_decided_by_what_layers_gave_before_is_seen() -> None:
    model, x = Decides(), rows(3, 4)
    known = KnownSamples(model)
    for _ in range(2):
        with torch.no_grad(), known.used(3), Decisions(x) as noted:
            model(x)
        assert noted.found
