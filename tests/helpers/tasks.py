"""What benchmarks are given to measure: small networks with their inputs."""

import torch
from networks import NETWORKS
from torch import nn
from torchvision.models import VisionTransformer

from benchmarks.peers.task import Task


def task_of(name: str, samples: int = 4) -> Task:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(samples)
    return Task.of(model, x, torch.arange(samples) % model(x).shape[1])


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=32,
                              num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros as it comes
    return model


def wide(width: int = 32) -> Task:
    """A network with channels enough for a share of its MACs to be met."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
                          nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)).eval()
    return Task.of(model, torch.randn(6, 3, 12, 12), torch.arange(6) % 5)
