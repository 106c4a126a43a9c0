"""What made a network's outputs: parts put side by side, or a function that leaves no logits."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# what comes out is an image, an estimate within bounds, a direction: no logits, of which the largest would decide
_NO_LOGITS = {"tanh": "tanh", "tanh_": "tanh", "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "normalize": "normalize"}
_SAME_VALUES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"}


class LastOperations(TorchFunctionMode):
    """Remembers, while it is entered, what torch.cat made last, and of which widths along which dimension, and the
    tensors that one of _NO_LOGITS made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: Tensor | None = None
        self._dim, self._sizes = 0, list[int]()
        self._no_logits: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        before = self.no_logits(args[0]) if name in _SAME_VALUES and args else ""
        made = func(*args, **kwargs)
        if not isinstance(made, Tensor):
            return made
        if func in (torch.cat, torch.concat, torch.concatenate):
            tensors = args[0] if args else kwargs["tensors"]
            self._dim = int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % made.dim()
            self._made, self._sizes = made, [each.shape[self._dim] for each in tensors if each.dim() == made.dim()]
        if said := before or _NO_LOGITS.get(name, ""):
            self._no_logits[id(made)] = weakref.ref(made), said
        elif not name.startswith("__"):  # not a look at its shape; what is written to is another thing then
            self._no_logits.pop(id(made), None)
        return made

    def no_logits(self, output: Any) -> str:
        """The function that leaves no logits and made this output, but for its shape; empty where none did."""
        made, said = self._no_logits.get(id(output), (None, ""))
        return said if made is not None and made() is output else ""

    def widths(self, output: Tensor, dim: int) -> list[int]:
        """Of the parts of an output along the dimension; none where it is no concatenation of outputs."""
        whole = self._made is output and output.dim() > 1 and self._dim == dim and \
            sum(self._sizes) == output.shape[self._dim]
        return self._sizes if whole and len(self._sizes) > 1 and max(self._sizes) > 1 else []
