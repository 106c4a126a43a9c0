"""Commands on photographs, and networks for them."""



NETS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def number():
    return 3

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        features = self.net(x)
        return self.head(features.mean((2, 3))), features

def two():
    return Two()

network = build()

def half():
    return grey().half()

def wide(width):
    return nn.Linear(3, width)

def broken():
    raise ValueError("this is the user's own")
"""
MODEL = ("nets.py:build", "--checkpoint", "net.safetensors", "--size", "48")
SCORE = ("score", *MODEL)
PRUNE = ("prune", *MODEL, "--out", "small.pt2")
