"""How a model calls its attention modules, and what they hand on to each other."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches.devices import with_float64
from fastscore.batches.parts import tensors_of
from fastscore.modules.hooks import input_of, put_on
from fastscore.modules.inspection import channel_dim

_TOLERANCE = 0.05  # of a channel's length; bfloat16 rounds to 0.004 of each value


@dataclass(frozen=True)
class Call:
    """The first call of a module.

    args, kwargs: copies, since a cache of keys and values would grow. handed: the arguments, by position or keyword,
    that hold a bias for each head in their last dimension but two.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    handed: frozenset[int | str] = frozenset()

    def of_heads(self, kept: Tensor) -> "Call":
        """The same call, but for the biases of heads that are not `kept` (int64)."""
        def narrow(place: int | str, value: Any) -> Any:
            return value.index_select(-3, kept.to(value.device)) if place in self.handed else value

        return replace(self, args=tuple(narrow(place, value) for place, value in enumerate(self.args)),
                       kwargs={name: narrow(name, value) for name, value in self.kwargs.items()})

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for calls of as many tensors, of the same sizes, for the same arguments."""
        given: dict[Any, Any] = {**dict(enumerate(self.args)), **self.kwargs}
        return self.handed, *((place, type(value), *((x.shape, x.dtype) for x in tensors_of(value)))
                              for place, value in given.items())

    def inputs_of(self, layers: Iterable[str], module: nn.Module, hooks: Iterable[Any] = ()
                  ) -> dict[str, Tensor | None]:
        """What each of `layers` reads in this call of `module`; None where it is not called. hooks: handles of those
        that are there for this call alone."""
        seen: dict[str, Tensor | None] = dict.fromkeys(layers)

        def see(layer: str, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if seen[layer] is None:
                seen[layer] = input_of(args, kwargs).detach().movedim(channel_dim(called), -1)

        handles = [module.get_submodule(layer).register_forward_pre_hook(partial(see, layer), with_kwargs=True)
                   for layer in seen] + [*hooks]
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with put_on(handles), torch.no_grad():
            module(*args, **kwargs)
        return seen


@dataclass
class Calls:
    """Those of the modules `of`, by name; `together`, those that take what another of them returned: a bias for
    each head, as T5's layers do of the first; and `given`, those that take one tensor, which may be such a bias, that
    none of them returned -> where each takes it."""

    of: dict[str, Call] = field(default_factory=dict)
    together: list[list[str]] = field(default_factory=list)
    given: list[dict[str, frozenset[int | str]]] = field(default_factory=list)
    again: set[str] = field(default_factory=set)  # those that are called more than once

    def take(self, given: Mapping[str, frozenset[int | str]]) -> None:
        """What these modules are given, one of `given`, is a bias for each head."""
        for name, places in given.items():
            self.of[name] = replace(self.of[name], handed=self.of[name].handed | places)
        _join(self.together, next(iter(given)), given)


def record(model: nn.Module, heads: Mapping[str, int], run: Callable[[nn.Module], Any], last: bool = False) -> Calls:
    """The first calls of modules in one run of a model, or the last. heads: name of each module -> how many it has."""
    calls = Calls()
    returned: dict[int, tuple[Tensor, str]] = {}  # which are kept, so that no other tensor has their ids
    others: dict[int, tuple[Tensor, dict[str, frozenset[int | str]]]] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in calls.of:
            calls.again.add(name)
            if not last:
                return
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        given.pop(next(iter(given), None), None)  # what attends, which may be an image of as many channels
        handed = {place: returned[id(value)][1] for place, value in given.items()
                  if id(value) in returned and _is_bias(value, heads[name])}
        for place, value in given.items():
            if id(value) not in returned and _is_bias(value, heads[name]):
                places = others.setdefault(id(value), (value, {}))[1]
                places[name] = places.get(name, frozenset()) | {place}
        calls.of[name] = Call(*copy.deepcopy((args, kwargs)), frozenset(handed))
        _join(calls.together, name, handed.values())

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for tensor in tensors_of(output):
            if _is_bias(tensor, heads[name]):
                returned.setdefault(id(tensor), (tensor, name))

    modules = {name: model.get_submodule(name) for name in heads}
    with torch.no_grad(), put_on(handle for name, module in modules.items() for handle in (
            module.register_forward_pre_hook(partial(before, name), with_kwargs=True),
            module.register_forward_hook(partial(after, name)))):
        run(model)
    calls.given = [places for _, places in others.values()]
    return calls


class Steps(TorchFunctionMode):
    """How many operations have been `made` in the block, all done."""

    made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.made += 1
        return output


def randomized(module: nn.Module) -> nn.Module:
    """With random weights: trained ones may be zero, or all alike, and hide which row belongs to which head."""
    generator = torch.Generator().manual_seed(0)
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                values = (torch.rand(parameter.shape, generator=generator) - 0.5) * (12 / fan_in) ** 0.5
                owner._parameters[name] = nn.Parameter(values.to(parameter), requires_grad=False)
    return module


def close(x: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Channel by channel, to rounding in any dtype: a wrong head, of random weights, differs by its own size."""
    if x.shape != expected.shape:
        return False
    x, expected = (with_float64(each.flatten(0, -2)).double() for each in (x, expected))
    return bool(((x - expected).norm(dim=0) <= tolerance * expected.norm(dim=0)).all())


def _is_bias(value: object, heads: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (4, 5) and \
        value.shape[-3] == heads > 1


def _join(together: list[list[str]], name: str, makers: Iterable[str]) -> None:
    """Put a module to those whose biases it takes."""
    rows = [row for row in together if not {*makers}.isdisjoint(row)]
    for row in rows:
        together.remove(row)
    together.append(list(dict.fromkeys([*(each for row in rows for each in row), *makers, name])))
