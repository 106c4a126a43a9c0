"""Linear reconstruction: what removed channels gave to a layer, as far as the channels that stay can say it.

With K kept and R removed inputs of a layer, mean mu and covariance C of them all,

    x_R ≈ B x_K + b,   B = C_RK (C_KK + ridge·diag C_KK)⁻¹,   b = mu_R - B mu_K,

so that W_K grows by W_R B at every position of the kernel, and the bias by what the layer makes of the constant b (see
fastscore.recovery.compensation). An infinite ridge leaves b = mu_R: mean compensation.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.devices import with_float64
from fastscore.recovery.moments import Moments

NOISE = 1e-6  # of the largest eigenvalue: about what float32 products carry, below which a direction is not known


@dataclass(frozen=True)
class InputEstimate:
    """All inputs of a layer as a function of those that stay: x ≈ mixing·x + constant.

    index: int64 [G, P, C], as in Moments. mixing: float64 [G, C, C]; columns of removed inputs are zero.
    constant: float64 [inputs].
    """

    index: Tensor
    mixing: Tensor
    constant: Tensor


def estimate_inputs(moments: Moments, removed: Tensor, ridge: float) -> InputEstimate:
    """What replaces the inputs at positions `removed` (int64) best, by ridge regression on the others of their block.

    ridge: >= 0, a share of each kept channel's own variance; math.inf for the mean alone. Channels that vary no more
    than rounding does say nothing and are replaced by their mean; of directions in which the samples say nothing, too
    few as they may be, the shortest solution is taken.
    """
    kept = kept_channels(moments.index, removed)
    covariance = moments.covariance
    mixing = torch.diag_embed(kept.double())
    if ridge != math.inf:
        for block, (c, keep) in enumerate(zip(covariance, kept, strict=True)):
            if keep.any() and not keep.all():
                mixing[block][(~keep)[:, None] & keep] = solve(c[keep][:, keep], c[~keep][:, keep], ridge).flatten()
    constant = torch.zeros(moments.index.numel(), dtype=torch.float64)
    rest = moments.mean - moments.mean @ mixing.transpose(1, 2)
    constant[moments.index.flatten()] = torch.where(kept[:, None], 0.0, rest).flatten()
    return InputEstimate(moments.index, mixing, constant)


def kept_channels(index: Tensor, removed: Tensor) -> Tensor:
    """bool [G, C]: which inputs stay. Raises ValueError where only some of a flattened channel's places go."""
    gone = torch.zeros(index.numel(), dtype=torch.bool)
    gone[removed] = True
    at = gone[index]
    if not torch.equal(at, at[:, :1].expand_as(at)):
        raise ValueError("only some places of a flattened channel are removed")
    return ~at[:, 0]


def rewired(layer: nn.Module, x: InputEstimate) -> Tensor:
    """The layer's weight, float64 and of the shape it has, once it reads mixing·x in place of x."""
    weight: Any = with_float64(layer.weight.detach()).double()  # type: ignore[operator]
    index, mixing = x.index.to(weight.device), x.mixing.to(weight.device)
    if isinstance(layer, nn.Linear):
        new = torch.empty_like(weight)
        new[:, index[0].flatten()] = (weight[:, index[0]] @ mixing[0]).flatten(1)
        return new
    read = weight.unflatten(0, (len(index), -1))
    if getattr(layer, "transposed", False):  # [G, C, out / G, ...]
        return torch.einsum("gr...,grk->gk...", read, mixing).flatten(0, 1)
    return torch.einsum("gor...,grk->gok...", read, mixing).flatten(0, 1)  # [G, out / G, C, ...]


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """float64 [.., O, K]: `cross` [.., O, K] times the inverse of `gram` [.., K, K] + ridge·its diagonal, for grams
    that may be singular; those of all blocks at once, of which a depthwise layer has as many as channels."""
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    varies = scale > 1e-7 * scale.amax(-1, keepdim=True)
    inverse = torch.where(varies, 1 / scale.clamp(min=1e-150), 0.0)
    correlation, cross = gram * inverse[..., None] * inverse[..., None, :], cross * inverse[..., None, :]
    if ridge > NOISE * gram.shape[-1]:  # then it is positive definite
        factor = torch.linalg.cholesky(correlation + torch.diag_embed(ridge + (~varies).double()))
        solution: Tensor = torch.cholesky_solve(cross.mT, factor).mT
        return solution * inverse[..., None, :]
    values, vectors = torch.linalg.eigh(correlation)
    usable = values > NOISE * values[..., -1:].clamp(min=1e-150)
    weights = torch.where(usable, 1 / (values + ridge).clamp(min=1e-150), 0.0)
    found: Tensor = (cross @ vectors * weights[..., None, :]) @ vectors.mT
    return found * inverse[..., None, :]
