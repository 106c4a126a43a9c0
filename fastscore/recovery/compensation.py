"""Compensation: what removed channels gave to their consumers on average goes into the consumers' biases.

A consumer that read x at position i now reads nothing there. With mu_i the mean of x at that position, its bias grows
by what the layer makes of a constant input, mu_i where channels are gone and 0 elsewhere: W[:, i] mu_i for a Linear
layer. A convolution that pads with zeros makes less of it at the borders than inside, and a transposed one with stride
repeats a pattern; a bias is one number, and the average over output positions is the one with the least squared error.
The layer itself is run to find it, so that stride, padding mode, dilation and groups need no formula.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, with_float64
from fastscore.graph.groups import ChannelGroup, Role
from fastscore.modules import held_weights
from fastscore.modules.channel_norms import norm_of
from fastscore.modules.hooks import input_of, with_input
from fastscore.modules.inspection import channel_dim
from fastscore.modules.parameter_layers import ParameterLinear
from fastscore.modules.transposed_linear import is_transposed, widths
from fastscore.modules.windowed_attention import LinearWithoutKeyBias
from fastscore.wording import counted

_ADAPTERS = {"lora_A", "lora_B"}


def removed_positions(channel_groups: tuple[ChannelGroup, ...], removed: Mapping[str, Tensor],
                      *more: Role) -> dict[str, Tensor]:
    """Layer where channels end -> the positions of its input (its output, for a gate) that are gone, int64. A
    normalisation's are those that its statistics read.

    removed: group -> int64 [R]. more: roles that count as ends, too.
    """
    positions: dict[str, list[Tensor]] = defaultdict(list)
    for group in channel_groups:
        if group.name in removed:
            for member, index in group.removed_at(removed[group.name]):
                if member.role in ("consumer", "norm", "gate", *more):
                    positions[member.layer].append(index)
    return {layer: index for layer, parts in positions.items() if len(index := torch.cat(parts))}


def has_no_place(model: nn.Module, name: str) -> bool:
    """Whether what reads channels has no bias that could take a mean in: experts, norms, and the ranks of an adapter,
    which PEFT merges without one."""
    if held_weights.is_held(model, name) or not _ADAPTERS.isdisjoint(name.split(".")[:-1]):
        return True
    layer = model.get_submodule(name)
    return isinstance(layer, ParameterLinear) or norm_of(layer) is not None


def removed_means(model: nn.Module, activation_means: Mapping[str, Tensor], positions: Mapping[str, Tensor],
                  channel_groups: Iterable[ChannelGroup] = ()) -> dict[str, Tensor]:
    """Layer -> float64 [C]: the mean at each of the layer's `positions`, 0 elsewhere; not of experts and norms.

    activation_means: layer -> [C], those of Scores.means. channel_groups: what may be ignored, as errors say.
    Raises ValueError where they have none of a layer, or one of another width; FloatingPointError for NaN or
    infinity.
    """
    found = {}
    for name, index in positions.items():
        if has_no_place(model, name):
            continue
        layer = model.get_submodule(name)
        width = widths(layer)[0] if is_transposed(layer) else next(
            getattr(layer, width) for width in ("in_features", "in_channels", "num_features") if hasattr(layer, width))
        mean = activation_means.get(name)
        if mean is None or mean.shape != (width,):
            known = "no mean activations" if mean is None else f"means of shape {tuple(mean.shape)}"
            makers = [group.name for group in channel_groups if any(edge.layer == name for edge in group.edges)]
            raise ValueError(f"{name}: the scores hold {known} for its {counted(width, 'channel')}: score this model "
                             f"with a taylor importance, or leave out what makes them: ignore={makers}")
        if not torch.isfinite(mean).all():
            raise FloatingPointError(f"{name}: NaN or infinity in its mean activations (scores.means)")
        mean = mean.double().cpu()
        found[name] = torch.zeros_like(mean).index_copy(0, index, mean[index])
    return found


def mean_contributions(model: nn.Module, means: Mapping[str, Tensor], example_inputs: Batch,
                  forward: Forward) -> dict[str, Tensor]:
    """Layer -> float64 [C_out]: what a constant input adds to its output, averaged over output positions and calls.

    model: an evaluation copy, which runs once on `example_inputs` to show the shape of each layer's input; layers that
    it does not call are left out. means: layer -> float64 [C_in], the constant input at each channel.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def contribution_of(name: str, mean: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            dim, x = channel_dim(module), input_of(args, kwargs)
            shape = x.shape[1:] if dim % x.dim() else x.shape  # one without a batch has its channels first
            constant = with_float64(x.new_zeros(2, *shape)).double()  # the second gives the bias
            constant[0].movedim(dim if dim < 0 else dim - 1, -1).copy_(mean)
            exact = copy.deepcopy(module).to(constant.device).double()
            args, kwargs = with_input(args, kwargs, constant)
            y = type(exact).forward(exact, *args, **kwargs)  # past the hooks
            added = (y[:1] - y[1:]).movedim(dim, 0).flatten(1).mean(1)
            if isinstance(module, LinearWithoutKeyBias):
                added.chunk(3)[1].zero_()
            found[name].append(added)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(contribution_of(name, mean), with_kwargs=True)
               for name, mean in means.items()]
    with torch.no_grad():
        forward(model, example_inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(calls).mean(0) for name, calls in found.items()}


def add_to_biases(model: nn.Module, added: Mapping[str, Tensor]) -> None:
    """Add float64 [C_out] to the bias of each layer, in place; a layer without one gets one, trained if its weight is.

    model: before surgery, which then takes from the biases what belongs to outputs that go. The biases are new
    parameters, rounded once to the dtype of the old ones (of the weight).
    """
    for name, value in added.items():
        layer = model.get_submodule(name)
        old: Tensor | None = layer.bias  # type: ignore[assignment]
        like: Tensor = layer.weight if old is None else old  # type: ignore[assignment]
        value = value if old is None else with_float64(old.detach()).double() + value.to(with_float64(old).device)
        layer.bias = nn.Parameter(value.to(like.device, like.dtype), like.requires_grad)
