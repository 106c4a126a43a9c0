"""Tables that no layer made (positions by sinusoids, say), and where they meet what layers make: those that modules
make in each call, and those that they keep in attributes, and that code reads without a gradient."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor, nn

from fastscore.batches.parts import memory_of, tensors_of
from fastscore.graph.cutting.cut_widths import calling_modules
from fastscore.modules import held_tables, returned_part
from fastscore.modules.reachable_code import ReachableCode

_Shape: TypeAlias = tuple[int, ...]


class MadeTables:
    """Notes, call by call of a run, tensors without gradients that modules without parameters make, and those that are
    read of attributes of any.

    model: that runs.
    """

    def __init__(self, model: nn.Module) -> None:
        # autograd's function of an operation -> (its shape, whose module, the attribute or "", the shape of that) of
        # what it takes beside what layers made
        self._met: dict[Any, list[tuple[_Shape, nn.Module, str, _Shape]]] = {}
        self._made: dict[int, tuple[Tensor, nn.Module]] = {}  # memory -> what was made there, and by which module
        # memory -> what is there, the module, the attribute that it was made of, and the shape of that
        self._held = {memory_of(held): (held, module, name, tuple(held.shape))
                      for module, name, held in held_tables.of(model) if memory_of(held)}
        self._model = model

    def note(self, args: Any, output: Tensor) -> None:
        """A call of a function."""
        if output.grad_fn is None:
            if output.is_floating_point() and (memory := memory_of(output)):
                maker = next(iter(calling_modules()), None)
                if maker is not None and returned_part.makes_alone(maker):
                    self._made.setdefault(memory, (output, maker))
                for x in tensors_of(args) if self._held else ():
                    if (held := self._held.get(memory_of(x))) is not None:
                        self._held.setdefault(memory, (output, *held[1:]))
            return
        for x in tensors_of(args) if self._made or self._held else ():
            if not x.requires_grad and (memory := memory_of(x)):
                _, maker = self._made.get(memory, (None, None))
                if maker is not None and maker not in calling_modules():
                    self._met.setdefault(output.grad_fn, []).append((tuple(x.shape), maker, "", ()))
                elif memory in self._held:
                    self._met.setdefault(output.grad_fn, []).append((tuple(x.shape), *self._held[memory][1:]))

    def at(self, function: Any, dim: int, channels: int) -> Iterator[tuple[nn.Module, str]]:
        """(module, what surgery is to narrow of it) of each table that an operation takes, and that has something for
        every channel. function: of autograd. dim: of the channels, from the end."""
        for shape, module, name, held in self._met.get(function, ()):
            if -dim <= len(shape) and shape[dim] == channels > 1:
                if not name:
                    yield module, returned_part.attribute(dim, channels)
                elif (at := _dim_of(held, dim, channels)) is not None and \
                        not held_tables.is_made_anew(name, self._code):
                    yield module, held_tables.attribute(name, at)

    @cached_property
    def _code(self) -> ReachableCode:
        return ReachableCode(self._model)

    def forget(self) -> None:
        """Let go of it all."""
        self._met.clear()
        self._made.clear()
        self._held.clear()


def _dim_of(held: _Shape, dim: int, channels: int) -> int | None:
    """The dimension of a tensor of that shape that holds channels which lie along `dim`, from the end, where it meets
    others; None where several may."""
    found = [at for at, size in enumerate(held) if size == channels]
    at = len(held) + dim
    return at if at in found else found[0] if len(found) == 1 else None
