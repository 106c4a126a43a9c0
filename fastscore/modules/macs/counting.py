"""The multiply-accumulates (MACs) that run: counted operation by operation, in one call of a model.

Formulas are PyTorch's own (torch.utils.flop_counter; one MAC is two FLOPs) and those of mac_formulas. What none knows
is named.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fastscore.batches.calls import Forward, call_model
from fastscore.batches.parts import Batch, first_tensor, tensors_of
from fastscore.modules.attention import multihead_attention
from fastscore.modules.macs import mac_formulas
from fastscore.modules.operations_run import OperationsRun
from fastscore.modules.weights import recurrent
from fastscore.modules.weights.computed_weights import computed_weight
from fastscore.modules.weights.own_layers import own_layer
from fastscore.modules.weights.weight_products import WeightProducts

# Operations of PyTorch that multiply and add inside and have no formula; those of other packages count as such, too.
_UNKNOWN = ("_fft_", "linalg_", "_linalg_", "cholesky", "_cholesky", "lu_", "triangular_solve", "ormqr",
            "_scaled_grouped", "_weight_int", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
            "quantized_", "fbgemm_")
# operations that add to a product what stands before its two factors
_ADD = {"addmm", "_addmm_activation", "baddbmm", "addbmm", "addmv", "_sparse_addmm"}
_PYTORCH = {"aten", "prim", "prims", "profiler", "inductor", "debugprims", "c10d", "_c10d_functional"}


@dataclass(frozen=True)
class Count:
    """What one call of a model costs.

    Attributes:
        macs: of the whole model, for one sample.
        layers: layer -> its MACs for one sample, those of the layers in it included.
        weights: Conv or Linear, or other weight -> MACs of the products with it, for one sample; products of
            activations are in none. See fastscore.modules.weights.weight_products.
        uncounted: operation that no formula knows -> the modules that it ran in, whose MACs are not in these figures.
        returned: what the model returned.
    """

    macs: int
    layers: Mapping[str, float]
    weights: Mapping[str, float]
    uncounted: Mapping[str, str]
    returned: Any


def count(model: nn.Module, example_inputs: Batch, forward: Forward = call_model,
          batch_dim: int = 0) -> Count:
    """Count the MACs of one call of `model`, as it is, on the example inputs, whose samples lie along `batch_dim`.

    Elementwise operations, interpolation and sums are none. A recurrent layer has one for each weight and step of a
    sequence, a Bilinear one for each weight and row, a sparse matrix those of its entries. What a layer of a class of
    its own takes to compute its weight from its parameters (see fastscore.modules.weights.computed_weights) is none: it
    is the same for any number of samples, and goes where pruning makes the layer a plain one.
    """
    with torch.no_grad(), counting(model) as counted:
        returned = forward(model, example_inputs)
    return counted.of(example_inputs, batch_dim, returned)


@dataclass
class Counting:
    """What was counted in a block: MACs of the whole model, of layers, by weights; and operations without a formula,
    of which each has the modules that it ran in."""

    macs: float = 0
    layers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, dict[str, None]] = field(default_factory=dict)

    def of(self, batch: Batch, batch_dim: int, returned: Any = None) -> Count:
        """The same for one sample of the batch that the model was called on. returned: what it returned then."""
        samples = 1
        tensor = first_tensor(batch)
        if tensor is not None and tensor.dim() > batch_dim:
            samples = max(tensor.shape[batch_dim], 1)
        return Count(int(self.macs // samples), {name: macs / samples for name, macs in self.layers.items()},
                     {name: macs / samples for name, macs in self.weights.items()},
                     {operation: ", ".join(places) for operation, places in self.unknown.items()}, returned)


class CountedRun:
    """MACs of a run that is made anyhow on example inputs, or of one more. model: an evaluation copy. example_inputs,
    forward: how it is called."""

    def __init__(self, model: nn.Module, example_inputs: Batch, forward: Forward) -> None:
        self._model, self._example, self._forward = model, example_inputs, forward
        self._counted: Counting | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """A block in which the model is called on the example inputs, without gradients: that is counted, unless it has
        recurrent modules, whose steps are not all taken while a model is traced."""
        if any(map(recurrent.state_layers, self._model.modules())):
            yield
            return
        with counting(self._model) as counted:
            yield
        self._counted = counted

    def products(self, batch_dim: int) -> dict[str, Any]:
        """The `macs` and `uncounted` of a graph. batch_dim: along which the samples of the example inputs lie."""
        try:
            counted = count(self._model, self._example, self._forward, batch_dim) if self._counted is None else \
                self._counted.of(self._example, batch_dim)
        except Exception as error:  # of a model that runs otherwise: what is scored does not depend on it
            return {"uncounted": {f"everything ({type(error).__name__}: {error})": "the whole model"}}
        return {"macs": counted.weights, "uncounted": counted.uncounted}


@contextmanager
def counting(model: nn.Module) -> Iterator[Counting]:
    """The MACs of one call of `model` in the block, without gradients, are in what is given once it has been left: see
    `count`."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which few need

    counted = Counting()
    running: list[str] = []
    computing = {name for name, module in model.named_modules()
                 if computed_weight(module) is not None and own_layer(module) is None}
    known = FlopCounterMode(display=False, custom_mapping=mac_formulas.formulas()).flop_registry
    products = _Products(known, WeightProducts(model), running, computing)

    def entering(name: str, *args: object) -> None:
        running.append(name)
        products.last = 0
        counted.layers[name] -= products.flops / 2

    def leaving(name: str, *args: object) -> None:
        del running[len(running) - 1 - running[::-1].index(name):]  # and those that an exception left
        counted.layers[name] += products.flops / 2

    with ExitStack() as attached:
        for handle in multihead_attention.replace_attention(model):
            attached.enter_context(handle)
        attached.enter_context(_without_fused_attention())
        attached.enter_context(recurrent.exact_rows(model))
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which has no such hooks
                attached.enter_context(module.register_forward_pre_hook(partial(entering, name)))
                attached.enter_context(module.register_forward_hook(partial(leaving, name)))
        with products:
            yield counted
    counted.macs = products.flops // 2
    counted.weights |= {name: macs / 2 for name, macs in products.weights.flops.items()}
    counted.unknown |= products.unknown


