"""The multiply-accumulates (MACs) that run: counted operation by operation, in one call of a model.

Formulas are PyTorch's own (torch.utils.flop_counter; one MAC is two FLOPs) and those below. What none knows is named.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from fastscore import batches
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.surgery import remove_channels
from fastscore.modules import multihead_attention
from fastscore.modules.evaluation_copy import evaluation_copy

Shape = Sequence[int]
# Operations of PyTorch that multiply and add inside and have no formula; those of other packages count as such, too.
_UNKNOWN = ("_fft_", "linalg_", "_linalg_", "cholesky", "_cholesky", "lu_", "triangular_solve", "ormqr",
            "_scaled_grouped", "_weight_int", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
            "quantized_", "fbgemm_")
_PYTORCH = {"aten", "prim", "prims", "profiler", "inductor", "debugprims", "c10d", "_c10d_functional"}


@dataclass(frozen=True)
class Count:
    """What one call of a model costs.

    Attributes:
        macs: of the whole model, for one sample.
        layers: layer -> its MACs for one sample, those of the layers in it included.
        uncounted: operation that no formula knows -> the modules that it ran in, whose MACs are not in these figures.
        returned: what the model returned.
    """

    macs: int
    layers: Mapping[str, float]
    uncounted: Mapping[str, str]
    returned: Any


def count(model: nn.Module, example_inputs: batches.Batch, forward: batches.Forward = batches.call_model) -> Count:
    """Count the MACs of one call of `model`, as it is, on the example inputs.

    Elementwise operations, interpolation and sums are none. A recurrent layer has one for each weight and step of a
    sequence, a Bilinear one for each weight and row, a sparse matrix those of its entries.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which few need

    samples = 1
    tensor = batches.first_tensor(example_inputs)
    if tensor is not None and tensor.dim():
        samples = max(len(tensor), 1)
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Everywhere()  # the hooks below know where
    layers: dict[str, float] = defaultdict(float)
    running: list[str] = []

    def entering(name: str) -> Callable[..., None]:
        def hook(*args: object) -> None:
            running.append(name)
            layers[name] -= counter.get_total_flops() / 2 / samples

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(*args: object) -> None:
            del running[len(running) - 1 - running[::-1].index(name):]  # and those that an exception left
            layers[name] += counter.get_total_flops() / 2 / samples

        return hook

    unknown = _Unknown(counter.flop_registry, running)
    with torch.no_grad(), ExitStack() as attached:
        for handle in multihead_attention.replace_attention(model):
            attached.enter_context(handle)
        attached.enter_context(_without_fused_attention())
        for name, module in model.named_modules():  # the counter knows names below the whole model's own call alone
            attached.enter_context(module.register_forward_pre_hook(entering(name)))
            attached.enter_context(module.register_forward_hook(leaving(name)))
        with unknown, counter:
            returned = forward(model, example_inputs)
    uncounted = {operation: ", ".join(places) for operation, places in unknown.found.items()}
    return Count(counter.get_total_flops() // 2 // samples, layers, uncounted, returned)


def macs_without(model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: batches.Batch,
                 forward: batches.Forward, removed: Mapping[str, Tensor]) -> int:
    """MACs of `model`, an evaluation copy that stays as it is, without `removed` (group -> int64 [R]): a copy is cut.

    Raises RuntimeError where it does not run.
    """
    with running_without_them():
        return count(remove_channels(evaluation_copy(model), groups, removed), example_inputs, forward).macs


@contextmanager
def running_without_them() -> Iterator[None]:
    """Within, a smaller model runs; RuntimeError says what to do where it does not."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"the pruned model does not run ({error}): its forward depends on a width that changed; "
                           "ignore the layers it names") from error


class _Everywhere(ModuleTracker):
    """In the place of the counter's own tracker of modules: its hooks cost time and end in cycles."""

    def __enter__(self) -> "_Everywhere":
        self.parents = {"Global"}
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _Unknown(TorchDispatchMode):
    """Names the operations that make floating-point tensors by products that no formula knows."""

    def __init__(self, known: Mapping[Any, object], running: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self._running = known, running
        self.found: dict[str, dict[str, None]] = {}  # operation -> modules, in order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and func._overloadpacket not in self._known:
            unknown = func._opname.startswith(_UNKNOWN) if func.namespace in _PYTORCH else \
                any(tensor.is_floating_point() for tensor in batches.tensors_of(out))
            if unknown:
                place = self._running[-1] if self._running else ""
                self.found.setdefault(f"{func.namespace}::{func._opname}", {})[place or "the model itself"] = None
        return out


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Within, nn.MultiheadAttention and nn.TransformerEncoderLayer run operation by operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
    rows = math.prod(query[:-1])
    return 2 * rows * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Shape, *weights: Any, **kwargs: object) -> int:
    """Rows x matrices: every step of a sequence meets each weight once; biases have one dimension."""
    held: Sequence[Shape] = weights[:4] if isinstance(weights[0], torch.Size) else weights[0]
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in held if len(shape) == 2)


