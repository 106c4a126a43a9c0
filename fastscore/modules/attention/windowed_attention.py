"""Attention modules of torchvision whose code takes heads x head width for the embedding's: what they compute,
from the same attributes, with any number of heads and with projections
that run as layers (see multihead_attention.py)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.attention.own_width import DENSE_WIDTH


class LinearWithoutKeyBias(nn.Linear):
    """Queries, keys and values of torchvision's Swin V2, which has zeros for the bias of the keys, whatever is held."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., 3·H·D]."""
        if self.bias is None:
            return F.linear(x, self.weight)
        third = torch.arange(len(self.bias), device=x.device) // (len(self.bias) // 3)
        return F.linear(x, self.weight, self.bias * (third != 1))


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
    qkv_class: type[nn.Linear] = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C]; of a video [N, T, H, W, C] -> the same."""
        whole, dims = x.shape[1:-1], range(1, x.dim() - 1)
        size = self._window(whole)
        padding = [(0, -part % side) for part, side in zip(whole, size, strict=True)]
        x = F.pad(x, [0, 0, *(amount for each in reversed(padding) for amount in each)])
        shape = x.shape[1:-1]
        shift = [0 if side >= part else by for side, part, by in zip(size, shape, self.shift_size, strict=True)]
        x = _windows(x.roll([-by for by in shift], tuple(dims)), size)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # [N, windows, heads, L, D] each
        products = self._products(q, k) + self._position_bias(math.prod(size))
        if any(shift):
            region = _windows(_regions(shape, size, shift, x.device)[None, ..., None], size)[0, :, :, 0]
            apart = region[:, :, None] != region[:, None, :]
            products = products + torch.zeros_like(apart, dtype=x.dtype).masked_fill_(apart, -100.0)[:, None]
        weights = F.dropout(products.softmax(-1), self.attention_dropout, self.training)
        read = (weights @ v).transpose(2, 3).flatten(3)
        y = F.dropout(self.proj(read), self.dropout, self.training)
        y = y.unflatten(2, size).unflatten(1, [part // side for part, side in zip(shape, size, strict=True)])
        for dim in dims:  # each number of a window beside the places in it
            y = y.movedim(len(size) + dim, 2 * dim)
        for dim in dims:
            y = y.flatten(dim, dim + 1)
        y = y.roll(shift, tuple(dims))
        for dim, part in zip(dims, whole, strict=True):
            y = y.narrow(dim, 0, part)
        output: Tensor = y.contiguous()
        return output

    def _window(self, whole: torch.Size) -> list[int]:
        """The size of a window in an input of that size."""
        return self.window_size

    def _products(self, q: Tensor, k: Tensor) -> Tensor:
        products: Tensor = (q * vars(self).get(DENSE_WIDTH, q.shape[-1]) ** -0.5) @ k.mT
        return products

    def _position_bias(self, tokens: int) -> Tensor:
        """[1, heads, L, L]."""
        return self._placed(self.relative_position_bias_table, tokens)

    def _placed(self, table: Tensor, tokens: int) -> Tensor:
        every = math.prod(self.window_size)
        index = self.relative_position_index.view(every, every)[:tokens, :tokens]
        return table[index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)[None]


class ShiftedWindowAttention3d(ShiftedWindowAttention):
    """torchvision's Swin attention of videos: a window is no larger than the input, and then not shifted."""

    def _window(self, whole: torch.Size) -> list[int]:
        return [min(side, part) for side, part in zip(self.window_size, whole, strict=True)]


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    """torchvision's Swin V2 attention: cosines, scaled for each head; the bias comes from a network."""

    logit_scale: Tensor
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    qkv_class = LinearWithoutKeyBias

    def _products(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale

    def _position_bias(self, tokens: int) -> Tensor:
        return 16 * torch.sigmoid(self._placed(self.cpb_mlp(self.relative_coords_table).flatten(0, -2), tokens))


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


# qualified name of a class -> what computes the same
REPLACEMENTS: dict[str, type[nn.Module]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ShiftedWindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ShiftedWindowAttentionV2,
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ShiftedWindowAttention3d,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": RelativePositionAttention,
}


def layers(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(layer of a module that becomes of `kind`, "__class__", what class it has then), where that is another one."""
    layer = module._modules.get("qkv")
    if issubclass(kind, ShiftedWindowAttention) and type(layer) is nn.Linear and kind.qkv_class is not nn.Linear:
        yield layer, "__class__", kind.qkv_class


def _windows(x: Tensor, size: list[int]) -> Tensor:
    """[N, *places, C] -> [N, windows, L, C]."""
    dims = len(size)
    for dim in reversed(range(dims)):
        x = x.unflatten(1 + dim, (-1, size[dim]))
    for dim in range(1, dims):  # the numbers of windows to the front
        x = x.movedim(1 + 2 * dim, 1 + dim)
    return x.flatten(1 + dims, 2 * dims).flatten(1, dims)


def _regions(shape: torch.Size, size: list[int], shift: list[int], device: torch.device) -> Tensor:
    """int64 of that shape: places with different numbers are no neighbours but for the shift."""
    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for whole, side, by in zip(shape, size, shift, strict=True):
        place = torch.arange(whole, device=device)
        number = (place >= whole - side).long() + (place >= whole - by).long() if by else torch.zeros_like(place)
        numbers = numbers[..., None] * 3 + number
    return numbers
