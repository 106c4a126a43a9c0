"""Views of sizes that stand in a module's code, or that it keeps: `x.view(-1, 16 * 5 * 5)`, `x.view(-1, self.flat)`."""

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.modules import written_numbers

CHANNELS, SIDE = 6, 4
FLAT = 96


class Net(nn.Module):
    """Convolutions, and a classifier of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, CHANNELS, 3, padding=1)
        self.classifier = nn.Linear(CHANNELS * SIDE * SIDE, 4)
        self.flat, self.width = CHANNELS * SIDE * SIDE, CHANNELS

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).relu()


class Literal(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, 6 * 4 * 4))


class InATuple(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.reshape(self.features(x), (-1, 96)))


class InAMethod(Net):
    def flatten(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(x)))


class OfTheClassAbove(InAMethod):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(super().forward(x), Tensor)  # whose closure holds its class
        return super().forward(x)


class Kept(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, self.flat))


class PositionsFirst(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).permute(0, 2, 3, 1).reshape(-1, self.flat))


class Apart(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, self.width, 16).flatten(1))


class Product(Net):
    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return self.classifier(self.features(x).view(-1, h * w * self.width))


class ProductInTheCode(Net):
    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return self.classifier(self.features(x).view(-1, 6 * h * w))


class HalfOfAProduct(Net):
    """A number that counts both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.both = 2 * CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        c, (h, w) = self.both, x.shape[-2:]
        return self.classifier(self.features(x).reshape(len(x), c * h * w // 2))


class TwoOfEach(Net):
    """Two numbers of it, of which the code takes one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(2 * FLAT, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = torch.stack([y, y.tanh()], 1).view(len(x), 2 * self.width, 4, 4)
        return self.classifier(y.view(len(x), self.width * 32))


class Merged(Net):
    """Four neighbours side by side, as in Swin: the 4 counts these, and no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4 * CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).permute(0, 2, 3, 1)
        n, c = len(y), y.shape[-1]
        y = torch.cat([y[:, row::2, column::2] for row in range(2) for column in range(2)], -1)
        return self.classifier(y.view(n, -1, 4 * c)).mean(1)


class Global(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, FLAT))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier(self.features(x).view(-1, 96))
        return y if len(x) < 96 else 2 * y


class ByChance(Net):
    """Reads the sizes of its view off what it views; a number of its own, as large, says how many images it likes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = self.classifier(y.view(len(y), y.shape[1] * 16))
        return y if len(x) < self.flat else 2 * y


class InItsCodeByChance(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = self.classifier(y.view(len(y), y.shape[1] * 16))
        return y if len(x) < 96 else 2 * y


class ChannelsByChance(Net):
    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = self.features(x).shape
        y = self.classifier(self.features(x).view(n, channels, height * width).flatten(1))
        return y if n < self.width else 2 * y


class PlacesByChance(Net):
    """Twice as many as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.classifier = 12, nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)[..., :3]
        n, c = y.shape[:2]
        return self.classifier(y.reshape(n, c * self.places)) + self.classifier(y.reshape(-1, y.size(1) * self.places))


