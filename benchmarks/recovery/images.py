"""Images as tensors: JPEG CIFAR-10, one ImageNet image of each class, Fashion-MNIST.

A data folder holds `cifar10-jpeg/{train,test}/CLASS/*.jpg`, `imagenet/*.jpg` (1,000 files, whose sorted names are the
class numbers) and `FashionMNIST/raw`, each where it is used.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor

from benchmarks.paper.data import Images, jpeg_cifar

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite: (x - 127) / 128


def cifar(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """JPEG CIFAR-10, "train" or "test": (uint8 [N, 3, 32, 32], int64 [N]). Raises FileNotFoundError without it."""
    found = jpeg_cifar(str(folder), part)
    return found.data.permute(0, 3, 1, 2), found.targets


def normalized(pixels: Tensor, mean: tuple[float, ...] = IMAGENET[0], std: tuple[float, ...] = IMAGENET[1]) -> Tensor:
    """uint8 [N, C, H, W] -> float32, as a network takes them."""
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (pixels.float() / 255 - shift) / scale


def imagenet(folder: Path, size: int = 224) -> tuple[Tensor, Tensor]:
    """The middle of each of the 1,000 images: (uint8 [1000, 3, size, size], int64 [1000]).

    Raises FileNotFoundError where they are not there.
    """
    paths = sorted((folder / "imagenet").glob("*.jpg"))
    if len(paths) != 1000:
        raise FileNotFoundError(f"{folder / 'imagenet'}: {len(paths)} of 1,000 images, one to a class")
    found = []
    for path in paths:
        pixels = torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB)
        found.append(torchvision.transforms.functional.center_crop(pixels, [size, size]))
    return torch.stack(found), torch.arange(1000)


def split(images: Images, seed: int, calibrate: int, judge: int | None = None) -> tuple[Images, Images]:
    """A draw: `calibrate` images to calibrate with, and of the others all, or `judge`, to judge by."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    ends = None if judge is None else calibrate + judge
    first, rest = order[:calibrate], order[calibrate:ends]
    return Images(images.images[first], images.labels[first]), Images(images.images[rest], images.labels[rest])
