"""Asymmetric reconstruction, front to back: each layer makes what the dense one made, from what the smaller network
gives it to read.

A layer of the dense network reads x, the same layer of the smaller one reads x̂, which is x without the removed
channels and with whatever the layers before it lost. From the moments of both together,

    x ≈ M x̂ + c,   M = S + (C_xx̂ - S C_x̂x̂)(C_x̂x̂ + ridge·diag C_x̂x̂)⁻¹,   c = mu_x - M mu_x̂,

a ridge regression that falls back to the symmetric solution S where the samples say nothing. The ridge of every layer
is the one that errs least, in what the layer makes of it, on samples held out; an infinite one leaves S. A regression
shrinks, layer after layer, and what follows was trained on outputs that vary more: the layer's outputs are scaled to
vary as the dense one's do.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastscore.batches import Batch, Forward, valid_tokens
from fastscore.recovery.linear import InputEstimate, kept_channels, rewired, solve
from fastscore.recovery.moments import Moments, rows_of

RIDGES = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
GAINS = (0.5, 2.0)  # no output is scaled by less or more


class Joint:
    """What a layer of the dense network and the same layer of a smaller one read, taken together.

    index: int64 [G, P, C], as in Moments, of the dense layer. removed: int64, inputs that the smaller one has not; as
    many in every block (see `possible`).
    """

    @staticmethod
    def possible(index: Tensor, removed: Tensor) -> bool:
        """Whether every block keeps as many inputs, and any at all."""
        counts = kept_channels(index, removed).sum(1)
        return bool(counts.min() == counts.max()) and int(counts.min()) > 0

    def __init__(self, index: Tensor, removed: Tensor) -> None:
        self.kept = kept_channels(index, removed)
        gone = torch.zeros(index.numel(), dtype=torch.bool)
        gone[removed] = True
        ranks = (~gone).cumsum(0) - 1 + index.numel()
        small = torch.stack([ranks[block[:, keep]] for block, keep in zip(index, self.kept, strict=True)])
        self.index, self.width = index, index.shape[2]
        self.moments = Moments(torch.cat([index, small], 2))

    def add(self, dense: Tensor, small: Tensor) -> None:
        """Rows [n, inputs] of both layers, of the same samples and positions."""
        self.moments.add(torch.cat([dense, small.to(dense.dtype)], 1))

    def finish(self, process_group: distributed.ProcessGroup | None, device: torch.device) -> None:
        """After the last row: add up over processes."""
        if process_group is not None:
            self.moments.all_reduce(process_group, device)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(C_xx, C_xx̂, C_x̂x̂, mu_x, mu_x̂): [G, C, C], [G, C, K], [G, K, K], [G, P, C], [G, P, K]."""
        c, mean, width = self.moments.covariance, self.moments.mean, self.width
        return (c[:, :width, :width], c[:, :width, width:], c[:, width:, width:],
                mean[..., :width], mean[..., width:])


@dataclass(frozen=True)
class Rewired:
    """A layer's new weight, float64 and of the dense shape, and what its bias grows by, float64 [C_out], as the
    difference of what it makes of two constant inputs, float64 [inputs]: `gain` · (layer of `read`) less."""

    weight: Tensor
    gain: Tensor
    given: Tensor
    read: Tensor


def fit(joint: Joint, symmetric: InputEstimate, ridge: float) -> Tensor:
    """M, float64 [G, C, K]."""
    _, cross, gram, _, _ = joint.parts()
    start = torch.stack([mixing[:, keep] for mixing, keep in zip(symmetric.mixing, joint.kept, strict=True)])
    if ridge == math.inf:
        return start
    rest = cross - start @ gram
    return start + torch.stack([solve(g, r, ridge) for g, r in zip(gram, rest, strict=True)])


