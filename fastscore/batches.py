"""How a batch reaches a model: tensors, (input, ...) tuples, dicts of keyword arguments, or dataclasses."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Batch: TypeAlias = Any
Forward: TypeAlias = Callable[[nn.Module, Batch], Any]
Output: TypeAlias = Callable[[Any], Any]  # what a model returns -> a tensor of it, or several
Outputs: TypeAlias = Callable[[Any, str], Sequence[Tensor]]  # (what a model returns, its name) -> its output

MASK = "attention_mask"  # by this name a model is told which tokens are padding
INDEX = "batch"  # and by this one, which graph of a batch each node belongs to


class OutputError(TypeError):
    """What a model returns is no output that a gradient can start from."""


def check_example(batch: Batch, argument: str) -> None:
    """Raise TypeError, naming the argument, where a batch holds no tensor."""
    if first_tensor(batch) is None:
        shown = repr(batch) if len(repr(batch)) < 60 else type(batch).__name__
        advice = "; torch.from_numpy makes one of an array" if type(batch).__module__ == "numpy" else ""
        raise TypeError(f"{argument}: {shown}, where a batch is meant: a tensor [N, ...], a tuple that begins with "
                        f"one, a dict of keyword arguments, or a dataclass{advice}")


def check_rows(batch: Batch, argument: str) -> None:
    """Raise TypeError, naming the argument, where samples of different lengths lie one after the other in a batch."""
    if isinstance(batch, PackedSequence):
        raise TypeError(f"{argument}: a PackedSequence has no row for each sample: give batches (padded, lengths), as "
                        "pad_packed_sequence(packed, batch_first=True) makes, and pass forward=lambda model, batch: "
                        "model(pack_padded_sequence(batch[0], batch[1].cpu(), batch_first=True, enforce_sorted=False))")
    if isinstance(batch, Tensor):
        if batch.is_nested:
            raise TypeError(f"{argument}: a nested tensor has no row for each sample: give padded ones, as in "
                            "torch.nested.to_padded_tensor(batch, 0.0), and a mask where the model takes one")
        return
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else \
        _fields(batch).values()
    for part in parts:
        check_rows(part, argument)


def check_iterable(batches: object, argument: str) -> None:
    """Raise TypeError, naming the argument, where `batches` are none: one tensor, one dict, no iterable."""
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        shown = "one tensor" if isinstance(batches, Tensor) else type(batches).__name__
        raise TypeError(f"{argument}: {shown}, where an iterable of batches is meant; for a single one: [batch]")


_handed_copies = set[type[nn.Module]]()


def hand_copies_to(kind: type[nn.Module]) -> None:
    """From here on call_model calls models of this class, which write to what they are called on, on copies of it."""
    _handed_copies.add(kind)


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call `model` on a batch: a tensor, or a dataclass, as it is, of a tuple or list the first element, a dict as
    keyword arguments."""
    if type(model) in _handed_copies:
        batch = map_tensors(Tensor.clone, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def is_call_model(forward: Forward) -> bool:
    """Whether `forward` is call_model, as it is or checked (see checked_forward), and no function of the user's."""
    return getattr(forward, "checks", forward) is call_model


def call_of(batch: Batch) -> str:
    """Code for what call_model does with a batch like this one."""
    return "model(**batch)" if isinstance(batch, Mapping) else \
        "model(batch[0])" if isinstance(batch, (tuple, list)) else "model(batch)"


def way_out(forward: Forward, batch: Batch) -> str:
    """How call_model called a model on a batch that it does not take so, and how it is called otherwise; empty where
    that was not call_model, or says nothing new."""
    if not is_call_model(forward) or isinstance(batch, Tensor):
        return ""
    kind, how = type(batch).__name__, "pass forward=lambda model, batch: model"
    if isinstance(batch, Mapping):
        called, takes = f"with the keywords {', '.join(map(str, batch))}", f"the {kind} itself, {how}(batch)"
    elif isinstance(batch, (tuple, list)):
        called, takes = f"on the first element of the {kind}", f"the whole, {how}(batch), or model(*batch)"
    else:
        part = next(name for name, value in _fields(batch).items() if first_tensor(value) is not None)
        called, takes = f"on the {kind} itself", f"a part, {how}(batch.{part})"
    return f". It was called {called}: where it takes {takes}"


def output_tensors(returned: Any, model: str) -> list[Tensor]:
    """The tensor that the output gradient of `model` (its name) starts from: what it returned, or the only one in that.

    Integers and scalars, such as a loss, do not count. Raises TypeError, naming them, where there is another number of
    tensors than one.
    """
    found = dict(_named_tensors(returned, ""))
    if len(found) != 1:
        shown = type(returned).__name__ if not isinstance(returned, Tensor) else \
            f"a {returned.dtype} tensor of shape {tuple(returned.shape)}"
        held = ", ".join(f"{name or 'it'} {list(tensor.shape)}" for name, tensor in found.items())
        raise OutputError(f"{model} returns {shown}{f' with {held}' if held else ''}; scores need one floating-point "
                        "tensor [N, ...]: pass forward=lambda model, batch: <the tensor, or a tuple of those that "
                        "count> (to a Scorer: output=lambda returned: <the tensor, or a list of them>)")
    return list(found.values())


def named_outputs(returned: Any, run: Forward, model: str) -> dict[str, Tensor]:
    """The outputs of `model` (its name) in what `run` returned, by how they are reached: all that hold values where
    `run` is the user's own, who says by what it returns which count; else the only one.

    Raises OutputError where there are none, or several that no one has chosen.
    """
    found = dict(_named_tensors(returned, ""))
    if len(found) > 1 and not is_call_model(run):
        return found
    return {"": output_tensors(returned, model)[0]}


def floating_tensors(returned: Any) -> list[Tensor]:
    """All floating-point tensors but scalars in what a model returned."""
    return [tensor for _, tensor in _named_tensors(returned, "")]


def _named_tensors(returned: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(returned, Tensor):
        if returned.is_floating_point() and returned.dim() > 0:
            yield name, returned
    elif isinstance(returned, Mapping):
        for key, value in returned.items():
            yield from _named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(returned, (tuple, list)):
        for place, value in enumerate(returned):
            yield from _named_tensors(value, f"{name}[{place}]")
    else:
        for key, value in _fields(returned).items():
            yield from _named_tensors(value, f"{name}.{key}")


def output_selector(output: Output | None) -> Outputs:
    """What finds the tensors in what a model returned: `output`, where the model does not return a tensor as it is."""

    def outputs(returned: Any, model: str) -> list[Tensor]:
        if output is None or isinstance(returned, Tensor):
            return output_tensors(returned, model)
        found = output(returned)
        return [tensor for each in (found if isinstance(found, (tuple, list)) else [found])
                for tensor in output_tensors(each, model)]

    return outputs


def check_same_rows(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError where the tensors of an output differ in their number of rows."""
    if len({len(tensor) for tensor in tensors}) != 1:
        raise ValueError(f"output: its tensors have {', '.join(str(len(tensor)) for tensor in tensors)} rows, not one "
                         "for each sample in all of them: choose those that have, by forward= (of a Scorer: output=)")


def concat_outputs(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [N, ...] as one, [N, K] where there are several: K values in all for each sample."""
    if len(tensors) == 1:
        return tensors[0]
    check_same_rows(tensors)
    return torch.cat([tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in tensors], 1)


def checked_forward(run: Forward, outputs: Outputs | None = None) -> Callable[[nn.Module, Batch], Tensor]:
    """`run`, with its output found and checked to be floating-point, [N, ...]: what a gradient can start from; several
    that a `run` of the user's own returns are one. outputs: finds them otherwise."""

    def run_and_check(model: nn.Module, batch: Batch) -> Tensor:
        returned, name = run(model, batch), type(model).__name__
        return concat_outputs(list(named_outputs(returned, run, name).values()) if outputs is None
                              else outputs(returned, name))

    run_and_check.checks = run  # type: ignore[attr-defined]
    return run_and_check


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """`batch` with `function` applied to each of its tensors, through tuples, lists, mappings and dataclasses, all of
    which stay what they are."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        values = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return values
        made = copy.copy(batch)
        for key, value in values.items():
            made[key] = value
        return made
    if isinstance(batch, (tuple, list)):
        parts = [map_tensors(function, value) for value in batch]
        return batch._make(parts) if hasattr(batch, "_make") else parts if isinstance(batch, list) else tuple(parts)
    if _fields(batch):
        made = copy.copy(batch)
        for name, value in _fields(batch).items():
            object.__setattr__(made, name, map_tensors(function, value))  # of a frozen one, too
        return made
    return batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch, depth first."""
    found: list[Tensor] = []
    _collect(batch, found)
    return iter(found)


def _collect(batch: Batch, found: list[Tensor]) -> None:
    """Add the tensors of a batch, depth first: every operation of a model that is watched asks for its operands'."""
    if isinstance(batch, Tensor):
        found.append(batch)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            _collect(value, found)
    elif type(batch) not in _NO_CONTAINERS:
        for value in batch.values() if isinstance(batch, Mapping) else _fields(batch).values():
            _collect(value, found)


_NO_CONTAINERS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; none of anything else."""
    if not is_dataclass(value) or isinstance(value, (type, Mapping)):
        return {}
    return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}


def mappings(batch: Batch) -> Iterator[Mapping[str, Any]]:
    """The dicts in a batch, or among a call's (args, kwargs)."""
    if isinstance(batch, Mapping):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from mappings(value)


def valid_tokens(batch: Batch) -> Tensor | None:
    """bool [N, T]: the tokens that are no padding, as an attention_mask [N, T] among a batch's keywords, or a call's,
    has it; None where there is none, or no padding."""
    masks = (value for keywords in mappings(batch) for key, value in keywords.items()
             if key == MASK and isinstance(value, Tensor) and value.dim() == 2)
    return None if (mask := next(masks, None)) is None or bool((mask != 0).all()) else mask != 0


def first_tensor(batch: Batch) -> Tensor | None:
    """The first tensor of a batch, depth first; None where there is none."""
    return next(tensors_of(batch), None)


def first_input(inputs: Any) -> Tensor:
    """The tensor that tells samples apart: the first in a batch, or among a forward call's (args, kwargs)."""
    if (tensor := first_tensor(inputs)) is None:
        raise TypeError("batches: the model is called without a tensor, so its samples cannot be told apart: give "
                        "tensors, or tuples, lists, dicts or dataclasses of them")
    return tensor


def first_samples(batch: Batch, keep: int) -> Batch:
    """The first `keep` samples of a batch: of each of its tensors that has a row for every sample."""
    count = len(first_input(batch))
    return map_tensors(lambda tensor: tensor[:keep] if tensor.dim() and len(tensor) == count else tensor, batch)


def few_samples(batch: Batch, keep: int) -> Batch:
    """`first_samples`, to trace a model with that call_model calls; the batch as it is where it cannot be cut."""
    return first_samples(batch, keep) if can_be_cut(batch[:1] if isinstance(batch, (tuple, list)) else batch) else batch


def can_be_cut(batch: Batch) -> bool:
    """Whether samples can be taken out of a batch by its rows: not where integers of another number, or a vector that
    is called `batch`, tell which rows belong together (edges of graphs, offsets of sequences, the graph of a node)."""
    tensor = first_tensor(batch)
    if tensor is None or not tensor.dim():
        return True
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    return not any(isinstance(value, Tensor) and value.dim() and value.dtype in (torch.int32, torch.int64)
                   and (len(value) not in (1, len(tensor)) or (name == INDEX and value is not tensor))
                   for part in parts for name, value in _own_fields(part).items())


def _own_fields(part: Any) -> Mapping[Any, Any]:
    """What a part of a batch holds, by name; lists of targets are not looked into."""
    return {"": part} if isinstance(part, Tensor) else part if isinstance(part, Mapping) else _fields(part)


def on_device(batches: Iterable[Batch], device: torch.device, samples: int | None = None) -> Iterator[Batch]:
    """The batches on `device`, without empty ones, cut off after `samples` samples."""
    left = samples
    for batch in batches:
        check_rows(batch, "batches")
        tensor = first_tensor(batch)
        if tensor is not None and tensor.dim() and not len(tensor):
            continue  # a loss over no sample is NaN
        batch = to_device(map_tensors(usable, batch), device)
        if left is not None:
            count = len(first_input(batch))
            if not can_be_cut(batch):
                raise ValueError("samples: these batches cannot be cut by their rows, of which integers beside them "
                                 "tell which belong together: give fewer batches, or samples=\"auto\"")
            if count > left:
                batch = first_samples(batch, left)
            left -= min(left, count)
        yield batch
        if left == 0:
            return


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` on `device`. To a CUDA device it is copied from pinned memory, on a stream of its own: while the device
    works on the batch before, and without a wait of the host."""
    if device.type != "cuda":
        return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)

    def move(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor.to(device, non_blocking=True)
        with torch.cuda.stream(stream):
            moved = (tensor.pin_memory() if tensor.layout == torch.strided else tensor).to(device, non_blocking=True)
        moved.record_stream(current)
        return moved

    batch = map_tensors(move, batch)
    current.wait_stream(stream)
    return batch


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache
def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Apple's and some of Intel's do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True


def with_float64(tensor: Tensor) -> Tensor:
    """`tensor` where float64 is to be had: on its device, or else on the CPU."""
    return tensor if has_float64(tensor.device) else tensor.cpu()


def usable(tensor: Tensor) -> Tensor:
    """A tensor that can be followed: none made under inference_mode, which autograd does not take, and none of a
    subclass that adds nothing to operations, whose results are views that in-place layers write to."""
    plain, own = (getattr(kind.__torch_function__, "__func__", None) for kind in (Tensor, type(tensor)))
    if type(tensor) is not Tensor and own is plain:
        tensor = tensor.as_subclass(Tensor)
    return tensor.clone() if tensor.is_inference() else tensor


def to_channels_last(batch: Batch) -> Batch:
    """The 4-D tensors of a batch, or a tensor, in channels_last memory format."""
    return map_tensors(lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4
                       else tensor, batch)


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The floating-point tensors of a batch, or a tensor, in `dtype`."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)
