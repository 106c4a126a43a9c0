"""Layers of a class of their own that keep something beside their weight, entry by entry: it is cut with the weight."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.cutting import beside_weights
from fastscore.graph.tracing import trace


class Masked(nn.Conv2d):
    """Of PixelCNN: what comes after a pixel is not read. The mask is put on the weight in place."""

    def __init__(self, kind: str, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))
        _, _, height, width = self.weight.shape
        self.mask[:, :, height // 2, width // 2 + (kind == "B"):] = 0
        self.mask[:, :, height // 2 + 1:] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class MaskedAnew(Masked):
    """And here in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedLinear(nn.Linear):
    """Of MADE: some inputs reach some outputs."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("mask", after[:, None] >= before[None])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class Step(nn.Module):
    """Of a quantiser: one for each filter."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.full((filters, 1, 1, 1), 0.01))

    def forward(self, weight: Tensor) -> Tensor:
        rounded = (weight / self.step).clamp(-8, 7)
        return ((rounded.round() - rounded).detach() + rounded) * self.step


class Quantised(nn.Conv2d):
    """By such steps."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.quantiser = Step(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.quantiser(self.weight), self.bias)


def _x(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()


def _pixels(kind: type[Masked]) -> nn.Module:
    return nn.Sequential(kind("A", 1, 8, 5, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                         kind("B", 8, 6, 3, padding=1, groups=2), nn.ReLU(), kind("B", 6, 5, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(5, 4, 1))


def test_masked_convolutions(tmp_path: Path) -> None:
    """By brute force, from data to a file; in groups too."""
    small = check(lambda: _pixels(MaskedAnew), _x(1, 6, 6), ["0", "3", "5"], tmp_path).model
    assert {i: (type(small[i]), small[i].mask.shape) for i in (0, 3, 5)} == {
        i: (MaskedAnew, small[i].weight.shape) for i in (0, 3, 5)}


def test_masks_that_are_put_on_in_place() -> None:
    """The weight that is written to is the copy's, where the model has not run yet."""
    model, same, x = noisy(lambda: _pixels(Masked)), noisy(lambda: _pixels(MaskedAnew)), _x(1, 6, 6)
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        result = fastscore.prune(model, scores, x, channels=0.5, compensate=False)
    assert (model[0].weight[:, :, -1] != 0).all()
    expected = fastscore.score(same, [x], progress=False)
    assert list(scores) == ["0", "3", "5"]
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name])
    other = fastscore.prune(same, expected, x, channels=0.5, compensate=False).model
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), other(x))


def test_masked_linears(tmp_path: Path) -> None:
    """Of booleans."""
    order = [torch.arange(5), torch.arange(8) % 4, torch.arange(6) % 4]

    def build() -> nn.Module:
        first, second = MaskedLinear(order[0], order[1]), MaskedLinear(order[1], order[2])
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), MaskedLinear(order[2], order[0]))

    small = check(build, _x(5), ["0", "2"], tmp_path).model
    assert [small[i].mask.dtype for i in (0, 2, 4)] == [torch.bool] * 3


def test_what_is_one_for_each_filter() -> None:
    """In a module of the layer's own; and the steps stay those of the filters."""
    model, x = noisy(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Quantised(6, 8, 3), nn.ReLU(),
                                           nn.Conv2d(8, 2, 1))), _x(3, 8, 8)
    with torch.no_grad():
        model[2].quantiser.step.abs_()
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["0", "2"]
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False)
    stays = torch.ones(8, dtype=torch.bool).index_fill(0, result.removed["2"], False)
    assert torch.equal(result.model[2].quantiser.step, model[2].quantiser.step[stays])
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, scope="layer", compensate=False):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_quantiser_in_a_layer_is_no_other_reader_of_its_weight() -> None:
    """What goes is not said to stay, and what stays, the model's output, has its own reason."""
    graph = trace(nn.Sequential(Quantised(3, 8, 1), nn.ReLU(), Quantised(8, 2, 1)), _x(3, 4, 4).float())
    assert [group.name for group in graph.groups] == ["0"]
    assert graph.skipped == {
        "2": "its channels are the model's output",
        "2.quantiser": "the code of Step computes what it multiplies by from its step [2, 1, 1, 1], in each pass"}


class Scaled(nn.Linear):
    """One factor of all weights and one of what is read, as a quantiser has, of any shape that holds one number."""

    def __init__(self, inputs: int, outputs: int, shape: tuple[int, ...]) -> None:
        super().__init__(inputs, outputs)
        self.step, self.gain = nn.Parameter(torch.full(shape, 0.5)), nn.Parameter(torch.full(shape, 1.5))
        self.register_parameter("none", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.gain, self.weight * self.step, self.bias)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_has_no_channels(shape: tuple[int, ...], tmp_path: Path) -> None:
    small = check(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Scaled(8, 6, shape), nn.ReLU(),
                                        Scaled(6, 2, shape)), _x(5), ["0", "2"], tmp_path).model
    assert small[2].step.shape == small[2].gain.shape == shape


def test_what_is_found() -> None:
    """Nothing of PyTorch's own layers, and no layer that another one holds."""
    layer = Quantised(3, 4, 3)
    layer.inner = nn.Conv2d(3, 4, 3)
    layer.register_buffer("other", torch.ones(5))
    assert [name for _, name, _ in beside_weights.own(layer)] == ["step"]
    plain = nn.Conv2d(3, 4, 3)
    plain.register_buffer("mask", torch.ones_like(plain.weight))
    assert not list(beside_weights.own(plain))
