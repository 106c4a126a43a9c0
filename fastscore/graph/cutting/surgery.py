"""Surgery: channels go out of every layer that makes, passes or reads them. Nothing here chooses them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import beside_weights, channel_buffers, heads, own_tensors
from fastscore.graph.cutting.cut_widths import SIDE, narrow
from fastscore.graph.groups import ChannelGroup, Role
from fastscore.modules import held_tables, returned_part, zero_branch
from fastscore.modules.attention import handed, multihead_attention
from fastscore.modules.copying import deepcopy
from fastscore.modules.evaluation_copy import own_copies, spell_out
from fastscore.modules.hooks import remove_copied_hooks
from fastscore.modules.inspection import submodule
from fastscore.modules.weights import called_layers, held_weights, own_products, recurrent
from fastscore.modules.weights.computed_weights import compute_on_in, make_plain

Dim = Literal["dim0", "dim1", "dim2", "dim3", "dim4", "dim5"]
# "inputs", "outputs", one of heads.SIDES (by which of a module's numbers count them), "head_dims", "rotary", "block", a
# Dim, SIDE and what a module keeps, HANDED and names of what it is called with, or PRODUCT and the dimension of a
# parameter that a module's code multiplies by
Side: TypeAlias = str
_DIMS: tuple[Dim, ...] = get_args(Dim)
_SIDES: Mapping[Role, Side] = {"producer": "outputs", "channelwise": "outputs", "norm": "outputs", "gate": "outputs",
                               "router": "outputs", "head_dims": "head_dims", "rotary": "rotary",
                               "consumer": "inputs", "reader": "inputs", "heads": "heads", "block": "block"}
HANDED = "handed "
PRODUCT = "product "
_NAMED: Mapping[Role, str] = {"width": SIDE, "handed": HANDED}
# what modules keep of the widths of convolutions that they hold: diffusers' up- and downsamplers, and the embeddings of
# patches of transformers, of what they read, torchvision's VisionTransformer of what it makes of patches
_OF_OWNERS = {"inputs": ("channels", "num_channels"), "outputs": ("hidden_dim",)}
# (layer, its inputs or its outputs; or an attention module, its heads; or a parameter, a dimension of it) -> positions
# that go, int64, ascending: a surgery whole, for any copy of the model
RemovedIndices: TypeAlias = Mapping[tuple[str, Side], Tensor]


def removed_indices(groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor]) -> RemovedIndices:
    """Where the channels lie in each layer that go: group -> int64 [R]; groups that `removed` does not name stay
    whole."""
    indices: dict[tuple[str, Side], list[Tensor]] = defaultdict(list)
    for group in groups:
        if group.name in removed:
            for member, index in group.removed_at(removed[group.name]):
                if member.role in ("branch", "expert", "query"):
                    continue  # other members say what goes
                if member.holds:  # a parameter that a module's code multiplies by
                    indices[member.holds, f"{PRODUCT}{member.dim}"].append(index)
                side = _DIMS[member.dim] if member.role == "tensor" else \
                    f"{_NAMED[member.role]}{member.attribute}" if member.role in _NAMED else \
                    f"{_SIDES[member.role]}{member.attribute if member.role == 'heads' else ''}"
                indices[member.layer, side].append(index)
    return {key: index for key, parts in indices.items() if len(index := torch.cat(parts).unique())}


def remove_indices(model: nn.Module, indices: RemovedIndices) -> nn.Module:
    """Take positions out of the layers of a model that was traced, or a copy of it, in place; returns it.

    Parameters that lost something are new objects, which require gradients, and have the memory format, as the old ones
    did.
    """
    for (name, side), index in indices.items():
        if side == "block":
            zero_branch.put_zeros(model, name, int(index))
    gone = removed_branches(indices)
    indices = {(name, side): index for (name, side), index in indices.items() if not gone(name)}
    indices = _cut_once(model, indices)
    make_plain(model, (name for name, _ in indices))
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    shared = _shared_parameters(model)
    formats = {name: _memory_format(parameter) for name, parameter in model.named_parameters()}
    for side in ("rotary", "head_dims"):  # of which modules keep the width: before anything that has it
        for name in [name for name, of in indices if of == side]:
            _narrow_heads(model.get_submodule(name), side, indices[name, side])
    for name, side in indices:  # before it knows of fewer heads
        if side.startswith(HANDED):
            module, arguments = model.get_submodule(name), side.removeprefix(HANDED).split(",")
            handed.narrow_biases(module, indices[name, side], heads.count(module) or 0, arguments)
    layers = [name for name, side in indices if side in ("inputs", "outputs")]
    for handle in multihead_attention.replace_attention(model, layers) if layers else ():
        handle.make_permanent()  # whose code takes the width of a stream for that of heads
    if any(side in heads.SIDES for _, side in indices):
        for handle in multihead_attention.replace_attention(model, called=()):
            handle.make_permanent()
    for (name, side), index in indices.items():
        if side in _OF_OWNERS and not held_weights.is_held(model, name):
            held_by = name.rpartition(".")[0]
            _narrow_owner(model, name, side, len(index), [key for key in _OF_OWNERS[side]
                                                         if (held_by, f"{SIDE}{key}") not in indices])
    # chosen beforehand: a grouped convolution that has lost inputs can look like a depthwise one
    surgeons = {name: channel_buffers.surgeon(submodule(model, name))
                for name, side in indices if side in ("inputs", "outputs")
                and not held_weights.is_held(model, name)}
    for (name, side), index in indices.items():
        if side in ("head_dims", "rotary") or side.startswith(HANDED):
            continue
        if side in _DIMS or side.startswith(PRODUCT):
            dim = _DIMS.index(side) if side in _DIMS else int(side.removeprefix(PRODUCT))
            own_tensors.cut(model, name, dim, index)
            continue
        if side in ("inputs", "outputs") and name not in surgeons:
            held_weights.cut(model, name, "inputs" if side == "inputs" else "outputs", index)
            continue
        layer = submodule(model, name)
        if side.startswith(SIDE + returned_part.RETURNED):
            returned_part.narrow(layer, side.removeprefix(SIDE), index)
            continue
        if side.startswith(SIDE + held_tables.HELD):
            key, dim = held_tables.place(side.removeprefix(SIDE))
            own_tensors.cut(model, f"{name}.{key}".lstrip("."), dim, index)
            continue
        if side.startswith(SIDE):
            narrow(layer, side.removeprefix(SIDE), len(index))
            continue
        if side in heads.SIDES:
            apart = [key for key in heads.tensors(layer) if any((f"{name}.{key}".lstrip("."), dim) in indices for dim in
                     _DIMS) or (f"{name}.{key.replace('bias', 'weight')}", "outputs") in indices]  # with its weight
            heads.remove(layer, index, apart, side.removeprefix("heads"))
            continue
        surgeon = surgeons[name]
        prune = surgeon.prune_in_channels if side == "inputs" else surgeon.prune_out_channels
        at = index if isinstance(surgeon, channel_buffers.TAKE_TENSORS) else index.tolist()
        beside_weights.cut_with(layer, partial(prune, idxs=at))
    for owners in shared:  # of which each has been cut alike
        for owner, key in owners[1:]:
            owner._parameters[key] = owners[0][0]._parameters[owners[0][1]]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
        parameter.data = parameter.data.contiguous(memory_format=formats[name])
    recurrent.keep_up(model)
    zero_branch.keep_up(model)
    return model


def _cut_once(model: nn.Module, indices: RemovedIndices) -> RemovedIndices:
    """Those less inputs and outputs of parameters that a module's code multiplies by: their dimensions are cut, or the
    layer that holds them."""
    there = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
    there -= {name for name, side in indices if side.startswith(PRODUCT)}
    return {(name, side): index for (name, side), index in indices.items()
            if side not in ("inputs", "outputs") or name in there}


def smaller_copy(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What `change`, a surgery in place, makes of a copy of `model`, which stays as it is and shares no memory with it.
    """
    # surgery makes new weights of most: those that are still the model's own afterwards are copied then
    # .data: detach() would share autograd's count of changes with the model's own, for good
    shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.data, parameter.requires_grad)
                              for parameter in model.parameters() if type(parameter) is nn.Parameter}
    copy = spell_out(deepcopy(model, shared | own_copies(model)))
    compute_on_in(model, copy)
    called_layers.remember_in(model, copy)
    own_products.remember_in(model, copy)
    pruned = change(copy)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for parameter in pruned.parameters():
        if parameter.untyped_storage()._cdata in own:
            parameter.data = parameter.data.clone()
    held_weights.put_all_back(pruned)
    recurrent.keep_up(pruned)
    remove_copied_hooks(pruned)
    return pruned


