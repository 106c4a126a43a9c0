"""Which normalisation over channels a module computes: found by running it on inputs of its own, with random
parameters, so that names do not matter, nor where its code has eps from."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastscore.modules.norms import activations
from fastscore.modules.norms.channel_norm import ChannelNorm, ResponseNorm

EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")  # what attributes are called that hold it
_RESPONSE_EPS = 1e-6  # what a global response normalisation adds whose code holds the number
_LARGE, _LOUD = 1e6, 100.0  # of an input's largest channel, and of parameters: whatever is clamped is clamped then
_TOLERANCE = 1e-5  # some compute in float32 whatever they are given
_ROUGH = 1e-4  # of gradients in float32
_SINGLE = 3e-7  # of numbers in float32
_SIZES = 6, 9  # that those are tried with which are for any number of channels
_SHAPES: Mapping[int, Sequence[tuple[int, ...]]] = {  # of one sample; -1 stands for the channels
    -1: ((3, -1), (3, 4, -1), (-1,)), 1: ((-1, 5), (-1, 3, 4)), -3: ((-1, 3, 4),), -2: ((-1, 5),),
    -4: ((-1, 2, 3, 4),)}
_SMALL = 1e-30  # of inputs beside which eps is all that counts; float32 holds them
_DIMS = (-1, -3, -2, -4)
_OF_MEANS = (True, False), (False, False), (False, True)  # whether it is centered, and whether it is spread
_PLACES: tuple[Literal["inside", "added", "least"], ...] = "inside", "added", "least"


def has_eps(module: nn.Module) -> bool:
    """Whether it has an attribute that is called so."""
    return any(hasattr(module, name) for name in EPS)


def find(module: nn.Module, size: int | None) -> ChannelNorm | ResponseNorm | None:
    """What a module for `size` channels computes, which has at most two parameters of that many numbers, and else
    nothing; None where it is no normalisation over channels. size: None for any number, with parameters of one."""
    with torch.random.fork_rng(devices=[]):
        if not activations.work_on_each_number(module):
            return None
        if size is None:
            return _of_any_size(module)
        for trial in (_Trial(module, size, dim) for dim in _DIMS):
            for candidate in _of_channels(trial, module) if trial.normalizes() else ():
                if trial.computes(candidate):
                    return candidate
        for trial in (_Trial(module, size, dim, shape) for dim, shape in ((-1, (3, 4, -1)), (-3, ()))):
            for gain, shift in trial.names:
                for eps in _epsilons(module) or [_RESPONSE_EPS]:
                    if trial.computes(norm := ResponseNorm(trial.dim, eps, gain, shift)):
                        return norm
    return None


def _of_any_size(module: nn.Module) -> ChannelNorm | None:
    for dim, shapes in _SHAPES.items():
        first, *others = (_Trial(module, size, dim, shape) for shape in shapes for size in _SIZES)
        for candidate in _of_channels(first, module, of_any_size=True) if first.normalizes() else ():
            if first.computes(candidate) and all(trial.computes(candidate) for trial in others if trial.takes()):
                return candidate
    return None


class _Trial:
    """A copy with random parameters, on inputs with channels along one dimension."""

    def __init__(self, module: nn.Module, size: int, dim: int, shape: Sequence[int] = ()) -> None:
        self._random = torch.Generator().manual_seed(0)
        self.dim, self.size = dim, size
        shape = shape or _SHAPES[dim][0]
        self._shape = 2, *(size if each < 0 else each for each in shape)
        self._whole, self._alone = activations.bare(module), activations.without(module)
        self._alone.training = False
        self._alone._parameters = {
            name: None if parameter is None else
            nn.Parameter(torch.randn(parameter.shape, generator=self._random, dtype=torch.float64), False)
            for name, parameter in module._parameters.items()}
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        first = sorted(own, key=lambda name: name in ("bias", "beta", "shift", "b"))  # what it is likely to be
        self.names = list(itertools.permutations(first)) if len(own) == 2 else \
            [(own[0], ""), ("", own[0])] if own else [("", "")]

    def inputs(self, scale: float) -> Tensor:
        """Random ones, whose mean is not zero."""
        return (torch.randn(self._shape, generator=self._random, dtype=torch.float64) + 0.3) * scale

    def run(self, x: Tensor, module: nn.Module | None = None) -> Tensor | None:
        """What the module (by default, without what it holds) makes; None of what it does not take, or writes to."""
        given, module = x.clone(), module or self._alone
        try:
            with torch.no_grad():
                y = type(module).forward(module, given)
        except Exception:  # whatever a module's code does with what it does not take
            return None
        return y.double() if isinstance(y, Tensor) and y.shape == x.shape and torch.equal(given, x) else None

    def held(self, name: str) -> Tensor | None:
        """A parameter, [C]."""
        parameter = self._alone._parameters.get(name)
        return None if parameter is None else parameter.flatten()

    def takes(self) -> bool:
        """Whether it makes something of such inputs."""
        return self.run(self.inputs(1.0)) is not None

    def normalizes(self) -> bool:
        """Whether it makes the same of an input twice as large."""
        x = self.inputs(100.0)
        one, two = self.run(x), self.run(2 * x)
        return one is not None and two is not None and close(one, two, 1e-3)  # which eps may differ by

    def computes(self, norm: ChannelNorm | ResponseNorm) -> bool:
        """Whether that is what it computes, of inputs as large as eps lets count, smaller and larger, in training too,
        and of such that one channel outweighs all others; with the gradients of it; and nothing is mixed along other
        dimensions."""
        eps = norm.eps or torch.finfo(torch.float64).eps
        inside = isinstance(norm, ChannelNorm) and norm.place == "inside"
        counts = eps ** 0.5 if inside else eps
        for scale in (1.0, counts, counts / 100):
            x = self.inputs(scale)
            self._alone.training = scale == 1.0
            y = self.run(x)
            self._alone.training = False
            if y is None or not close(y, self._made(norm, x)):
                return False
        loud, held = self.inputs(1.0), dict(self._alone._parameters)
        loud.select(self.dim, 0).mul_(_LARGE)
        self._alone._parameters = {name: None if parameter is None else nn.Parameter(parameter * _LOUD, False)
                                   for name, parameter in held.items()}
        y, expected = self.run(loud), self._made(norm, loud)
        self._alone._parameters = held
        return y is not None and close(y, expected) and self._has_gradients_of(norm) and self._goes_on(norm)

    def _goes_on(self, norm: ChannelNorm | ResponseNorm) -> bool:
        """Whether what it holds is given what `norm` makes, one after another, and nothing else."""
        if not self._whole._modules:
            return True
        x, self._whole._parameters = self.inputs(1.0), self._alone._parameters
        for training in (False, True):
            self._whole.train(training)
            y, expected = self.run(x, self._whole), activations.made(self._whole, self._made(norm, x))
            if y is None or not close(y, expected):
                return False
        return True

    def _unshifted(self, norm: ChannelNorm, x: Tensor) -> Tensor | None:
        """What it makes of x, with zeros for the shift."""
        held = dict(self._alone._parameters)
        if (shift := held.get(norm.shift)) is not None:
            self._alone._parameters[norm.shift] = nn.Parameter(torch.zeros_like(shift), False)
        y = self.run(x)
        self._alone._parameters.update(held)
        return y

    def _made(self, norm: ChannelNorm | ResponseNorm, x: Tensor) -> Tensor:
        return norm(x, self.held(norm.gain), self.held(norm.shift), self.size)

    def _has_gradients_of(self, norm: ChannelNorm | ResponseNorm) -> bool:
        """Whether gradients come back as they do from `norm`, through its statistics too."""
        x, weights = self.inputs(1.0).requires_grad_(), self.inputs(1.0)
        try:
            with torch.enable_grad():
                found, expected = (torch.autograd.grad((y.double() * weights).sum(), x)[0] for y in (
                    type(self._alone).forward(self._alone, x), self._made(norm, x)))
        except Exception:  # of code that none come back from
            return False
        return close(found, expected, _ROUGH)

    def of_little(self, norm: ChannelNorm) -> float | None:
        """What it multiplies small inputs by, where all of `norm` but eps is right: eps alone counts there. None where
        that is not one number."""
        x = self.inputs(_SMALL)
        if (y := self._unshifted(norm, x)) is None:
            return None
        centered = x - x.mean(self.dim, keepdim=True) if norm.centered else x
        gain = self.held(norm.gain)
        factors = y / (centered if gain is None else centered * norm.along_channels(gain + norm.offset)) / norm.factor
        factor = float(factors.median())
        if not 0 < factor < float("inf") or not close(factors, torch.full_like(factors, factor), 1e-4):
            return None
        return factor

    def factor(self, norm: ChannelNorm) -> float:
        """What it multiplies large inputs by besides, of which eps does not count."""
        x = self.inputs(_LARGE)
        y, expected = self._unshifted(norm, x), norm(x, self.held(norm.gain), None, self.size)
        found = 1.0 if y is None else float((y / expected).median())
        return 1.0 if abs(found - 1) < _TOLERANCE / 10 or not math.isfinite(found) else found


def _epsilons(module: nn.Module) -> list[float]:
    return [float(value) for name in EPS if isinstance(value := getattr(module, name, None), (int, float))]


def _of_channels(trial: _Trial, module: nn.Module, of_any_size: bool = False) -> Iterator[ChannelNorm]:
    """What a module may compute that makes the same of an input twice as large: the likeliest first. of_any_size:
    numbers of its code's own may multiply it."""
    eps: list[float | None] = list(_epsilons(module)) or [None]
    for (gain, shift), (centered, spread) in itertools.product(trial.names, _OF_MEANS):
        for offset in (0.0, 1.0) if gain else (0.0,):
            for value in eps if not of_any_size else ():
                yield ChannelNorm(trial.dim, centered, offset, value, gain=gain, shift=shift, spread=spread)
            plain = ChannelNorm(trial.dim, centered, offset, 0.0, gain=gain, shift=shift, spread=spread)
            little = trial.of_little(plain)
            for place, fewer in itertools.product(_PLACES, (0, 1, None)):
                values = eps if place != "inside" or fewer != 0 or of_any_size else []
                norm = replace(plain, place=place, fewer=fewer)
                if of_any_size:
                    norm = replace(norm, factor=trial.factor(norm))
                    little = trial.of_little(norm)
                if little is not None:
                    values = [*values, _constant(little ** -2 if place == "inside" else 1 / little)]
                for value in values:
                    yield replace(norm, eps=value)
                if little is None and of_any_size:
                    yield norm
            if little is None and not of_any_size:
                yield plain


def _constant(found: float) -> float:
    """The number in the code that is found so, itself or its square of as many digits as float32 has, as far as that
    can be told of code that computes in float32, or else in float64; else what was found."""
    single = abs(float(np.float32(found)) / found - 1) < 1e-14  # of float64 code one in ten million is
    near = (float(f"{found ** power:.6g}") ** (1 / power) for power in (1, 2))
    return next((value for value in near if abs(value / found - 1) < (_SINGLE if single else 1e-12)), found)


def close(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether nothing is off by more than a share of the largest of `other`, which is finite."""
    largest = float(other.abs().max())
    return math.isfinite(largest) and torch.allclose(one, other, rtol=0, atol=tolerance * largest)
