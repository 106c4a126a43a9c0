"""Who takes channels out of a module: Torch-Pruning, or this, where numbers stand in buffers that it leaves alone, and
for normalisations over channels."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fastscore.graph.layer_types import OPTYPE, groups_left, type_of
from fastscore.modules.narrower import in_place_of, staying, without
from fastscore.modules.norms import channel_norms, gated_norms
from fastscore.modules.weights import parameter_layers, transposed_linear

Positions: TypeAlias = Tensor | Sequence[int]
_COUNTS = ("num_features", "channels")  # attributes that say how many there are, whatever else is as many


def width(module: nn.Module) -> int | None:
    """For how many channels a module keeps numbers, if in buffers alone and one for each, as FrozenBatchNorm2d does, or
    a filter, as anti-aliasing pools do.

    None for modules that Torch-Pruning knows, that hold parameters, or modules with any such tensor of theirs, as the
    padding of a pool has none, and whose buffers differ.
    """
    if type_of(module) != OPTYPE.ELEMENTWISE or module._parameters or any(
            part._parameters or part._buffers for part in module.modules() if part is not module):
        return None
    dims = [(buffer, _channel_dim(buffer)) for _, buffer in _per_channel(module)]
    sizes = {None if dim is None else buffer.shape[dim] for buffer, dim in dims}
    return sizes.pop() if len(sizes) == 1 else None


def surgeon(module: nn.Module) -> Any:
    """What has prune_in_channels, prune_out_channels, get_in_channels and get_out_channels of (module, positions)."""
    if isinstance(module, parameter_layers.ParameterLinear):
        return module
    if transposed_linear.is_transposed(module):
        return _TRANSPOSED
    if channel_norms.norm_of(module) is not None or gated_norms.gated_norm_of(module) is not None:
        return NORMS
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return _SCALED_ROWS
    kind = type_of(module)
    if kind == OPTYPE.IN:
        return _STATISTICS
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not module.transposed:
        return _GROUPED
    if kind in _WEIGHTS and getattr(module, "groups", 1) == 1:
        return _WEIGHTS[kind]
    if kind == OPTYPE.GN:
        return _GROUP_NORMS
    return _BUFFERS if width(module) is not None else tp.function.PrunerBox[kind]


def _per_channel(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in module._buffers.items() if buffer is not None and buffer.numel() > 1)


def _channel_dim(buffer: Tensor) -> int | None:
    """The dimension of a buffer that holds something for each channel; None where no one does."""
    longest = max(range(buffer.dim()), key=lambda dim: buffer.shape[dim])
    if buffer.shape[longest] == buffer.numel():
        return longest
    return 0 if buffer.dim() > 2 and buffer.shape[0] > 1 == buffer.shape[1] else None


def _counts(module: nn.Module, channels: int | None) -> list[str]:
    """The attributes that say how many channels there are: by their names, or as the code of forward reads them."""
    code = getattr(type(module).forward, "__code__", None)
    as_many = [name for name, value in vars(module).items() if type(value) is int and value == channels]
    return [name for name in as_many if name in _COUNTS] or \
        [name for name in as_many if code is not None and name in code.co_names]


def _cut(module: nn.Module, index: Positions) -> None:
    """Take `index` out of each per-channel buffer."""
    for name, buffer in list(_per_channel(module)):
        module._buffers[name] = without(buffer, _channel_dim(buffer) or 0, index)


class _Buffers(tp.function.BasePruningFunc):  # type: ignore[misc]
    """Of a module with a width."""

    def prune_out_channels(self, layer: nn.Module, idxs: Positions) -> nn.Module:
        channels = width(layer)
        _cut(layer, idxs)
        for name in _counts(layer, channels):
            setattr(layer, name, getattr(layer, name) - len(idxs))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return width(layer)

    get_in_channels = get_out_channels


class _Weights(tp.function.BasePruningFunc):  # type: ignore[misc]
    """Of Linears, BatchNorms and convolutions of one group: what Torch-Pruning makes of them, in less time.

    outputs, inputs: the attribute that counts them, and the tensors that lose some of their first dimension, or second.
    """

    def __init__(self, outputs: tuple[str, tuple[str, ...], int], inputs: tuple[str, tuple[str, ...], int]) -> None:
        self._outputs, self._inputs = outputs, inputs

    def prune_out_channels(self, layer: nn.Module, idxs: Positions) -> nn.Module:
        return _less(layer, idxs, *self._outputs)

    def prune_in_channels(self, layer: nn.Module, idxs: Positions) -> nn.Module:
        return _less(layer, idxs, *self._inputs)

    def get_out_channels(self, layer: nn.Module) -> int:
        return int(getattr(layer, self._outputs[0]))

    def get_in_channels(self, layer: nn.Module) -> int:
        return int(getattr(layer, self._inputs[0]))


def _less(layer: nn.Module, gone: Positions, count: str, names: Sequence[str], dim: int) -> nn.Module:
    """A layer whose tensors of these names lose positions of a dimension, if they have several."""
    stay = staying(getattr(layer, count), gone)
    setattr(layer, count, len(stay))
    for name in names:
        if (old := getattr(layer, name, None)) is not None:
            at = dim if old.dim() == 1 or not getattr(layer, "transposed", False) else 1 - dim
            index = stay.to(old.device)
            new = old.detach().index_select(at, index)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new)
                new.grad = None if old.grad is None else old.grad.index_select(at, index)
            setattr(layer, name, new)
    return layer


class _Statistics(tp.function.InstanceNormPruner):  # type: ignore[misc]
    """Of an InstanceNorm, whose running statistics Torch-Pruning leaves as they are."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        _cut(layer, idxs)
        pruned: nn.Module = super().prune_out_channels(layer, idxs)
        return pruned

    prune_in_channels = prune_out_channels