def _recurrent_mps(x: Shape, states: object, weights: Sequence[Shape], *args: object, **kwargs: object) -> int:
    return _recurrent(x, weights)


def _inner(*shapes: Any, out_shape: Shape, **kwargs: object) -> int:
    """matrix x vector, vector x vector: of the last operand's length for each element that comes out."""
    return 2 * math.prod(out_shape) * next(shape for shape in reversed(shapes) if isinstance(shape, torch.Size))[-1]


def _distances(a: Shape, *args: object, out_shape: Shape, **kwargs: object) -> int:
    return 2 * math.prod(out_shape) * a[-1]


def _summed_products(total: Shape, a: Shape, b: Shape, **kwargs: object) -> int:
    return 2 * math.prod(a) * b[-1]


def _bilinear(rows: Shape, weight: Shape, *args: object, **kwargs: object) -> int:
    return 2 * rows[0] * math.prod(weight)


def _experts(a: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    """[M, K] x [G, K, N] and [M, K] x [K, N] have each row, or column, in one group; [G, M, K] x [G, K, N] is a bmm."""
    return 2 * math.prod(a) * b[-1]


def _deformable(x: Shape, weight: Shape, *args: object, out_shape: Shape, **kwargs: object) -> int:
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)


def _time_first_convolution(x: Shape, weight: Shape, *args: object, out_shape: Shape, **kwargs: object) -> int:
    return 2 * math.prod(out_shape[:2]) * math.prod(weight)


def _matrices(*tensors: Any, out_val: object, **kwargs: object) -> int:
    """Of which either may be sparse."""
    a, b = [tensor for tensor in tensors if isinstance(tensor, Tensor)][-2:]
    if a.layout != torch.strided:
        return 2 * int(a._nnz()) * b.shape[-1]
    return 2 * a.shape[0] * (b.numel() if b.layout == torch.strided else int(b._nnz()))


_matrices._get_raw = True  # type: ignore[attr-defined]  # given tensors, not shapes

_FORMULAS: Mapping[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_attention_math_for_mps": _attention,
    "aten::mkldnn_rnn_layer": _recurrent, "aten::_cudnn_rnn": _recurrent, "aten::miopen_rnn": _recurrent,
    "aten::_lstm_mps": _recurrent_mps,
    "aten::mv": _inner, "aten::addmv": _inner, "aten::dot": _inner, "aten::vdot": _inner,
    "aten::_cdist_forward": _distances,
    "aten::addbmm": _summed_products,
    "aten::_trilinear": _bilinear,
    "aten::_grouped_mm": _experts, "transformers::grouped_mm_fallback": _experts,
    "aten::mm": _matrices, "aten::addmm": _matrices, "aten::_int_mm": _matrices, "aten::_addmm_activation": _matrices,
    "aten::_sparse_mm": _matrices, "aten::_sparse_addmm": _matrices,
    "aten::conv_tbc": _time_first_convolution,
    "torchvision::deform_conv2d": _deformable,
}
"""Operation -> its FLOPs from the shapes of its arguments, beside those that PyTorch's counter knows."""


def _formulas() -> dict[Any, Callable[..., int]]:
    """Those of _FORMULAS whose operations are there: packages register theirs when they are imported."""
    found = {}
    for name, formula in _FORMULAS.items():
        namespace, operation = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found[packet] = formula
    return found
