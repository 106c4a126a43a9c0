"""What no group covers is named, with the reason: whoever reads a report finds every weight in it."""

from collections.abc import Container
from dataclasses import replace

from torch import nn

from fastscore.graph.cutting import beside_weights
from fastscore.graph.following.nodes import CHANNELWISE, PRODUCERS
from fastscore.graph.groups import READS, ChannelGraph
from fastscore.graph.layer_types import type_of
from fastscore.modules.inspection import parameter_owners
from fastscore.modules.scripted import Scripted
from fastscore.modules.weights import recurrent
from fastscore.modules.weights.computed_weights import why_it_computes_on
from fastscore.modules.weights.own_products import COMPUTED

# what has a reason of its own; of any other module: that its code reads the weight
_REASONS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.EmbeddingBag, "an embedding makes its channels by looking them up, and cannot lose any yet"),
    (nn.RNNBase, "a recurrent layer ({kind}), which cannot lose channels yet: {why}"),
    (nn.RNNCellBase, "a recurrent layer ({kind}), which cannot lose channels yet: {why}"),
    (nn.Bilinear, "a Bilinear layer, which cannot lose channels yet"),
)


def named(model: nn.Module, graph: ChannelGraph, taken: Container[int]) -> ChannelGraph:
    """The graph, with a word on everything of `model` that holds weights and is in no group.

    A weight is a parameter of two or more dimensions; normalisations go with the layers before them. Where a module
    holds others, the key is the parameter's qualified name. taken: ids of parameters that anything was computed from.
    """
    # a layer that only reads channels makes others
    covered = {member.layer for group in graph.groups for member in group.members
               if member.role not in (*READS, "width")}
    beside = {id(tensor) for name, layer in model.named_modules() if name in covered
              for _, _, tensor in beside_weights.own(layer)}
    owners = parameter_owners(model)
    more: dict[str, str] = {}
    for name, module in model.named_modules():
        if name in covered or name in graph.skipped:
            continue
        if isinstance(module, Scripted):
            if any(parameter.dim() > 1 for parameter in module.parameters()):
                more[name] = f"torch.jit made it ({module.part.original_name}), and its layers are not seen when it " \
                             "runs: put the nn.Module there that it was made from, and script it in the smaller model"
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in beside:
                whole = f"{name}.{key}".lstrip(".")
                if whole in covered:
                    continue
                holder = isinstance(module, (nn.ParameterList, nn.ParameterDict))  # whose code reads nothing
                reader, _, own = name.rpartition(".") if holder else (name, "", "")
                more[whole if module._modules or not name or holder else name] = _reason(
                    model.get_submodule(reader), f"{own}.{key}".lstrip("."), parameter, module,
                    owners[id(parameter)] > 1, id(parameter) in taken)
    parts = {member.layer for group in graph.groups for member in group.role("tensor")}  # which no layer makes
    skipped = {**graph.skipped, **more}
    return replace(graph, skipped={name: why for name, why in skipped.items() if name not in parts})


def _reason(module: nn.Module, key: str, parameter: nn.Parameter, holder: nn.Module, shared: bool,
            read: bool) -> str:
    """holder: of the parameter, a module below `module`, or itself. shared: whether others hold it, too. read: whether
    anything was computed from it."""
    kind = type(module).__name__
    if (why := why_it_computes_on(module)) is not None:
        return why
    known = next((reason for cls, reason in _REASONS if isinstance(module, cls)), None)
    if known is not None:
        return known.format(kind=kind, why=recurrent.why_kept(module))
    if type_of(module) in PRODUCERS | CHANNELWISE:
        return "its channels go with others that are kept"
    if shared:
        return f"the code of {kind} reads its {key} {list(parameter.shape)}, which other modules hold, too: it is " \
               "followed where one module alone holds it, and the others' code is that module's or reads it there"
    if key.rpartition(".")[2] in COMPUTED.get(holder, ()):
        return f"the code of {kind} computes what it multiplies by from its {key} {list(parameter.shape)}, in each pass"
    if not read:
        return f"no code reads its {key} {list(parameter.shape)} on example_inputs: if that meets channels that are " \
               "removed, it will not fit them"
    return f"the code of {kind} reads its {key} {list(parameter.shape)}, which meets no channels that can go"
