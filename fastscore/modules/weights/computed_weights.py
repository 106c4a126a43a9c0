"""Layers of a class of their own that compute their weight from their parameters in every pass, as weight
standardisation does: of all inputs, so that a layer which loses some would compute another one.

In evaluation copies, and in a model that pruning returns where it loses something, such a layer is a plain Conv or
Linear that holds the weight it computed; and one with weight_norm, of either kind, is what it was without it, which can
learn the same. Other parametrizations, which hold a weight to what it would learn away, stay what they are; and so do
layers that were seen, where the model ran, to compute their weight from more than that: see compute_on().
"""

import copy
import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OWN = {"weight", "bias"}
_PARAMETRIZED = ("parametrizations.weight.original0", "parametrizations.weight.original1")
_HOOKED = ("weight_g", "weight_v")
_UNUSED = "_unused_parameters"  # of a layer that became plain: what is counted, and does nothing
_COMPUTES_ON = "_computes_on"  # of a copy's layer: why it is not made plain
_compute_on: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()  # the same, of users' layers


def computed_weight(layer: nn.Module) -> Tensor | None:
    """The weight that a layer computes of its parameters alone; None of any other layer.

    One with weight_norm is asked. Any other is run in evaluation mode on two inputs of its own, and must hand what it
    reads, its own bias and settings to one product, with the same weight both times, and return that as it is: then the
    product is all that it does. None as well of a layer of which compute_on() has been told.
    """
    if why_it_computes_on(layer) is not None:
        return None
    if weight_norm(layer) is not None:
        return _normalized(layer)
    weight = _probed(layer)
    return None if weight is None or weight is layer._parameters.get("weight") else weight


def multiplies_plainly(layer: nn.Module) -> bool:
    """Whether a layer of a class of its own, run alone, does nothing but the product with its own weight."""
    weight = _probed(layer) if why_it_computes_on(layer) is None and weight_norm(layer) is None else None
    return weight is not None and weight is layer._parameters.get("weight")


def plain_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What PyTorch's own Conv or Linear makes with what a layer holds."""
    plain: Any = _plain(layer)
    return plain.forward(layer, *args, **kwargs)


def _probed(layer: nn.Module) -> Tensor | None:
    """The weight of the one product that a layer of a class of its own is, its own or one that it computes."""
    plain = _plain(layer)
    if plain is None or type(layer).forward is plain.forward or "forward" in vars(layer) or layer._modules or \
            layer._buffers:
        return None
    own = layer._parameters.get("weight")
    if own is None:  # it is computed by a parametrization, or not yet there
        return None
    alone = copy.copy(layer)  # what its code counts or keeps is not for the user's layer
    alone.training = False
    first, second = (_product(alone, own, seed) for seed in (0, 1))
    if first is None or second is None or first.shape != own.shape or not torch.equal(first, second):
        return None
    return first


def become_plain(layer: nn.Module, weight: Tensor, keep: bool = False) -> None:
    """Make a layer the Conv or Linear that holds `weight`, in place.

    Args:
        layer: of which computed_weight() has said `weight`.
        weight: what it holds from now on.
        keep: the layer's other parameters stay beside it, unused, so that they are counted.
    """
    own, plain, normalized = layer._parameters.get("weight"), _plain(layer), weight_norm(layer)
    if normalized is not None:
        gain, own = (layer.get_parameter(name) for name in normalized)
        _without_weight_norm(layer)
        layer._parameters[_HOOKED[0]] = gain
    else:
        assert plain is not None
        layer.__class__ = plain
    assert own is not None
    layer._parameters["weight"] = nn.Parameter(weight.detach(), own.requires_grad)
    more = [name for name in layer._parameters if name not in _OWN] if normalized is None else [_HOOKED[0]]
    if keep:
        vars(layer)[_UNUSED] = tuple(more)
    for name in [] if keep else more:
        del layer._parameters[name]


def compute_on(layer: nn.Module, reason: str) -> None:
    """Remember of a layer, for as long as it lives, why it is not made plain. Nothing is written to it."""
    _compute_on[layer] = reason


def why_it_computes_on(layer: nn.Module) -> str | None:
    """What compute_on() was told of a layer, or of the one that it is a copy of; None of any other."""
    reason: str | None = _compute_on.get(layer) or vars(layer).get(_COMPUTES_ON)
    return reason


def mark_copies(model: nn.Module, copy: nn.Module) -> None:
    """Write to the layers of an evaluation copy what compute_on() was told of the model's."""
    for name, module in model.named_modules() if _compute_on else ():
        if module in _compute_on:
            vars(copy.get_submodule(name))[_COMPUTES_ON] = _compute_on[module]


