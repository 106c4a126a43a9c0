"""Second moments of what a layer reads, added up batch by batch: all that a linear reconstruction needs to know.

A batch is centred by its own mean before its products are taken, in float32 on whatever device it lies, and merged
into totals in float64 (Chan, Golub, LeVeque 1979), so that a mean far from zero cancels nothing. No activation outlives
its layer's call.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastscore.batches.devices import wide, with_float64
from fastscore.batches.parts import valid_tokens
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.modules.hooks import input_of
from fastscore.modules.inspection import device_of
from fastscore.modules.weights import recurrent
from fastscore.modules.weights.channels_last import channels_first
from fastscore.modules.weights.parameter_layers import is_part
from fastscore.modules.weights.transposed_linear import is_linear

POSITIONS = 256  # of each sample and call, as many are looked at
WIDEST = 4096  # inputs whose moments are taken together: 128 MiB in float64


@dataclass
class Moments:
    """count, mean and scatter Σ (x - mean)(x - mean)ᵀ of the rows seen so far.

    index: int64 [G, P, C], where a row's values lie in the layer's input. Each of G blocks (the groups of a
    convolution) has a scatter of its own; the P places at which a flattened channel lies share one, each centred by a
    mean of its own.
    """

    index: Tensor
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    scatter: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not self.mean.numel():
            blocks, _, width = self.index.shape
            self.mean = torch.zeros(self.index.shape, dtype=torch.float64)
            self.scatter = torch.zeros(blocks, width, width, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """float64 [G, C, C], over rows and places."""
        return self.scatter / max(self.count * self.index.shape[1], 1)

    def add(self, rows: Tensor) -> None:
        """Take rows [n, inputs of the layer] in."""
        if not len(rows):
            return
        x = wide(rows)
        x = x[:, self.index.to(x.device)] if self.index.numel() != x.shape[1] or self.index.shape[:2] != (1, 1) \
            else x[:, None, None]  # [n, G, P, C]
        mean = x.mean(0)
        x = x - mean
        rest = with_float64(x.mean(0)).double()  # what rounding left of the mean
        flat = x.movedim(1, 0).flatten(1, 2)
        scatter = with_float64(torch.matmul(flat.transpose(1, 2), flat)).double()
        scatter -= len(rows) * rest.transpose(1, 2) @ rest
        self._merge(len(rows), (with_float64(mean).double() + rest).cpu(), scatter.cpu())

    def joined(self, other: "Moments") -> "Moments":
        """The moments of what both saw."""
        both = Moments.of(self.state_dict())
        both._merge(other.count, other.mean, other.scatter)
        return both

    def about_zero(self) -> "Moments":
        """The same about zero, as if that were the mean: for a layer that has no bias to add a constant with."""
        return Moments(self.index, self.count, torch.zeros_like(self.mean),
                       self.scatter + self.count * self.mean.transpose(1, 2) @ self.mean)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += shift.transpose(1, 2) @ shift * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """All of it, to go on from."""
        return {"index": self.index, "count": self.count, "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` gave. Raises ValueError for one of a layer that is looked at otherwise."""
        if not torch.equal(self.index, state["index"]):
            raise ValueError("moments: their state is of other inputs")
        self.count, self.mean, self.scatter = state["count"], state["mean"].clone(), state["scatter"].clone()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Moments":
        """What `state_dict` gave."""
        return cls(state["index"], state["count"], state["mean"].clone(), state["scatter"].clone())

    def all_reduce(self, process_group: distributed.ProcessGroup | None = None,
                   device: torch.device | None = None) -> None:
        """Add up over processes, so that every one has the moments of all."""
        counts = torch.tensor([self.count], dtype=torch.float64, device=device)
        distributed.all_reduce(counts, group=process_group)
        total = int(counts)
        if not total:
            return
        mean = (self.mean * (self.count / total)).to(device or "cpu")
        distributed.all_reduce(mean, group=process_group)
        shift = self.mean - mean.cpu()
        scatter = (self.scatter + self.count * shift.transpose(1, 2) @ shift).to(device or "cpu")
        distributed.all_reduce(scatter, group=process_group)
        self.count, self.mean, self.scatter = total, mean.cpu(), scatter.cpu()


def layouts(model: nn.Module, groups: Iterable[ChannelGroup], names: Iterable[str]) -> dict[str, Tensor]:
    """Layer -> int64 [G, P, C], how the inputs of the Linears and convolutions of those names are looked at.

    Channels that a flatten has spread over several positions share their moments; a layer that reads more than WIDEST
    inputs at once has those of each alone, from which no channel can say what another was.
    """
    members: dict[str, list[Member]] = {name: [] for name in names}
    for group in groups:
        for member in group.role("consumer"):
            if member.layer in members:
                members[member.layer].append(member)
    return {name: _layout(model.get_submodule(name), edges) for name, edges in members.items()}


