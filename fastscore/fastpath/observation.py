"""What one pass of a model shows: the shapes that taps read, and up-samplings that a tap may stand before."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch, tensors_of
from fastscore.fastpath.fusion import CLAMPS, clamp_bounds
from fastscore.fastpath.packed_layers import ClampBounds
from fastscore.graph.autograd_nodes import readers_of
from fastscore.modules.hooks import input_of, put_on
from fastscore.modules.inspection import hooked
from fastscore.taps.gates import TapPoint
from fastscore.taps.measures import SUMS
from fastscore.taps.taps import Taps

_BEFORE_CLAMPS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Observation:
    """What one pass shows.

    output: the model's. samples: N. shapes: tapped layer -> shape of what its tap reads, in each call. earlier: tapped
    layer -> where its tap could stand as well, before an up-sampling, and the shape that it would read there. flat:
    Linear layers whose output is [N, C]. inputs: layer -> shape of its input, but for those under autocast. clamps:
    layer or BatchNorm -> the bounds of the clamp that alone reads its output. sums: the same, of the clamp that alone
    reads the sum which alone reads that output. relus: layers and BatchNorms whose output a ReLU alone reads that is no
    module.
    """

    output: Tensor
    shapes: dict[str, list[tuple[int, ...]]]
    earlier: dict[str, tuple[TapPoint, tuple[int, ...]]]
    flat: set[str]
    inputs: dict[str, tuple[int, ...]]
    clamps: dict[str, ClampBounds]
    sums: dict[str, ClampBounds]
    relus: set[str]
    samples: int


def observe(eval_model: nn.Module, taps: Taps, example: Batch, run: Forward) -> Observation:
    """What one pass of the copy, as it is, shows; nothing is changed, the taps neither.

    taps: on the copy, and not attached. run(eval_model, example): its output.
    """
    recorder = _Recorder(eval_model, taps.points)
    handles = [module.register_forward_hook(recorder.after(name), with_kwargs=True)
               for name, module in eval_model.named_modules()]
    if recorder.repeating:
        handles += [eval_model.get_submodule(point.owner(layer)).register_forward_pre_hook(
            recorder.before(layer), with_kwargs=True) for layer, point in taps.points.items()]
    with put_on(handles), taps, taps.one_pass(example):
        output: Tensor = run(eval_model, example)
    readers = defaultdict(list, readers_of(output.grad_fn))
    # Σ a·g, Σ g and the mean of a are the same before an up-sampling; powers of a·g are not
    earlier = recorder.earlier(readers) if taps.measure is SUMS else {}
    return Observation(output.detach(), recorder.shapes, earlier,
                       {name for name, found in recorder.dims.items() if found == {2}}, recorder.inputs,
                       recorder.clamps(readers), recorder.sums(readers), recorder.relus(readers),
                       max(output.shape[taps.axes.output], 1))


class _Recorder:
    """What hooks note while the copy runs. points: tapped layer -> where its tap stands."""

    def __init__(self, eval_model: nn.Module, points: Mapping[str, TapPoint]) -> None:
        self.points = points
        self._taps_of = defaultdict[str, dict[str, TapPoint]](dict)  # module -> name of a tap there -> where it stands
        for layer, point in points.items():
            self._taps_of[point.owner(layer)][layer] = point
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.dims: dict[str, set[int]] = {}  # Linear -> how many dimensions its outputs have
        self.inputs: dict[str, tuple[int, ...]] = {}
        self._upsampled: dict[str, list[tuple[Tensor, Tensor]]] = {}  # up-sampling -> its (input, output) in each call
        self._reads: dict[str, list[Tensor]] = {}  # tapped layer -> its input, in each call
        self._made: dict[str, list[Any]] = {}  # layer or BatchNorm -> the autograd node of its output, in each call
        self._clamped: dict[Any, ClampBounds] = {}  # autograd node of a clamp -> its bounds
        modules = list(eval_model.named_modules())
        self._bare = {name for name, module in modules if not hooked(module)}  # before hooks are set here
        self.repeating = {name for name, module in modules if _is_nearest_upsample(module)}

    def after(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        """A forward hook for the module of that name."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            for layer, point in self._taps_of.get(name, {}).items():
                made = output[0] if isinstance(output, tuple) else output
                x = made if point.output else input_of(args, kwargs)
                self.shapes.setdefault(layer, []).append(tuple(x.shape))
            if not isinstance(output, Tensor) or any(tensor.is_nested for tensor in tensors_of((args, output))):
                return output
            if isinstance(module, nn.Linear):
                self.dims.setdefault(name, set()).add(output.dim())
            before = isinstance(module, _BEFORE_CLAMPS)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and args \
                    and args[0].dtype == module.weight.dtype == output.dtype:
                self.inputs[name] = tuple(args[0].shape)
            if (before or name in self.repeating) and not output.requires_grad and output.is_floating_point():
                output = output.detach().requires_grad_().clone()  # before the first tap: autograd is to count readers
            if before and name in self._bare:
                self._made.setdefault(name, []).append(output.grad_fn)
            if type(module) in CLAMPS and name in self._bare:
                self._clamped[output.grad_fn] = clamp_bounds(module)
            if name in self.repeating:
                self._upsampled.setdefault(name, []).append((input_of(args, kwargs), output))
            return output

        return hook

    def before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A forward pre-hook for the tapped layer of that name."""
        return lambda module, args, kwargs: self._reads.setdefault(name, []).append(input_of(args, kwargs))

    def earlier(self, readers: Mapping[Any, list[Any]]) -> dict[str, tuple[TapPoint, tuple[int, ...]]]:
        """Tapped layer -> the tap before the up-sampling that it alone reads, and the shape there."""
        found = {}
        for layer, tensors in self._reads.items():
            for module, ((small, large), *more) in self._upsampled.items():
                if tensors[0] is large and not more and len(tensors) == 1 and not self.points[layer].output \
                        and all(b % a == 0 for a, b in zip(small.shape, large.shape, strict=True)) \
                        and len(readers[large.grad_fn]) == 1:
                    found[layer] = replace(self.points[layer], window=(), module=module), tuple(small.shape)
        return found

    def clamps(self, readers: Mapping[Any, list[Any]]) -> dict[str, ClampBounds]:
        """Layer or BatchNorm that runs once -> the bounds of the clamp that alone reads its output."""
        return {name: self._clamped[reader] for name, (node, *more) in self._made.items()
                if not more and node is not None
                for reader in readers[node] if reader in self._clamped and len(readers[node]) == 1}

    def relus(self, readers: Mapping[Any, list[Any]]) -> set[str]:
        """Layers and BatchNorms that run once, whose output a ReLU alone reads that is no module; where nothing has
        changed the convolution's input in place."""
        return {name for name, (node, *more) in self._made.items() if not more and node is not None
                and [reader.name() for reader in readers[node]] == ["ReluBackward0"]
                and readers[node][0] not in self._clamped and _keeps_input(node)}

    def sums(self, readers: Mapping[Any, list[Any]]) -> dict[str, ClampBounds]:
        """Convolution, or BatchNorm behind one, that runs once -> the bounds of the clamp that alone reads the sum
        which alone reads its output; where nothing has changed the convolution's input in place."""
        found, first = {}, set()
        for name, (node, *more) in self._made.items():
            if more or node is None or [reader.name() for reader in readers[node]] != ["AddBackward0"]:
                continue
            (addition,) = readers[node]
            if addition._saved_alpha == 1 and len(readers[addition]) == 1 and readers[addition][0] in self._clamped \
                    and _keeps_input(node):
                found[name] = addition
                first |= {addition} if addition.next_functions[0][0] is node else set()
        # of two, the one that the other is added to, which may be in place
        return {name: self._clamped[readers[addition][0]] for name, addition in found.items()
                if addition not in first or addition.next_functions[0][0] is self._made[name][0]}


def _keeps_input(node: Any) -> bool:
    """Whether `node` is that of a convolution, or of what alone it reads is, whose input is as it was."""
    if node.name() != "ConvolutionBackward0":
        node = node.next_functions[0][0]
    try:
        return node is not None and node.name() == "ConvolutionBackward0" and node._saved_input is not None
    except RuntimeError:  # it was changed in place since
        return False


def _is_nearest_upsample(module: nn.Module) -> bool:
    """Whether it is an up-sampling that repeats each value: as often, if all sizes are multiples."""
    return type(module) is nn.Upsample and module.mode == "nearest" and not hooked(module)
