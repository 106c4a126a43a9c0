"""Normalisations that a module's code runs by functions, with parameters and buffers of its own, lose channels as
layers do."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore


class _Net(nn.Module):
    """Of two convolutions, and what `normalized` does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
        self.gain, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.register_buffer("mean", 0.1 * torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def normalized(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.normalized(self.first(x)).relu()).relu().mean((2, 3)))


class _Batch(_Net):
    def normalized(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gain, self.shift, self.training)


class _Statistics(_Net):
    def normalized(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, eps=1e-3)


class _Instance(_Net):
    def normalized(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.gain, bias=self.shift)


class _InstanceStatistics(_Net):
    def normalized(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, self.mean, self.var, self.gain, self.shift, use_input_stats=self.training)


class _Torchs(_Net):
    def normalized(self, x: Tensor) -> Tensor:
        y = torch.batch_norm(x, self.gain, self.shift, self.mean, self.var, False, 0.1, 1e-5, False)
        return torch.instance_norm(y, self.shift, None, None, None, True, 0.1, 1e-2, False)


class _OfLayer(_Net):
    """By the parameters of an InstanceNorm, which is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(8, affine=True)

    def normalized(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.norm.weight, bias=self.norm.bias)


class _Norm(nn.Module):
    """A normalisation of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.offset, self.training)


class _InModule(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = _Norm()

    def normalized(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize("kind", [_Batch, _Statistics, _Instance, _InstanceStatistics, _Torchs, _OfLayer, _InModule])
def test_its_tensors_go_with_the_channels(kind: type[_Net], tmp_path: Path) -> None:
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    check(kind, x, ["first", "second"], tmp_path)
    small = fastscore.prune(noisy(kind), fastscore.score(noisy(kind), [x], progress=False), x, channels=0.5,
                            scope="layer").model
    names = {"mean", "var", "gain", "shift"} & {*kind.normalized.__code__.co_names}
    assert {getattr(small, name).numel() for name in names} <= {4}
    small.train()(x).sum().backward()  # in which statistics are updated


def test_statistics_of_a_batch_tie_its_samples_and_are_left_to_run_as_they_are() -> None:
    class Always(_Net):
        def normalized(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, self.gain, self.shift, True)

    torch.manual_seed(0)
    model, x = noisy(Always), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False)
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, scope="layer", compensate=False):
        torch.testing.assert_close(result.model(x), model(x))
