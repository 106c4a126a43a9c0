"""Whole data sets as tensors, through torchvision's own loaders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Images:
    """images: float32 [N, C, H, W], each channel with mean 0 and standard deviation 1 over the training set.
    labels: int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """A training and a test set of the same kind of image."""

    name: str
    train: Images
    test: Images
    classes: int


def jpeg_cifar(root: str, part: str, download: bool = False) -> Any:
    """CIFAR-10 as JPEG files, in root/cifar10-jpeg/PART/CLASS/*.jpg: .data uint8 [N, 32, 32, 3], .targets [N].

    Decoded once, then kept beside that folder. Raises FileNotFoundError where there is none; `download` gets none.
    """
    kept = Path(root) / f"cifar10-jpeg-{part}.pt"
    if not kept.exists():
        files = torchvision.datasets.ImageFolder(str(Path(root) / "cifar10-jpeg" / part))
        pixels = [torchvision.io.decode_image(path) for path, _ in tqdm(files.samples, unit=" images")]
        torch.save({"images": torch.stack(pixels), "labels": torch.tensor(files.targets)}, kept)
    found = torch.load(kept, weights_only=True)
    return SimpleNamespace(data=found["images"].permute(0, 2, 3, 1), targets=found["labels"])


LOADERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    # name -> (training set, test set, classes), as functions of (root, download=)
    "cifar100": (lambda root, **how: torchvision.datasets.CIFAR100(root, train=True, **how),
                 lambda root, **how: torchvision.datasets.CIFAR100(root, train=False, **how), 100),
    "cifar10-jpeg": (lambda root, **how: jpeg_cifar(root, "train", **how),
                     lambda root, **how: jpeg_cifar(root, "test", **how), 10),
    "stl10": (lambda root, **how: torchvision.datasets.STL10(root, split="train", **how),
              lambda root, **how: torchvision.datasets.STL10(root, split="test", **how), 10),
    "fashion-mnist": (lambda root, **how: torchvision.datasets.FashionMNIST(root, train=True, **how),
                      lambda root, **how: torchvision.datasets.FashionMNIST(root, train=False, **how), 10),
}


def load(name: str, root: str, download: bool = False, device: str = "cpu") -> DataSet:
    """The data set `name` from the folder `root`, on `device`. Raises RuntimeError where its files are not there."""
    train_set, test_set, classes = LOADERS[name]
    train, test = (_arrays(make(root, download=download)) for make in (train_set, test_set))
    over = (0, 2, 3)
    scale = train[0].std(over, keepdim=True)
    shift = train[0].mean(over, keepdim=True)
    sets = [Images(((images - shift) / scale).to(device), labels.to(device)) for images, labels in (train, test)]
    return DataSet(name, *sets, classes)


def _arrays(data: Any) -> tuple[Tensor, Tensor]:
    """(images [N, C, H, W] in [0, 1], labels [N])"""
    pixels = torch.as_tensor(np.asarray(data.data))
    labels = torch.as_tensor(np.asarray(data.labels if hasattr(data, "labels") else data.targets)).long()
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.float() / 255, labels
