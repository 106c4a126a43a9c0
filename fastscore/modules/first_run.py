"""The first run of a copy of a model: whether it keeps to the copy, leaves its batch alone, and makes no new layers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches.calls import Forward, hand_copies_to, is_call_model
from fastscore.batches.parts import Batch, map_tensors, tensors_of
from fastscore.modules import written_parameters
from fastscore.modules.copying import own_attributes
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.handles import undone_on_error
from fastscore.modules.hooks import put_on
from fastscore.modules.inspection import device_of
from fastscore.modules.weights import computed_weights, noted_uses
from fastscore.modules.wrappers import without_checkpoints
from fastscore.rng import fork_rng

# what these return is of no use to compute with, unless it is a tensor: shapes, dtypes, devices
_LOOKS = {"__get__", "size", "dim", "stride", "numel", "__len__", "is_floating_point", "is_complex", "data_ptr"}


class _ReadElsewhereError(Exception):
    """The name of a tensor of the model that was copied."""


class _OwnTensors(TorchFunctionMode):
    """Stops at an operation on one of the tensors, id -> name, before it is done."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.read: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = next((self._names[id(value)] for value in _flat((*args, *kwargs.values())) if id(value) in self._names),
                    None)
        if name is not None:
            made = func(*args, **kwargs) if getattr(func, "__name__", "") in _LOOKS else None
            if made is None or isinstance(made, Tensor):
                self.read = self.read or name  # the model's code may catch what is raised
                raise _ReadElsewhereError(name)
            return made
        return func(*args, **kwargs)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value


@torch.inference_mode(False)
def check_first_run(model: nn.Module, batch: Batch, forward: Forward) -> set[str]:
    """Run an evaluation copy of a model once, on a copy of a batch, so that nothing has happened to the model or the
    batch where such runs would do something to them: the Linears with a bias whose output, of rows in several
    dimensions, was written to. A model that does not run is not told here.

    forward: where that is call_model, it hands copies to models of this class from here on if this one writes to its
    batch. Raises ValueError where the copy runs layers of the model itself, its first run makes layers, or `forward`
    writes to the batch. Whatever a module of the model holds is what it was.
    """
    copied, own = evaluation_copy(model), _named_tensors(model)
    writing = written_parameters.Writing(copied, model)
    for tensor in _named_tensors(copied):
        own.pop(tensor, None)
    before = [(name, module, _values(module)) for name, module in model.named_modules()]
    given = map_tensors(lambda tensor: tensor.detach().clone(), batch)
    versions = [(tensor, tensor._version) for tensor in tensors_of(given)]
    with undone_on_error(model):
        watch, noting = _OwnTensors(own), noted_uses.Noting(copied)
        parameters = {name for name, _ in copied.named_parameters()}
        with torch.enable_grad(), without_checkpoints(), fork_rng(device_of(model)), _written(copied) as written, \
                suppress(Exception), watch, noting, writing:
            forward(copied, given)  # whoever runs it next tells exceptions of its code
        if writing.remember(model):
            return check_first_run(model, batch, forward)
        held = next((f"{name}.{where}".lstrip(".") for name, module, values in before
                     if (where := _changed(values, _values(module)))), None)
        if watch.read is not None or held is not None:
            called = f"{watch.read} is read" if watch.read is not None else f"{held} is written"
            raise ValueError(
                f"model: {called} through a function that holds the model's own layers (a closure: a lambda, an inner "
                "function, a hook, or the forward of a layer put in another's place), which copies do not take along: "
                "make it a method of the model, or a submodule with a forward of its own; a forward= must call the "
                "model that it is given")
    for name, reason in noting.remember(model).items():
        computed_weights.compute_on(model.get_submodule(name), reason)
    if made := sorted({name for name, _ in copied.named_parameters()} - parameters):
        raise ValueError(f"model: {made[0]} is made when the model first runs: call it once, model(batch), first")
    if all(tensor._version == version for tensor, version in versions):
        return written
    if not is_call_model(forward):
        raise ValueError(f"{type(model).__name__}: it writes in place to the batch that it is called on (`x -= mean`, "
                         "or a first layer with inplace=True), which would change yours: write `x = x - mean`, or hand "
                         "it copies in forward=, as in model(batch.clone())")
    hand_copies_to(type(model))
    return written


@contextmanager
def _written(model: nn.Module) -> Iterator[set[str]]:
    """After the block, the Linears with a bias of whose outputs in it, of rows in several dimensions, one was written
    to."""
    made, names = list[tuple[str, Tensor, int]](), set[str]()

    def note(name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 2 and not output.is_inference():
            made.append((name, output, output._version))

    try:
        with put_on(layer.register_forward_hook(partial(note, name)) for name, layer in model.named_modules()
                    if type(layer).forward is nn.Linear.forward and layer._parameters.get("bias") is not None):
            yield names
    finally:
        names |= {name for name, output, version in made if output._version != version}


def _named_tensors(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}


def _values(module: nn.Module) -> dict[tuple[str, Any], Any]:
    """(attribute of a module's own, key in it or None) -> what lies there."""
    own = {"_buffers": module._buffers, **own_attributes(module)}
    found: dict[tuple[str, Any], Any] = {(name, None): value for name, value in own.items()}
    for name, value in own.items():
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found |= {(name, (key,)): inner for key, inner in inside}
    return found


def _changed(before: dict[tuple[str, Any], Any], after: dict[tuple[str, Any], Any]) -> str:
    """An attribute that holds something else; empty where none does."""
    nothing = object()
    return next((key[0] for key in {**before, **after} if before.get(key, nothing) is not after.get(key, nothing)), "")
