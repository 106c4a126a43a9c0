"""What can be told about a module by looking at it."""

import itertools
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastscore.modules.norms.channel_norms import norm_of
from fastscore.modules.norms.gated_norms import gated_norm_of
from fastscore.modules.weights.channels_last import takes_channels_last
from fastscore.modules.weights.own_layers import own_layer
from fastscore.modules.weights.transposed_linear import is_transposed

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def parametrized(module: nn.Module) -> bool:
    """Whether something computes the module's weight anew in each pass: it is no parameter that could be changed."""
    return nn.utils.parametrize.is_parametrized(module) or vars(module).get("weight") is not None


def runs_own_code(layer: nn.Module) -> bool:
    """Whether a Linear or convolution is of a class that computes its output by code that is not PyTorch's own."""
    kind = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    return kind is not None and not runs_code_of(layer, kind)


def runs_code_of(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes its output by the code of that class."""
    return all(getattr(type(layer), key, None) is getattr(kind, key, None) for key in ("forward", "_conv_forward"))


def hooked(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """What model.get_submodule(name) returns, for a part of its time: each run of a trace asks for each layer."""
    found = model
    for part in name.split(".") if name else ():
        inner = found._modules.get(part) if isinstance(found._modules, dict) else None  # torch.jit has others
        if inner is None:
            return model.get_submodule(name)  # or what it raises
        found = inner
    return found


def held_in(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(the module that has what is of that qualified name, its name there)."""
    owner, _, key = name.rpartition(".")
    return submodule(model, owner), key


def parameter_owners(model: nn.Module) -> Mapping[int, int]:
    """id of each parameter of `model` -> how many modules hold it; 0 for any other."""
    return Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())


def shared_parameters(module: nn.Module, owners: Mapping[int, int]) -> str:
    """Which of the module's own parameters another module holds too, in words; empty where that is none of them.
    owners: as parameter_owners gives them."""
    return " and ".join(name for name, parameter in module._parameters.items()
                        if parameter is not None and owners[id(parameter)] > 1)


def held_by_others(model: nn.Module, key: str) -> set[str]:
    """The modules of `model` whose parameter of that name another module holds, too, as a head and an embedding that
    are tied do."""
    owners = parameter_owners(model)
    return {name for name, module in model.named_modules()
            if (parameter := module._parameters.get(key)) is not None and owners[id(parameter)] > 1}


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's input and output that holds the channels: the last of a Linear (a Conv1D of
    transformers, a user's own, an Embedding) and of a convolution whose code turns what it reads, that before the image
    of any other (which need not have a batch before it), that of a normalisation over channels, else the second."""
    if isinstance(layer, (nn.Linear, nn.Embedding)) or is_transposed(layer):
        return -1
    if isinstance(layer, nn.modules.conv._ConvNd):
        return -1 if takes_channels_last(layer) else -1 - len(layer.kernel_size)
    if (own := own_layer(layer)) is not None:
        return 1 - layer.get_parameter(own.weight).dim()
    norm = gated_norm_of(layer) or norm_of(layer)
    return 1 if norm is None else norm.dim


def fits_width(layer: nn.Module, x: Tensor) -> bool:
    """Whether what a Linear or convolution is called with has as many channels as its weight reads: the code of one may
    put coordinates beside it, or take a part. Of a nested tensor, nobody asks."""
    width = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    return not x.is_nested and bool(x.shape[channel_dim(layer)] == width)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
