"""random_gradient beside torch.randn and its normalisation."""

import pytest
import torch

from fastscore import ops


@pytest.mark.parametrize("name", ["normal", "rademacher", "torch.randn"])
@pytest.mark.parametrize(("samples", "classes"), [(8, 10), (64, 1000), (256, 32000)])
def test_random_gradient(measure, samples, classes, name):
    ids = torch.arange(samples)

    def randn():
        x = torch.randn(samples, classes)
        return x / x.norm(dim=1, keepdim=True)

    def ours():
        return ops.random_gradient(ids, classes, seed=0, distribution=name)

    measure(f"random gradient, {samples}x{classes}", randn if name == "torch.randn" else ours, samples * classes * 4)
