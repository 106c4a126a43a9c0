"""One run of an attention by itself, with random weights, whose gradients say what shows where: see
fastscore.graph.heads.heads_by_use."""

import copy
from collections.abc import Callable, Collection, Container, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches.parts import tensors_of
from fastscore.graph import autograd_nodes
from fastscore.graph.cutting import own_tensors
from fastscore.graph.cutting.cut_widths import calling_modules
from fastscore.graph.following.cuts import LAYERS
from fastscore.graph.following.noted_calls import PRODUCTS, factors_of
from fastscore.graph.heads.attention_calls import Call, randomized
from fastscore.graph.layer_types import type_of
from fastscore.graph.trials.row_gradients import rows_shown
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import input_of, with_input
from fastscore.modules.inspection import channel_dim, parametrized
from fastscore.modules.norms import channel_norms, gated_norms


@dataclass
class Run:
    """The copy, what its parameters are called, and the layers that read the last product, with what each reads."""

    module: nn.Module
    parameters: dict[str, Tensor]
    read: dict[str, Tensor] = field(default_factory=dict)  # channels last
    makers: list[str] = field(default_factory=list)  # layers that make what is multiplied, and what gates it
    norms: dict[str, Tensor] = field(default_factory=dict)  # normalisation over channels -> ones that multiply it
    # layers that read a product which is multiplied once more, as those do through which heads talk; what they read
    between: dict[str, Tensor] = field(default_factory=dict)
    # layers before that product, and no part of those after others, which read what other layers make; what they read
    met: dict[str, Tensor] = field(default_factory=dict)