class HalvesByChance(Net):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(FLAT // 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        one, other = y.split(y.shape[1] // 2, 1)
        y = self.classifier((one * other).flatten(1))
        return y if len(x) < self.width else 2 * y


class ZerosByChance(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = self.classifier((y + torch.zeros(*y.shape, dtype=y.dtype)).flatten(1))
        return y if len(x) < self.width else 2 * y


class TwoAlike(Net):
    def __init__(self) -> None:
        super().__init__()
        self.most = self.flat

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 if len(x) < self.most else 2
        return scale * self.classifier(self.features(x).view(-1, self.flat))


IN_THE_CODE = (Literal, InATuple, InAMethod, OfTheClassAbove, ProductInTheCode)
WAYS = (*IN_THE_CODE, Kept, PositionsFirst, Apart, Product, HalfOfAProduct, TwoOfEach, Merged)


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_go(way: type[Net], tmp_path: Path) -> None:
    check(way, images(), ["first", "last"], tmp_path)


@pytest.mark.parametrize(("way", "said"), [(Global, "does not run with fewer channels"), (Twice, "(len(x) < 96)")])
def test_what_more_than_the_view_may_read_stays(way: type[Net], said: str) -> None:
    scores = fastscore.score(way().double().eval(), [images()], progress=False)
    assert set(scores) == {"first"}
    assert said in scores.skipped["last"]


@pytest.mark.parametrize("way", IN_THE_CODE)
def test_go_again_and_come_back_from_files(way: type[Net], tmp_path: Path) -> None:
    x, model = images(), noisy(way)
    small = model
    for macs in (0.7, 0.6):
        result = fastscore.prune(small, fastscore.score(small, [x], progress=False), x, macs=macs)
        small = result.model
    assert small.last.out_channels < CHANNELS
    assert isinstance(small, way)
    assert type(small).__name__ == way.__name__
    y = small(x)
    pickled = io.BytesIO()
    torch.save(small, pickled)
    pickled.seek(0)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, which is deprecated
        if way is not OfTheClassAbove:  # TorchScript knows no super()
            torch.testing.assert_close(torch.jit.script(small)(x), y, rtol=0, atol=0)
    for other in (copy.deepcopy(small), torch.load(pickled, weights_only=False),
                  fastscore.load_pruned(way().double().eval(), tmp_path / "small.safetensors")):
        torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    assert way().double()(x).shape == y.shape  # the class is what it was
    assert type(model) is way


@pytest.mark.parametrize("way", [ByChance, InItsCodeByChance, ChannelsByChance, PlacesByChance, HalvesByChance,
                                 ZerosByChance, TwoAlike])
def test_numbers_that_are_as_large_by_chance_stay(way: type[Net]) -> None:
    """What is left makes of few images, and of more than half as many, what it made beside zeros."""
    x, model = images(), noisy(way)
    scores = fastscore.score(model, [x], progress=False)
    options = {"scope": "layer", "compensate": False}
    small = fastscore.prune(model, scores, x, channels=0.5, **options).model
    assert small.last.out_channels < CHANNELS
    for times in (1, 20):
        many = x.repeat(times, 1, 1, 1)
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, **options):
            torch.testing.assert_close(small(many), model(many), rtol=1e-9, atol=1e-9)


def test_a_file_of_other_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Literal\.forward does not have the number 97"):
        written_numbers.take_off(Literal(), "forward#97", 1)
    with pytest.raises(ValueError, match=r"Kept\.flatten does not have the number 96"):
        written_numbers.take_off(Kept(), "flatten#96", 1)


class Points(nn.Module):
    """PointNet's: the greatest of each channel over all points, and a view of as many numbers as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.classifier = nn.Conv1d(3, 5, 1), nn.Conv1d(5, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max(self.last(self.first(x).tanh()), 2, keepdim=True)[0]
        return self.classifier(x.view(-1, 6))


class Square(Points):
    """A number is that of channels, and of positions beside them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.last(self.first(x).tanh()).reshape(-1, 6, 6).mean(2))


def test_as_many_as_there_are_channels(tmp_path: Path) -> None:
    x = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert check(Points, x, ["first", "last"], tmp_path).model.classifier.in_features == 3
    scores = fastscore.score(noisy(Square), [x[..., :6]], progress=False)
    assert set(scores) == {"first"}


class Windows(Points):
    """Longer clouds are averaged over windows, of as many points as there are channels; no example is one."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 9:
            x = x.view(len(x), 3, -1, 6).mean(2)
        x = torch.max(self.last(self.first(x).tanh()), 2, keepdim=True)[0]
        return self.classifier(x.view(-1, 6))


def test_numbers_of_views_that_no_example_runs_stay() -> None:
    scores = fastscore.score(noisy(Windows), [torch.randn(3, 3, 7).double()], progress=False)
    assert set(scores) == {"first"}
    assert "Windows.forward (x.view(len(x), 3, -1, 6))" in scores.skipped["last"]
