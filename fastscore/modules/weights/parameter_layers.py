"""A parameter that a module's own code multiplies by, as a layer, which can be tapped, followed and cut as others are.

In evaluation copies, and in a user's model as long as it is tapped or masked, such a layer stands under the name of the
parameter; state dicts have the parameter's own name all the while. Before and after surgery a user's model is what it
was, with narrower parameters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastscore.modules.handles import Handle
from fastscore.modules.narrower import without

Side: TypeAlias = Literal["inputs", "outputs"]


class ParameterLayer(nn.Module):
    """A layer of the parameter `_of[1]` of the module `_of[0]`, and of its bias."""

    order: tuple[str, ...] = ()  # of the names of all parameters that the module had
    bias_name = ""
    stored_as = "weight"  # the name of the parameter here
    _of: tuple[nn.Module, str]

    @property
    def owner(self) -> nn.Module:
        """The module whose parameter it is."""
        return self._of[0]

    @property
    def held(self) -> dict[str, nn.Parameter | None]:
        """What the module has in the place of this layer."""
        bias = {self.bias_name: self._parameters["bias"]} if self.bias_name else {}
        return {self._of[1]: self._parameters["weight"], **bias}

    def measure(self) -> None:
        """Note how wide the weight is."""
        raise NotImplementedError

    def lie_as_a_linear(self) -> None:
        """Of an evaluation copy: have the weight lie in memory as that of a Linear does."""

    def at(self, dim: int) -> int:
        """The dimension of the weight that a dimension of the parameter is."""
        return dim

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        around = prefix[:-len(self._of[1]) - 1]
        destination.update({f"{around}{name}": held if keep_vars else held.detach()
                            for name, held in self.held.items() if held is not None})


class ParameterLinear(ParameterLayer, nn.Linear):
    """A Linear of the parameter `name` of a module, and of its bias; made by `ParametersAsLayers`."""

    # widths that the code of a module keeps beside its parameters: (parameter, side) -> attributes
    widths: ClassVar[Mapping[tuple[str, str], tuple[str, ...]]] = {}

    def __init__(self, owner: nn.Module, name: str, bias_name: str) -> None:
        nn.Module.__init__(self)
        self._of = owner, name  # no child of it, that is
        self.bias_name = bias_name
        weight = owner._parameters.pop(name)
        assert weight is not None
        self.weight = weight
        self.register_parameter("bias", owner._parameters.get(bias_name))
        owner._parameters.pop(bias_name, None)
        self.measure()

    @classmethod
    def attributes(cls, name: str, side: Side) -> tuple[str, ...]:
        """Those of `widths` that the inputs, or outputs, of the parameter `name` are."""
        return cls.widths.get((name, side), ())

    def measure(self) -> None:
        """Note how wide the weight is."""
        self.out_features, self.in_features = self.weight.shape[-2:]

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight, self.bias)

    # code that reads the parameter itself reads it still

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(super().__getattr__("weight"), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What PyTorch calls where a function is given one as a tensor."""
        if getattr(func, "__name__", "") in ("eq", "ne", "__eq__", "__ne__"):  # as where it is looked for in a list
            return NotImplemented
        args, kwargs = tree_map(lambda each: each.weight if isinstance(each, ParameterLinear) else each,
                                (args, kwargs or {}))
        return func(*args, **kwargs)

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """As Torch-Pruning's functions do of a Linear: without the outputs `idxs`, in place."""
        if self.bias is not None:
            self.bias = without(self.bias, self.bias.dim() - 1, torch.tensor(idxs))
        return self._without("outputs", idxs)

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Without the inputs `idxs`, in place."""
        return self._without("inputs", idxs)

    def get_out_channels(self, layer: nn.Module) -> int:
        """How many outputs there are."""
        return self.out_features

    def get_in_channels(self, layer: nn.Module) -> int:
        """How many inputs there are."""
        return self.in_features

    def _without(self, side: Side, index: Sequence[int]) -> nn.Module:
        owner, name = self._of
        dim = self.weight.dim() - (1 if side == "inputs" else 2)
        self.weight = without_rows(self.weight, owner, self.attributes(name, side), dim, torch.tensor(index))
        self.measure()
        return self


def is_part(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call makes queries, keys or values alone, each maybe of something else."""
    return isinstance(layer, ParameterLinear) and len(args) + len(kwargs) > 1


