"""Which parameters of a user's model run as layers, and when: see fastscore.modules.weights.parameter_layers."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from fastscore.modules import forwards
from fastscore.modules.attention import multihead_attention, projections
from fastscore.modules.handles import Handle
from fastscore.modules.inspection import held_in
from fastscore.modules.narrower import without
from fastscore.modules.weights import called_layers, experts, own_products, recurrent
from fastscore.modules.weights.own_linear import OwnLinear
from fastscore.modules.weights.parameter_layers import (
    Kinds,
    ParameterLayer,
    ParameterLinear,
    ParametersAsLayers,
    Side,
    put_back,
    without_rows,
)

HAVE_PLACES = (projections.ProjectionLinear, recurrent.GateLinear)  # layers which add their bias, that takes means in


def replace(model: nn.Module, called: Iterable[str] | None = None) -> Iterator[Handle]:
    """Make layers, which compute the same, of the parameters that experts, routers, nn.MultiheadAttention and recurrent
    modules hold; and have modules call layers that their code runs without a call: a handle for each change.

    called: names of layers; only modules of which one is among them are changed. None: all.
    """
    yield from called_layers.replace(model, model)
    called = None if called is None else set(called)
    yield from own_products.replace(model, model, called)
    wanted = None if called is None else {name.rpartition(".")[0] for name in called}
    for name, module in list(model.named_modules()):
        if (wanted is None or name in wanted) and (kinds := _kinds(module)) is not None:
            yield ParametersAsLayers(module, kinds)


def put_all_back(model: nn.Module) -> None:
    """Make parameters of them again, in place: of a copy of a model that is tapped."""
    for module in model.modules():
        forwards.put_back(module)
        if any(isinstance(layer, ParameterLayer) for layer in module._modules.values()):
            put_back(module)


def is_held(model: nn.Module, name: str) -> bool:
    """Whether `name` is the qualified name of a parameter that `replace` makes a layer, as a user has it."""
    module, key = held_in(model, name)
    kinds = _kinds(module) if key in module._parameters else None
    return own_products.held(module, key) is not None or (kinds is not None and key in kinds.names)


def layer_of(model: nn.Module, name: str) -> type[ParameterLinear]:
    """What `replace` makes of such a parameter."""
    module, key = held_in(model, name)
    if own_products.held(module, key) is not None:
        return OwnLinear
    kinds = _kinds(module)
    assert kinds is not None
    return kinds.layer


def inputs_of(model: nn.Module, name: str) -> int:
    """How many channels such a parameter is multiplied by."""
    module, key = held_in(model, name)
    if own_products.held(module, key) is not None:
        return own_products.channels_of(module, key)[0]
    turned = key in experts.NAMES and experts.lie_turned(module)
    return int(getattr(module, key).shape[-2 if turned else -1])


def channel_dim(model: nn.Module, name: str) -> int:
    """The dimension of the input of such a layer that holds the channels."""
    module, key = held_in(model, name)
    return -1 if own_products.held(module, key) is None else own_products.channels_of(module, key)[1]


def bias_of(model: nn.Module, name: str) -> str | None:
    """The qualified name of the bias that goes with such a parameter; None where it has none, and for all else."""
    module, key = held_in(model, name)
    kinds = _kinds(module) if key in module._parameters else None
    bias = None if kinds is None else kinds.biases.get(key)
    return None if bias is None or module._parameters.get(bias) is None else f"{name.removesuffix(key)}{bias}"


def by_output(model: nn.Module, layer: str, name: str, values: Tensor) -> Tensor:
    """Values of such a parameter `layer`, or of its bias, by their name -> [outputs, all else]."""
    module, key = held_in(model, layer)
    last = name != layer or (key in experts.NAMES and experts.lie_turned(module))
    return values.movedim(-1 if last else -2, 0).flatten(1)


def cut(model: nn.Module, name: str, side: Side, index: Tensor) -> None:
    """Take inputs or outputs `index` (int64), of all experts, out of such a parameter and its bias, in place."""
    (module, key), bias = held_in(model, name), bias_of(model, name)
    layer = _LAYERS.get(key) or layer_of(model, name)  # of experts, those cut in part are none to `_kinds`
    held: Tensor = getattr(module, key)
    last = (side == "inputs") != (key in experts.NAMES and experts.lie_turned(module))
    dim = held.dim() - (1 if last else 2)
    setattr(module, key, without_rows(held, module, layer.attributes(key, side), dim, index))
    own = experts.bias_of(module, key) or (bias or "").rpartition(".")[2]
    if side == "outputs" and own:
        setattr(module, own, without(getattr(module, own), getattr(module, own).dim() - 1, index))


_LAYERS: Mapping[str, type[ParameterLinear]] = {
    **dict.fromkeys(experts.NAMES, experts.ExpertLinear), **dict.fromkeys(experts.ROUTER, experts.RouterLinear),
    **dict.fromkeys(multihead_attention.PROJECTIONS, projections.ProjectionLinear)}


def _kinds(module: nn.Module) -> Kinds | None:
    return experts.kinds(module) or projections.kinds(module) or recurrent.kinds(module)
