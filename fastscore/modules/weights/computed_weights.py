"""Layers of a class of their own that compute their weight from their parameters in every pass, as weight
standardisation does: of all inputs, so that a layer which loses some would compute another one.

In evaluation copies, and in a model that pruning returns where it loses something, such a layer is a plain Conv or
Linear that holds the weight it computed; and one whose weight PyTorch's utilities compute (see
fastscore.modules.weights.reparametrized) is what it was without them. Layers that were seen, where the model ran, to
compute their weight from more than that, stay what they are: see compute_on().
"""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.copying import counterparts, is_setting
from fastscore.modules.weights import reparametrized
from fastscore.modules.weights.own_layers import ARGUMENTS, Calls, become_layer, own_layer, weight_of

PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), ARGUMENTS)
_OWN = {"weight", "bias"}
_UNUSED = "_unused_parameters"  # of a layer that became plain: what is counted, and does nothing
_BY_CODE = "_computed_its_weight"  # of one whose class did
_COMPUTES_ON = "_computes_on"  # of a copy's layer: why it is not made plain
_compute_on: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()  # the same, of users' layers

# classes -> layers of them that were seen to call no product of PyTorch's, by what their code has to go by
_multiply_otherwise: "weakref.WeakKeyDictionary[type[nn.Module], set[Any]]" = weakref.WeakKeyDictionary()


def computed_weight(layer: nn.Module) -> Tensor | None:
    """The weight that a layer computes of its parameters alone; None of any other layer.

    Of one whose weight, or bias, PyTorch's utilities compute it is what they do. Any other is run in evaluation mode on
    two inputs of its own, and must hand what it reads, its own bias and settings to one product, with the same weight
    both times, and return that as it is: then the product is all that it does. None as well of a layer of which
    compute_on() has been told.
    """
    if why_it_computes_on(layer) is not None:
        return None
    if held := reparametrized.values(layer):
        return held.get("weight", layer._parameters.get("weight"))
    if (own := own_layer(layer)) is not None:
        return weight_of(layer, own)
    ours = str(type(layer).__module__).partition(".")[0] == __name__.partition(".")[0]  # which multiply by what is held
    weight = None if ours else _probed(layer)
    return None if weight is None or weight is layer._parameters.get("weight") else weight


def multiplies_plainly(layer: nn.Module) -> bool:
    """Whether a layer of a class of its own, run alone, does nothing but the product with its own weight."""
    weight = _probed(layer) if why_it_computes_on(layer) is None else None
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
    kind = _built(layer)
    if kind is not None and kind in _multiply_otherwise.get(type(layer), ()):
        return None
    alone = copy.copy(layer)  # what its code counts or keeps is not for the user's layer
    alone.training = False
    with Calls(_FUNCTIONS) as calls:
        first = _product(alone, own, 0)
    if not calls.made and kind is not None:
        _multiply_otherwise.setdefault(type(layer), set()).add(kind)
    second = None if first is None else _product(alone, own, 1)
    if first is None or second is None or first.shape != own.shape or not torch.equal(first, second):
        return None
    return first


def _built(layer: nn.Module) -> Any:
    """The same for layers of a class whose code has the same to go by, but for the numbers in its tensors; None where
    that cannot be said."""
    settings = {name: value for name, value in vars(layer).items() if name not in ("_parameters", "training")}
    held = tuple((name, None if x is None else (x.shape, x.dtype, x.device)) for name, x in layer._parameters.items())
    if any(not (is_setting(value) or (isinstance(value, dict | set) and not value)) for value in settings.values()):
        return None
    return type(layer).forward, held, repr(sorted(settings.items()))


def become_plain(layer: nn.Module, weight: Tensor, keep: bool = False) -> None:
    """Make a layer the Conv or Linear that holds `weight`, in place.

    keep: the layer's other parameters stay beside it, unused, so that they are counted.
    """
    made, more, own_kind = reparametrized.values(layer), list[nn.Parameter | None](), own_layer(layer)
    if made:
        held = {name: [layer.get_parameter(key) for key in reparametrized.sources(layer, name)] for name in made}
        reparametrized.take_off(layer)
        for name, value in made.items():
            learns = any(parameter.requires_grad for parameter in held[name])
            layer._parameters[name] = nn.Parameter((weight if name == "weight" else value).detach(), learns)
            more += held[name][1:]
    elif own_kind is not None:
        become_layer(layer, own_kind, weight)
    else:
        own, plain = layer._parameters["weight"], _plain(layer)
        assert plain is not None
        assert own is not None
        layer.__class__ = plain
        layer._parameters["weight"] = nn.Parameter(weight.detach(), own.requires_grad)
        more = [layer._parameters.pop(name) for name in list(layer._parameters) if name not in _OWN]
    if keep:
        unused = {f"weight_unused_{number}": parameter for number, parameter in enumerate(more)}
        layer._parameters.update(unused)
        vars(layer).update({_UNUSED: tuple(unused), _BY_CODE: not made})