class HoldsLayers:
    """Of a module that holds such layers: loads the names that it has outside of this file, and has the biases that are
    theirs now, for code that reads one itself."""

    def __getattr__(self: Any, name: str) -> Any:
        for key, layer in self.__dict__.get("_modules", {}).items():
            if isinstance(layer, ParameterLayer) and name and layer.bias_name == name:
                return layer._parameters["bias"]
            if key == name and get_ident() in getattr(layer, "readers", ()):
                with torch._C.DisableTorchFunction():
                    return layer.raw
        return super().__getattr__(name)  # type: ignore[misc]

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, layer in self._modules.items():
            if isinstance(layer, ParameterLayer):
                for own, held in ((name, layer.stored_as), (layer.bias_name, "bias")):
                    if own and f"{prefix}{own}" in state_dict:
                        state_dict[f"{prefix}{name}.{held}"] = state_dict.pop(f"{prefix}{own}")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


@dataclass(frozen=True)
class Kinds:
    """What becomes of a module.

    names: of its parameters that become layers. layer: of which class. change: what its own class is made from besides;
    None: it loads state dicts as HoldsLayers does already. biases: of those of `names` that have one, its name.
    """

    names: tuple[str, ...]
    layer: type[ParameterLinear]
    change: type | None = None
    biases: Mapping[str, str] = field(default_factory=dict)


class ParametersAsLayers(Handle):
    """A module whose parameters are layers until `remove`."""

    def __init__(self, module: nn.Module, kinds: Kinds) -> None:
        self._module: nn.Module | None = module
        order = tuple(module._parameters)
        for name in kinds.names:
            layer = kinds.layer(module, name, kinds.biases.get(name, ""))
            layer.order = order
            module.add_module(name, layer)
        others = {name: module._modules.pop(name) for name in list(module._modules) if name not in kinds.names}
        module._modules.update(others)  # behind them, so that parameters come in the order that they had
        if kinds.change is not None:
            module.__class__ = changed(kinds.change, type(module))

    def remove(self) -> None:
        if self._module is not None:
            put_back(self._module)
        self._module = None

    def make_permanent(self) -> None:
        for layer in self._module._modules.values() if self._module is not None else ():
            if isinstance(layer, ParameterLayer):
                layer.lie_as_a_linear()
        self._module = None


def put_back(module: nn.Module) -> None:
    """Make the layers that a module's parameters have become parameters again, in place."""
    layers = {name: layer for name, layer in module._modules.items() if isinstance(layer, ParameterLayer)}
    held = dict(module._parameters)
    order: tuple[str, ...] = ()
    for name, layer in layers.items():
        held |= layer.held
        order = layer.order or order
        del module._modules[name]
    module._parameters.clear()
    module._parameters.update({name: held.pop(name) for name in order if name in held} | held)
    module.__class__ = vars(type(module)).get("_before", type(module))


def without_rows(weight: Tensor, owner: nn.Module, attributes: Iterable[str], dim: int, index: Tensor
                 ) -> Tensor:
    """The weight less `index` (int64) of its dimension `dim`; those of its module's `attributes` that are its width
    follow."""
    new = without(weight, dim, index)
    for attribute in attributes:
        if vars(owner).get(attribute) == weight.shape[dim]:
            setattr(owner, attribute, new.shape[dim])
    return new


_CHANGED: dict[tuple[type, type], type] = {}  # (what is changed, a class) -> the class, with that changed


def changed(change: type, cls: type) -> type:
    """A class that is `cls`, with `change` before it."""
    if (change, cls) not in _CHANGED:
        _CHANGED[change, cls] = type(cls.__name__, (change, cls), {"_before": cls, "__module__": cls.__module__})
    return _CHANGED[change, cls]
