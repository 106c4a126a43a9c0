"""Functions of PyTorch that run a layer's parameters, `F.conv2d(x, layer.weight, layer.bias)`: which layers they are
of, and whether such a call computes what the layer would."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.inspection import runs_code_of

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
# function -> (the layers that it runs, the names of its arguments); that of a LayerNorm is given its width, which stays
FUNCTIONS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ("input", "weight", "bias")),
    F.conv1d: (nn.Conv1d, _CONV), F.conv2d: (nn.Conv2d, _CONV), F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED), F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
    F.batch_norm: (nn.modules.batchnorm._BatchNorm, _BATCH),
    F.instance_norm: (nn.modules.instancenorm._InstanceNorm, (*_BATCH[:5], "use_input_stats", *_BATCH[6:])),
    F.group_norm: (nn.GroupNorm, ("input", "num_groups", "weight", "bias", "eps")),
    F.prelu: (nn.PReLU, ("input", "weight")),
    F.embedding: (nn.Embedding, ("input", "weight", "padding_idx", "max_norm")),
}
# of arguments that are not given, where they do something
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "training": False, "eps": 1e-5,
             "use_input_stats": True}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_NO_MATTER = ("input", "momentum", "padding_idx")  # of evaluation mode


def bound(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one of these functions, by their names; a weight, where code hands over all of it as a view."""
    given = {**dict(zip(FUNCTIONS[func][1], args, strict=False)), **kwargs}
    return given | {"weight": _whole(given.get("weight"))}


def _whole(x: Any) -> Any:
    """What a view is of, where that is the same in all: `weight.squeeze(1)`, given another dimension again."""
    base = x._base if isinstance(x, Tensor) else None
    return x if base is None or _read_as(x) != _read_as(base) or any(
        size > 1 and own != of for size, own, of in zip(x.shape, x.stride(), base.stride(), strict=True)) else base


def _read_as(x: Tensor) -> tuple[object, ...]:
    """What tells, beside its strides, what a tensor is of its memory, in which `weight.conj()` is the weight."""
    return x.shape, x.storage_offset(), x.dtype, x.is_conj(), x.is_neg()


def computes_the_same(layer: nn.Module, func: Any, given: Mapping[str, Any]) -> bool:
    """Whether a function of a layer's weight computes what the layer does."""
    kind, names = FUNCTIONS[func]
    plain: Any = next((base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules.")), None)
    if not isinstance(layer, kind) or plain is None or not runs_code_of(layer, plain):
        return False
    held = {**layer._parameters, **layer._buffers}
    if not isinstance(given.get("input"), Tensor) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    return all(given.get(name) is held.get(name) for name in names if name in _TENSORS) and \
        has_settings_of(layer, given) and getattr(layer, "max_norm", None) is given.get("max_norm") is None


def has_settings_of(layer: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the numbers that a function is given are those that the layer has."""
    names = next(names for kind, names in FUNCTIONS.values() if isinstance(layer, kind))
    known = [name for name in names if name not in (*_TENSORS, *_NO_MATTER, "max_norm")]
    return all(_alike(given.get(name, _DEFAULTS.get(name)), _setting(layer, name)) or
               (name == "padding" and _same_padding(layer, given)) for name in known)


def _setting(layer: Any, name: str) -> Any:
    return not layer.track_running_stats if name == "use_input_stats" else getattr(layer, name)


def _same_padding(layer: Any, given: Mapping[str, Any]) -> bool:
    """Whether a word for the padding, where one of both has one, means the numbers of the other."""
    same = tuple(d * (k - 1) / 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    one, other = ({"same": same, "valid": (0,) * len(same)}.get(each, each) if isinstance(each, str) else each
                  for each in (given.get("padding", 0), layer.padding))
    return _alike(one, other)


def _alike(given: Any, own: Any) -> bool:
    """Whether a number, or several, are those of a layer."""
    if isinstance(own, tuple) and not isinstance(given, str):
        given = (given,) * len(own) if isinstance(given, int) else tuple(given)
        given = given * len(own) if len(given) == 1 else given
    return bool(given == own)
