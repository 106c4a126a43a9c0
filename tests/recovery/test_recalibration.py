"""recalibrate(): BatchNorm statistics measured anew, against their definition."""

import copy
import math
from typing import Any

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore


def test_recalibration_is_the_plain_average_over_batches() -> None:
    """Of statistics that each BatchNorm has where those before it normalise by the batch's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 5, 3, bias=False),
                          nn.BatchNorm2d(5, momentum=0.3)).double()
    model[2].eval()
    batches = [torch.randn(n, 3, 7, 7, dtype=torch.float64) for n in (3, 4, 5)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    first, second = [], []
    with torch.no_grad():
        for batch in batches:
            y = model[0](batch)
            var, mean = torch.var_mean(y, (0, 2, 3))
            first.append((mean, var))
            scale = (y.var((0, 2, 3), unbiased=False) + model[1].eps).rsqrt()
            y = (y - mean[:, None, None]) * (scale * model[1].weight)[:, None, None] + model[1].bias[:, None, None]
            second.append(torch.var_mean(model[3](y), (0, 2, 3))[::-1])
    assert fastscore.recalibrate(model, batches) is model
    for norm, rows in ((model[1], first), (model[4], second)):
        torch.testing.assert_close(norm.running_mean, torch.stack([mean for mean, _ in rows]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([var for _, var in rows]).mean(0))
        assert int(norm.num_batches_tracked) == 3
    assert model[4].momentum == 0.3
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(("batches", "error", "words"), [
    ([], ValueError, "batches: there is none"),
    ([torch.full((4, 3), math.nan)], FloatingPointError, "1: NaN or infinity"),
    ([torch.randn(4, 3), torch.randn(1, 3)], ValueError, "more than 1 value per channel"),
    ([torch.randn(4, 2)], ValueError, r"^batches: .* 0 \(Linear\): .*shapes"),
    (torch.randn(4, 4, 3), TypeError, "batches: one tensor"),
])
def test_after_a_recalibration_that_fails_all_is_as_it_was(batches: Any, error: type[Exception], words: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(5, 3))
    with untouched(model), pytest.raises(error, match=words):
        fastscore.recalibrate(model, batches)


def test_without_batchnorms_there_is_nothing_to_recalibrate() -> None:
    with pytest.raises(ValueError, match="no BatchNorm"):
        fastscore.recalibrate(nn.Linear(3, 3), [torch.randn(4, 3)])


def test_recalibrate_takes_norms_that_were_told_to_keep_their_statistics() -> None:
    """Evaluation goes by what they keep, whatever track_running_stats was set to since."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other, batches = copy.deepcopy(one), [torch.randn(8, 3, 6, 6) for _ in range(3)]
    other[1].track_running_stats = False
    for model in (one, other):
        fastscore.recalibrate(model, batches)
    assert not other[1].track_running_stats
    assert torch.equal(one[1].running_var, other[1].running_var)
    assert not torch.equal(one[1].running_mean, torch.zeros(4))


class ByFunction(nn.Module):
    """One BatchNorm is called, the statistics of the other are read."""

    def __init__(self, as_told: bool) -> None:
        super().__init__()
        self.a, self.called, self.b, self.read = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.as_told = as_told

    def forward(self, x: Tensor) -> Tensor:
        read = self.read
        x = self.b(self.called(self.a(x)))
        return nn.functional.batch_norm(x, read.running_mean, read.running_var, read.weight, read.bias,
                                        self.as_told and read.training)


@pytest.mark.parametrize("as_told", [False, True])
def test_statistics_that_code_reads_itself_stay(as_told: bool) -> None:
    """Nothing measures them, and they were another's momentum's."""
    model, x = ByFunction(as_told).double().eval(), torch.randn(40, 3).double()
    model.read.running_mean.normal_()
    before = {name: tensor.clone() for name, tensor in model.read.state_dict().items()}
    fastscore.recalibrate(model, x.split(10))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.read.state_dict().items())
    means = torch.stack([part.mean(0) for part in model.a(x).detach().split(10)]).mean(0)
    torch.testing.assert_close(model.called.running_mean, means)
