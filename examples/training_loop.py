"""The drop-in: five lines (marked +) in an ordinary training script. Its gradients stay bit for bit what they were.

    python examples/training_loop.py --epochs 4 --out scores.safetensors
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastscore  # +
from fastscore.cli import digits  # real images and a small ResNet


def train_one_epoch(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                    loader: DataLoader) -> float:
    """As public training scripts have it; nothing here knows of fastscore."""
    model.train()
    total = 0.0
    for image, target in loader:
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(image)
    return total / len(loader.dataset)


def main(epochs: int = 4, out: str = "scores.safetensors", score: bool = True) -> nn.Module:
    """Returns the trained network."""
    torch.manual_seed(0)
    data = digits.Digits.split(0)
    loader = DataLoader(TensorDataset(*data.train), batch_size=64, shuffle=True, drop_last=True)
    model = digits.network()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    scorer = fastscore.Scorer(model, data.train[0][:2])                               # +
    for epoch in range(epochs):
        if score and epoch == epochs - 1:  # scores of a network that is nearly trained
            scorer.attach()                                                           # +
        loss = train_one_epoch(model, criterion, optimizer, loader)
        scheduler.step()
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {digits.accuracy(model, *data.test):.1%}")
    if score:
        scorer.detach()                                                               # +
        scorer.scores().save(out)                                                     # +
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--out", default="scores.safetensors", help="default: %(default)s")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.out)
    print(f"wrote {arguments.out}; to look at it: fastscore report {arguments.out}")