def compute_on_in(model: nn.Module, copy: nn.Module) -> None:
    """Remember of the layers of another model, which is like `model`, what compute_on() was told of those."""
    for name, module in model.named_modules() if _compute_on else ():
        if module in _compute_on:
            compute_on(copy.get_submodule(name), _compute_on[module])


def was_computed(layer: nn.Module) -> bool:
    """Whether a layer of an evaluation copy holds the weight that one of a class of its own computed, by code."""
    return _UNUSED in vars(layer) and type(layer) in PLAIN and _HOOKED[0] not in layer._parameters


def multiplied_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The weight of a call of a product of a Conv or Linear; None of any other function."""
    if not any(func is known for known in _FUNCTIONS):
        return None
    weight: Tensor = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}["weight"]
    return weight


def unused_parameters(layer: nn.Module) -> tuple[str, ...]:
    """Those that a layer which became plain has kept, and does not read."""
    names: tuple[str, ...] = vars(layer).get(_UNUSED, ())
    return names


def weight_norm(layer: nn.Module) -> tuple[str, str] | None:
    """The names of the gains and of the directions that a layer's weight is computed from; None where it is not, or by
    more than that."""
    if nn.utils.parametrize.is_parametrized(layer):
        held: Any = layer.parametrizations
        known = set(held) == {"weight"} and [type(each) for each in held["weight"]] == [parametrizations._WeightNorm]
        return _PARAMETRIZED if known else None
    hooks = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    return _HOOKED if [hook.name for hook in hooks] == ["weight"] and "weight" in vars(layer) else None


def weight_source(model: nn.Module, layer: str) -> str:
    """The qualified name of the parameter that a layer's weight is, or is computed from."""
    names = weight_norm(model.get_submodule(layer))
    return f"{layer}.{'weight' if names is None else names[1]}"


def _normalized(layer: nn.Module) -> Tensor:
    """The weight of a layer with weight_norm."""
    with torch.no_grad():
        if nn.utils.parametrize.is_parametrized(layer):
            return cast(Tensor, layer.weight).detach()
        hook = next(hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm))
        return cast(Tensor, hook.compute_weight(layer))


def _without_weight_norm(layer: nn.Module) -> None:
    """Take it off a layer, which has no weight then. remove_parametrizations() would change the class, which copies of
    a layer share."""
    if nn.utils.parametrize.is_parametrized(layer):
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]
        return
    for key in [key for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, WeightNorm)]:
        del layer._forward_pre_hooks[key]
    for name in _HOOKED:
        del layer._parameters[name]
    del vars(layer)["weight"]


def computed_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of `names` that are layers of a model which compute their weight -> that weight."""
    modules = dict(model.named_modules())
    found = ((name, computed_weight(modules[name])) for name in dict.fromkeys(names) if name in modules)
    return {name: weight for name, weight in found if weight is not None}


def make_plain(model: nn.Module, names: Iterable[str]) -> None:
    """Make those of `names`, layers of a model, plain that compute their weight, in place."""
    for name, weight in computed_weights(model, names).items():
        become_plain(model.get_submodule(name), weight)


def _plain(layer: nn.Module) -> type[nn.Module] | None:
    """The class of PyTorch that a layer's class is made from."""
    return next((plain for plain in PLAIN if isinstance(layer, plain)), None)


def _product(layer: nn.Module, own: nn.Parameter, seed: int) -> Tensor | None:
    """The weight of the one product that the layer's forward is, on a random input, of another size for each seed."""
    if isinstance(layer, nn.Linear):
        shape = [1 + seed, layer.in_features]
    else:
        conv: Any = layer
        extent = [step * (kernel - 1) + 1 for step, kernel in zip(conv.dilation, conv.kernel_size, strict=True)]
        shape = [1, conv.in_channels, *(size + seed * (size + 1) for size in extent)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(own)
    with torch.no_grad(), _Calls() as calls:
        try:
            output = type(layer).forward(layer, x)  # without the user's hooks
        except Exception:  # of a layer that takes something else
            return None
    if len(calls.made) != 1:
        return None
    arguments, made = calls.made[0]
    settings = [name for name in _ARGUMENTS[3:] if name in arguments and arguments[name] != getattr(layer, name, None)]
    if output is not made or arguments["input"] is not x or settings or \
            arguments.get("bias") is not layer._parameters.get("bias"):
        return None
    weight: Tensor = arguments["weight"]
    return weight


class _Calls(TorchFunctionMode):
    """Notes the products of a Conv or Linear that run in the block: (arguments by name, what came of it)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(func is known for known in _FUNCTIONS):
            self.made.append(({**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}, output))
        return output
