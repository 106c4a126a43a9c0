"""Which parameters of a user's model run as layers, and when: see fastscore.modules.weights.parameter_layers."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from fastscore.modules import forwards
from fastscore.modules.attention import multihead_attention, projections
from fastscore.modules.handles import Handle
from fastscore.modules.narrower import without
from fastscore.modules.weights import called_layers, experts, recurrent
from fastscore.modules.weights.parameter_layers import (
    Kinds,
    ParameterLinear,
    ParametersAsLayers,
    Side,
    put_back,
    without_rows,
)

HAVE_PLACES = (projections.ProjectionLinear, recurrent.GateLinear)  # layers which add their bias, that takes means in


def replace(model: nn.Module, called: Iterable[str] | None = None) -> Iterator[Handle]:
    """Make layers, which compute the same, of the parameters that experts, routers, nn.MultiheadAttention and recurrent
    modules hold; and have modules call layers that their code runs without a call.

    Args:
        model: changed in place.
        called: names of layers; only modules of which one is among them are changed. None: all.

    Yields:
        For each module, a handle that undoes it.
    """
    yield from called_layers.replace(model, model)
    wanted = None if called is None else {name.rpartition(".")[0] for name in called}
    for name, module in list(model.named_modules()):
        if (wanted is None or name in wanted) and (kinds := _kinds(module)) is not None:
            yield ParametersAsLayers(module, kinds)


def put_all_back(model: nn.Module) -> None:
    """Make parameters of them again, in place: of a copy of a model that is tapped."""
    for module in model.modules():
        forwards.put_back(module)
        if any(isinstance(layer, ParameterLinear) for layer in module._modules.values()):
            put_back(module)


def is_held(model: nn.Module, name: str) -> bool:
    """Whether `name` is the qualified name of a parameter that `replace` makes a layer, as a user has it."""
    owner, _, key = name.rpartition(".")
    kinds = _kinds(model.get_submodule(owner)) if key in model.get_submodule(owner)._parameters else None
    return kinds is not None and key in kinds.names


def layer_of(model: nn.Module, name: str) -> type[ParameterLinear]:
    """What `replace` makes of such a parameter."""
    kinds = _kinds(model.get_submodule(name.rpartition(".")[0]))
    assert kinds is not None
    return kinds.layer


def inputs_of(model: nn.Module, name: str) -> int:
    """How many channels such a parameter is multiplied by."""
    owner, _, key = name.rpartition(".")
    return int(getattr(model.get_submodule(owner), key).shape[-1])


def bias_of(model: nn.Module, name: str) -> str | None:
    """The qualified name of the bias that goes with such a parameter; None where it has none, and for all else."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    kinds = _kinds(module) if key in module._parameters else None
    bias = None if kinds is None else kinds.biases.get(key)
    return None if bias is None or module._parameters.get(bias) is None else f"{owner}.{bias}".lstrip(".")


def cut(model: nn.Module, name: str, side: Side, index: Tensor) -> None:
    """Take inputs or outputs `index` (int64), of all experts, out of such a parameter and its bias, in place."""
    owner, _, key = name.rpartition(".")
    module, bias = model.get_submodule(owner), bias_of(model, name)
    layer = _LAYERS.get(key) or layer_of(model, name)  # of experts, those cut in part are none to `_kinds`
    setattr(module, key, without_rows(getattr(module, key), module, layer.attributes(key, side), side, index))
    if side == "outputs" and bias is not None:
        own = bias.rpartition(".")[2]
        setattr(module, own, without(getattr(module, own), 0, index))


_LAYERS: Mapping[str, type[ParameterLinear]] = {
    **dict.fromkeys(experts.NAMES, experts.ExpertLinear), **dict.fromkeys(experts.ROUTER, experts.RouterLinear),
    **dict.fromkeys(multihead_attention.PROJECTIONS, projections.ProjectionLinear)}


def _kinds(module: nn.Module) -> Kinds | None:
    return experts.kinds(module) or projections.kinds(module) or recurrent.kinds(module)
