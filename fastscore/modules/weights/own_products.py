"""Parameters that a module's own code multiplies by, `h @ self.head`, an einsum, `F.linear(h, self.embed.weight)`, as
layers, which can be tapped, followed and cut as others are.

Where a model ran, such products are noted (see fastscore.modules.weights.noted_products); in evaluation copies, and in
a user's model as long as it is tapped or masked, a layer stands under the name of the parameter and is called there.
"""

import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from threading import get_ident
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.modules import frames
from fastscore.modules.copying import counterparts
from fastscore.modules.forwards import ForwardWithin
from fastscore.modules.handles import Handle
from fastscore.modules.inspection import hooked
from fastscore.modules.weights import own_convolution
from fastscore.modules.weights.found_weights import Weights
from fastscore.modules.weights.own_convolution import OwnConvolution
from fastscore.modules.weights.own_linear import OwnLinear, TiedLinear
from fastscore.modules.weights.parameter_layers import HoldsLayers, changed, put_back
from fastscore.modules.weights.products import is_view

OwnLayer: TypeAlias = OwnLinear | OwnConvolution
OWN = (OwnLinear, OwnConvolution)


@dataclass(frozen=True)
class OwnProduct:
    """Of a module's code: a parameter that it multiplies by.

    owner, key: the module below it that has the parameter, and its name there. order: its dimensions: (copies, if there
    are several,) outputs, inputs. name: that of the layer in the module; "" where the parameter becomes the layer, and
    is held by no other. also: the qualified name, below the module, of the same parameter in a module that is no layer.
    settings: of a convolution.
    """

    owner: str
    key: str
    order: tuple[int, ...]
    name: str = ""
    also: str = ""
    settings: own_convolution.Settings | None = None

    @property
    def layer(self) -> str:
        """The name of the layer below the module."""
        return self.name or f"{self.owner}.{self.key}".lstrip(".")


NOTED: "weakref.WeakKeyDictionary[nn.Module, tuple[OwnProduct, ...]]" = weakref.WeakKeyDictionary()  # of users' models
# users' modules, and copies of them -> parameters that their code computes what it multiplies by of, in each pass
COMPUTED: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
# module -> name of a layer that stands in it where it is replaced -> what it is of
_HELD: "weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[nn.Module, OwnProduct]]]" = weakref.WeakKeyDictionary()


class _Products(TorchFunctionMode):
    """In the block, those layers are called."""

    def __init__(self, module: nn.Module, own: "_MultipliesByLayers") -> None:
        super().__init__()
        self._module, self._own, self._weights = module, own, Weights()
        self._layers: list[OwnLayer] = []
        self._of_order: dict[tuple[int, tuple[int, ...]], OwnLinear] = {}  # (memory, order)
        self._convolutions: dict[tuple[int, own_convolution.Settings | None], OwnConvolution] = {}
        for product in own.products:
            layer = _below(module, product.layer)
            tensor, dims = layer.stored
            self._weights.add(tensor, dims)
            if isinstance(layer, OwnConvolution):
                self._convolutions[id(tensor), layer.numbers] = layer
            else:
                self._of_order[id(tensor), layer.dims] = layer
            self._layers.append(layer)

    def __enter__(self) -> "_Products":
        for layer in self._layers:
            layer.readers.append(get_ident())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for layer in self._layers:
            layer.readers.remove(get_ident())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (found := self._weights.product(func, args, kwargs)) is not None:
            product, seen = found
            layer = self._of_order.get((id(seen.base), seen.dims)) or self._of_one_number(id(seen.base), product.weight)
            if self._runs_itself(id(seen.base)):
                return func(*args, **kwargs)
            if layer is not None:
                y = layer(product.x) if seen.copy is None else layer(product.x, seen.copy[1])
                for scale in seen.scales:
                    y = scale(y)
                return product.finish(y)
            self._refuse_another_way()
        if (given := own_convolution.given(func, args, kwargs)) is not None and \
                (of := self._weights.find(given["weight"])) is not None:
            convolution = self._convolutions.get((id(of.base), own_convolution.settings_of(given)))
            if convolution is not None:
                y = convolution(given["input"])
                for scale in of.scales:
                    y = scale(y)
                return own_convolution.with_bias(y, given["bias"], given["weight"])
            self._refuse_another_way(own_convolution.groups_that_stay(given))
        if (is_view(func) and any(map(self._weights.is_weight, args))) or self._weights.scales(func, args, kwargs):
            with torch._C.DisableTorchFunction():  # what reads the weight is the layer
                output = func(*args, **kwargs)
                self._weights.note_scaled(func, args, kwargs, output)
            return output
        return func(*args, **kwargs)

    def _refuse_another_way(self, why: str = "") -> None:
        if self._own.permanent or any(map(hooked, self._layers)):
            raise RuntimeError(f"the code of {type(self._module).__name__} " + (why or (
                "multiplies by a parameter in another way than on the first batch, where nothing would be measured: "
                "use batches of one kind")))

    def _of_one_number(self, weight: int, given: Tensor) -> OwnLinear | None:
        """The layer of a weight of one output and one input, which lies the same either way."""
        return next((layer for (of, _), layer in self._of_order.items()
                     if of == weight and given.shape[-2:].numel() == layer.weight.shape[-2:].numel() == 1), None)

    def _runs_itself(self, weight: int) -> bool:
        """Whether it is the layer that holds a weight which multiplies by it."""
        holders = [layer.owner for (of, _), layer in self._of_order.items()
                   if of == weight and isinstance(layer, TiedLinear)]
        inside = takewhile(lambda frame: frames.called(frame) is not self._module, frames.outwards())
        return bool(holders) and any(frames.owner(frame) is holder for frame in inside for holder in holders)


