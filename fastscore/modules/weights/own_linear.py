"""Layers of a class of a user's own, made of no layer of PyTorch, that compute what a nn.Linear does: `x @ self.w.t() +
self.b`, F.linear, an einsum, with a weight that lies either way.

In evaluation copies, and in a model that pruning returns where it loses something, such a layer is a nn.Linear: see
fastscore.modules.weights.computed_weights.
"""

import copy
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.copying import ATOMS

_LEADING = ((3,), (2, 3), (2, 2, 3))  # of inputs that it is tried on: as many dimensions as its code takes
_FAR = 100.0
_OTHERS = ("torch", "transformers", "fastscore")  # whose layers are known by other means


@dataclass(frozen=True)
class OwnLinear:
    """The names of the parameters of one; whether its weight is [inputs, outputs]."""

    weight: str
    bias: str | None
    transposed: bool


_OF_EVERY_MODULE = set(vars(nn.Module()))
_alike: "weakref.WeakKeyDictionary[type, dict[Any, OwnLinear | None]]" = weakref.WeakKeyDictionary()
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, OwnLinear | None]]" = weakref.WeakKeyDictionary()


def own_linear(module: nn.Module) -> OwnLinear | None:
    """What such a layer is made of; None of any other module.

    A copy runs by itself, in evaluation mode, on two inputs of its own and with parameters of its own, and must make of
    them what F.linear does, with the gradient that it has. The module is not run.
    """
    if module._modules or module._buffers or type(module).__module__.partition(".")[0] in _OTHERS or \
            isinstance(module, (nn.Linear, nn.Embedding, torch.jit.ScriptModule)) or "forward" in vars(module):
        return None
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    of_dims = {parameter.dim(): name for name, parameter in parameters.items()}
    if set(of_dims) not in ({2}, {1, 2}) or len(of_dims) < len(parameters) or \
            not all(parameter.is_floating_point() for parameter in parameters.values()):
        return None
    key = tuple((name, parameter.shape) for name, parameter in parameters.items()), type(module)
    if module not in _found or _found[module][0] != key:
        _found[module] = key, _of_its_like(module, key[0], of_dims)
    return _found[module][1]


def weight_of(module: nn.Module, own: OwnLinear) -> Tensor:
    """Its weight as a nn.Linear has it, in the same memory."""
    weight = module.get_parameter(own.weight).detach()
    return weight.t() if own.transposed else weight


def become_linear(module: nn.Module, own: OwnLinear, weight: Tensor) -> None:
    """Make it a nn.Linear of that weight, in place."""
    learns = module.get_parameter(own.weight).requires_grad
    bias = None if own.bias is None else module._parameters[own.bias]
    module._parameters.clear()
    for name in ("weight", "bias", "in_features", "out_features"):
        vars(module).pop(name, None)
    module.__class__ = nn.Linear
    module.out_features, module.in_features = weight.shape  # type: ignore[assignment]
    module._parameters.update(weight=nn.Parameter(weight.detach(), learns), bias=bias)


def _of_its_like(module: nn.Module, shapes: Any, of_dims: dict[int, str]) -> OwnLinear | None:
    """The same, tried once for all modules of a class that hold equal numbers and words: copies of one, mostly."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    if not all(type(value) in ATOMS for value in own.values()):
        return _probed(module, of_dims[2], of_dims.get(1))
    known = _alike.setdefault(type(module), {})
    key = shapes, repr(sorted(own.items()))
    if key not in known:
        known[key] = _probed(module, of_dims[2], of_dims.get(1))
    return known[key]


def _probed(module: nn.Module, weight: str, bias: str | None) -> OwnLinear | None:
    shapes = {name: module.get_parameter(name).shape for name in (weight, bias) if name is not None}
    for transposed in (False, True):
        outputs, inputs = reversed(shapes[weight]) if transposed else shapes[weight]
        if bias is None or shapes[bias] == (outputs,):
            for leading in _LEADING:
                if all(_computes(module, OwnLinear(weight, bias, transposed), shapes, inputs, leading, seed)
                       for seed in (0, 1)):
                    return OwnLinear(weight, bias, transposed)
    return None


@torch.inference_mode(False)
def _computes(module: nn.Module, own: OwnLinear, shapes: dict[str, torch.Size], inputs: int, leading: tuple[int, ...],
              seed: int) -> bool:
    """Whether it makes of random parameters and inputs what F.linear does, and its gradient."""
    random = torch.Generator().manual_seed(seed)
    alone = copy.copy(module)  # what its code counts or keeps is not for the user's layer
    held: dict[str, Any] = {name: nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))
                            for name, shape in shapes.items()}
    alone.training, alone._parameters = False, {**dict.fromkeys(module._parameters), **held}
    x = torch.randn(*leading, inputs, generator=random, dtype=torch.float64) * (_FAR if seed else 1)
    x.requires_grad_()
    weight = held[own.weight].t() if own.transposed else held[own.weight]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):  # of what takes something else
        made, expected = type(alone).forward(alone, x), F.linear(x, weight, held.get(own.bias or ""))
        if not isinstance(made, Tensor) or made.shape != expected.shape or made.dtype != expected.dtype:
            return False
        sent = torch.randn(made.shape, generator=random, dtype=torch.float64)
        read = [x, *held.values()]
        first, second = ((y, *torch.autograd.grad(y, read, sent)) for y in (made, expected))
        return all(torch.allclose(a, b, 1e-9, 1e-9) for a, b in zip(first, second, strict=True))
    return False
