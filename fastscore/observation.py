"""What one pass of a model shows: the shapes that taps read, and up-samplings that a tap may stand before."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward
from fastscore.evaluation import hooked
from fastscore.importance import SUMS
from fastscore.taps import Taps


@dataclass
class Seen:
    """What one pass shows. shapes: tapped layer -> shape [N, ...] of its input (output), in each call. flat:
    Linear layers that put out [N, C]."""

    output: Tensor
    shapes: dict[str, list[tuple[int, ...]]]
    flat: set[str]


def observe(twin: nn.Module, taps: Taps, example: Batch, run: Forward) -> Seen:
    """Run the copy as it is, and stand taps before up-samplings where that measures the same."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    dims: dict[str, set[int]] = {}
    upsampled: dict[str, list[tuple[Tensor, Tensor]]] = {}  # up-sampling -> its (input, output) in each call
    reads: dict[str, list[Tensor]] = {}
    repeating = {name for name, module in twin.named_modules() if _repeats(module)}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if name in taps.places:
                x = output if taps.places[name].output else args[0]
                shapes.setdefault(name, []).append(tuple(x.shape))
            if isinstance(module, nn.Linear):
                dims.setdefault(name, set()).add(output.dim())
            if name in repeating:
                if not output.requires_grad:  # before the first tap: autograd is to count its readers
                    output = output.detach().requires_grad_().clone()
                upsampled.setdefault(name, []).append((args[0], output))
            return output

        return hook

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: reads.setdefault(name, []).extend(args[:1])

    handles = [module.register_forward_hook(look(name)) for name, module in twin.named_modules()]
    if repeating:
        handles += [twin.get_submodule(layer).register_forward_pre_hook(note(layer)) for layer in taps.places]
    try:
        with taps, taps.joined(example):
            torch.manual_seed(0)
            output: Tensor = run(twin, example)
    finally:
        for handle in handles:
            handle.remove()
    if taps.measure is SUMS:  # Σ a·g, Σ g and the mean of a are what they were; powers of a·g are not
        for layer, tensors in reads.items():
            for module, ((small, large), *more) in upsampled.items():
                if tensors[0] is large and not more and len(tensors) == 1 and not taps.places[layer].output \
                        and all(b % a == 0 for a, b in zip(small.shape, large.shape, strict=True)) \
                        and _readers(output, large) == 1:
                    taps.places[layer] = replace(taps.places[layer], window=(), module=module)
                    shapes[layer] = [tuple(small.shape)]
    return Seen(output.detach(), shapes, {name for name, found in dims.items() if found == {2}})


def _repeats(module: nn.Module) -> bool:
    """Whether it is an up-sampling that repeats each value: as often, if all sizes are multiples."""
    return type(module) is nn.Upsample and module.mode == "nearest" and not hooked(module)


def _readers(output: Tensor, x: Tensor) -> int:
    """How many operations behind `output` read `x`."""
    count, work, seen = 0, [output.grad_fn], {output.grad_fn}
    while work:
        node = work.pop()
        for source, _ in node.next_functions if node is not None else ():
            count += source is not None and source is x.grad_fn
            if source is not None and source not in seen:
                seen.add(source)
                work.append(source)
    return count
