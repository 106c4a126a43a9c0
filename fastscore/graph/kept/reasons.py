"""Why a group of channels is kept: what its layers are, and what the run that was traced has shown of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from fastscore.graph import units
from fastscore.graph.cutting import beside_weights
from fastscore.graph.following import nested
from fastscore.graph.following.residual_sums import holders
from fastscore.graph.groups import Member, Role
from fastscore.graph.trials.recording import MISREAD, OWN_FAULT, READ, Recording
from fastscore.modules.inspection import channel_dim, parametrized, shared_parameters
from fastscore.modules.weights import recurrent
from fastscore.modules.weights.computed_weights import PLAIN, unused_parameters, why_it_computes_on
from fastscore.modules.weights.own_linear import TiedLinear

ONE = "it is one channel, which has to stay"
UNREAD = "no Conv or Linear is found to read its channels"
_BEFORE = ": prune the model before it is prepared for quantization (prepare_qat)"
QUANTIZED = ": prune the model before it is quantized, and quantize what is left"
CHANGES = "their number changes on the way to"
_FIRST = " is called as well on what no layer makes (the model's input, a constant, or what detach() gives)"


def of_group(layers: Mapping[str, nn.Module], members: list[Member], owners: Mapping[int, int],
             recording: Recording, readers: Mapping[str, str]) -> str | None:
    """Why the layers of a group cannot be pruned; None where they can.

    owners: id of a parameter -> modules with it. readers: see `read_elsewhere`.
    """
    if computed := computing(layers, members):
        return computed
    if quantized := _quantized(layers, members):
        return quantized
    if partly := _making_a_part(layers, members, recording):
        return partly
    consumers = {member.layer for member in members if member.role == "consumer"}
    if not consumers:
        one = any(units.width_of(layers[member.module], member.role) == 1 for member in members
                  if member.role == "producer")
        return ONE if one else UNREAD
    for layer_name in sorted({member.layer for member in members
                              if member.role == "consumer" and recording.reads_given(member)}):
        if layer_name in recording.without_gradients:
            return f"{layer_name} runs under torch.no_grad() as well, where nothing can be measured"
        return f"{layer_name}{_FIRST}"
    norms = {member.layer for member in members if member.role == "norm"}
    for layer_name in sorted((consumers | norms) & recording.detached):
        return _without_gradient(layer_name, recording)
    for layer_name in sorted((consumers | norms).intersection(recording.overwritten)):
        return f"what {layer_name} reads is written to in place afterwards, so that nothing can be measured there"
    for member in members:
        layer = layers[member.module]
        if member.role == "tensor":
            reason = _of_tensor(layer, member, owners)
            if reason is not None:
                return reason
            continue
        width = units.width_of(layer, member.role)
        if width is not None and int(member.index.max()) >= width:
            return read_elsewhere(members, readers) or f"{CHANGES} {member.layer}"
        around = next((outer for outer in holders(member.layer)[:-1] if outer in recording.layers), None)
        if around is not None and member.role in ("producer", "consumer"):
            return f"{member.layer} runs inside of {around} ({type(layers[around]).__name__}), which is followed as " \
                   "one layer"
        if parametrized(layer):
            return f"the weight of {member.layer} is computed (a parametrization): remove it first{_by(layer)}"
        follow = {name for module, name, _ in beside_weights.own(layer) if module is layer}
        follow |= {name for name, parameter in layer._parameters.items() if parameter is None or parameter.numel() == 1}
        own = [name for name in layer._parameters if name not in {"weight", "bias", *unused_parameters(layer), *follow}]
        if own and member.role != "norm" and type(layer) not in PLAIN:  # which do not read them
            return f"{member.layer} has a parameter {own[0]} besides weight and bias, which cannot lose channels yet"
        shared = shared_parameters(layer, owners)
        if member.role == "consumer" and shared == "bias":  # which stays as it is
            shared = ""
        if shared and getattr(layer, "max_norm", None) is not None:
            return f"{member.layer} scales rows of its weight when it runs (max_norm), and another layer holds it, too"
        if shared and not _tied_alike(layers, member, members, owners):
            return f"{member.layer} shares its {shared} with another layer"
        if width is not None and units.sections_of(layer, member.role) > 1 and len(member.index) < width:
            return f"{member.layer} is grouped and works on other channels too"
    return None


def _quantized(layers: Mapping[str, nn.Module], members: Iterable[Member]) -> str | None:
    """That one of a group's layers holds its weight as whole numbers, or as a kind of tensor that is another one once
    it is cut; None where none does."""
    for member in members:
        weight = layers[member.module]._parameters.get("weight") if member.module in layers else None
        if weight is not None and not (weight.is_floating_point() or weight.is_complex()):
            return f"the weight of {member.layer} is quantized ({weight.dtype}){QUANTIZED}"
        if weight is not None and not _stays_its_kind(weight):
            return f"the weight of {member.layer} is a {type(weight).__name__}, which no part of it is{QUANTIZED}"
    return None


def _stays_its_kind(weight: Tensor) -> bool:
    """Whether a part of a weight is as the whole: tensors that compute by themselves, as torchao's, may be floats then;
    those that lie on another device, or on several, stay what they are."""
    held = weight.detach()
    if type(held).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return True
    try:
        return type(held.narrow(0, 0, 1)) is type(held)
    except Exception:  # whatever such a kind raises where it cannot be cut
        return False


def of_ranges(layers: Mapping[str, nn.Module], members: Iterable[Member]) -> str | None:
    """Why one of a group's layers, whose weight is rounded for quantization, is kept; None where none is."""
    for member in members:
        quantizer = layers[member.module]._modules.get("weight_fake_quant") if member.module in layers else None
        if quantizer is not None and _goes_on(quantizer):
            return f"{type(quantizer).__name__} goes on changing the range of the weight of {member.layer}{_BEFORE}"
        if isinstance(scale := getattr(quantizer, "scale", None), Tensor) and scale.numel() > 1:
            return f"{type(quantizer).__name__} has a range for each channel of the weight of {member.layer}{_BEFORE}"
    return None