def removed_branches(indices: RemovedIndices) -> Callable[[str], bool]:
    """Whether a module of that name goes with a residual branch: is it, or stands in it."""
    branches = tuple(f"{name}." for name, side in indices if side == "block")
    return lambda name: f"{name}.".startswith(branches)


def remove_channels(model: nn.Module, groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor]) -> nn.Module:
    """Take the channels of `removed` (group -> int64 [R]) out of every layer of `model`, in place; returns it."""
    return remove_indices(model, removed_indices(groups, removed))


def _narrow_heads(module: nn.Module, side: str, index: Tensor) -> None:
    if side == "head_dims":
        heads.narrow(module, len(index))
    elif (width := heads.width(module)) is not None:
        handed.narrow(module, index, handed.turned(module, width))


def _narrow_owner(model: nn.Module, name: str, side: str, gone: int, keys: Iterable[str]) -> None:
    """Take what a layer loses off the width that the module which holds it keeps in one of `keys`, where it is the
    layer's."""
    owner, layer = submodule(model, name.rpartition(".")[0]), submodule(model, name)
    if isinstance(layer, nn.modules.conv._ConvNd):
        width = layer.in_channels if side == "inputs" else layer.out_channels
        for key in keys:
            if vars(owner).get(key) == width:
                setattr(owner, key, width - gone)


def _shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """(module, name there) of all that hold the same parameter, for each that several hold."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, key))
    return [held for held in owners.values() if len(held) > 1]


def _memory_format(x: Tensor) -> torch.memory_format:
    """That of a tensor, so that surgery can keep it."""
    lasts = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = lasts.get(x.dim())
    return last if last and not x.is_contiguous() and x.is_contiguous(memory_format=last) else torch.contiguous_format
