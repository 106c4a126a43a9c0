"""What one pass of a model shows: the shapes that taps read, and up-samplings that a tap may stand before."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastscore.batches import Batch, Forward
from fastscore.fastpath.fusion import CLAMPS, clamp_bounds
from fastscore.fastpath.packed_layers import ClampBounds
from fastscore.modules.inspection import hooked
from fastscore.taps.gates import TapPoint
from fastscore.taps.measures import SUMS
from fastscore.taps.taps import Taps

_BEFORE_CLAMPS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Observation:
    """What one pass shows.

    output: the model's. shapes: tapped layer -> shape [N, ...] of what its tap reads, in each call. earlier: tapped
    layer -> where its tap could stand as well, before an up-sampling, and the shape that it would read there. flat:
    Linear layers whose output is [N, C]. inputs: layer -> shape of its input, but for those under autocast. clamps:
    layer or BatchNorm -> the bounds of the clamp that alone reads its output.
    """

    output: Tensor
    shapes: dict[str, list[tuple[int, ...]]]
    earlier: dict[str, tuple[TapPoint, tuple[int, ...]]]
    flat: set[str]
    inputs: dict[str, tuple[int, ...]]
    clamps: dict[str, ClampBounds]


def observe(eval_model: nn.Module, taps: Taps, example: Batch, run: Forward) -> Observation:
    """What one pass of the copy, as it is, shows; nothing is changed, the taps neither.

    taps: on the copy, and not attached. run(eval_model, example): its output.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    dims: dict[str, set[int]] = {}
    upsampled: dict[str, list[tuple[Tensor, Tensor]]] = {}  # up-sampling -> its (input, output) in each call
    reads: dict[str, list[Tensor]] = {}
    bare = {name for name, module in eval_model.named_modules() if not hooked(module)}  # before hooks are set here
    repeating = {name for name, module in eval_model.named_modules() if _is_nearest_upsample(module)}
    inputs: dict[str, tuple[int, ...]] = {}
    made: dict[str, list[Any]] = {}  # layer or BatchNorm -> the autograd node of its output, in each call
    clamped: dict[Any, ClampBounds] = {}  # autograd node of a clamp -> its bounds

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if name in taps.points:
                x = output if taps.points[name].output else args[0]
                shapes.setdefault(name, []).append(tuple(x.shape))
            if isinstance(module, nn.Linear):
                dims.setdefault(name, set()).add(output.dim())
            if not isinstance(output, Tensor):
                return output
            before = isinstance(module, _BEFORE_CLAMPS)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and args \
                    and args[0].dtype == module.weight.dtype == output.dtype:
                inputs[name] = tuple(args[0].shape)
            if (before or name in repeating) and not output.requires_grad and output.is_floating_point():
                output = output.detach().requires_grad_().clone()  # before the first tap: autograd is to count readers
            if before and name in bare:
                made.setdefault(name, []).append(output.grad_fn)
            if type(module) in CLAMPS and name in bare:
                clamped[output.grad_fn] = clamp_bounds(module)
            if name in repeating:
                upsampled.setdefault(name, []).append((args[0], output))
            return output

        return hook

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: reads.setdefault(name, []).extend(args[:1])

    handles = [module.register_forward_hook(look(name)) for name, module in eval_model.named_modules()]
    if repeating:
        handles += [eval_model.get_submodule(layer).register_forward_pre_hook(note(layer)) for layer in taps.points]
    try:
        with taps, taps.one_pass(example):
            output: Tensor = run(eval_model, example)
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(output)
    earlier: dict[str, tuple[TapPoint, tuple[int, ...]]] = {}
    if taps.measure is SUMS:  # Σ a·g, Σ g and the mean of a are what they were; powers of a·g are not
        for layer, tensors in reads.items():
            for module, ((small, large), *more) in upsampled.items():
                if tensors[0] is large and not more and len(tensors) == 1 and not taps.points[layer].output \
                        and all(b % a == 0 for a, b in zip(small.shape, large.shape, strict=True)) \
                        and len(readers[large.grad_fn]) == 1:
                    earlier[layer] = replace(taps.points[layer], window=(), module=module), tuple(small.shape)
    clamps = {name: clamped[reader] for name, (node, *more) in made.items() if not more and node is not None
              for reader in readers[node] if reader in clamped and len(readers[node]) == 1}
    return Observation(output.detach(), shapes, earlier, {name for name, found in dims.items() if found == {2}},
                inputs, clamps)


def _is_nearest_upsample(module: nn.Module) -> bool:
    """Whether it is an up-sampling that repeats each value: as often, if all sizes are multiples."""
    return type(module) is nn.Upsample and module.mode == "nearest" and not hooked(module)


def _readers(output: Tensor) -> dict[Any, list[Any]]:
    """Autograd node behind `output` -> those that read what it makes, one for each time."""
    readers: dict[Any, list[Any]] = {output.grad_fn: []}
    work = [output.grad_fn]
    while work:
        node = work.pop()
        for source, _ in node.next_functions if node is not None else ():
            if source is not None and source not in readers:
                readers[source] = []
                work.append(source)
            if source is not None:
                readers[source].append(node)
    return defaultdict(list, readers)