class RunAlone:
    """One run of a copy of a module. ends: layers through which no gradient goes. but: modules in it whose products are
    not looked at."""

    def __init__(self, module: nn.Module, call: Call, ends: Container[str] = (), but: Iterable[str] = ()) -> None:
        self._dense = dense = randomized(evaluation_copy(module))
        self._weights: dict[str, Tensor] = {}  # of layers
        self._read: list[tuple[str, Tensor]] = []  # in the order of calls
        self._norms: dict[str, Tensor] = {}
        self._products: list[Tensor] = []
        if any(map(parametrized, dense.modules())):
            return  # weights that are computed lose no rows
        with own_tensors.buffers_as_parameters(dense), torch.enable_grad(), ExitStack() as hooks:
            layers = {name: layer for name, layer in dense.named_modules() if type_of(layer) in LAYERS
                      and isinstance(layer._parameters.get("weight"), nn.Parameter)}
            self._parameters: dict[str, Tensor] = {name: parameter.requires_grad_() for name, parameter in
                                                   dense.named_parameters() if parameter.is_floating_point()}
            self._weights = {name: self._parameters[f"{name}.weight" if name else "weight"] for name in layers}
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(self._see, name, name in ends),
                                                                     with_kwargs=True))
            for name, part in dense.named_modules():
                found = gated_norms.gated_norm_of(part) or channel_norms.norm_of(part)
                if found is not None and found.dim == -1:
                    hooks.enter_context(part.register_forward_hook(partial(self._apart, name), with_kwargs=True))
            args, kwargs = copy.deepcopy((call.args, call.kwargs))
            x = next((x for x in tensors_of((args, tuple(kwargs.values()))) if x.is_floating_point()), None)
            if x is not None and not x.any():  # weights that read zeros show nowhere
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
            hooks.enter_context(_Tempered())
            products = hooks.enter_context(_Products(set(map(id, self._weights.values())),
                                                     {*map(dense.get_submodule, but)}))
            hooks.enter_context(rows_shown(dense))
            dense(*args, **kwargs)
        self._products = products.made

    def last(self, but: Container[str] = ()) -> Run | None:
        """What is made of the last product in which some layers show, and none of `but`; None where no layer reads
        what others made and code multiplied."""
        names, weights = list(self._weights), list(self._weights.values())
        made = self._products
        while made:
            of_last = gradients(made[-1], weights)
            shown = [name for name, g in zip(names, of_last, strict=True) if g is not None]
            if shown and all(name not in but for name in shown) and any(
                    gradients(x, [made[-1]])[0] is not None for _, x in self._read):
                break
            made.pop()
        if not made:
            return None
        run = Run(self._dense, self._parameters, norms=self._norms)
        after = {name for name, x in self._read if any(g is not None for g in gradients(x, made))}
        for name, x in self._read:
            of_product = gradients(x, [made[-1]])[0] is not None
            known = next(iter(run.read.items()), None)
            if of_product and (known is None or (x.shape[-1] == known[1].shape[-1] and name not in run.read and
                                                 gradients(x, [self._weights[known[0]]])[0] is None)):
                run.read[name] = x
        if not run.read:
            return None
        for name, x in self._read:  # the first of several on the way
            if name in after and of_last[names.index(name)] is not None and \
                    all(g is None for g in gradients(x, [self._weights[other] for other in run.between])):
                run.between[name] = x
        leaves = {*map(_leaf, weights)}
        for name, x in self._read:
            if name not in after and of_last[names.index(name)] is not None and not leaves.isdisjoint(_reached(x)):
                run.met[name] = x
        of_read = gradients(next(iter(run.read.values())), weights)
        run.makers = [name for name, g in zip(names, of_read, strict=True) if g is not None and name not in after]
        return run

    def _see(self, name: str, is_end: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = input_of(args, kwargs)
        if x.dim() >= -channel_dim(layer) and x.grad_fn is not None and torch.is_grad_enabled():
            self._read.append((name, x.movedim(channel_dim(layer), -1)))
        return with_input(args, kwargs, x.detach()) if is_end else None

    def _apart(self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        gated = gated_norms.elementwise(norm, args, kwargs)
        x = gated if gated is not None else args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output.shape != x.shape:
            return None
        ones = self._norms.setdefault(name, output.new_ones(output.shape[-1]).requires_grad_())
        return (x + (output - x).detach()) * ones  # without its statistics, which read all heads


class _Products(TorchFunctionMode):
    """What products of activations made in the block. weights: ids of those of layers. but: modules whose own do not
    count."""

    def __init__(self, weights: Container[int], but: Collection[nn.Module]) -> None:
        super().__init__()
        self._weights, self._but = weights, but
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS and torch.is_grad_enabled() and len(factors_of(args, self._weights)) > 1 and not (
                self._but and any(module in self._but for module in calling_modules())):
            self.made.append(output)
        return output


def _leaf(weight: Tensor) -> Any:
    """The function by which autograd gives a weight its gradient."""
    return weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def _reached(x: Tensor) -> set[Any]:
    """The functions that x is computed from."""
    reached = set[Any]()
    autograd_nodes.reach(x.grad_fn, reached)
    return reached


def gradients(x: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Those of a sum of x, at random weights; None where there are none, or zeros alone."""
    if not tensors:
        return ()
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) + 0.5
    found = torch.autograd.grad(x, tensors, weights, retain_graph=True, allow_unused=True)
    return tuple(g if g is not None and bool(g.any()) else None for g in found)


_SOFTMAX: set[Callable[..., Any]] = {torch.softmax, Tensor.softmax, F.softmax}
_FLAT: set[Callable[..., Any]] = {
    torch.relu, Tensor.relu, F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.gelu, torch.sigmoid,
    Tensor.sigmoid, F.sigmoid, torch.tanh, Tensor.tanh, F.tanh}


class _Tempered(TorchFunctionMode):
    """In the block softmaxes read numbers that are near each other, and functions of each entry by itself have a slope
    everywhere; what depends on what stays as it is. A softmax of random numbers a hundred apart chooses one of them,
    and a ReLU may be given none above zero: then nothing before them would have a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, x = dict(kwargs or {}), args[0] if args else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        if func in _SOFTMAX:
            return func(x.asinh(), *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention and len(args) > 2:
            longest = args[1].detach().norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
            query, key = (y / size.clamp_min(1) for y, size in (
                (x, x.detach().norm(dim=-1, keepdim=True)), (args[1], longest)))
            return func(query, key, *args[2:], **{**kwargs, "scale": 1.0})
        output = func(*args, **kwargs)
        return output + 0.1 * x if func in _FLAT and not kwargs.get("inplace") else output
