"""Convolutions of parameters that a module's own code hands to F.conv2d and its like: see
fastscore.modules.weights.own_products."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.weights.parameter_layers import ParameterLayer

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEPTHWISE = -1  # groups: as many as there are channels
Settings = tuple[tuple[str, Any], ...]


def given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a convolution, by their names; None of any other call."""
    return {"bias": None, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs} if func in _KINDS else None


def is_one(func: Any) -> bool:
    """Whether a function is a convolution."""
    return func in _KINDS


def settings_of(given: Mapping[str, Any]) -> Settings | None:
    """Those of a convolution all of whose channels are one group, or each one of its own; None of any other."""
    weight: Tensor = given["weight"]
    dims, groups = weight.dim() - 2, given.get("groups", 1)
    if groups != 1 and not (weight.shape[1] == 1 and groups == weight.shape[0]):
        return None
    found: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1} | {
        name: given[name] for name in ("stride", "padding", "dilation") if name in given}
    sizes = {name: value if isinstance(value, str) else (value,) * dims if isinstance(value, int) else
             tuple(value) * (dims if len(value) == 1 else 1) for name, value in found.items()}
    return (*sizes.items(), ("groups", _DEPTHWISE if groups > 1 else 1))


def groups_that_stay(given: Mapping[str, Any]) -> str:
    """What to say of a convolution of each channel by itself whose code keeps the number of groups from elsewhere than
    from the weight, which has become narrower; empty of any other."""
    weight, groups = given["weight"], given.get("groups", 1)
    if groups == 1 or weight.shape[1] != 1 or groups == len(weight):
        return ""
    return f"convolves in {groups} groups, whatever goes of the weight: groups=weight.shape[0] follows it"


class OwnConvolution(ParameterLayer):
    """What such a layer is beside the convolution of PyTorch."""

    def __init__(self, owner: nn.Module, name: str, settings: Settings) -> None:
        weight: Any = owner._parameters[name]
        numbers = dict(settings)
        groups = len(weight) if numbers.pop("groups") == _DEPTHWISE else 1
        kind: Any = super()
        kind.__init__(weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), bias=False, device="meta",
                      groups=groups, **numbers)
        self._of, self.order, self.dims = (owner, name), tuple(owner._parameters), tuple(range(weight.dim()))
        self.readers, self.numbers = list[int](), settings
        self._parameters["weight"] = owner._parameters.pop(name)

    @property
    def stored(self) -> tuple[Tensor, tuple[int, ...]]:
        """What is in memory, and which dimensions of the parameter its own are."""
        return self.raw, self.dims

    @property
    def raw(self) -> Tensor:
        """The parameter as the module's code has it."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def measure(self) -> None:
        """Note how wide the weight is."""
        layer: Any = self
        outputs, inputs = self.raw.shape[:2]
        layer.groups = 1 if layer.groups == 1 else outputs
        layer.in_channels, layer.out_channels = inputs * layer.groups, outputs


class _Conv1d(OwnConvolution, nn.Conv1d):
    pass


class _Conv2d(OwnConvolution, nn.Conv2d):
    pass


class _Conv3d(OwnConvolution, nn.Conv3d):
    pass


_KINDS: Mapping[Any, type[OwnConvolution]] = {F.conv1d: _Conv1d, F.conv2d: _Conv2d, F.conv3d: _Conv3d}


def of(owner: nn.Module, name: str, settings: Settings) -> OwnConvolution:
    """The layer of a parameter, which is taken from its module."""
    weight = owner._parameters[name]
    assert weight is not None
    return list(_KINDS.values())[weight.dim() - 3](owner, name, settings)


def with_bias(y: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """What a convolution makes, and its bias."""
    return y if bias is None else y + bias.view(-1, *[1] * (weight.dim() - 2))
