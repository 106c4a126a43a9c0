"""Scores of a loop whose BatchNorms normalise by the batch: what comes to a sample from the others is not taken for its
own, however little the loss still asks of it."""

import pytest
import torch
from torch import Tensor, nn

from fastscore import Scorer


def network(training: bool) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3),
                              nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(5, 4))
    return model.double().train(training)


def drawn(size: float) -> tuple[Tensor, Tensor]:
    """Images and output gradients, that of the first image `size` times as long."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    v[0] *= size
    return x, v


def scored(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    scorer = Scorer(model, x[:2])
    with scorer:
        model(x).backward(v)
    return scorer.scores()["0"].double()  # rounded to float32


@pytest.mark.parametrize("scale", [1.0, 1e6])  # of a loss
@pytest.mark.parametrize("size", [3.0, 1.0, 1e-2, 1e-8, 1e-100])
def test_no_sample_counts_for_more_than_its_share(size: float, scale: float) -> None:
    """By gates on what the second convolution reads, through autograd; divided by the length of a sample's output
    gradient, or by the root mean square of all, whichever is more."""
    x, v = drawn(size)
    model = network(training=True)
    gates = torch.ones(8, 6, dtype=torch.float64, requires_grad=True)
    z = model[3:](model[:3](x) * gates[:, :, None, None])
    (s,) = torch.autograd.grad((z * v).sum(), gates)
    lengths = v.square().sum(1).sqrt()
    expected = (s / lengths.clamp(min=float(lengths.square().mean().sqrt()))[:, None]).square().mean(0)
    torch.testing.assert_close(scored(network(training=True), x, scale * v), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-2, 1e-8])
def test_where_samples_do_not_meet_each_has_the_length_of_its_own(size: float) -> None:
    """In evaluation mode."""
    torch.testing.assert_close(scored(network(False), *drawn(size)), scored(network(False), *drawn(1.0)), rtol=1e-6,
                               atol=0)
