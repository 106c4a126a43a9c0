"""copy.deepcopy() of a model, for a part of its time: a module has some twenty attributes, most of them empty dicts and
numbers."""

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ATOMS = frozenset((bool, int, float, str, type(None), type, torch.dtype))
_CONTAINERS = (dict, OrderedDict, list, set)
_PROTOCOL = {"__reduce_ex__": object.__reduce_ex__, "__reduce__": object.__reduce__, "__new__": object.__new__,
             "__getattr__": nn.Module.__getattr__}
# that put what they are given into the module, and add what old checkpoints lack
_RESTORING = (nn.Module.__setstate__, nn.modules.conv._ConvNd.__setstate__, nn.MultiheadAttention.__setstate__)
_known = WeakKeyDictionary[type[nn.Module], bool]()
_OF_ITS_OWN = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__slots__")
_OF_EVERY_MODULE = set(vars(nn.Module()))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside what every module has: settings, mostly."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def is_setting(value: object) -> bool:
    """Whether a value is a number, a word, a type or nothing, or a tuple or list of such: what can be compared."""
    return isinstance(value, bool | int | float | str | type | torch.dtype | None) or (
        isinstance(value, tuple | list) and all(map(is_setting, value)))


def counterparts(noted: Mapping[nn.Module, Any] | Set[nn.Module], model: nn.Module, copy: nn.Module
                 ) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(module, the same of `copy`) of those of `model` that are noted."""
    for name, module in list(model.named_modules()) if noted else ():
        if module in noted:
            yield module, copy.get_submodule(name)


def deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What copy.deepcopy(model, memo) returns; of a model with compressed sparse buffers, which it refuses, too. memo:
    id of a part of the model -> what stands for it in the copy; more is added."""
    made: list[tuple[nn.Module, nn.Module]] = []
    storages: dict[int, Any] = memo.setdefault("torch", {})  # type: ignore[call-overload]  # as PyTorch keeps them
    for buffer in model.buffers():
        if id(buffer) in memo:
            continue
        if buffer.layout not in (torch.strided, torch.sparse_coo):  # which have no storage that PyTorch could copy
            memo[id(buffer)] = buffer.clone()
        elif _is_all_of_its_storage(buffer) and buffer.untyped_storage()._cdata not in storages:
            memo[id(buffer)] = own = buffer.clone()
            storages[buffer.untyped_storage()._cdata] = own.untyped_storage()
    for module in model.modules():
        if id(module) not in memo and _is_plain(type(module)) and _OF_ITS_OWN[0] not in vars(module):
            memo[id(module)] = shell = object.__new__(type(module))
            made.append((module, shell))
    for module, shell in made:
        state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
        shell.__setstate__({name: _copied(value, memo) for name, value in state.items()})
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _is_all_of_its_storage(x: Tensor) -> bool:
    """Whether a clone of a tensor has all that copy.deepcopy() takes along."""
    return type(x) is Tensor and x.layout == torch.strided and x.device.type in ("cpu", "cuda") and \
        not x.requires_grad and not vars(x) and not x.is_quantized and not x.is_conj() and not x.is_neg() and \
        x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind in _CONTAINERS:
        if not value:
            return memo.setdefault(id(value), kind())
        if kind is dict and id(value) not in memo and all(type(key) in ATOMS for key in value):
            memo[id(value)] = made = {}
            made.update({key: _copied(each, memo) for key, each in value.items()})
            return made
        if kind is list and id(value) not in memo:
            memo[id(value)] = several = []
            several.extend([_copied(each, memo) for each in value])
            return several
    if kind is tuple and all(type(each) in ATOMS for each in value):
        return value
    found = memo.get(id(value))
    return copy.deepcopy(value, memo) if found is None else found


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether all that a copy of such a module has is copies of its attributes."""
    if kind not in _known:
        _known[kind] = _has_no_ways_of_its_own(kind)
    return _known[kind]


def _has_no_ways_of_its_own(kind: type[nn.Module]) -> bool:
    return all(getattr(kind, name) is method for name, method in _PROTOCOL.items()) and \
        kind.__setstate__ in _RESTORING and \
        kind not in copyreg.dispatch_table and \
        getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None) and \
        not any(name in vars(base) for base in kind.__mro__[:-1] for name in _OF_ITS_OWN)