class _MultipliesByLayers(ForwardWithin):
    """Of a module whose code multiplies by parameters. products: of it."""

    products: tuple[OwnProduct, ...] = ()

    def block(self, module: nn.Module) -> _Products:
        return _Products(module, self)


class ProductsAsLayers(Handle):
    """A module whose code multiplies by layers, until `remove`."""

    def __init__(self, module: nn.Module, products: tuple[OwnProduct, ...]) -> None:
        self._module = module
        self._owners, self._tied = list[nn.Module](), list[str]()
        for product in sorted(products, key=lambda each: bool(each.name)):  # whom others are tied to comes first
            owner = module.get_submodule(product.owner)
            if product.name:
                if product.name not in module._modules:
                    held = owner._modules.get(product.key)
                    layer = held if isinstance(held, OwnLinear) else owner
                    module.add_module(product.name, TiedLinear(layer, product.key, product.order, product.also))
                    self._tied.append(product.name)
            elif product.key not in owner._modules:
                others = dict(owner._modules)
                owner._modules.clear()
                owner.add_module(product.key, OwnLinear(owner, product.key, product.order) if product.settings is None
                                 else own_convolution.of(owner, product.key, product.settings))
                owner._modules.update(others)  # behind it, so that parameters come in the order that they had
                owner.__class__ = changed(HoldsLayers, type(owner)) if owner not in self._owners else owner.__class__
                self._owners.append(owner)
        self._own = _MultipliesByLayers.put(module)
        self._own.products = products

    def remove(self) -> None:
        self._own.leave()
        for name in self._tied:
            self._module._modules.pop(name, None)
        for owner in self._owners:
            put_back(owner)
        self._owners, self._tied = [], []

    def make_permanent(self) -> None:
        self._own.permanent = True
        for product in self._own.products:
            _below(self._module, product.layer).lie_as_a_linear()
        self._owners, self._tied = [], []


def _below(module: nn.Module, name: str) -> OwnLayer:
    """A layer, whoever reads it as a tensor meanwhile."""
    for key in name.split("."):
        module = module._modules[key]  # type: ignore[assignment]
    assert isinstance(module, OWN)
    return module


def replace(model: nn.Module, noted: nn.Module, called: Collection[str] | None = None) -> Iterator[Handle]:
    """Have modules whose code was noted multiply by layers, a handle for each.

    noted: the model itself, or the one that it is a copy of. called: names of layers; only modules that multiply by one
    of them are changed. None: all.
    """
    for module, own in counterparts(COMPUTED, noted, model) if noted is not model else ():
        COMPUTED[own] = COMPUTED[module]
    for name, module in list(noted.named_modules()) if NOTED else ():
        products = NOTED.get(module, ())
        if products and (called is None or any(f"{name}.{each.layer}".lstrip(".") in called for each in products)):
            yield ProductsAsLayers(model.get_submodule(name), products)


def note(module: nn.Module, products: tuple[OwnProduct, ...]) -> None:
    """Remember of a user's module what its code multiplies by, in the place of what was before."""
    forget(module)
    NOTED[module] = products
    for product in products:
        owner = module.get_submodule(product.owner)
        holder, key = (module, product.name) if product.name else (owner, product.key)
        _HELD.setdefault(holder, {})[key] = owner, product


def forget(module: nn.Module) -> None:
    """Remember nothing of a module."""
    for product in NOTED.pop(module, ()):
        holder, key = (module, product.name) if product.name else (module.get_submodule(product.owner), product.key)
        _HELD.get(holder, {}).pop(key, None)
    COMPUTED.pop(module, None)


def remember_in(model: nn.Module, copy: nn.Module) -> None:
    """Remember of the modules of another model, which is like `model`, what was noted of those."""
    for module, own in counterparts(NOTED, model, copy):
        note(own, NOTED[module])


def held(module: nn.Module, key: str) -> OwnProduct | None:
    """What a module that is not replaced multiplies by, or holds, under the name of a layer; None of all else."""
    found = _HELD.get(module, {}).get(key)
    return None if found is None or key in module._modules else found[1]


def names(model: nn.Module) -> dict[str, nn.Module]:
    """The names of all that held() finds in a model -> the module that has it."""
    return {f"{name}.{key}".lstrip("."): module for name, module in model.named_modules()
            for key in _HELD.get(module, ())}


def channels_of(module: nn.Module, key: str) -> tuple[int, int]:
    """(how many channels what held() finds reads, the dimension of its input that holds them)."""
    owner, product = _HELD[module][key]
    weight: Tensor = getattr(owner, product.key)
    return weight.shape[product.order[-1] if product.settings is None else 1], \
        -1 if product.settings is None else 1 - weight.dim()
