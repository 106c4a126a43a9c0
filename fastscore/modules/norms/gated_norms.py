"""Normalisations that are called with a gate, too, as Mamba 2's: norm(x * silu(gate)), or norm(x) * silu(gate).

One that loses channels stays of its own class, and any kernel that is handed its parameters and its eps computes what
it does: of w of W channels the mean square is W / w times what it was where the others count as zeros, and so its eps
becomes W / w times, and its gain the root of that.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.batches.devices import wide
from fastscore.modules.copying import own_attributes
from fastscore.modules.hooks import input_of
from fastscore.modules.narrower import staying, without
from fastscore.modules.norms.finding import EPS, close

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "sigmoid": torch.sigmoid, "nothing": lambda x: x, "relu": F.relu, "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"), "tanh": torch.tanh}
_PLAIN = (bool, int, float, str, tuple, torch.dtype, type(None))


@dataclass(frozen=True)
class GatedNorm:
    """What a module computes of x and a gate: a root of mean squares over the last dimension, of `groups` of channels
    each by itself, is divided by.

    before: whether what the activation makes of the gate multiplies what is normalised, or what is made of it. gain,
    eps: the parameter and the attribute that they are, by their names.
    """

    before: bool
    activation: str
    groups: int
    gain: str
    eps: str
    dim: int = -1

    def factor(self, gate: Tensor) -> Tensor:
        """What a gate multiplies by."""
        return _ACTIVATIONS[self.activation](gate)

    def normalized(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(x in its groups, less their lengths; what it was multiplied by), in float32 or wider."""
        of_group = wide(x).unflatten(-1, (self.groups, -1))
        scale = (of_group.square().mean(-1, keepdim=True) + eps).rsqrt()
        return of_group * scale, scale

    def __call__(self, x: Tensor, gate: Tensor, gain: Tensor, eps: float) -> Tensor:
        """What the module computes."""
        factor = self.factor(gate)
        y = self.normalized(x * factor if self.before else x, eps)[0].flatten(-2) * gain
        return y if self.before else y * factor


def gated_norm_of(module: nn.Module) -> GatedNorm | None:
    """What a module computes that takes a gate beside its input, if that is such a normalisation; None for all others.

    A copy with random parameters is tried: what anything is called does not matter.
    """
    if type(module).__module__.startswith("torch.") or module._modules or module._buffers or \
            isinstance(module, torch.jit.ScriptModule) or len(module._parameters) != 1:
        return None
    (parameter,) = module._parameters.values()
    if parameter is None or parameter.dim() != 1 or len(parameter) < 2 or len(_names(type(module))) != 2:
        return None
    own = {name: value for name, value in own_attributes(module).items() if name != "forward"}
    if not all(isinstance(value, _PLAIN) for value in own.values()):
        return None
    key = type(module), len(parameter), *module._parameters, *own.items()
    if key not in _found:
        with torch.random.fork_rng(devices=[]):
            _found[key] = next(_computed(module), None)
    return _found[key]


_found: dict[Any, GatedNorm | None] = {}


