"""Compensation: what removed channels gave to their consumers on average goes into the consumers' biases.

A consumer that read x at position i now reads nothing there. With mu_i the mean of x at that position, its bias grows
by what the layer makes of a constant input, mu_i where channels are gone and 0 elsewhere: W[:, i] mu_i for a Linear
layer. A convolution that pads with zeros makes less of it at the borders than inside, and a transposed one with stride
repeats a pattern; a bias is one number, and the average over output positions is the one with the least squared error.
The layer itself is run to find it, but for Linears and convolutions of PyTorch's own that pad with zeros: by their
weights it takes a small part of the time.
"""

import copy
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.devices import with_float64
from fastscore.batches.parts import Batch
from fastscore.graph.groups import ChannelGroup, Role
from fastscore.graph.trials.plain_layers import plain_kind
from fastscore.modules.attention.windowed_attention import LinearWithoutKeyBias
from fastscore.modules.hooks import input_of, put_on, with_input
from fastscore.modules.inspection import channel_dim, parameter_owners
from fastscore.modules.narrower import in_place_of
from fastscore.modules.norms.channel_norms import norm_of
from fastscore.modules.norms.gated_norms import gated_norm_of
from fastscore.modules.weights import held_weights
from fastscore.modules.weights.own_layers import inputs_of, own_layer
from fastscore.modules.weights.parameter_layers import ParameterLayer, is_part
from fastscore.modules.weights.recurrent import GateLinear
from fastscore.modules.weights.transposed_linear import is_transposed, widths
from fastscore.wording import and_more_layers, counted

_ADAPTERS = {"lora_A", "lora_B"}  # beside a layer that PEFT calls so:
_ADAPTED = "base_layer"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


def has_no_place(model: nn.Module, name: str, kept_biases: Container[str]) -> bool:
    """Whether what reads channels has no bias that could take a mean in: experts, norms, recurrent modules without
    biases, projections that nn.MultiheadAttention holds without biases or one by one; biases that other modules hold,
    too; an adapter beside a layer that has none, where it does not read what that reads; `kept_biases`, those of the
    graph."""
    if name in kept_biases or adapted(name) in kept_biases:
        return True
    if held_weights.is_held(model, name):
        held = held_weights.bias_of(model, name)
        return held is None or not issubclass(held_weights.layer_of(model, name), held_weights.HAVE_PLACES) or \
            parameter_owners(model)[id(model.get_parameter(held))] > 1
    if (beside := adapted(name)) is not None:
        try:
            layer = model.get_submodule(beside)
        except AttributeError:
            return True
        return not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or (
            getattr(layer, "bias", None) is None and "lora_A" not in name.split("."))
    layer = model.get_submodule(name)
    if isinstance(layer, ParameterLayer) and (layer.bias is None or not isinstance(layer, held_weights.HAVE_PLACES)):
        return True
    bias = layer._parameters.get("bias")
    return norm_of(layer) is not None or gated_norm_of(layer) is not None or (
        bias is not None and parameter_owners(model)[id(bias)] > 1)


def weight_alone(model: nn.Module, name: str) -> bool:
    """Whether it is a weight of a recurrent module without a bias of its own, which reconstruction can change."""
    return held_weights.is_held(model, name) and held_weights.bias_of(model, name) is None and \
        issubclass(held_weights.layer_of(model, name), GateLinear)


def say_what_takes_no_mean(model: nn.Module, channel_groups: tuple[ChannelGroup, ...], removed: Mapping[str, Tensor]
                           ) -> str:
    """A note of what modules hold that has lost inputs and has no bias; empty where nothing has."""
    bare = [name for name in removed_positions(channel_groups, removed)
            if held_weights.is_held(model, name) and held_weights.bias_of(model, name) is None]
    said = []
    for alone, what in ((True, "no mean of what went is taken in there, linear reconstruction (calibration=) changes "
                               "its weights alone"),
                        (False, "what went of what is read there is neither compensated nor reconstructed")):
        names = [name for name in bare if weight_alone(model, name) is alone]
        if names:
            said.append(f"{and_more_layers(names)} has no bias: {what}")
    return "; ".join(said)


