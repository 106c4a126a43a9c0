"""Asymmetric reconstruction, front to back: each layer makes what the dense one made, from what the smaller network
gives it.

With x̂ what a layer of the smaller network reads (all kernel positions of it) and t what it should make,

    t ≈ W x̂ + b,   W = S + (C_tx̂ - S C_x̂x̂)(C_x̂x̂ + ridge·diag C_x̂x̂)⁻¹,   b = mu_t - W mu_x̂,

a ridge regression that falls back to the weights S of the symmetric solution where the samples say nothing. The ridge
of every layer is the one that errs least on samples held out, or a multiple of it, where what each layer has fitted too
closely adds up; an infinite one leaves S. A layer that has
no bias, and has lost nothing that one makes good, gets none: moments are taken about 0 then. t is the dense layer's
output; where the layer ends a branch beside a shortcut, t makes good what the shortcut has lost as well, so that errors
do not add up from block to block. A regression shrinks, layer after layer, and what follows was trained on outputs that
vary more: outputs are scaled to vary as the dense layer's do, what makes a loss good apart.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from fastscore.batches.devices import wide
from fastscore.recovery.linear import solve

RIDGES = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
GAINS = (0.5, 2.0)  # no output is scaled by less or more
WIDEST = 2048  # inputs of an output, kernel positions and all, above which a layer keeps its weights


@dataclass
class Joint:
    """Second moments of what a layer reads, x [n, G, K], and what it should make, t [n, G, O], centred; added up batch
    by batch as in Moments."""

    count: int = 0
    x: Tensor = field(default_factory=lambda: torch.zeros(()))
    t: Tensor = field(default_factory=lambda: torch.zeros(()))
    xx: Tensor = field(default_factory=lambda: torch.zeros(()))
    tx: Tensor = field(default_factory=lambda: torch.zeros(()))
    tt: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def empty(cls, blocks: int, inputs: int, outputs: int) -> "Joint":
        """Of no row."""
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(blocks, *shape, dtype=torch.float64)

        return cls(0, zeros(inputs), zeros(outputs), zeros(inputs, inputs), zeros(outputs, inputs), zeros(outputs))

    def add(self, x: Tensor, t: Tensor) -> None:
        """Take rows in."""
        count = len(x)
        if not count:
            return
        x, t = wide(x), wide(t)
        mean_x, mean_t = x.mean(0), t.mean(0)
        x, t = (x - mean_x).transpose(0, 1), (t - mean_t).transpose(0, 1)
        total = self.count + count
        share = self.count * count / total
        dx, dt = mean_x.cpu().double() - self.x, mean_t.cpu().double() - self.t
        self.xx += (x.transpose(1, 2) @ x).cpu().double() + share * dx[:, :, None] * dx[:, None]
        self.tx += (t.transpose(1, 2) @ x).cpu().double() + share * dt[:, :, None] * dx[:, None]
        self.tt += t.square().sum(1).cpu().double() + share * dt.square()
        self.x += dx * (count / total)
        self.t += dt * (count / total)
        self.count = total

    def outputs(self, some: slice) -> "Joint":
        """Of some of the outputs of each block."""
        return Joint(self.count, self.x, self.t[:, some], self.xx, self.tx[:, some], self.tt[:, some])

    def about_zero(self) -> "Joint":
        """The same moments, not centred: a fit to them has a bias of 0."""
        x, t = self.x, self.t
        return Joint(self.count, torch.zeros_like(x), torch.zeros_like(t),
                     self.xx + self.count * x[:, :, None] * x[:, None],
                     self.tx + self.count * t[:, :, None] * x[:, None], self.tt + self.count * t.square())

    def all_reduce(self, process_group: distributed.ProcessGroup, device: torch.device) -> None:
        """Add up over processes, so that every one has the moments of all."""
        counts = torch.tensor([float(self.count)], dtype=torch.float64, device=device)
        distributed.all_reduce(counts, group=process_group)
        total = float(counts)
        if not total:
            return
        x, t = ((mean * (self.count / total)).to(device) for mean in (self.x, self.t))
        for mean in (x, t):
            distributed.all_reduce(mean, group=process_group)
        dx, dt = self.x - x.cpu(), self.t - t.cpu()
        sums = [(self.xx + self.count * dx[:, :, None] * dx[:, None]).to(device),
                (self.tx + self.count * dt[:, :, None] * dx[:, None]).to(device),
                (self.tt + self.count * dt.square()).to(device)]
        for value in sums:
            distributed.all_reduce(value, group=process_group)
        self.xx, self.tx, self.tt = (value.cpu() for value in sums)
        self.count, self.x, self.t = int(total), x.cpu(), t.cpu()


def fit(joint: Joint, start: Tensor, ridge: float) -> Tensor:
    """W, float64 [G, O, K]; `start` is S."""
    if ridge == math.inf or not joint.count:
        return start
    gram, cross = joint.xx / joint.count, joint.tx / joint.count
    return start + solve(gram, cross - start @ gram, ridge)


def error(weight: Tensor, fitted: Joint, held_out: Joint) -> float:
    """The mean over samples held out of the squared error of W x̂ + b, summed over outputs, with b from the fit."""
    n = max(held_out.count, 1)
    off = (held_out.t - fitted.t) - _apply(weight, held_out.x - fitted.x)
    variance = (held_out.tt - 2 * (held_out.tx * weight).sum(2) + ((weight @ held_out.xx) * weight).sum(2)) / n
    return float((variance + off.square()).sum())


def rescaled(weight: Tensor, joint: Joint) -> Tensor:
    """W, once W x̂ varies as t does."""
    made = ((weight @ joint.xx) * weight).sum(2)
    return weight * (joint.tt / made.clamp(min=1e-300)).sqrt().nan_to_num(1.0).clamp(*GAINS)[:, :, None]


def bias(weight: Tensor, joint: Joint) -> Tensor:
    """b, float64 [G·O]: W x̂ + b has the mean of t."""
    return (joint.t - _apply(weight, joint.x)).flatten()


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("gok,gk->go", weight, x)
