"""Which channel groups are scored, and where their taps stand."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from fastscore.graph import scored_units
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Ignore, Role
from fastscore.graph.kept.reasons import QUANTIZED
from fastscore.graph.samples.sample_axes import ALONE, VARYING
from fastscore.modules.inspection import channel_dim
from fastscore.modules.weights.channels_last import takes_channels_last
from fastscore.modules.weights.held_weights import channel_dim as channel_dim_held
from fastscore.modules.weights.held_weights import is_held
from fastscore.scoring.scores import Origin
from fastscore.taps.gates import TapPoint


def tap_points(model: nn.Module, groups: Sequence[ChannelGroup], windowed: bool = True) -> dict[str, TapPoint]:
    """Layer (or name of a tap: see Member.tap) -> where its tap stands, for every edge of the groups.

    windowed: a tap reads only the positions that its layer reads, where it skips some.
    """
    points = {edge.tap: TapPoint(-1, output=True, module=edge.layer) if edge.role == "query" else
              TapPoint(channel_dim_held(model, edge.layer)) if is_held(model, edge.layer) else
              TapPoint(edge.dim, output=True, module=edge.layer) if edge.role == "branch" else
              _tap_point(model.get_submodule(edge.layer), edge.role, windowed)
              for group in groups for edge in group.edges if edge.role != "expert"}
    # with what reads the experts' channels, one tap
    return points | {edge.layer: TapPoint(-1, experts=len(edge.index))
                     for group in groups for edge in group.role("expert")}


def _tap_point(layer: nn.Module, role: Role, windowed: bool) -> TapPoint:
    if role == "norm":
        return TapPoint(channel_dim(layer), output=True, statistics=True)
    gate = role == "gate"
    if gate or not isinstance(layer, nn.modules.conv._ConvNd):
        return TapPoint(channel_dim(layer), gate)
    # a convolution of one position with stride, as in a ResNet's shortcuts, reads no other positions
    alone = not layer.transposed and all(size == 1 for size in layer.kernel_size) and set(layer.padding) <= {0}
    steps = layer.stride if windowed and alone and any(step > 1 for step in layer.stride) else ()
    window = [slice(None), *(slice(None, None, step) for step in steps)] if steps else []
    if steps:
        window.insert(len(window) if takes_channels_last(layer) else 1, slice(None))  # of channels
    return TapPoint(channel_dim(layer), window=tuple(window))


def groups_to_score(model: nn.Module, graph: ChannelGraph, origin: Origin, ignore: Ignore, apart: bool = False
                    ) -> tuple[ChannelGraph, Origin]:
    """The groups to score, and how, of which model. apart: without those whose samples cannot be told apart in a batch
    of several. Raises ValueError, with the reasons, when nothing is left."""
    graph = scored_units.of_graph(model, graph, origin.units)
    if graph.samples.second and origin.gradient != "none":
        raise ValueError("batches, or example_inputs: their second dimension counts samples, [T, N, ...], by what the "
                         f"output depends on; give [N, ...] and {graph.samples.transposing}")
    origin = replace(origin, fingerprint=graph.fingerprint)
    graph = graph.without(model, ignore)
    found, graph = graph, graph.told_apart() if apart else graph
    if not graph.groups:
        reasons = "".join(f"\n  {layer}: {reason}" for layer, reason in graph.skipped.items())
        nothing = "it has no BatchNorm" if origin.units == "norms" else "it has no Conv or Linear"
        raise ValueError(f"{type(model).__name__} has no channel that can be scored{reasons or ': ' + nothing}"
                         + _quantized(model)
                         + (_way_out([graph.skipped[group.name] for group in found.groups], graph.samples.transposing)
                            if found.groups else ""))
    return graph, origin


def _quantized(model: nn.Module) -> str:
    """That PyTorch's quantization has taken the place of layers, or stands beside them, and the way out; empty where it
    does not."""
    found = ((name, type(module)) for name, module in model.named_modules())
    return next((f"\n{name or 'it'} is quantized, or prepared for that ({kind.__name__}){QUANTIZED}"
                 for name, kind in found if f"{kind.__module__}.".startswith(_QUANTIZATION)), "")


_QUANTIZATION = ("torch.ao.", "torch.nn.quantized.", "torchao.", "bitsandbytes.")  # whose modules do it


def _way_out(reasons: Iterable[str], transposing: str) -> str:
    """What to give instead of a batch whose samples nothing can tell apart, for `reasons`. transposing: the `forward`
    for a model that takes samples second."""
    said = set(reasons)
    if all(reason.endswith(ALONE) for reason in said):
        return "\ngive batches of one sample each, [1, ...]; where each row of the output is a part of one sample (a " \
               "node of its graph, say), a forward= that returns [1, rows, ...]: forward=lambda model, batch: " \
               "model(**batch)[None]"
    if any(reason.endswith(VARYING) for reason in said):
        return "\npass forward= that returns as many numbers for each sample, whatever is in it (what heads make at " \
               "all places, before some are chosen by scores or by NMS)"
    if not any("counts samples" in reason for reason in said):
        return ""
    return "\ngive batches [N, ...]; where samples of several sizes lie one after the other in one tensor (nodes of " \
           "graphs, tokens with cu_seqlens), batches of one sample each" + (
               transposing and f"; where the model takes samples second, {transposing}")
