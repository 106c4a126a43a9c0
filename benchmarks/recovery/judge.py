"""How good a smaller network is: top-1, agreement with the dense network, KL divergence from it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Verdict:
    """top1: share of labels met. agreement: share of images named as by the dense network. kl: nats, mean over images
    of KL(dense ‖ smaller)."""

    top1: float
    agreement: float
    kl: float


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor, batch: int = 20) -> Tensor:
    """float64 [N, K]: of the softmax of `model`, which is put into evaluation mode."""
    model.eval()
    batch = batch if images.shape[-1] > 64 else 10 * batch  # what stays in the processor's caches
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)).double().log_softmax(1)
                      for part in images.split(batch)])


def verdict(dense: Tensor, smaller: Tensor, labels: Tensor) -> Verdict:
    """Log-probabilities [N, K] of both networks and the labels [N] -> what they say of the smaller one."""
    named = smaller.argmax(1)
    # a class that the smaller network rules out entirely would make a mean infinite
    kl = (dense.exp() * (dense - smaller.clamp(min=-1e4))).sum(1).mean()
    top1, agreement = ((named == names).double().mean() for names in (labels, dense.argmax(1)))
    return Verdict(float(top1), float(agreement), float(kl))