class _Products(OperationsRun):
    """Counts the products that run, tells whose weights they are with, and names the operations that make
    floating-point tensors by products that no formula knows.

    computing: layers that compute their weight, and then run one product with it: what they run before that is in no
    sum. flops: of all products. last: FLOPs of the last product of such a layer's call that runs.
    """

    def __init__(self, known: Mapping[Any, Callable[..., int]], weights: WeightProducts,
                 running: Sequence[str], computing: Container[str]) -> None:
        super().__init__()
        self.weights, self._known, self._running, self._computing = weights, known, running, computing
        self.flops = self.last = 0
        self.unknown: dict[str, dict[str, None]] = {}  # operation -> modules, in order
        self._made_of_others: dict[Any, bool] = {}  # operation -> whether it is one that is taken apart

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        formula, operands = self._known.get(func._overloadpacket), (*args, *kwargs.values())
        place = self._running[-1] if self._running else ""
        if any(tensor.is_nested for tensor in tensors_of(operands)):
            return self._of_nested(func, args, kwargs, formula is not None, place)
        if formula is None and self._made_of_others.get(func, True):
            with self:
                out = func.decompose(*args, **kwargs)
            self._made_of_others[func] = out is not NotImplemented
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.flops += flops
            self.weights.credit(_factors(func._opname, operands), flops, place)
            if place in self._computing:
                self.weights.credit((), -self.last, place)
                self.flops -= self.last
                self.last = flops
        elif func._opname.startswith(_UNKNOWN) if func.namespace in _PYTORCH else \
                any(tensor.is_floating_point() for tensor in tensors_of(out)):
            self._note_unknown(f"{func.namespace}::{func._opname}", place)
        self.weights.follow(func, operands, out, product=formula is not None)
        return out

    def _of_nested(self, func: Any, args: Any, kwargs: Any, product: bool, place: str) -> Any:
        """Out of sight of the modes around it: they cannot run operations on nested tensors."""
        with _disable_current_modes():
            if func is torch.ops.aten.linear.default:
                flops = 2 * sum(part.numel() for part in args[0].unbind()) * len(args[1])
                self.weights.credit((*args, *kwargs.values()), flops, place)
                self.flops += flops
            elif func._opname == "matmul" or product:
                self._note_unknown(f"{func._opname} of nested tensors", place)
            return func(*args, **kwargs)

    def _note_unknown(self, operation: str, place: str) -> None:
        self.unknown.setdefault(operation, {})[place or "the model itself"] = None


def _factors(operation: str, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an operation multiplies: not what it adds to products, as the masks and biases of attention."""
    return operands[1:3] if operation in _ADD else operands[:3] if "attention" in operation else operands


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Within, nn.MultiheadAttention and nn.TransformerEncoderLayer run operation by operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