def compute_on(layer: nn.Module, reason: str) -> None:
    """Remember of a layer, for as long as it lives, why it is not made plain. Nothing is written to it."""
    _compute_on[layer] = reason


def why_it_computes_on(layer: nn.Module) -> str | None:
    """What compute_on() was told of a layer, or of the one that it is a copy of; None of any other."""
    reason: str | None = _compute_on.get(layer) or vars(layer).get(_COMPUTES_ON)
    return reason


def mark_copies(model: nn.Module, copy: nn.Module) -> None:
    """Write to the layers of an evaluation copy what compute_on() was told of the model's."""
    for layer, own in counterparts(_compute_on, model, copy):
        vars(own)[_COMPUTES_ON] = _compute_on[layer]


def compute_on_in(model: nn.Module, copy: nn.Module) -> None:
    """Remember of the layers of another model, which is like `model`, what compute_on() was told of those."""
    for layer, own in counterparts(_compute_on, model, copy):
        compute_on(own, _compute_on[layer])


def was_computed(layer: nn.Module) -> bool:
    """Whether a layer of an evaluation copy holds the weight that one of a class of its own computed, by code."""
    return vars(layer).get(_BY_CODE, False) and type(layer) in PLAIN


def multiplied_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The weight of a call of a product of a Conv or Linear; None of any other function."""
    if func not in _FUNCTIONS:
        return None
    weight: Tensor = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}["weight"]
    return weight


def unused_parameters(layer: nn.Module) -> tuple[str, ...]:
    """Those that a layer which became plain has kept, and does not read."""
    names: tuple[str, ...] = vars(layer).get(_UNUSED, ())
    return names


def computed_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of `names` that are layers of a model which compute their weight -> that weight."""
    modules = dict(model.named_modules())
    found = ((name, computed_weight(modules[name])) for name in dict.fromkeys(names) if name in modules)
    return {name: weight for name, weight in found if weight is not None}


def held_after(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of those of `names` that compute their weight: each parameter that it is held in once they are plain -> the one
    that this was computed from. By their qualified names."""
    found: dict[str, str] = {}
    for name in computed_weights(model, names):
        layer = model.get_submodule(name)
        made = reparametrized.values(layer)
        if not made and own_layer(layer) is not None:  # which holds the same numbers
            continue
        found |= {f"{name}.{key}": f"{name}.{reparametrized.sources(layer, key)[0] if made else key}"
                  for key in made or ("weight",)}
    return found


def make_plain(model: nn.Module, names: Iterable[str]) -> None:
    """Make those of `names`, layers of a model, plain that compute their weight, in place."""
    for name in computed_weights(model, names):
        make_layer_plain(model.get_submodule(name))


def make_layer_plain(layer: nn.Module, keep: bool = False) -> None:
    """Make a layer plain that computes its weight, in place, and leave any other. keep: see become_plain."""
    for _ in range(2):  # its code may go on with what PyTorch's utilities compute
        if (weight := computed_weight(layer)) is None:
            return
        become_plain(layer, weight, keep)


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
    with torch.no_grad(), Calls(_FUNCTIONS) as calls:
        try:
            output = type(layer).forward(layer, x)  # without the user's hooks
        except Exception:  # of a layer that takes something else
            return None
    if len(calls.made) != 1:
        return None
    _, arguments, made = calls.made[0]
    settings = [name for name in ARGUMENTS[3:] if name in arguments and arguments[name] != getattr(layer, name, None)]
    if output is not made or arguments["input"] is not x or settings or \
            arguments.get("bias") is not layer._parameters.get("bias"):
        return None
    weight: Tensor = arguments["weight"]
    return weight
