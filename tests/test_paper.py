"""The paper's protocol: fast evaluation against forward hooks on the network as it was trained; curves read back."""

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from networks import randomize
from torch import Tensor, nn

import fastscore
from benchmarks.paper import evaluation, results
from benchmarks.paper.data import Images
from benchmarks.paper.networks import NETWORKS

SIZES = {"resnet20": (1, 28), "vgg6": (1, 28), "resnet18": (3, 64), "vgg19": (3, 32)}  # channels, width and height


def trained_like(name: str) -> tuple[nn.Module, Images]:
    """A network with weights and statistics far from their defaults, and 62 images, two for each point."""
    channels, size = SIZES[name]
    torch.manual_seed(0)
    model = randomize(NETWORKS[name](channels, 10)).eval()
    return model, Images(torch.randn(62, channels, size, size), torch.randint(10, (62,)))


def hooked(model: nn.Module, removed: Mapping[str, Tensor], means: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the untouched model computes with outputs of its BatchNorms set to zero or to their means, in float64."""
    def setting(name: str):  # noqa: ANN202
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output.clone()
            for channel in removed[name].tolist():
                output[:, channel] = means[name][channel] if means else 0
            return output
        return hook

    handles = [model.get_submodule(name).register_forward_hook(setting(name)) for name in removed]
    with torch.no_grad():
        output = model.double()(x.double())
    model.float()
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("name", list(SIZES))
def test_masked_gates_are_what_hooks_on_the_batchnorms_make(name: str, compensate: bool) -> None:
    model, images = trained_like(name)
    x = images.images[:4]
    scores = fastscore.score(model, [x], units="norms", progress=False)
    evaluator = evaluation.Evaluator(model, images, "norms")
    draw = torch.Generator().manual_seed(1)
    removed = {group.name: torch.randperm(group.channels, generator=draw)[:group.channels // 4].sort().values
               for group in evaluator.groups}
    exact = hooked(model, removed, scores.means if compensate else {}, x)
    with torch.no_grad():
        fast = evaluator.without(removed, scores, compensate)(x)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    assert (hooked(model, {}, {}, x) - exact).abs().max() > 0.01 * exact.abs().max()


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("name", list(SIZES))
def test_removed_channels_are_what_the_mask_makes(name: str, compensate: bool) -> None:
    model, images = trained_like(name)
    x = images.images[:4]
    scores = fastscore.score(model, [x], importance="taylor-abs", progress=False)
    evaluator = evaluation.Evaluator(model, images, "groups")
    with torch.no_grad(), fastscore.mask(model, scores, 0.3, x, compensate=compensate) as removed:
        exact = model(x)
    with torch.no_grad():
        fast = evaluator.without(removed, scores, compensate)(x)
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