def gets_bias(model: nn.Module, name: str, kept_biases: Container[str]) -> bool:
    """Whether what reads channels, of an evaluation copy, gets a bias that it had not once a mean goes into it."""
    return model.get_submodule(name).bias is None and adapted(name) is None and \
        not has_no_place(model, name, kept_biases)


def adapted(name: str) -> str | None:
    """The layer beside which an adapter stands, of which `name` is a part: PEFT merges adapters without biases."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts[:-1]) if part in _ADAPTERS), None)
    return None if at is None else ".".join([*parts[:at], _ADAPTED])


def removed_means(model: nn.Module, activation_means: Mapping[str, Tensor], positions: Mapping[str, Tensor],
                  channel_groups: Iterable[ChannelGroup], kept_biases: Container[str]) -> dict[str, Tensor]:
    """Layer -> float64 [C]: the mean at each of the layer's `positions`, 0 elsewhere; not of what has no place for it,
    or no mean (see Scores.means).

    activation_means: layer -> [C], those of Scores.means. channel_groups: what may be ignored, as errors say.
    kept_biases: those of the graph.

    Raises ValueError where they have none of a layer, or one of another width; FloatingPointError for NaN or
    infinity.
    """
    found = {}
    for name, index in positions.items():
        if has_no_place(model, name, kept_biases):
            continue
        width = held_weights.inputs_of(model, name) if held_weights.is_held(model, name) else \
            _inputs_of(model.get_submodule(name))
        mean = activation_means.get(name)
        if mean is not None and not mean.numel():
            continue  # it read nothing for some samples: nothing is added
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


def _inputs_of(layer: nn.Module) -> int:
    if is_transposed(layer):
        return widths(layer)[0]
    if (own := own_layer(layer)) is not None:
        return inputs_of(layer, own)
    width: int = next(getattr(layer, width) for width in ("in_features", "in_channels", "num_features")
                      if hasattr(layer, width))
    return width


def mean_contributions(model: nn.Module, means: Mapping[str, Tensor], example_inputs: Batch,
                  forward: Forward) -> dict[str, Tensor]:
    """Layer -> float64 [C_out]: what a constant input adds to its output, averaged over output positions and calls.

    What a constant input of an adapter adds counts for the layer beside it.

    model: an evaluation copy, which runs once on `example_inputs` to show the shape of each layer's input; layers that
    it does not call are left out, and projections of queries, keys or values alone, whose means are not told apart.
    means: layer -> float64 [C_in], the constant input at each channel.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    beside: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)  # layer -> adapter -> what that adds in each call

    def contribution_of(name: str, mean: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                        output: Tensor) -> None:
        if is_part(module, args, kwargs) or (isinstance(module, GateLinear) and found[name]):
            return  # of a state each step makes the same
        dim, x = channel_dim(module), input_of(args, kwargs)
        shape = x.shape[1:] if dim % x.dim() else x.shape  # one without a batch has its channels first
        if not shape.numel():
            return  # there is no position to average over
        if (of_weights := constant_sum(module, mean, shape)) is not None:
            found[name].append(of_weights)
            return
        constant = with_float64(x.new_zeros(2, *shape)).double()  # the second gives the bias
        constant[0].movedim(dim if dim < 0 else dim - 1, -1).copy_(mean)
        exact = copy.deepcopy(module).to(constant.device).double()
        args, kwargs = with_input(args, kwargs, constant)
        y = type(exact).forward(exact, *args, **kwargs)  # past the hooks
        added = (y[:1] - y[1:]).movedim(dim, 0).flatten(1).mean(1)
        if isinstance(module, LinearWithoutKeyBias):
            added.chunk(3)[1].zero_()
        found[name].append(added)

    def beside_layer(name: str, layer: str, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                     output: Any) -> None:
        if found[name] and (added := _through(owner, args, kwargs, name, layer, found[name].pop())) is not None:
            beside[layer].setdefault(name, []).append(added)

    handles = [model.get_submodule(name).register_forward_hook(partial(contribution_of, name, mean), with_kwargs=True)
               for name, mean in means.items()]
    handles += [model.get_submodule(layer.rpartition(".")[0]).register_forward_hook(
        partial(beside_layer, name, layer), with_kwargs=True) for name in means if (layer := adapted(name)) is not None]
    with put_on(handles), torch.no_grad():
        forward(model, example_inputs)
    added = {name: torch.stack(calls).mean(0) for name, calls in found.items() if calls}
    for layer, adapters in beside.items():
        more = torch.stack([torch.stack(calls).mean(0) for calls in adapters.values()]).sum(0)
        added[layer] = added[layer] + more if layer in added else more
    return added


