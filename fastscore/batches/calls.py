"""How a model is called on a batch."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastscore.batches.parts import Batch, fields_of, first_tensor, map_tensors

_OF_TYPES = re.compile(r"\b(data|d)?type\b|not implemented for '")  # in what PyTorch says of them
Forward: TypeAlias = Callable[[nn.Module, Batch], Any]
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


def way_out(model: nn.Module, forward: Forward, batch: Batch, error: Exception) -> str:
    """What may explain an error of a model's on its batch: of one about types, numbers of another type than its
    weights; else how call_model called it, and how it is called otherwise. Empty where nothing new can be said."""
    if isinstance(error, (RuntimeError, ValueError)) and _OF_TYPES.search(str(error)):
        return _other_types(model, batch)
    if isinstance(error, RuntimeError):  # as of shapes
        return ""
    if not is_call_model(forward):
        return "" if _takes_two(forward) else ". forward= is given both: forward=lambda model, batch: model(batch)"
    if isinstance(batch, Tensor):
        return ""
    kind, how = type(batch).__name__, "pass forward=lambda model, batch: model"
    if isinstance(batch, Mapping):
        called, takes = f"with the keywords {', '.join(map(str, batch))}", f"the {kind} itself, {how}(batch)"
        part = next((name for name, value in batch.items() if first_tensor(value) is not None), None)
        takes += "" if part is None else f", and where it takes a part, model(batch[{part!r}])"
    elif isinstance(batch, (tuple, list)):
        called, takes = f"on the first element of the {kind}", f"the whole, {how}(batch), or model(*batch)"
    else:
        part = next(name for name, value in fields_of(batch).items() if first_tensor(value) is not None)
        called, takes = f"on the {kind} itself", f"a part, {how}(batch.{part})"
    return f". It was called {called}: where it takes {takes}"


def _takes_two(forward: Forward) -> bool:
    try:
        inspect.signature(getattr(forward, "checks", forward)).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # of code that says nothing of itself
        return True
    return True


def _other_types(model: nn.Module, batch: Batch) -> str:
    tensor, weight = first_tensor(batch), next(filter(Tensor.is_floating_point, model.parameters()), None)
    values = tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.uint8)  # others are indices
    if tensor is None or weight is None or tensor.dtype == weight.dtype or not values:
        return ""
    return f". The batch holds {tensor.dtype}, and the weights are {weight.dtype}"
