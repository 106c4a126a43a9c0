"""Which parameters of a user's model run as layers, and when: see fastscore.modules.parameter_layers."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fastscore.modules import experts, multihead_attention, projections
from fastscore.modules.parameter_layers import Handle, Kinds, ParameterLinear, Side, put_back, without_rows


def replace(model: nn.Module, called: Iterable[str] | None = None) -> Iterator[Handle]:
    """Make layers, which compute the same, of the parameters that experts, routers and nn.MultiheadAttention hold.

    Args:
        model: changed in place.
        called: names of layers; only modules of which one is among them are changed. None: all.

    Yields:
        For each module, a handle that undoes it.
    """
    wanted = None if called is None else {name.rpartition(".")[0] for name in called}
    for name, module in list(model.named_modules()):
        if (wanted is None or name in wanted) and (kinds := _kinds(module)) is not None:
            yield Handle(module, kinds)


def put_all_back(model: nn.Module) -> None:
    """Make parameters of them again, in place: of a copy of a model that is tapped."""
    for module in model.modules():
        if any(isinstance(layer, ParameterLinear) for layer in module._modules.values()):
            put_back(module)


def is_held(model: nn.Module, name: str) -> bool:
    """Whether `name` is the qualified name of a parameter that `replace` makes a layer, as a user has it."""
    owner, _, key = name.rpartition(".")
    kinds = _kinds(model.get_submodule(owner)) if key in _NAMES else None
    return kinds is not None and key in kinds.names


def bias_of(model: nn.Module, name: str) -> Tensor | None:
    """The bias that goes with such a parameter."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    kinds = _kinds(module)
    return None if kinds is None else module._parameters.get(kinds.biases.get(key, ""))


def inputs_of(model: nn.Module, name: str) -> int:
    """How many channels such a parameter is multiplied by."""
    owner, _, key = name.rpartition(".")
    return int(getattr(model.get_submodule(owner), key).shape[-1])


def cut(model: nn.Module, name: str, side: Side, index: Tensor) -> None:
    """Take inputs or outputs `index` (int64), of all experts, out of such a parameter, in place."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    widths = experts.WIDTHS.get((key, side), ())
    module._parameters[key] = without_rows(getattr(module, key), module, widths, side, index)


_NAMES = {*experts.NAMES, *experts.ROUTER, *multihead_attention.PROJECTIONS}


def _kinds(module: nn.Module) -> Kinds | None:
    return experts.kinds(module) or projections.kinds(module)