def error(layer: nn.Module, mixing: Tensor, fitted: Joint, held_out: Joint) -> float:
    """The mean squared error, over samples held out, of what the layer makes of M x̂ + c in place of x."""
    weights = _weights(layer, fitted.index).flatten(1, 2)
    xx, xy, yy, mean_x, mean_y = held_out.parts()
    _, _, _, known_x, known_y = fitted.parts()
    off = (mean_x - known_x) - (mean_y - known_y) @ mixing.transpose(1, 2)  # [G, P, C]
    covariance = xx - 2 * xy @ mixing.transpose(1, 2) + mixing @ yy @ mixing.transpose(1, 2)
    covariance = covariance + off.transpose(1, 2) @ off / off.shape[1]
    return float((weights.transpose(1, 2) @ weights * covariance).sum())


def rewire(layer: nn.Module, joint: Joint, mixing: Tensor) -> Rewired:
    """The layer, once it reads M x̂ + c in place of x and its outputs vary as the dense layer's do."""
    xx, _, yy, mean_x, mean_y = joint.parts()
    weights = _weights(layer, joint.index)
    dense, small = (torch.einsum("gokc,gcd,gokd->go", weights, covariance, weights).flatten()
                    for covariance in (xx, mixing @ yy @ mixing.transpose(1, 2)))
    gain = (dense / small.clamp(min=1e-300)).sqrt().nan_to_num(1.0).clamp(*GAINS)
    full = torch.zeros_like(xx)
    for block, keep in enumerate(joint.kept):
        full[block][:, keep] = mixing[block]
    given, read = (torch.zeros(joint.index.numel(), dtype=torch.float64) for _ in range(2))
    given[joint.index.flatten()] = mean_x.flatten()
    read[joint.index.flatten()] = (mean_y @ mixing.transpose(1, 2)).flatten()
    weight = rewired(layer, InputEstimate(joint.index, full, given))
    if getattr(layer, "transposed", False):
        scale = gain.reshape(len(full), 1, -1, *[1] * (weight.dim() - 2))
        weight = (weight.unflatten(0, (len(full), -1)) * scale).flatten(0, 1)
    else:
        weight = weight * gain.reshape(-1, *[1] * (weight.dim() - 1)).to(weight.device)
    return Rewired(weight, gain, given, read)


def _weights(layer: nn.Module, index: Tensor) -> Tensor:
    """float64 [G, out / G, kernel positions, C]; the places of a flattened channel count as kernel positions."""
    weight: Tensor = layer.weight.detach().double().cpu()  # type: ignore[operator]
    if isinstance(layer, nn.Linear):
        read: Tensor = weight[:, index[0]]
        return read[None]
    blocks: Tensor = weight.unflatten(0, (len(index), -1)).flatten(3)
    return blocks.permute(0, 2, 3, 1) if getattr(layer, "transposed", False) else blocks.permute(0, 1, 3, 2)


class Pair:
    """Runs the dense network and a smaller one on the same batches, up to the last of some layers.

    calls: how often each layer is called in one forward.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, forward: Forward, calls: Mapping[str, int]) -> None:
        self._models, self._forward, self._calls = (dense, small), forward, calls

    def measure(self, batches: Iterable[Batch], joints: Mapping[str, Joint]) -> None:
        """Take in what the layers of `joints` read."""
        for batch in batches:
            dense, small = (self._read(model, batch, list(joints)) for model in self._models)
            for name, joint in joints.items():
                for a, b in zip(dense[name], small[name], strict=True):
                    joint.add(a, b)

    def _read(self, model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, list[Tensor]]:
        rows: dict[str, list[Tensor]] = defaultdict(list)
        left = sum(self._calls[name] for name in names)
        valid = valid_tokens(batch)

        def hook(name: str) -> Any:
            def read(layer: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal left
                rows[name].append(rows_of(layer, args[0], valid))
                left -= 1
                if not left:
                    raise _Enough

            return read

        with ExitStack() as hooks:
            for name in names:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name)))
            with suppress(_Enough):
                self._forward(model, batch)
        return rows


class _Enough(Exception):
    """All that is wanted of a forward pass is there."""
