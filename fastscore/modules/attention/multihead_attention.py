"""nn.MultiheadAttention with a width of its own, and an output projection that runs as a layer.

PyTorch's module computes its output projection from the weights of `out_proj` without calling it, so nothing can be
tapped there, and takes heads x head_dim for the embedding's width, so no head can go. The class here computes the same
from the same parameters, under the same names, and takes the place of PyTorch's: in evaluation copies, on a user's
model as long as it is tapped or masked, and for good where heads were removed.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastscore.modules.attention import by_function, own_width, windowed_attention
from fastscore.modules.attention.heads_read import what_heads_read
from fastscore.modules.handles import Handle
from fastscore.modules.inspection import submodule
from fastscore.modules.weights.parameter_layers import HoldsLayers

_SEPARATE = "qkv_bias_separate"  # of timm's attention: False has it read the weight of its layer without calling it


# what nn.MultiheadAttention holds itself and multiplies by: see fastscore.modules.attention.projections
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class SequenceFirstLinear(nn.Linear):
    """A Linear on [N, L, C] that multiplies rows in the order [L, N], as nn.MultiheadAttention does: to the bit."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C_in] -> [N, L, C_out]."""
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class MultiheadAttention(HoldsLayers, nn.Module):
    """What nn.MultiheadAttention computes, with num_heads x head_dim of any width; made by `replace_attention` alone.

    Parameters as there: in_proj_weight [3·H·D, E], or q_proj_weight [H·D, E], k_proj_weight and v_proj_weight; out_proj
    from H·D to E; bias_k, bias_v [1, 1, H·D].
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | nn.Module | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | nn.Module
    k_proj_weight: Tensor | nn.Module
    v_proj_weight: Tensor | nn.Module
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Module

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False  # keeps nn.TransformerEncoderLayer from its fused path, which takes E for the width

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: output, and the attention weights where `need_weights`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = _sequence_first(query, key, value)
        q, k, v = self._project(query, key, value)
        read, weights = what_heads_read(
            q, k, v, self.num_heads, self.bias_k, self.bias_v, self.add_zero_attn,
            self.dropout if self.training else 0.0, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal, vars(self).get(own_width.DENSE_WIDTH))
        output: Tensor = self.out_proj(read.transpose(0, 1)).transpose(0, 1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[L, N, E] each -> [L, N, H·D] each."""
        weight = self.in_proj_weight
        bias = None if isinstance(weight, nn.Module) else self.in_proj_bias
        if weight is not None and query is key and key is value:
            # contiguous parts of one product, as PyTorch makes them
            q, k, v = _product(query, weight, bias).unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2) \
                .squeeze(-2).contiguous()
            return q, k, v
        if isinstance(weight, nn.Module):
            q, k, v = (weight(x.transpose(0, 1), part).transpose(0, 1).chunk(3, -1)[part].contiguous()
                       for part, x in enumerate((query, key, value)))
            return q, k, v
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(_product(x, w, b) for x, w, b in  # type: ignore[return-value]
                     zip((query, key, value), weights, biases, strict=True))


def _product(x: Tensor, weight: Tensor | nn.Module, bias: Tensor | None) -> Tensor:
    """[L, N, E] times a weight, or through a layer of it, which may have the bias: [L, N, outputs]."""
    if isinstance(weight, nn.Module):
        made: Tensor = weight(x.transpose(0, 1)).transpose(0, 1).contiguous()
        return made if bias is None else made + bias
    return F.linear(x, weight, bias)


def projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of nn.MultiheadAttention, or what stands for it, that it multiplies by; of all other
    modules none."""
    if not _is_replaced(module) and type(module) is not MultiheadAttention:
        return ()
    return tuple(name for name in PROJECTIONS if module._parameters.get(name) is not None)


def _is_replaced(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether it is PyTorch's own, whose place MultiheadAttention takes."""
    return type(module) is nn.MultiheadAttention and type(module.out_proj) in (NonDynamicallyQuantizableLinear,
                                                                               nn.Linear, SequenceFirstLinear)


def replace_attention(model: nn.Module, called: Iterable[str] | None = None) -> Iterator[Handle]:
    """Put MultiheadAttention in the place of each nn.MultiheadAttention of a model, whose parameters stay: a handle for
    each change.

    Each nn.TransformerEncoder then calls its layers on plain tensors. The modules that fastscore.modules'
    windowed_attention and own_width know are replaced alike; subclasses, and modules whose out_proj is no plain Linear,
    stay as they are. called: names of layers; only modules whose output projection is among them are changed (of those
    that windowed_attention and own_width know, any of whose layers is), and encoders that hold one. None: all; ():
    encoders alone.
    """
    wanted = None if called is None else {id(_layer(model, name)) for name in called}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False) and (
                not wanted or any(id(inner.out_proj) in wanted for inner in module.modules()
                                  if isinstance(inner, nn.MultiheadAttention))):
            yield AttributesSet([(module, "use_nested_tensor", False)])  # only its layers' fused path takes nested ones
        qualified = f"{type(module).__module__}.{type(module).__qualname__}"
        kind = windowed_attention.REPLACEMENTS.get(qualified)
        if kind is not None and (wanted is None or any(id(layer) in wanted for layer in module.children())):
            yield AttributesSet([(module, "__class__", kind), *windowed_attention.layers(module, kind)])
        found = by_function.replacement(module)
        if found is None and not by_function.is_made(module):  # whose code would be read as it was written
            found = own_width.replacement(module)
        if found is not None and (wanted is None or any(id(layer) in wanted for layer in module.children())):
            yield AttributesSet([(module, "__class__", found)])
        if module.__dict__.get(_SEPARATE) is False and (wanted is None or any(
                id(layer) in wanted for layer in module.children())):
            yield AttributesSet([(module, _SEPARATE, True)])
        if _is_replaced(module) and (wanted is None or id(module.out_proj) in wanted):
            yield AttributesSet([(module, "__class__", MultiheadAttention),
                          (module.out_proj, "__class__", SequenceFirstLinear)])


def _layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that qualified name; of a parameter the module that holds it, or, of a projection, the output
    projection there."""
    owner, _, key = name.rpartition(".")
    module = submodule(model, owner)
    if key in PROJECTIONS and isinstance(output := getattr(module, "out_proj", None), nn.Module):
        return output
    return module if key in module._parameters else submodule(model, name)


class AttributesSet(Handle):
    """Attributes of modules that have other values until `remove`."""

    def __init__(self, changes: Iterable[tuple[nn.Module, str, Any]]) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []
        for module, name, value in changes:
            self._before.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    def remove(self) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)
        self._before.clear()

    def make_permanent(self) -> None:
        self._before.clear()


def _sequence_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, L, E] -> [L, N, E]; what was one tensor stays one."""
    turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    return turned[id(query)], turned[id(key)], turned[id(value)]
