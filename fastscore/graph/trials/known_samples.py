"""What layers made of a sample, which they need not make again.

Samples are told apart in runs on the same few of them, beside others or alone. What PyTorch's own layers make of a
sample's rows depends on these alone: where they are, to rounding, what a layer has read before, in the call of that
number, it gives what it gave. Whatever the code between layers does to samples that meet is done in every run.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.plain_layers import memory_order, plain_kind
from fastscore.graph.trials.replaced_layers import replaced
from fastscore.modules.evaluation_copy import may_be_written
from fastscore.modules.weights.experts import ExpertLinear

_KEPT = 2 ** 30  # bytes of what is known, at most
_SOME = 4  # places of each dimension, which are looked at first
_LEAST = 2 ** 23  # products of a layer for a sample: with fewer it has run before what it reads is compared
_EACH = 384  # products for each number that it reads or makes, at least, for the same reason
Forward = Callable[..., Tensor]


@dataclass
class _Held:
    """A parameter as it was: its version, and sums over it, where the code of a module may write to its data."""

    parameter: Tensor | None
    version: int
    sums: tuple[Tensor, ...]

    def is_same(self, other: "_Held") -> bool:
        return self.parameter is other.parameter and self.version == other.version and \
            all(map(torch.equal, self.sums, other.sums))


@dataclass
class _Part:
    """What a layer read of a sample, by which parameters, and made of it; and the versions that these had then."""

    read: tuple[Tensor, ...]
    held: tuple[_Held, ...]
    made: Tensor
    versions: tuple[int, ...]

    def is_as_it_was(self) -> bool:
        return self.versions == tuple(x._version for x in (*self.read, self.made))

    def is_of(self, read: tuple[Tensor, ...], held: tuple[_Held, ...]) -> bool:
        """Whether it is what a layer would make of this."""
        return all(then.is_same(now) for then, now in zip(self.held, held, strict=True)) and all(
            x.dtype == y.dtype and x.shape == y.shape and _equal(x, y) for x, y in zip(self.read, read, strict=True))


class KnownSamples:
    """Of the layers of a model. What one made with other parameters than it holds now is of no use."""

    def __init__(self, model: nn.Module) -> None:
        self._written = {id(parameter) for parameter in may_be_written(model)}
        self._model = model
        self._layers = {name: layer for name, layer in model.named_modules() if plain_kind(layer) is not None
                        and "forward" not in vars(layer)}
        self._parts: dict[tuple[str, int], list[_Part]] = defaultdict(list)
        self._calls, self._samples, self._left = Counter[str](), 1, _KEPT

    @contextmanager
    def run(self, samples: int) -> Iterator[None]:
        """A block in which the model is run once, on so many samples, by whoever calls `product`."""
        self._calls, self._samples = Counter(), samples
        yield

    @contextmanager
    def used(self, samples: int) -> Iterator[None]:
        """The same, in which layers call it."""
        with self.run(samples), replaced(self._model, {name: partial(self.product, name, layer)
                                                       for name, layer in self._layers.items()}):
            yield

    def product(self, name: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer of that name makes of `args`."""
        call = self._calls[name]
        self._calls[name] += 1
        own: Forward = type(layer).forward
        if kwargs or name not in self._layers or not self._lie_apart(layer, args) or \
                not self._takes_long(layer, args[0]):
            return own(layer, *args, **kwargs)
        parts = self._parts[name, call]
        axis = self._axis(layer, args[0])
        with _unseen():
            each = list(zip(*(x.detach().chunk(self._samples, axis) for x in args), strict=True))
            parts[:] = filter(_Part.is_as_it_was, parts)
            held = tuple(map(self._as_it_is, layer._parameters.values()))
            found = [next((part for part in parts if part.is_of(read, held)), None) for read in each]
        new = [at for at, part in enumerate(found) if part is None]
        if len(new) < len(each):
            chosen = (torch.cat([x.chunk(self._samples, axis)[at] for at in new], axis) for x in args if new)
            of_new = iter(own(layer, *chosen).chunk(len(new), axis) if new else ())
            rows = [next(of_new) if part is None else part.made for part in found]
            # the rest of what was read, of which there is none, is there for who follows what comes of it
            out = torch.cat([*rows, args[0].flatten()[:0]], axis)
            out = out.contiguous(memory_format=memory_order(rows[new[0] if new else 0]) or torch.contiguous_format)
        else:
            out = own(layer, *args)
        with _unseen():
            if new and memory_order(out) is not None and out.shape[axis] == args[0].shape[axis]:
                made_of = out.detach().chunk(self._samples, axis)
                for at in new:
                    self._keep(parts, each[at], held, made_of[at])
        return out

    def _lie_apart(self, layer: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether what a layer is called on can be taken sample by sample."""
        if len(args) != 1 + isinstance(layer, ExpertLinear) or not all(
                type(x) is Tensor and x.layout == torch.strided and not x.is_inference() for x in args):
            return False
        x = args[0]
        kernel = getattr(layer, "kernel_size", None)
        return x.dim() > 1 and x.shape[self._axis(layer, x)] % self._samples == 0 and x.numel() > 0 and \
            not x.is_meta and not x.is_complex() and not torch.is_autocast_enabled(x.device.type) and \
            torch._C._functorch.peek_interpreter_stack() is None and (kernel is None or x.dim() == len(kernel) + 2)

    def _takes_long(self, layer: Any, x: Tensor) -> bool:
        """Whether a layer takes longer than what finds that it need not run."""
        weight = layer.weight[0] if isinstance(layer, ExpertLinear) else layer.weight
        places = x.numel() // (self._samples * x.shape[1 if hasattr(layer, "kernel_size") else -1])
        return bool(weight.numel() * places >= _LEAST and weight.numel() >= _EACH * sum(weight.shape[:2]))

    def _axis(self, layer: nn.Module, x: Tensor) -> int:
        """Along which samples may lie, of dimensions whose places a layer treats each alone."""
        return int(isinstance(layer, nn.Linear) and x.dim() > 2 and x.shape[0] != self._samples == x.shape[1])

    def _as_it_is(self, parameter: Tensor | None) -> _Held:
        if parameter is None or id(parameter) not in self._written:
            return _Held(parameter, 0 if parameter is None else parameter._version, ())
        return _Held(parameter, parameter._version, (parameter.detach().sum(0), parameter.detach().sum(-1)))

    def _keep(self, parts: list[_Part], read: tuple[Tensor, ...], held: tuple[_Held, ...], made: Tensor) -> None:
        size = sum(x.numel() * x.element_size() for x in (*read, made))
        if size <= self._left:
            self._left -= size
            parts.append(_Part(read, held, made, tuple(x._version for x in (*read, made))))


@contextmanager
def _unseen() -> Iterator[None]:
    """A block that no mode sees: who counts, or follows what is decided by the batch, is to see the model's code alone.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _equal(x: Tensor, y: Tensor) -> bool:
    """To rounding, which may be another where there are more samples: normalisations add up in another order."""
    if torch.equal(x, y) or not x.is_floating_point():
        return torch.equal(x, y)
    some, scale = (slice(0, _SOME),) * x.dim(), torch.stack(torch.aminmax(y))
    return all_close(x[some], y[some], scale) and all_close(x, y, scale)
