"""Training the networks that are to be pruned: SGD, one cycle of the learning rate, crops and flips."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper.data import DataSet, Images
from benchmarks.paper.networks import NETWORKS

PADDING = 4  # of the random crops, in pixels, for images of 32; in proportion for others


def trained(network: str, data: DataSet, seed: int, epochs: int, folder: Path, batch: int = 128,
            learning_rate: float = 0.1) -> nn.Module:
    """`network` trained on `data`, in evaluation mode; from `folder` where it is there, or goes on where it stopped."""
    device = data.train.images.device
    torch.manual_seed(seed)
    model = NETWORKS[network](data.train.images.shape[1], data.classes).to(device, memory_format=torch.channels_last)
    steps = len(data.train.images) // batch
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    path = folder / f"{data.name}-{network}-{seed}-{epochs}epochs.pt"
    state = {"epoch": 0}
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        if state["epoch"] < epochs:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
    for epoch in range(state["epoch"], epochs):
        draw = torch.Generator().manual_seed(1000 * seed + epoch)
        model.train()
        order = torch.randperm(len(data.train.images), generator=draw)
        for i in tqdm(range(steps), desc=f"{network} on {data.name}, seed {seed}, epoch {epoch + 1}/{epochs}",
                      unit=" steps", mininterval=5):
            index = order[i * batch:(i + 1) * batch].to(device)
            images = augment(data.train.images[index], draw).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train.labels[index]).backward()
            optimizer.step()
            schedule.step()
        rest = {} if epoch + 1 == epochs else {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        save({"epoch": epoch + 1, "model": model.state_dict(), **rest}, path)
    return model.eval()


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images [N, C, H, W], each at random moved by up to an eighth of its width, and mirrored."""
    samples, _, height, width = images.shape
    reach = max(1, PADDING * width // 32)
    padded = F.pad(images, (reach,) * 4)
    rows, columns = (torch.randint(0, 2 * reach + 1, (samples, 1), generator=draw) + torch.arange(size)
                     for size in (height, width))
    mirrored = torch.rand(samples, 1, generator=draw) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(samples)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[tuple(index.to(images.device) for index in
                                             (sample, rows[:, :, None], columns[:, None, :]))]
    return moved.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = 500) -> float:
    """The share of `images` that `model` names right."""
    right = sum(int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
                for x, y in zip(images.images.split(batch), images.labels.split(batch), strict=True))
    return right / len(images.labels)


def save(state: object, path: Path) -> None:
    """torch.save, all or nothing: an interruption leaves the former file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
