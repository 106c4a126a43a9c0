"""Which layers a model's code runs without a call, as its first run shows: what fastscore.modules.weights.called_layers
goes by, where they compute what a call would."""

from collections.abc import Iterator
from itertools import takewhile
from types import FrameType
from typing import Any, cast

import torch
from torch import nn

from fastscore.modules import frames
from fastscore.modules.forwards import Forward, InThePlaceOfForwards, put_back
from fastscore.modules.hooks import has_users_hooks
from fastscore.modules.inspection import parametrized
from fastscore.modules.weights import layer_functions, own_norms
from fastscore.modules.weights.called_layers import NOTED, Uses
from fastscore.modules.weights.noted_products import NotedProducts, put_parameters_back

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
           nn.PReLU, nn.Embedding, nn.RNNBase)  # whose forward may run without a call


class Noting(InThePlaceOfForwards):
    """In the block, what a run of a model, a copy, shows of such uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for module in list(model.modules()):
            put_back(module)  # of what was noted before: its own code is to be seen
            put_parameters_back(module)
        self._names = {module: name for name, module in model.named_modules()}
        self.products = NotedProducts(model)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            if (weight := module._parameters.get("weight")) is not None:
                self._owners.setdefault(id(weight), []).append(module)
        self._used: dict[str, set[str]] = {}  # module -> layers
        self._by_function, self._without_bias = set[str](), set[str]()
        self._past = set[str]()  # layers whose forward runs, and cannot be called instead
        self._otherwise = set[str]()  # layers whose weight is used for something else
        self._normalizing = set[str]()  # modules whose code runs normalisations with tensors of its own

    def stand_ins(self) -> Iterator[Forward]:
        for module in self._names:
            if not isinstance(module, torch.jit.ScriptModule):
                watched = _Watched.put(module)
                watched.noting = self
                yield watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if own_norms.is_own(func, caller := frames.innermost(frames.outwards()), args, kwargs) and \
                not any(id(tensor) in self._owners for tensor in (*args, *kwargs.values())) and caller in self._names:
            self._normalizing.add(self._names[caller])
        if func in layer_functions.FUNCTIONS:
            given, stack = layer_functions.bound(func, args, kwargs), list(frames.outwards())
            owners = self._owners.get(id(given.get("weight")), [])
            own_forward = any(frames.owner(frame) is layer for frame in stack for layer in owners)
            if owners and not own_forward:
                name, around = self._names[owners[0]], self._around(owners[0], stack)
                if len(owners) > 1 or around is None or not layer_functions.computes_the_same(owners[0], func, given):
                    self._otherwise.add(name)
                else:
                    self._used.setdefault(around, set()).add(name)
                    self._by_function.add(name)
                    self._without_bias |= {name} if owners[0]._parameters.get("bias") is None else set()
        output = func(*args, **kwargs)
        self.products.see(func, args, kwargs, output, lambda: list(frames.outwards()))
        return output

    def _around(self, layer: nn.Module, stack: list[FrameType]) -> str | None:
        """The innermost module that is called, where it holds the layer and its forward runs, not a hook of it."""
        caller = frames.innermost(stack)
        inside = map(frames.owner, takewhile(lambda frame: frames.called(frame) is None, stack))
        if not any(isinstance(own, _Watched) and own.module is caller for own in inside):
            return None
        around = self._names[cast(nn.Module, caller)]
        return around if f"{self._names[layer]}.".startswith(f"{around}." if around else "") else None

    def runs(self, layer: nn.Module, stack: list[FrameType]) -> None:
        """Whether the forward of a layer, which runs, is one that is not called."""
        if isinstance(layer, _LAYERS) and frames.innermost(stack) is not layer:
            around = self._around(layer, stack)
            if around is None:
                self._past.add(self._names[layer])
            else:
                self._used.setdefault(around, set()).add(self._names[layer])

    def remember(self, model: nn.Module) -> dict[str, str]:
        """Remember of the modules of `model`, which the one that ran is a copy of, what was noted, in the place of what
        was before.

        Returns layers that are run without a call, which cannot be called instead -> why they are kept."""
        modules, used = dict(model.named_modules()), set[str]().union(*self._used.values())
        for module in modules.values():
            NOTED.pop(module, None)
            own_norms.NOTED.discard(module)
        own_norms.NOTED.update(modules[name] for name in self._normalizing & modules.keys())
        held = {name for name in used & modules.keys() if has_users_hooks(modules[name])}
        self._past |= held - self._by_function
        self._otherwise |= held | {name for name in self._by_function & modules.keys() if parametrized(modules[name])}
        for around, names in self._used.items():
            whole, begin = names - self._otherwise - self._past, len(around) + 1 if around else 0
            if around in modules and whole <= modules.keys() and whole:
                NOTED[modules[around]] = Uses(frozenset(name[begin:] for name in whole),
                                               frozenset(name[begin:] for name in whole & self._without_bias))
        self.products.remember(model, used - self._otherwise - self._past)
        return {name: f"the model's code runs {name} by {name}.forward(x), which its hooks do not see: write {name}(x)"
                for name in self._past if name in modules}


class _Watched(Forward):
    """Of a module of a copy, as it runs first."""

    noting: Noting

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.noting.runs(self.module, list(frames.outwards()))
        output = self.run(self.module, *args, **kwargs)
        self.noting.products.made(self.module, output)
        return output
