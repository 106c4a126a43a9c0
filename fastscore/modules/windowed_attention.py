"""Attention modules of torchvision whose code takes heads x head width for the embedding's: what they compute,
from the same attributes, with any number of heads and with projections
that run as layers (see multihead_attention.py)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShiftedWindowAttention(nn.Module):
    """torchvision's Swin attention: windows of tokens, shifted, with a bias for each head and relative position."""

    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C]."""
        height, width = x.shape[1:3]
        size = self.window_size
        x = F.pad(x, (0, 0, 0, -width % size[1], 0, -height % size[0]))
        shape = x.shape[1:3]
        shift = [0 if side >= whole else by for side, whole, by in zip(size, shape, self.shift_size, strict=True)]
        x = _windows(x.roll([-by for by in shift], (1, 2)), size)
        qkv = F.linear(x, self.qkv.weight, self._bias()).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # [N, windows, heads, L, D] each
        products = self._products(q, k) + self._position_bias()
        if any(shift):
            region = _windows(_regions(shape, size, shift, x.device)[None, ..., None], size)[0, :, :, 0]
            apart = region[:, :, None] != region[:, None, :]
            products = products + torch.zeros_like(apart, dtype=x.dtype).masked_fill_(apart, -100.0)[:, None]
        weights = F.dropout(products.softmax(-1), self.attention_dropout, self.training)
        read = (weights @ v).transpose(2, 3).flatten(3)
        y = F.dropout(self.proj(read), self.dropout, self.training)
        y = y.unflatten(2, size).unflatten(1, [side // part for side, part in zip(shape, size, strict=True)])
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(shift, (1, 2))
        output: Tensor = y[:, :height, :width].contiguous()
        return output

    def _bias(self) -> Tensor | None:
        return self.qkv.bias

    def _products(self, q: Tensor, k: Tensor) -> Tensor:
        products: Tensor = (q * q.shape[-1] ** -0.5) @ k.mT
        return products

    def _position_bias(self) -> Tensor:
        """[1, heads, L, L]."""
        return self._placed(self.relative_position_bias_table)

    def _placed(self, table: Tensor) -> Tensor:
        tokens = math.prod(self.window_size)
        return table[self.relative_position_index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)[None]


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    """torchvision's Swin V2 attention: cosines, scaled for each head; the bias comes from a network."""

    logit_scale: Tensor
    cpb_mlp: nn.Module
    relative_coords_table: Tensor

    def _bias(self) -> Tensor | None:
        bias = self.qkv.bias
        if bias is None:
            return None
        q, k, v = bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def _products(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale

    def _position_bias(self) -> Tensor:
        return 16 * torch.sigmoid(self._placed(self.cpb_mlp(self.relative_coords_table).flatten(0, -2)))


class RelativePositionAttention(nn.Module):
    """torchvision's MaxViT attention, within each part of [N, parts, L, C]."""

    n_heads: int
    scale_factor: float
    to_qkv: nn.Module
    merge: nn.Module
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[N, parts, L, C] -> [N, parts, L, C]."""
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(2, 3) for part in self.to_qkv(x).chunk(3, -1))
        tokens = x.shape[2]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        products = q @ (k * self.scale_factor).mT + bias.view(tokens, tokens, -1).permute(2, 0, 1)
        output: Tensor = self.merge((products.softmax(-1) @ v).transpose(2, 3).flatten(3))
        return output


# qualified name of a class -> what computes the same, and the name of the output projection
REPLACEMENTS: dict[str, tuple[type[nn.Module], str]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": (ShiftedWindowAttention, "proj"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": (ShiftedWindowAttentionV2, "proj"),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": (RelativePositionAttention, "merge"),
}


def _windows(x: Tensor, size: list[int]) -> Tensor:
    """[N, H, W, C] -> [N, windows, L, C]."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _regions(shape: torch.Size, size: list[int], shift: list[int], device: torch.device) -> Tensor:
    """int64 [H, W]: places with different numbers are no neighbours but for the shift."""
    numbers = []
    for whole, side, by in zip(shape, size, shift, strict=True):
        place = torch.arange(whole, device=device)
        numbers.append((place >= whole - side).long() + (place >= whole - by).long() if by else torch.zeros_like(place))
    return numbers[0][:, None] * 3 + numbers[1]
