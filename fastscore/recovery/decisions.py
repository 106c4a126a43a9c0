"""What a network decides: its outputs, each by itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches import Batch, Forward, call_model, named_outputs
from fastscore.wording import counted


class Decisions:
    """The outputs of networks that decide, by name, each to be judged by itself.

    A network of one output returns it under the name "". One that is made by `torch.cat` along the dimension over which
    it decides, of parts of which one at least is wider than one, is taken apart again: the largest of several outputs
    together says nothing of any.

    Args:
        forward: how a network is called; a user's own may return a tuple, list, dict or dataclass of outputs.
        outputs: the places, keys or fields of those that are decisions, None for all. Others (boxes, features) are not
            judged.
    """

    def __init__(self, forward: Forward, outputs: Sequence[str | int] | None = None) -> None:
        if isinstance(outputs, (str, int)):
            outputs = [outputs]
        self._forward, self._chosen = forward, outputs
        self._widths: dict[str, list[int]] | None = None  # of the parts of each output, known after the first call
        self._said = ""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Name -> output. Raises OutputError where there is none, ValueError where `outputs` names what is not there.
        """
        made = _Concatenation()
        if self._widths is None:
            with made:
                returned = self._forward(model, batch)
        else:
            returned = self._forward(model, batch)
        found = self._decisive(named_outputs(returned, self._forward, type(model).__name__))
        if self._widths is None:
            self._widths = {name: made.widths(output) for name, output in found.items()}
            self._said = self._described(found)
        return {name: part for whole, output in found.items() for name, part in _parts(whole, output,
                                                                                        self._widths.get(whole, []))}

    def __str__(self) -> str:
        """What is taken for decisions; empty before the first call."""
        return self._said

    def _decisive(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._chosen is None:
            return found
        ways = {key: (f"[{key!r}]", f".{key}") for key in self._chosen}
        for key, starts in ways.items():
            if not any(name.startswith(starts) for name in found):
                there = ", ".join(name for name in found if name) or "one tensor alone"
                raise ValueError(f"outputs: {key!r} is not among what forward= returns: {there}; name its places, keys "
                                 "or fields")
        return {name: output for name, output in found.items()
                if any(name.startswith(starts) for starts in ways.values())}

    def _described(self, found: Mapping[str, Tensor]) -> str:
        assert self._widths is not None
        parts = [(name, part) for whole, output in found.items()
                 for name, part in _parts(whole, output, self._widths[whole])]
        said = [f"{name} {_decides(part)}".strip() for name, part in parts]
        if len(parts) > 1:
            return f"{counted(len(parts), 'output')}, each by itself (agreement: the least, KL: the sum): " + \
                "; ".join(said)
        own = getattr(self._forward, "checks", self._forward) is not call_model and not parts[0][0]
        return said[0] + ("; where that is several outputs side by side, let forward= return a tuple of them" if own
                          else "")


class _Concatenation(TorchFunctionMode):
    """Remembers what torch.cat made last, and of which widths along which dimension."""

    def __init__(self) -> None:
        super().__init__()
        self._made: Tensor | None = None
        self._dim, self._sizes = 0, list[int]()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(made, Tensor):
            tensors = args[0] if args else kwargs["tensors"]
            self._dim = int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % made.dim()
            self._made, self._sizes = made, [each.shape[self._dim] for each in tensors if each.dim() == made.dim()]
        return made

    def widths(self, output: Tensor) -> list[int]:
        """Of the parts of an output; none where it is no concatenation of outputs."""
        whole = self._made is output and output.dim() > 1 and self._dim == dimension(output) and \
            sum(self._sizes) == output.shape[self._dim]
        return self._sizes if whole and len(self._sizes) > 1 and max(self._sizes) > 1 else []


def dimension(output: Tensor) -> int:
    """Over which it decides: the last of [N, T, K], else the second."""
    return 2 if output.dim() == 3 else 1


def _parts(name: str, output: Tensor, widths: Sequence[int]) -> list[tuple[str, Tensor]]:
    if not widths:
        return [(name, output)]
    dim, found, start = dimension(output), [], 0
    for part in output.split(list(widths), dim):
        found.append((f"{name}[{':, ' * dim}{start}:{start + part.shape[dim]}]", part))
        start += part.shape[dim]
    return found


def _decides(output: Tensor) -> str:
    if output.dim() < 2 or output.shape[dimension(output)] == 1:
        return "by its sign"
    return f"by the largest of {output.shape[dimension(output)]} over dimension {dimension(output)}"
