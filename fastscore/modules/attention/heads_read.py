"""What the heads of an attention read, as F.multi_head_attention_forward computes it, of any width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def what_heads_read(q: Tensor, k: Tensor, v: Tensor, heads: int, bias_k: Tensor | None, bias_v: Tensor | None,
                    add_zero_attn: bool, dropout: float, key_padding_mask: Tensor | None, need_weights: bool,
                    attn_mask: Tensor | None, average_attn_weights: bool, is_causal: bool, dense: int | None
                    ) -> tuple[Tensor, Tensor | None]:
    """([L, N, H·D], the weights where `need_weights`), of queries [L, N, H·D], keys and values [S, N, H·D].

    dense: the width that a head had, by which products stay scaled; None for the one that it has.
    """
    length, samples, width = q.shape
    head_dim = width // heads
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.repeat(1, samples, 1)])
        v = torch.cat([v, bias_v.repeat(1, samples, 1)])
    q, k, v = (x.reshape(x.shape[0], samples * heads, head_dim).transpose(0, 1) for x in (q, k, v))
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, head_dim)], 1) for x in (k, v))
    source = k.shape[1]
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, source, samples, heads, q.dtype)
    if is_causal and attn_mask is None:
        raise RuntimeError("attn_mask: the is_causal hint needs it, as in nn.MultiheadAttention")
    weights: Tensor | None = None
    if need_weights:
        q = q * (1.0 / (dense or head_dim)) ** 0.5
        weights = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
        weights = weights.softmax(-1)
        if dropout > 0:
            weights = F.dropout(weights, dropout)
        read = torch.bmm(weights, v).transpose(0, 1)
        weights = weights.view(samples, heads, length, source)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(samples, heads, -1, source)
        q, k, v = (x.view(samples, heads, -1, head_dim) for x in (q, k, v))
        scale = None if dense is None else dense ** -0.5
        read = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale).permute(2, 0, 1, 3)
    return read.reshape(length, samples, heads * head_dim), weights


def _mask(attn_mask: Tensor | None, padding: Tensor | None, source: int, samples: int, heads: int, dtype: torch.dtype
          ) -> Tensor | None:
    """What is added to the products of queries and keys, broadcasting over [N·H, L, S]; None for nothing."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        mask = F.pad(mask, (0, source - mask.shape[-1]))  # keys that the module itself adds are open to all
    if padding is not None:
        padding = F.pad(_additive(padding, dtype), (0, source - padding.shape[-1]))
        padding = padding.view(samples, 1, 1, source).expand(-1, heads, -1, -1).reshape(-1, 1, source)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add: a boolean one, where True stands for what is not read, becomes 0 and minus infinity."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask
