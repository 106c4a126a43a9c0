"""FLOPs of operations from the shapes of their arguments, where PyTorch's own counter has no formula."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
    rows = math.prod(query[:-1])
    return 2 * rows * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Shape, *weights: Any, **kwargs: object) -> int:
    """Rows x matrices: every step of a sequence meets each weight once; biases have one dimension."""
    held: Sequence[Shape] = weights[:4] if isinstance(weights[0], torch.Size) else weights[0]
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in held if len(shape) == 2)


def _inner(*shapes: Any, out_shape: Shape, **kwargs: object) -> int:
    """matrix x vector, vector x vector: of the last operand's length for each element that comes out."""
    return 2 * math.prod(out_shape) * next(shape for shape in reversed(shapes) if isinstance(shape, torch.Size))[-1]


def _experts(a: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    """[M, K] x [G, K, N] and [M, K] x [K, N] have each row, or column, in one group; [G, M, K] x [G, K, N] is a bmm."""
    return 2 * math.prod(a) * b[-1]


def _matrices(*tensors: Any, out_val: object, **kwargs: object) -> int:
    """Of which either may be sparse."""
    a, b = [tensor for tensor in tensors if isinstance(tensor, Tensor)][-2:]
    if a.layout != torch.strided:
        return 2 * int(a._nnz()) * b.shape[-1]
    return 2 * a.shape[0] * (b.numel() if b.layout == torch.strided else int(b._nnz()))


_matrices._get_raw = True  # type: ignore[attr-defined]  # given tensors, not shapes

FORMULAS: Mapping[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_attention_math_for_mps": _attention,
    "aten::mkldnn_rnn_layer": _recurrent, "aten::_cudnn_rnn": _recurrent, "aten::miopen_rnn": _recurrent,
    "aten::_lstm_mps": lambda x, states, weights, *args, **kwargs: _recurrent(x, weights),
    "aten::mv": _inner, "aten::addmv": _inner, "aten::dot": _inner, "aten::vdot": _inner,
    "aten::_cdist_forward": lambda a, *args, out_shape, **kwargs: 2 * math.prod(out_shape) * a[-1],
    "aten::addbmm": lambda total, a, b, **kwargs: 2 * math.prod(a) * b[-1],
    "aten::_trilinear": lambda rows, weight, *args, **kwargs: 2 * rows[0] * math.prod(weight),
    "aten::_grouped_mm": _experts, "transformers::grouped_mm_fallback": _experts,
    "aten::mm": _matrices, "aten::addmm": _matrices, "aten::_int_mm": _matrices, "aten::_addmm_activation": _matrices,
    "aten::_sparse_mm": _matrices, "aten::_sparse_addmm": _matrices,
    "aten::conv_tbc": lambda x, weight, *args, out_shape, **kwargs: 2 * math.prod(out_shape[:2]) * math.prod(weight),
    "torchvision::deform_conv2d": lambda x, weight, *args, out_shape, **kwargs: (
        2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)),
}
"""Operation -> its FLOPs from the shapes of its arguments, beside those that PyTorch's counter knows."""


def formulas() -> dict[Any, Callable[..., int]]:
    """Those of FORMULAS whose operations are there: packages register theirs when they are imported."""
    found = {}
    for name, formula in FORMULAS.items():
        namespace, operation = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found[packet] = formula
    return found
