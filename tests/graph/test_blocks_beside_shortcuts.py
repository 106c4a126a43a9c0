"""Residual branches that change size and channels: they go, and the shortcut beside them stays."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from residual_networks import Beside, of_images
from thinned import NIGHTLY
from torch import nn
from torchvision.models import regnet, resnet
from torchvision.models.video import resnet as videos
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

import fastscore
from fastscore.pruning.budgets.costs import total_macs


def _down(width: int, out: int, stride: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def _images(strided: int) -> nn.Module:
    """torchvision's, timm's whose shortcut pools first, one whose shortcut is larger than the branch, which is then
    none, and one that holds its branch as a whole; strided: of the first."""
    pool = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(12, 16, 1))
    large = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1))
    return of_images(resnet.BasicBlock(8, 12, strided, _down(8, 12, strided)),
                   timm.models.resnet.Bottleneck(12, 4, 2, pool, attn_layer=timm.layers.SEModule),
                   resnet.BasicBlock(16, 16, 2, large), Beside(16, 16, 2), width=16)


def _within() -> nn.Module:
    """Whose strides are within modules of the branch, or of a module that blurs."""
    blur = timm.models.resnet.BasicBlock(16, 20, 2, _down(16, 20), aa_layer=timm.layers.BlurPool2d)
    return of_images(regnet.ResBottleneckBlock(8, 12, 2, nn.BatchNorm2d, nn.ReLU, 4, 1.0, 0.25),
                   ResNetBottleNeckLayer(12, 16, stride=2), blur, width=20)


def _videos() -> nn.Module:
    down = nn.Sequential(nn.Conv3d(8, 12, 1, 2, bias=False), nn.BatchNorm3d(12))
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(),
                         videos.BasicBlock(8, 12, videos.Conv3DSimple, 2, down), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                         nn.Linear(12, 3))


CASES = {"first": (lambda: _images(1), ["3", "4", "6.body"], "3.downsample"),
         "strided": (lambda: _images(2), ["3", "4", "6.body"], "3.downsample"),
         "within": (_within, ["3.f", "4.layer", "5"], "3.proj")}
if NIGHTLY:
    CASES["videos"] = _videos, ["2"], "2.downsample"


@pytest.mark.parametrize("name", CASES)
def test_where_a_shortcut_changes_the_shape_the_branch_goes_and_it_stays(name: str, tmp_path: Path) -> None:
    """Zeros are of as many channels as it makes, also once these go, at once or later, and of images of any size."""
    make, branches, shortcut = CASES[name]

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().double().eval()
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    def images(samples: int, size: int, seed: int) -> torch.Tensor:
        shape = (size, size) if name != "videos" else (4, size, size)
        return torch.randn(samples, 3, *shape, generator=torch.Generator().manual_seed(seed)).double()

    model, x = build(), images(3, 16, 1)
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    found = [name for name in scores if len(scores[name]) == 1]
    assert found == branches
    first = replace(scores, totals={name: (scores.totals[name] + 1e-9) * (name not in found)  # which go first
                                    for name in scores})
    left = 0.4 if name == "within" else 0.7  # so that all branches go, and more
    result = fastscore.prune(model, first, x, channels=left, cost_aware=False, compensate=False, progress=False)
    assert set(found) <= set(result.removed)
    assert not {name for name, side in result.removed_indices if side == "block" and "down" in name}
    assert sum(p.numel() for p in result.model.parameters()) == result.report.params[1]
    assert total_macs(result.model, x) == result.report.macs[1]
    again = fastscore.score(result.model, [x], units="blocks", progress=False)
    twice = fastscore.prune(result.model, again, x, channels=0.7, compensate=False, progress=False)
    assert any(member.startswith(shortcut) for member, _ in twice.removed_indices)
    share = 1 - result.report.channels[1] / result.report.channels[0]
    for size in (16, 17, 23):
        y = images(2, size, 2)
        with torch.no_grad():
            with fastscore.mask(model, first, share, x, compensate=False) as masked:
                assert {name: index.tolist() for name, index in masked.items()} == {
                    name: index.tolist() for name, index in result.removed.items()}
                torch.testing.assert_close(result.model(y), model(y), rtol=1e-10, atol=1e-12)
            with fastscore.mask(result.model, again, 0.3, x, compensate=False):
                torch.testing.assert_close(twice.model(y), result.model(y), rtol=1e-10, atol=1e-12)
    fastscore.save_pruned(twice, tmp_path / "twice.safetensors")
    loaded = fastscore.load_pruned(build(), tmp_path / "twice.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), twice.model(x))
        exported = torch.export.export(twice.model, (x,)).module()
        torch.testing.assert_close(exported(x), twice.model(x))