def _goes_on(quantizer: nn.Module) -> bool:
    """Whether a module that rounds what it reads takes its range from that, in evaluation mode, too."""
    return all(any(map(int, getattr(quantizer, name, ()))) for name in ("observer_enabled", "fake_quant_enabled"))


def computing(layers: Mapping[str, nn.Module], members: Iterable[Member]) -> str | None:
    """Why one of a group's layers goes on computing its weight; None where none does."""
    return next((why for member in members if member.module in layers
                 and (why := why_it_computes_on(layers[member.module]))), None)


def _making_a_part(layers: Mapping[str, nn.Module], members: Iterable[Member], recording: Recording) -> str | None:
    """That one of a group's layers makes another number of channels than its weight has rows; None where none does."""
    for member in members:
        made = recording.outputs.get(member.layer) if member.role == "producer" else None
        width = units.width_of(layers[member.module], "producer") if made else None
        numbers = {output.shape[channel_dim(layers[member.module])] for output in made or ()}
        if width is not None and numbers != {width}:
            return f"the weight of {member.layer} makes {width} channels, and its code takes {min(numbers)} of them"
    return None


def of_gradients_of_its_own(recording: Recording) -> dict[str, str]:
    """Layer that ran -> why nothing that is found out about it can be verified: the model's code takes gradients, of
    which there are none where layers give what they gave before; empty where it does not."""
    try:
        assert recording.inputs is not None
    except RuntimeError as error:
        if "not require grad" not in str(error):
            raise
        reason = "the model's code takes gradients of its own, as forces are of an energy, and channels are followed " \
                 "where layers give what they gave before, of which there are none: let forward= return what they " \
                 "are taken of, and take none (lambda model, batch: model.energy(batch), say)"
        return dict.fromkeys(sorted(recording.layers_that_ran), reason)
    return {}


