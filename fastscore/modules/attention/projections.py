"""The projections that nn.MultiheadAttention holds itself, as layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.attention.multihead_attention import PROJECTIONS, projections
from fastscore.modules.weights.parameter_layers import Kinds, ParameterLinear

_FUSED, _BIAS = PROJECTIONS[0], "in_proj_bias"


class ProjectionLinear(ParameterLinear):
    """A projection of queries, keys and values, or of one of them."""

    def forward(self, x: Tensor, part: int | None = None) -> Tensor:
        """[N, L, inputs] -> [N, L, outputs], by rows in the order [L, N], as PyTorch multiplies them: to the bit.

        part: of queries, keys and values alone (0, 1, 2); the outputs of the others are zeros.
        """
        x = x.transpose(0, 1)
        made: Tensor = F.linear(x, self.weight, self.bias) if part is None else \
            PartOfProjection.apply(x, self.weight, self.bias, part)
        return made.transpose(0, 1)


class PartOfProjection(torch.autograd.Function):
    """One node of autograd, as wide as the whole projection: whoever follows channels sees one layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, part: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        width = len(weight) // 3
        ctx.rows = slice(part * width, (part + 1) * width)
        made = F.linear(x, weight[ctx.rows], None if bias is None else bias[ctx.rows])
        out = made.new_zeros(*made.shape[:-1], len(weight))
        out[..., ctx.rows] = made
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = g[..., ctx.rows]
        to_x, to_weight, to_bias = None, None, None
        if ctx.needs_input_grad[0]:
            to_x = (g @ weight[ctx.rows].to(g.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight)
            to_weight[ctx.rows] = (g.flatten(0, -2).t() @ x.flatten(0, -2).to(g.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = g.new_zeros(len(weight), dtype=weight.dtype)
            to_bias[ctx.rows] = g.flatten(0, -2).sum(0).to(weight.dtype)
        return to_x, to_weight, to_bias, None


def kinds(module: nn.Module) -> Kinds | None:
    """What becomes of a module's parameters; None of all but nn.MultiheadAttention, and what stands for it."""
    held = projections(module)
    return Kinds(held, ProjectionLinear, biases={_FUSED: _BIAS}) if held else None