class _Grouped(tp.function.ConvPruner):  # type: ignore[misc]
    """Of a grouped convolution, which loses the same places of each group, and groups of which no output is left: of
    inputs and outputs whichever comes first, as both are counted in what was there before."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        conv = cast(Any, layer)
        groups = groups_left(conv.groups, conv.out_channels, set(idxs))
        super().prune_out_channels(layer, idxs)
        conv.groups, conv.in_channels = groups, groups * conv.weight.shape[1]
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        conv, gone = cast(Any, layer), set(idxs)
        kept = [at for at in range(conv.weight.shape[1]) if at not in gone]  # of the first group, as of all
        conv.weight = self._prune_parameter_and_grad(conv.weight, kept, 1)
        conv.in_channels = conv.groups * len(kept)
        return layer


class _GroupNorms(tp.function.GroupNormPruner):  # type: ignore[misc]
    """Of a GroupNorm, which loses as many channels of each group, or groups of one channel."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        norm = cast(nn.GroupNorm, layer)
        norm.num_groups = groups_left(norm.num_groups, norm.num_channels, set(idxs))
        super().prune_out_channels(norm, idxs)
        return norm

    prune_in_channels = prune_out_channels


class _Norms(tp.function.BasePruningFunc):  # type: ignore[misc]
    """Of normalisations over channels."""

    def prune_out_channels(self, layer: nn.Module, idxs: Positions) -> nn.Module:
        channel_norms.narrow(layer, torch.as_tensor(idxs, dtype=torch.int64))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return channel_norms.width(layer)

    get_in_channels = get_out_channels


class _ScaledRows(tp.function.EmbeddingPruner):  # type: ignore[misc]
    """Of embeddings that scale rows to a length, max_norm, over all channels, where they are looked up: they are scaled
    before any goes. What is left is shorter, and never scaled again."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        embedding = cast(nn.Embedding, layer)
        weight = embedding.weight.detach().clone()
        rows = torch.arange(len(weight), device=weight.device)
        torch.embedding_renorm_(weight, rows, cast(float, embedding.max_norm), embedding.norm_type)
        embedding.weight = in_place_of(embedding.weight, weight)
        super().prune_out_channels(embedding, idxs)
        return embedding

    prune_in_channels = prune_out_channels


TAKE_TENSORS = (_Buffers, _Weights, _Norms)  # surgeons to whom positions need not come as lists
_BUFFERS, _STATISTICS, NORMS, _TRANSPOSED = _Buffers(), _Statistics(), _Norms(), transposed_linear.Surgeon()
_GROUPED, _GROUP_NORMS, _SCALED_ROWS = _Grouped(), _GroupNorms(), _ScaledRows()
_OF_CHANNELS = ("num_features", ("weight", "bias", "running_mean", "running_var"), 0)
_WEIGHTS = {OPTYPE.CONV: _Weights(("out_channels", ("weight", "bias"), 0), ("in_channels", ("weight",), 1)),
            OPTYPE.LINEAR: _Weights(("out_features", ("weight", "bias"), 0), ("in_features", ("weight",), 1)),
            OPTYPE.BN: _Weights(_OF_CHANNELS, _OF_CHANNELS)}
