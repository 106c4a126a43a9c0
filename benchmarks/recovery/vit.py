"""A small vision transformer without BatchNorm, trained on Fashion-MNIST.

    python -m benchmarks.recovery.vit --data DATA

Writes DATA/vit-fashion-mnist.pt and prints its test accuracy.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from benchmarks.paper import data as paper_data
from benchmarks.paper.data import Images
from benchmarks.paper.training import accuracy, augment, save

FILE = "vit-fashion-mnist.pt"


def new(**options: int) -> nn.Module:
    """16 patches of 7x7 pixels, 4 blocks of width 96 with 4 heads; untrained."""
    import timm

    settings = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 4,
                "num_heads": 4, "mlp_ratio": 4, **options}
    model: nn.Module = timm.models.VisionTransformer(**settings)
    return model


def train(model: nn.Module, data: Images, epochs: int, batch: int = 128, rate: float = 2e-3,
          seed: int = 0) -> nn.Module:
    """AdamW, one cycle of the learning rate, crops and flips; in evaluation mode after."""
    steps = epochs * (len(data.labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(data.labels), generator=draw) for _ in range(epochs)])
    model.train()
    for index in tqdm(order.split(batch)[:steps], unit=" steps", mininterval=10):
        optimizer.zero_grad()
        F.cross_entropy(model(augment(data.images[index], draw)), data.labels[index]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.vit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    sets = paper_data.load("fashion-mnist", str(options.data))
    torch.manual_seed(0)
    model = train(new(), sets.train, options.epochs)
    save(model.state_dict(), options.data / FILE)
    print(f"ViT: {100 * accuracy(model, sets.test):.1f} % of the 10,000 test images")


if __name__ == "__main__":
    main()