def elementwise(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """x times what its gate multiplies by, in a call with a gate of such a module; None of any other."""
    norm, (x, gate) = gated_norm_of(module), _given(module, args, kwargs)
    return None if norm is None or gate is None or x is None else x * norm.factor(gate)


def statistics(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(what is normalised in a call of a module, with a gate or without, what the result is multiplied by, if that is
    anything)."""
    x = input_of(args, kwargs)
    norm, (_, gate) = gated_norm_of(module), _given(module, args, kwargs)
    if norm is None or gate is None:
        return x, None
    factor = norm.factor(gate.detach())
    return (x.detach() * factor, None) if norm.before else (x, factor)


def gradient_of_statistics(module: nn.Module, norm: GatedNorm, x: Tensor, g: Tensor) -> Tensor:
    """The gradient of what is normalised, x, through its mean squares alone, from that of what is made of it."""
    normalized, scale = norm.normalized(x, getattr(module, norm.eps))
    g = (g.to(normalized.dtype) * module.get_parameter(norm.gain).detach()).unflatten(-1, (norm.groups, -1))
    return (-normalized * (g * normalized).mean(-1, keepdim=True) * scale).flatten(-2).to(x.dtype)


def whole_groups(norm: GatedNorm, unit: Tensor) -> bool:
    """Whether channels whose units are `unit`, int64 [C], leave as many in each group of a norm whatever units go: all
    of a group are of one unit, or there is one group."""
    return norm.groups == 1 or bool((unit.view(norm.groups, -1) == unit.view(norm.groups, -1)[:, :1]).all())


def narrow(module: nn.Module, norm: GatedNorm, gone: Tensor) -> None:
    """Take the channels `gone`, int64 [R], out of such a module, in place; its gain is a new parameter then."""
    gain = module.get_parameter(norm.gain)
    left = torch.bincount(staying(len(gain), gone) * norm.groups // len(gain), minlength=norm.groups)
    sizes = left[left > 0].unique()
    if len(sizes) > 1:
        raise ValueError(f"{type(module).__name__} normalises {norm.groups} groups of channels, which are to stay as "
                         "wide as each other")
    grown = len(gain) / norm.groups / int(sizes) if len(sizes) else 1.0
    new = without(gain, 0, gone)
    with torch.no_grad():
        new.mul_(grown ** 0.5)
    module._parameters[norm.gain] = new
    setattr(module, norm.eps, getattr(module, norm.eps) * grown)


def _names(cls: type[nn.Module]) -> list[str]:
    """Of the arguments of a class's forward."""
    try:
        return list(inspect.signature(cls.forward).parameters)[1:]
    except ValueError:
        return []


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(x, gate) of a call."""
    given: dict[str, Any] = {**dict(zip(_names(type(module)), args, strict=False)), **kwargs}
    x, gate = [*(given.get(name) for name in _names(type(module))), None, None][:2]
    return x if isinstance(x, Tensor) else None, gate if isinstance(gate, Tensor) else None


def _computed(module: nn.Module) -> Iterator[GatedNorm]:
    """What a module computes, if it is known: of inputs as large as eps lets count, and larger, in training, too."""
    ((gain, held),) = module._parameters.items()
    assert held is not None
    size, numbers = len(held), {value for value in vars(module).values() if isinstance(value, int) and value > 0}
    counts = {1, *(n for value in numbers for n in (value, size // value) if n and size % n == 0 and n < size)}
    random = torch.Generator().manual_seed(0)
    weight, x, gate = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in (
        (size,), (2, 3, size), (2, 3, size)))
    for eps in (name for name in EPS if isinstance(getattr(module, name, None), float) and getattr(module, name) > 0):
        value: float = getattr(module, eps)
        inputs = [(x * scale, gate, training) for scale in (1.0, value ** 0.5) for training in (False, True)]
        made = [_run(module, gain, weight, *each) for each in inputs]
        for before, activation, groups in itertools.product((True, False), _ACTIVATIONS, sorted(counts)):
            norm = GatedNorm(before, activation, groups, gain, eps)
            if all(y is not None and close(y, norm(each, by, weight, value))
                   for (each, by, _), y in zip(inputs, made, strict=True)):
                yield norm


def _run(module: nn.Module, gain: str, weight: Tensor, x: Tensor, gate: Tensor, training: bool) -> Tensor | None:
    alone = type(module).__new__(type(module))
    vars(alone).update(vars(module), _parameters={gain: nn.Parameter(weight, False)}, training=training)
    try:
        with torch.no_grad():
            y = type(module).forward(alone, x.clone(), gate.clone())
    except Exception:  # whatever code does with what it does not take
        return None
    return y.double() if isinstance(y, Tensor) and y.shape == x.shape else None
