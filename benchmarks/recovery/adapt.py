"""Adapt a CIFAR-10 ResNet to JPEG CIFAR-10: a short fine-tune of somebody else's weights.

    python -m benchmarks.recovery.adapt --data DATA --depth 20
    python -m benchmarks.recovery.adapt --data DATA --depth 56 --images 15000

Reads DATA/resnet-cifar10/*.th, writes DATA/networks/cifar10-jpeg-resnetDEPTH-padded-0-1epochs.pt, where
`python -m benchmarks.paper` looks for it too, and prints the accuracy before and after on the first 4,000 of the
shuffled test images.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from benchmarks.paper.data import Images
from benchmarks.paper.training import accuracy, augment, save
from benchmarks.recovery import images, resnet


def adapt(model: nn.Module, data: Images, steps: int, batch: int, rate: float, seed: int = 0) -> nn.Module:
    """SGD with crops and flips, the learning rate falling from `rate` to 0 along a cosine; in evaluation mode after."""
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(data.labels), generator=draw)
                       for _ in range(-(-steps * batch // len(data.labels)))])
    for index in tqdm(order[:steps * batch].split(batch), unit=" steps", mininterval=10):
        x = augment(data.images[index], draw).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(x), data.labels[index]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.adapt", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depth", type=int, choices=list(resnet.FILES), required=True)
    parser.add_argument("--images", type=int, default=50000, help="how many of the training images to see")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.01)
    options = parser.parse_args()

    model = resnet.load(options.data / "resnet-cifar10" / resnet.FILES[options.depth], options.depth)
    pixels, labels = images.cifar(options.data, "test")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:4000]
    test = Images(images.normalized(pixels[chosen]), labels[chosen])
    before = accuracy(model, test)
    pixels, labels = images.cifar(options.data, "train")
    train = Images(images.normalized(pixels), labels)
    model = adapt(model, train, options.images // options.batch, options.batch, options.rate)
    save({"epoch": 1, "model": model.state_dict()}, options.data / resnet.ADAPTED.format(options.depth))
    print(f"ResNet-{options.depth}: {100 * before:.1f} % of 4,000 test images before, "
          f"{100 * accuracy(model, test):.1f} % after {options.images:,} training images")


if __name__ == "__main__":
    main()
