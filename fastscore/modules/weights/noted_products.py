"""Which parameters a model's code multiplies by, as its first run shows: what fastscore.modules.weights.own_products
goes by, where the code does nothing else with them."""

from collections.abc import Callable, Container, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.parts import tensors_of
from fastscore.modules import frames
from fastscore.modules.inspection import runs_code_of
from fastscore.modules.weights import own_convolution, own_products
from fastscore.modules.weights.found_weights import Weights
from fastscore.modules.weights.own_convolution import Settings
from fastscore.modules.weights.own_products import OwnProduct
from fastscore.modules.weights.parameter_layers import ParameterLayer, put_back
from fastscore.modules.weights.products import PRODUCTS, is_view

_OF_NO_LAYER = ("torch.nn.modules.module", "torch.nn.modules.container")  # modules whose code is their user's
_LAYERS = (nn.Linear, nn.Embedding)  # whose weight other code may multiply by, which goes with theirs then


def put_parameters_back(module: nn.Module) -> None:
    """Make layers that products were noted for parameters again, in place."""
    if any(isinstance(layer, own_products.OWN) for layer in module._modules.values()):
        put_back(module)


class NotedProducts:
    """Of a copy of a model that runs."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._weights = Weights()
        # id of a parameter -> (the layer of PyTorch that holds it, or a module of a class of its own; its name there)
        self._of: dict[int, tuple[nn.Module, str]] = {}
        self._also: dict[int, str] = {}  # the same -> its qualified name in a module that is no layer
        self._otherwise = set[int]()  # parameters that the code does more with, or that cannot be layers
        self._ran = set[int]()  # those that layers of PyTorch hold which ran
        self._computed: dict[int, tuple[Tensor, set[int]]] = {}  # id of a tensor -> itself, and of which it is computed
        self._in_products = set[int]()  # those of which what is multiplied by is computed
        self._around: dict[int, set[str]] = {}  # parameter -> modules whose code multiplies by it
        self._orders: dict[int, list[tuple[tuple[int, ...], Settings | None]]] = {}  # and settings of convolutions
        # of Linears whose own code reads them, the orders in which it multiplies; those with which it does more
        self._inside: dict[int, set[tuple[int, ...]]] = {}
        self._more_inside = set[int]()
        self._several = set[nn.Module]()  # Linears that return no tensor, but several
        self._parameters: dict[int, Tensor] = {}
        for module, name in self._names.items():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point() and 1 < parameter.dim() < 6:
                    self._note_holder(module, name, key, parameter)
        self._computed.update((id(tensor), (tensor, set())) for tensor in (*model.parameters(), *model.buffers())
                              if id(tensor) not in self._parameters)
        for parameter in self._parameters.values():
            self._weights.add(parameter, tuple(range(parameter.dim())))

    def _note_holder(self, module: nn.Module, name: str, key: str, parameter: nn.Parameter) -> None:
        layer = key == "weight" and isinstance(module, _LAYERS) and not isinstance(module, ParameterLayer)
        own = not any(kind.__module__.startswith("torch.") and kind.__module__ not in _OF_NO_LAYER
                      for kind in type(module).__mro__)
        held = any(isinstance(part, ParameterLayer) for part in module._modules.values())
        if isinstance(module, ParameterLayer) or held or (not layer and (not own or isinstance(module, _LAYERS))):
            self._otherwise.add(id(parameter))
            return
        before = self._of.get(id(parameter))
        self._parameters[id(parameter)] = parameter
        if before is None or layer:
            self._of[id(parameter)] = module, key
        if before is None:
            return
        one, other = (before, (module, key)) if not layer else ((module, key), before)
        if not isinstance(one[0], _LAYERS) or isinstance(other[0], _LAYERS) or id(parameter) in self._also:
            self._otherwise.add(id(parameter))
        else:
            self._also[id(parameter)] = f"{self._names[other[0]]}.{other[1]}".lstrip(".")

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any, stack: Callable[[], list[FrameType]]
            ) -> None:
        """What a call does with parameters."""
        with torch._C.DisableTorchFunction():
            tensors = list(tensors_of((args, kwargs)))
            given = [seen for tensor in tensors if (seen := self._weights.find(tensor)) is not None]
            self._follow_computed(func, tensors, output)
            if not given or next(tensors_of(output), None) is None:  # a shape, say
                return
            convolution = own_convolution.given(func, args, kwargs)
            if (found := self._weights.product(func, args, kwargs)) is not None:
                if self._runs(found[1].base, stack):
                    self._inside.setdefault(id(found[1].base), set()).add(found[1].dims)
                else:
                    self._see_product(id(found[1].base), (found[1].dims, None), stack)
            elif convolution is not None and len(given) == 1 and self._weights.is_weight(convolution["weight"]):
                settings = own_convolution.settings_of(convolution)
                if settings is None or given[0].dims != tuple(range(given[0].base.dim())):
                    self._otherwise.add(id(given[0].base))
                else:
                    self._see_product(id(given[0].base), (given[0].dims, settings), stack)
            elif self._weights.scales(func, args, kwargs):
                self._weights.note_scaled(func, args, kwargs, output)
            elif not is_view(func) or (isinstance(output, Tensor) and self._weights.find(output) is None):
                for seen in given:
                    if not (isinstance(output, Tensor) and output is seen.base):
                        (self._more_inside if self._runs(seen.base, stack) else self._otherwise).add(id(seen.base))

    def made(self, module: nn.Module, output: Any) -> None:
        """What a module has returned."""
        if isinstance(module, nn.Linear) and not isinstance(output, Tensor):
            self._several.add(module)

    def _follow_computed(self, func: Any, tensors: list[Tensor], output: Any) -> None:
        """Note what is computed of parameters alone, and which of them what is multiplied by comes of."""
        if func in PRODUCTS or own_convolution.is_one(func):
            self._in_products.update(*(self._computed[id(x)][1] for x in tensors if id(x) in self._computed))
        of = [{id(seen.base)} if (seen := self._weights.find(tensor)) is not None else
              self._computed[id(tensor)][1] if id(tensor) in self._computed else
              set[int]() if tensor.numel() == 1 else None for tensor in tensors]
        if tensors and all(one is not None for one in of):
            for tensor in tensors_of(output):
                self._computed[id(tensor)] = tensor, set[int]().union(*filter(None, of))

    def _runs(self, weight: Tensor, stack: Callable[[], list[FrameType]]) -> bool:
        """Whether it is the layer that holds a weight which reads it."""
        owner, _ = self._of[id(weight)]
        if not isinstance(owner, _LAYERS) or not any(frames.owner(frame) is owner for frame in stack()):
            return False
        self._ran.add(id(weight))
        return True

    def _see_product(self, weight: int, order: tuple[tuple[int, ...], Settings | None],
                     stack: Callable[[], list[FrameType]]) -> None:
        held = f"{self._names[self._of[weight][0]]}."
        around = next((self._names[module] for module in map(frames.called, stack()) if module in self._names
                       and held.startswith(f"{self._names[module]}." if self._names[module] else "")), None)
        if around is None:
            self._otherwise.add(weight)
            return
        self._around.setdefault(weight, set()).add(around)
        if order not in (orders := self._orders.setdefault(weight, [])):
            orders.append(order)

    def remember(self, model: nn.Module, called: Container[str]) -> None:
        """Remember of the modules of `model`, which the one that ran is a copy of, what was noted. called: layers that
        code runs without a call, which are called instead."""
        modules = dict(model.named_modules())
        for module in modules.values():
            own_products.forget(module)
        of_module: dict[str, list[OwnProduct]] = {}
        for weight, arounds in self._around.items():
            owner, key = self._of[weight]
            name, around = self._names[owner], min(arounds, key=len)
            is_layer = isinstance(owner, _LAYERS)
            if weight in self._otherwise or name in called or \
                    around not in modules or name not in modules or key not in modules[name]._parameters or \
                    (is_layer and (weight not in self._ran or not any(
                        runs_code_of(modules[name], kind) for kind in _LAYERS if isinstance(owner, kind)))):
                continue
            within = name[len(around) + 1 if around else 0:]
            if len(self._orders[weight]) > 1 and any(settings for _, settings in self._orders[weight]):
                continue
            for number, (order, settings) in enumerate(self._orders[weight]):
                tied = "" if not is_layer and not number else \
                    f"{key}{number + 1 if number else ''}_of_{within.replace('.', '_')}".removesuffix("_of_")
                product = OwnProduct(within, key, order, tied, self._also.get(weight, ""), settings)
                of_module.setdefault(around, []).append(product)
        for weight, product in self._of_several():
            if (name := self._names[self._of[weight][0]]) in modules and name not in called:
                of_module.setdefault(name, []).append(product)
        for around, found in of_module.items():
            own_products.note(modules[around], tuple(found))
        followed = {product.layer for found in of_module.values() for product in found}
        for weight in self._in_products:
            owner, key = self._of[weight]
            if self._names[owner] in modules and f"{self._names[owner]}.{key}".lstrip(".") not in followed:
                own_products.COMPUTED.setdefault(modules[self._names[owner]], set()).add(key)

    def _of_several(self) -> Iterator[tuple[int, OwnProduct]]:
        """(weight, the product with it) of Linears of a class whose code multiplies by it, and returns several things:
        what it makes of the product is code as any other."""
        known = self._otherwise | self._more_inside | self._around.keys() | self._also.keys()
        for weight in self._inside.keys() - known:
            owner, key = self._of[weight]
            order, *others = self._inside[weight]
            if owner in self._several and not others:
                yield weight, OwnProduct("", key, order)
