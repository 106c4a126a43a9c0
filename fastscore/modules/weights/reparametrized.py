"""Weights and biases that PyTorch's utilities compute before each call, from other parameters: parametrizations, and
the hooks of weight_norm, spectral_norm and prune."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from fastscore.modules.copying import deepcopy

_TENSORS = {"weight", "bias"}
_PREFIX = "parametrizations."
_KNOWN = (parametrizations._WeightNorm, parametrizations._SpectralNorm, parametrizations._Orthogonal)


def values(layer: nn.Module) -> dict[str, Tensor]:
    """What they compute for a layer in evaluation mode: "weight", "bias" or both -> a tensor.

    Empty where they do nothing, or where that is not all that computes these two, or where it is not the same twice.
    Neither the layer nor what it holds is run or changed.
    """
    if not layer._forward_pre_hooks and "parametrizations" not in layer._modules and \
            vars(layer).keys().isdisjoint(_TENSORS):  # as most have none
        return {}
    made: dict[str, Tensor] = {}
    with torch.no_grad(), suppress(Exception):  # of a user's parametrization
        made = _by_hooks(layer) if not nn.utils.parametrize.is_parametrized(layer) else _by_parametrizations(layer)
    computed = {name for name in _TENSORS if name in vars(layer)}
    return {} if computed - set(made) or not all(sources(layer, name) for name in made) else made


def sources(layer: nn.Module, tensor: str) -> list[str]:
    """The names of the parameters that such a weight or bias is computed from; that which it stands for comes first."""
    if nn.utils.parametrize.is_parametrized(layer):
        held: Any = layer.parametrizations
        names = [f"{_PREFIX}{tensor}.{name}" for name, _ in held[tensor].named_parameters()]
        own = [name for name in names if name.rpartition(".")[2].startswith("original")]
        first = own[-1:]  # the directions of weight_norm come behind the gains
    else:
        names = [f"{tensor}_{key}" for key in ("v", "g", "orig") if f"{tensor}_{key}" in layer._parameters]
        first = names[:1]
    return first + [name for name in names if name not in first] if first else []


def of_unknown_code(layer: nn.Module) -> bool:
    """Whether a parametrization is not one of PyTorch's own: its code may read what the layer does not hold."""
    held: Any = layer.parametrizations if nn.utils.parametrize.is_parametrized(layer) else {}
    return any(type(each) not in _KNOWN for name in held for each in held[name])


def take_off(layer: nn.Module) -> None:
    """Take them off a layer of which values() has some, which lacks these parameters then. remove_parametrizations()
    would change the class, which copies of a layer share."""
    if nn.utils.parametrize.is_parametrized(layer):
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]
        return
    for key, hook in list(layer._forward_pre_hooks.items()):
        if (name := _tensor_of(hook)) is None:
            continue
        del layer._forward_pre_hooks[key], vars(layer)[name]
        for held, ends in ((layer._parameters, ("v", "g", "orig")), (layer._buffers, ("mask", "u", "v"))):
            for end in ends:
                held.pop(f"{name}_{end}", None)
    for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "hook", hook), (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)):
                del hooks[key]


def _by_parametrizations(layer: nn.Module) -> dict[str, Tensor]:
    held: Any = layer.parametrizations
    if set(held) - _TENSORS:
        return {}
    shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
                              for parameter in held.parameters()}
    alone = deepcopy(held, shared).eval()
    first, second = ({name: each() for name, each in alone.items()} for _ in range(2))  # type: ignore[operator]
    return first if all(torch.equal(first[name], second[name]) for name in first) else {}


def _by_hooks(layer: nn.Module) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for hook in layer._forward_pre_hooks.values():
        name = _tensor_of(hook)
        if name is None:
            continue
        if name in made or name not in _TENSORS or name not in vars(layer):
            return {}
        made[name] = _ways(hook)(layer)
    return made


def _tensor_of(hook: Any) -> str | None:
    """The name of what such a hook computes; None of any other."""
    name: str | None = hook._tensor_name if isinstance(hook, BasePruningMethod) else \
        hook.name if isinstance(hook, (WeightNorm, SpectralNorm)) else None
    return name


def _ways(hook: Any) -> Callable[[nn.Module], Tensor]:
    if isinstance(hook, SpectralNorm):
        return lambda layer: hook.compute_weight(layer, do_power_iteration=False)
    way: Callable[[nn.Module], Tensor] = hook.compute_weight if isinstance(hook, WeightNorm) else hook.apply_mask
    if isinstance(hook, BasePruningMethod) and type(hook).__call__ is not BasePruningMethod.__call__:
        raise TypeError("a hook with code of its own")
    return way
