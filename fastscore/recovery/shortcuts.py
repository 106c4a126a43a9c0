"""Which layers' outputs are added to something that is there before they run: the shortcuts around them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches.parts import version_of
from fastscore.modules.hooks import input_of, put_on
from fastscore.recovery.lockstep import Side

_ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Shortcut:
    """What is added to a layer's output: the `side` of `module`, which is there when the layer is called.

    norm: the BatchNorm in between, None without one.
    """

    module: str
    side: Side
    norm: str | None


class _Additions(TorchFunctionMode):
    """Keeps the operands of every addition of two tensors of one shape, and how often they had been written to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[Tensor, int], tuple[Tensor, int]]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if getattr(function, "__name__", "") in _ADDS and not kwargs and len(args) == 2 and \
                all(isinstance(arg, Tensor) and not arg.is_nested for arg in args) and args[0].shape == args[1].shape:
            one, other = args
            self.found.append(((one, version_of(one)), (other, version_of(other))))
        return function(*args, **(kwargs or {}))


def shortcuts(model: nn.Module, run: Callable[[], object], normalized_by: Mapping[str, str]) -> dict[str, Shortcut]:
    """Layer -> the shortcut around it; those for which none is found are left out.

    model: in evaluation mode. run: calls it on an example. normalized_by: layer -> the BatchNorm that alone reads it.
    """
    names = {module: name for name, module in model.named_modules() if name}
    seen: dict[int, tuple[Tensor, int, str, Side]] = {}  # the first place where each tensor was met
    clock = 0
    met: dict[int, int] = {}
    made: dict[int, tuple[str, str | None]] = {}  # what a layer, or the BatchNorm after it, has made
    called: dict[str, int] = {}
    norms = {norm: layer for layer, norm in normalized_by.items()}

    def note(x: object, module: nn.Module, side: Side) -> None:
        nonlocal clock
        clock += 1
        if isinstance(x, Tensor) and id(x) not in seen and not x.is_inference():  # of which no writes are counted
            seen[id(x)] = x, version_of(x), names[module], side
            met[id(x)] = clock

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args or kwargs:
            note(input_of(args, kwargs), module, "input")
        called[names[module]] = clock

    def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        name = names[module]
        if isinstance(output, Tensor):
            made[id(output)] = (norms[name], name) if name in norms else (name, None)
        note(output, module, "output")

    leaves = [module for module in names if not list(module.children())]
    handles: list[Any] = [module.register_forward_pre_hook(before, with_kwargs=True) for module in leaves]
    handles += [module.register_forward_hook(after) for module in leaves]
    with put_on(handles), torch.no_grad(), _Additions() as additions:
        run()
    found: dict[str, Shortcut] = {}
    for pair in additions.found:
        for (branch, _), (other, version) in (pair, pair[::-1]):
            layer, norm = made.get(id(branch), ("", None))
            if layer in called and id(other) in seen:
                _, first, module, side = seen[id(other)]
                if version == first and met[id(other)] <= called[layer] and layer not in found:
                    found[layer] = Shortcut(module, side, norm)
    return found