def constant_sum(layer: nn.Module, mean: Tensor, shape: torch.Size) -> Tensor | None:
    """float64 [C_out]: what a constant input adds to the output of a Linear or convolution of PyTorch's own, averaged
    over output positions, by its weights alone: each counts at as many positions as it meets the image at, and not the
    zeros around it. None for other layers.

    mean: float64 [C_in], the input at each channel. shape: of the input, without samples.
    """
    kind, conv = plain_kind(layer), cast(Any, layer)
    if kind not in (nn.Linear, *_CONVOLUTIONS) or \
            (kind is not nn.Linear and (conv.padding_mode != "zeros" or isinstance(conv.padding, str))):
        return None
    weight = with_float64(conv.weight.detach()).double()
    groups = 1 if kind is nn.Linear else conv.groups
    read = mean.to(weight).view(groups, -1, 1)  # at each weight, on average
    for size, kernel, stride, padding, dilation in () if kind is nn.Linear else zip(
            shape[1:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True):
        positions = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        met = torch.arange(positions) * stride - padding + torch.arange(kernel)[:, None] * dilation
        read = (read[..., None] * ((met >= 0) & (met < size)).to(weight).mean(1)).flatten(2)
    added: Tensor = weight.flatten(1).unflatten(0, (groups, -1)) @ read.flatten(1)[..., None]
    return added.flatten()


def _through(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter: str, layer: str, value: Tensor
             ) -> Tensor | None:
    """float64 [C_out]: what the bias of a layer must grow by for `owner`, which holds it and an adapter beside it, to
    return what it does where `value` is added to what that part of the adapter makes. None where none does."""
    exact = copy.deepcopy(owner).to(value.device).double()
    for module in exact.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    x = input_of(args, kwargs)
    args, kwargs = with_input(args, kwargs, torch.zeros_like(x[:1], dtype=torch.float64, device=value.device))
    prefix = layer.removesuffix(_ADAPTED)

    def adding(name: str, value: Tensor) -> Tensor:
        inner = exact.get_submodule(name.removeprefix(prefix))
        dim = channel_dim(inner)

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return (output.movedim(dim, -1) + value).movedim(-1, dim)

        with put_on([inner.register_forward_hook(add)]):
            made: Tensor = type(exact).forward(exact, *args, **kwargs)
        return made.movedim(channel_dim(exact.get_submodule(_ADAPTED)), 0).flatten(1).mean(1)

    nothing = adding(layer, value.new_zeros(()))
    added = adding(adapter, value) - nothing
    close = torch.allclose(adding(layer, added) - nothing, added, rtol=1e-6, atol=1e-9 * float(added.abs().max()))
    return added if close else None


def add_to_biases(model: nn.Module, added: Mapping[str, Tensor]) -> None:
    """Add float64 [C_out] to the bias of each layer, in place; a layer without one gets one, trained if its weight is.

    model: before surgery, which then takes from the biases what belongs to outputs that go; what modules hold
    themselves must be layers. The biases are new parameters, rounded once to the dtype of the old ones (of the weight).
    """
    for name, value in added.items():
        layer = model.get_submodule(name)
        old: Tensor | None = layer.bias  # type: ignore[assignment]
        like: Tensor = layer.weight if old is None else old  # type: ignore[assignment]
        value = value if old is None else with_float64(old.detach()).double() + value.to(with_float64(old).device)
        value = value.to(like.device, like.dtype)
        layer.bias = nn.Parameter(value, like.requires_grad) if old is None else in_place_of(old, value)
