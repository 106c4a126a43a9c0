"""Every torchvision classification family: the fast pass has the scores of hooks on the model as it is.

A thin member of each here. FASTSCORE_NIGHTLY=1 adds every model that torchvision lists, at its own width.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from networks import randomize
from torch import Tensor, nn
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastscore
from fastscore import Scorer, Scores

NIGHTLY = os.environ.get("FASTSCORE_NIGHTLY") == "1"


def vgg() -> nn.Module:
    """The features of a VGG, without the 120 million weights of its classifier."""
    features = torchvision.models.vgg.make_layers([8, "M", 12, 12, "M", 16], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(64, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 10))


THIN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # family -> (thin member, size of its images)
    "resnet": (partial(tv.ResNet, BasicBlock, [1, 1, 1, 1], num_classes=10), 32),
    "resnet, bottlenecks": (partial(tv.ResNet, Bottleneck, [1, 1, 1, 1], num_classes=10), 32),
    "resnext": (partial(tv.ResNet, Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8), 32),
    "wide resnet": (partial(tv.ResNet, Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=128), 32),
    "vgg": (vgg, 32),
    "densenet": (partial(tv.DenseNet, 4, (2, 3), 8, num_classes=10), 32),
    "mobilenet v2": (partial(tv.MobileNetV2, 10, 0.25), 32),
    "mobilenet v3": (partial(tv.mobilenet_v3_small, width_mult=0.25, num_classes=10), 32),
    "mnasnet": (partial(tv.MNASNet, 0.25, 10), 32),
    "efficientnet": (partial(tv.efficientnet_b0, num_classes=10), 32),
    "regnet": (lambda: tv.RegNet(BlockParams.from_init_params(5, 16, 8.0, 2.0, 8, se_ratio=0.25), num_classes=10), 32),
    "shufflenet": (partial(tv.ShuffleNetV2, [2, 2, 2], [8, 16, 24, 32, 48], num_classes=10), 32),
    "squeezenet": (partial(tv.squeezenet1_1, num_classes=10), 64),
    "googlenet": (partial(tv.GoogLeNet, 10, aux_logits=False, init_weights=False), 32),
    "convnext": (lambda: tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=10), 32),
    "vit": (partial(tv.VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=10), 32),
    "swin": (partial(tv.SwinTransformer, [4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=10), 32),
    "maxvit": (partial(tv.MaxVit, (32, 32), 8, 2, [8, 16], [1, 1], 8, 0.0, num_classes=10), 32),
}


def assert_fast_is_plain(model: nn.Module, x: Tensor) -> None:
    """1e-6 of each channel's score, and the order with it. In float64: in float32 they agree to 1e-4, but for a ReLU or
    a maximum that rounding tips over now and then."""
    model, x = model.double(), x.double()
    scorer = Scorer(model, x[:1], gradient="random")
    with scorer:
        scorer.probe(model(x))
    plain: Scores = scorer.scores()
    fast = fastscore.score(model, [x], progress=False)
    assert list(fast) == list(plain)
    for layer in plain:
        rounding = 1e-6 * plain[layer] + 1e-9 * plain[layer].max()
        assert bool(((fast[layer] - plain[layer]).abs() <= rounding).all()), layer
        order = plain[layer].argsort()
        assert bool((fast[layer][order].diff() >= -2 * rounding[order][1:]).all()), layer
    assert {tap.layer for tap in fast.plan.taps} == set(fast.means)


@pytest.mark.parametrize("family", list(THIN))
def test_the_fast_pass_of_a_thin_member_has_the_plain_scores(family: str) -> None:
    build, size = THIN[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomize(build()).eval()
        assert_fast_is_plain(model, torch.randn(4, 3, size, size))


if NIGHTLY:
    @pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
    def test_the_fast_pass_of_every_model_has_the_plain_scores(name: str) -> None:
        size = {"inception_v3": 96}.get(name, 224 if name.startswith(("vit", "maxvit")) else 64)
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torchvision.models.get_model(name, num_classes=10, **extra).eval()
            assert_fast_is_plain(model, torch.randn(2, 3, size, size))
