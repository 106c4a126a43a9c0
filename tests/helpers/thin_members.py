"""A thin member of every family of classification models that torchvision has."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck


def vgg() -> nn.Module:
    """The features of a VGG, without the 120 million weights of its classifier."""
    features = tv.vgg.make_layers([8, "M", 12, 12, "M", 16], batch_norm=True)
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
    "efficientnet": (lambda: tv.EfficientNet([MBConvConfig(*row, 1.0, 1.0) for row in (
        (1, 3, 1, 32, 8, 1), (6, 3, 2, 8, 12, 2), (6, 5, 2, 12, 16, 2))], 0.0, num_classes=10), 32),
    "regnet": (lambda: tv.RegNet(BlockParams.from_init_params(5, 16, 8.0, 2.0, 8, se_ratio=0.25), num_classes=10), 32),
    "shufflenet": (partial(tv.ShuffleNetV2, [2, 2, 2], [8, 16, 24, 32, 48], num_classes=10), 32),
    "squeezenet": (partial(tv.squeezenet1_1, num_classes=10), 64),
    "googlenet": (partial(tv.GoogLeNet, 10, aux_logits=False, init_weights=False), 32),
    "convnext": (lambda: tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=10), 32),
    "vit": (partial(tv.VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=10), 32),
    "swin": (partial(tv.SwinTransformer, [4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=10), 32),
    "maxvit": (partial(tv.MaxVit, (32, 32), 8, 2, [8, 16], [1, 1], 8, 0.0, num_classes=10), 32),
}
# Tried in float32 by tests/fastpath/test_fusion.py; the others in float64 by tests/fastpath/test_engine_families.py
PACKED = ["resnet, bottlenecks", "densenet", "mobilenet v2", "efficientnet", "shufflenet", "googlenet", "convnext"]
