"""What modules make of nothing that layers made (positions by sinusoids, say), and where it meets what these make."""

from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.parts import tensors_of
from fastscore.graph.cutting.cut_widths import calling_modules
from fastscore.modules import returned_part


class MadeTables:
    """Notes, call by call of a run, tensors without gradients that modules without parameters make.

    met: autograd's function of an operation -> (whose module, shape) of what it takes beside what layers made.
    """

    def __init__(self) -> None:
        self.met: dict[Any, list[tuple[nn.Module, tuple[int, ...]]]] = {}
        self._made: dict[int, tuple[Tensor, nn.Module]] = {}  # memory -> what was made there, and by which module

    def note(self, args: Any, output: Tensor) -> None:
        """A call of a function."""
        if output.grad_fn is None:
            if output.is_floating_point() and _is_plain(output):
                maker = next(iter(calling_modules()), None)
                if maker is not None and returned_part.makes_alone(maker):
                    self._made.setdefault(output.untyped_storage().data_ptr(), (output, maker))
            return
        for x in tensors_of(args) if self._made else ():
            if x.grad_fn is None and _is_plain(x):
                _, maker = self._made.get(x.untyped_storage().data_ptr(), (None, None))
                if maker is not None and maker not in calling_modules():
                    self.met.setdefault(output.grad_fn, []).append((maker, tuple(x.shape)))

    def forget(self) -> None:
        """Let go of it all."""
        self.met.clear()
        self._made.clear()


def _is_plain(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested and torch._C._functorch.maybe_get_level(x) == -1