def of_untraced(names: Sequence[str], idle: Collection[str], recording: Recording, readers: Mapping[str, str],
                detached: Mapping[str, str]) -> dict[str, str]:
    """Why layers of which no gradient comes back are kept.

    idle: all layers that ran, and of which none comes back, normalisations included. readers: see `read_elsewhere`.
    detached: the same, of code that no gradient comes back from.
    """
    found: dict[str, str] = {}
    for name in names:
        weight = recording.layers[name].weight if name in recording.layers else None
        if name in recording.layers and (why := why_it_computes_on(recording.layers[name])):
            found[name] = why
        elif isinstance(weight, Tensor) and not weight.is_floating_point():
            found[name] = f"its weight is of {weight.dtype}, of which no gradient is taken"
        elif name in recording.several:
            found[name] = f"the forward of its class ({type(recording.layers[name]).__name__}) returns several " \
                          "things, where one tensor can be followed"
        elif name in recording.nested:
            found[name] = f"it reads a nested tensor, {nested.WAY_OUT}"
        elif name in recording.transformed:
            found[name] = "it runs under torch.func (vmap, say), where nothing can be followed or measured"
        elif name in recording.without_gradients:
            found[name] = "it runs under torch.no_grad(), where nothing can be measured"
        elif name in readers and name not in recording.layers_that_ran:
            found[name] = f"the code of {readers[name]} reads its weight, and does not call it"
        elif name in detached and name not in recording.layers_that_ran:
            found[name] = f"the code of {detached[name]} reads its weight, and does not call it, where no gradient " \
                          "comes back (torch.no_grad(), or detach())"
    rest = {name for name in names if name not in found}
    show = recording.read_by_others(rest.union(idle)) is not None  # one of them, or more
    for name in rest:
        where = recording.read_by_others({name}) if show else None
        found[name] = _without_gradient(where, recording) if where else "the output does not depend on it"
    return {name: found[name] for name in names}


def of_leak(where: str, members: Iterable[Member], recording: Recording, readers: Mapping[str, str], chosen: bool,
            mixer: str | None) -> str:
    """Why a group is kept whose channels show at `where`, and are not known to come there. chosen: they do not show
    where all that is chosen by them stays as it is. mixer: see fastscore.graph.trials.mixing."""
    if where.startswith(OWN_FAULT):
        return where
    if where in recording.first_layers or where in recording.without_gradients:
        return _without_gradient(where, recording)
    if where in recording.layers and recurrent.was_given_constant(recording.layers[where]):
        return f"{where} reads a state that no layer makes: one that the model keeps from call to call, say"
    return read_elsewhere(members, readers) or (of_choice(where) if chosen else \
        f"the tracer cannot follow its channels to {where}: "
        f"{mixer or 'an operation mixes or moves them, or the code decides by them'}")


def of_refusal(why: str, members: Iterable[Member], recording: Recording, readers: Mapping[str, str],
               written: str | None) -> str:
    """Why a group is kept that cannot go by surgery.

    why: as the trial says. written: what kept_widths.written says of it."""
    first = next((layer for layer in sorted(recording.from_zeros) if why.startswith(f"{layer} {MISREAD}")), None)
    return read_elsewhere(members, readers) or written or (f"{first}{_FIRST}" if first else why)


def not_twice(where: str, model: nn.Module) -> str:
    """Why a group is kept of a model in which something else comes to `where` though no channel is changed."""
    if where.startswith(OWN_FAULT):
        return where
    for name, module in model.named_modules():
        if _goes_on(module):
            return f"{type(module).__name__} at {name or 'the model'} goes on changing its range with what it reads" \
                   f"{_BEFORE}"
    return f"something else comes to {where} each time the model runs on the same input (it keeps something from " \
           "call to call, say), so that nobody sees what its channels do"