def _layout(layer: nn.Module, members: list[Member]) -> Tensor:
    blocks = 1
    if isinstance(layer, nn.Linear):
        inputs = layer.in_features
        every = torch.cat([member.index for member in members]) if members else torch.empty(0, dtype=torch.int64)
        if len(every) == inputs and len(every.unique()) == inputs:
            folded = _folded(members)
            if folded is not None and folded.shape[2] <= WIDEST:
                return folded
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        inputs, blocks = layer.in_channels, layer.groups
    shape = (blocks, 1, -1) if inputs // blocks <= WIDEST else (inputs, 1, 1)
    return torch.arange(inputs).reshape(shape)


def _folded(members: list[Member]) -> Tensor | None:
    """[1, P, C] where each channel of every member lies at P places, as after a flatten; None where they differ."""
    columns = []
    for member in members:
        order = torch.argsort(member.channel * (int(member.index.max()) + 1) + member.index)
        counts = torch.bincount(member.channel)
        if int(counts.min()) != int(counts.max()):
            return None
        columns.append(member.index[order].reshape(len(counts), -1))
    if len({column.shape[1] for column in columns}) != 1:
        return None
    return torch.cat(columns).T[None].contiguous()


class InputMoments:
    """Hooks that take the moments of what layers read, while they are entered.

    model: an evaluation copy. index: layer -> see `layouts`, in the order they run. moments: layer -> Moments.
    """

    def __init__(self, model: nn.Module, index: Mapping[str, Tensor]) -> None:
        self._model = model
        self.moments = {name: Moments(where) for name, where in index.items()}
        self._valid: Tensor | None = None
        self.calls: Counter[str] = Counter()  # how often each layer was called, in the order they run
        self._handles = ExitStack()

    def __enter__(self) -> "InputMoments":
        self._handles.enter_context(recurrent.exact_rows(self._model))  # padding is none of what a module reads
        for name, moments in self.moments.items():
            layer = self._model.get_submodule(name)
            self._handles.enter_context(layer.register_forward_pre_hook(partial(self._add, name, moments),
                                                                        with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.close()

    def start(self, batch: Any) -> None:
        """Before each batch: padding among its tokens does not count."""
        self._valid = valid_tokens(batch)

    def _add(self, name: str, moments: Moments, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
             ) -> None:
        if not is_part(layer, args, kwargs):
            self.calls[name] += 1
            moments.add(rows_of(layer, input_of(args, kwargs), self._valid))

    def finish(self, process_group: distributed.ProcessGroup | None = None) -> None:
        """After the last batch: add up over processes. Raises FloatingPointError for NaN or infinity, naming the first
        layer that reads it."""
        for moments in self.moments.values():
            if process_group is not None:
                moments.all_reduce(process_group, device_of(self._model))
        for name, moments in self.moments.items():
            if not torch.isfinite(moments.scatter).all():
                raise FloatingPointError(f"{name}: NaN or infinity in what it reads of the calibration batches")


def rows_of(layer: nn.Module, x: Tensor, valid: Tensor | None = None, limit: int = POSITIONS) -> Tensor:
    """[n, C_in]: the inputs of a Linear, or of a convolution at the positions that it reads, at most `limit` of each
    sample: a fixed random choice, the same for every sample of that size. valid: bool [N, T], tokens that are no
    padding. Raises ValueError for inputs without a dimension for samples."""
    if x.dim() < (2 if is_linear(layer) else len(layer.kernel_size) + 2):  # type: ignore[arg-type]
        raise ValueError(f"{layer} reads {list(x.shape)}, without a dimension for samples: of a batch of one (its part "
                         "that is held out may be one) the model's code drops it, as squeeze() does; name the "
                         "dimensions to drop, or pass a forward= that brings it back")
    x = channels_first(layer, x.detach())
    if is_linear(layer):
        if valid is not None and x.dim() == 3 and x.shape[:2] == valid.shape:
            x = x[valid]
        x = x.flatten(0, -3) if x.dim() > 2 else x[:, None]
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        alone = not layer.transposed and all(size == 1 for size in layer.kernel_size) and set(layer.padding) <= {0}
        if alone:  # it reads no other positions than these
            steps = [slice(None, None, int(step)) for step in layer.stride]
            x = x[tuple([slice(None), slice(None), *steps])]
        x = x.movedim(1, -1).flatten(1, -2)
    if x.shape[1] > limit:
        x = x[:, some_places(x.shape[1], limit).to(x.device)]
    return x.flatten(0, 1)


def some_places(count: int, limit: int) -> Tensor:
    """Of so many places, numbered, at most `limit`, ascending: the same for every sample of that size."""
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))[:limit].sort().values