def of_choice(where: str) -> str:
    """Why a group is kept by which something is chosen that shows at `where`."""
    if where == READ:
        return "the model's code makes Python numbers of them (item(), tolist(), numpy()), where no gradient comes back"
    return f"they choose what comes to {where} (by argmax, topk, a comparison or rounding), without a gradient"


def among_samples(where: str, chosen: bool) -> str:
    """Why a group is kept whose channels show at `where` in a batch of several samples, and not in one of them.

    chosen: because something is chosen by them."""
    return f"they choose among the samples of a batch what comes to {where} (by argmax, topk, a comparison or " \
           "rounding), without a gradient" if chosen else \
        f"in a batch of several samples they come to {where}, or do not, in another way than in one sample (by a " \
        "number of the whole batch, or by code that asks how many samples there are)"


def read_elsewhere(members: Iterable[Member], readers: Mapping[str, str]) -> str | None:
    """That a weight of a group is read by code of another module than its own; None where none is.

    readers: layer -> the class of that module.
    """
    return next((f"the code of {readers[member.layer]} reads the weight of {member.layer} as well"
                 for member in members if member.layer in readers), None)


def _by(layer: nn.Module) -> str:
    """How what computes a layer's weight is removed."""
    utils = "torch.nn.utils"
    if nn.utils.parametrize.is_parametrized(layer, "weight"):
        return f', by {utils}.parametrize.remove_parametrizations(layer, "weight")'
    hooks = list(layer._forward_pre_hooks.values())
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        return f", by {utils}.remove_spectral_norm(layer)"
    return f', by {utils}.prune.remove(layer, "weight")' if any(isinstance(hook, BasePruningMethod) for hook in hooks) \
        else ""


def _without_gradient(where: str, recording: Recording) -> str:
    how = "torch.no_grad()" if where in recording.without_gradients else \
        "detach(), a choice by them, or an operation that has none, as those of quantized layers"
    return f"{where} reads its channels where no gradient comes back ({how})"


def _of_tensor(module: nn.Module, member: Member, owners: Mapping[int, int]) -> str | None:
    """The same, of a parameter that a module's code reads itself."""
    parameter = module._parameters.get(member.layer.rpartition(".")[2])
    if parameter is None or isinstance(module, nn.utils.parametrize.ParametrizationList):
        return f"{member.layer} is computed (a parametrization): remove it first"
    if int(member.index.max()) >= parameter.shape[member.dim]:
        return f"their number changes on the way to {member.layer}"
    if owners[id(parameter)] > 1:
        return f"{member.layer} is shared with another module"
    return None


def _tied_alike(layers: Mapping[str, nn.Module], member: Member, members: Sequence[Member],
                owners: Mapping[int, int]) -> bool:
    """Whether all layers that hold the weight of `member` lose the same of it, as an embedding and a head tied to it
    do; biases of what makes it are held by one each, and those of what reads it stay as they are."""
    weight, bias = (layers[member.layer]._parameters.get(name) for name in ("weight", "bias"))
    kinds: dict[Role, type[nn.Module]] = {"producer": nn.Embedding, "consumer": nn.Linear}  # of [.., C] weights
    alike = {other.layer for other in members
             if other.role in kinds and isinstance(layers[other.layer], kinds[other.role])
             and layers[other.layer]._parameters.get("weight") is weight is not None
             and torch.equal(other.index, member.index) and torch.equal(other.channel, member.channel)}
    alike |= {other.holds for other in members if other.holds and isinstance(tied := layers[other.layer], TiedLinear)
              and tied.owner is layers[member.layer]  # under the name that a module which is no layer has for it
              and torch.equal(other.index, member.index) and torch.equal(other.channel, member.channel)}
    return len(alike) == owners[id(weight)] and (bias is None or member.role == "consumer" or owners[id(bias)] == 1)
