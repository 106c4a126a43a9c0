"""How channels move from one operation to the next: read off the shapes and arguments that autograd keeps.

A position is one integer, index << 32 | channel: the channel of a group's root, and its index along the dimension that
holds channels. Maps take arrays of distinct positions in ascending order to the like.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

CHANNEL = 0xFFFFFFFF  # the bits of a position that hold its channel
_BROADCASTING = ("Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Maximum", "Minimum", "Where", "Lerp", "Addcmul", "Expand")
_REDUCING = ("Mean", "Sum", "Max", "Min", "Amax", "Amin", "Aminmax", "Var", "Std", "LinalgVectorNorm", "Norm", "Prod",
             "Logsumexp", "Softmax", "LogSoftmax", "Cum", "Logcumsumexp", "Sort", "Topk", "Fft", "Kthvalue", "Median",
             "Nanmedian", "Mode", "Nansum", "LinalgCross")

_PRODUCTS = ("Mm", "Bmm", "Addmm", "Addbmm", "Baddbmm", "Mv", "Addmv", "Dot", "ScaledDotProduct", "Cdist", "Einsum",
             "Trilinear", "Convolution")
_CONTRACTING = ("Mm", "Bmm", "Addmm", "Addbmm", "Baddbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution", "Embedding",
                "Index", "Gather", "ScaledDotProduct", "Cdist", "Einsum", "Roll", "Flip", "Unfold",
                "PartOfProjection")  # the last is of fastscore.modules.attention.projections


class IndexMap(Protocol):
    """How positions move through one operation; `inverse` leads back to where they came from."""

    def forward(self, positions: np.ndarray) -> np.ndarray:
        """From the operation's input to its output: int64 [M] -> int64 [M']."""

    def inverse(self, positions: np.ndarray) -> np.ndarray:
        """From the operation's output to its input: int64 [M'] -> int64 [M]."""


@dataclass(frozen=True)
class ViewMap:
    """Index p becomes outer x inner positions: repeat x (channels x inner) + p x inner + j for j < inner."""

    channels: int
    inner: int
    outer: int

    def __bool__(self) -> bool:
        return (self.inner, self.outer) != (1, 1)

    def forward(self, positions: np.ndarray) -> np.ndarray:
        """From the input's dimension to the output's."""
        first = (positions >> 32) * self.inner
        step = np.arange(self.outer)[:, None] * self.channels * self.inner + np.arange(self.inner)
        return np.unique(first[:, None] + step.reshape(1, -1) << 32 | (positions & CHANNEL)[:, None])

    def inverse(self, positions: np.ndarray) -> np.ndarray:
        """From the output's dimension to the input's."""
        return np.unique((positions >> 32) // self.inner % self.channels << 32 | positions & CHANNEL)


@dataclass(frozen=True)
class SliceMap:
    """Indices begin, begin + step, ... < end of the whole are 0, 1, ... of the part."""

    begin: int
    end: int
    step: int = 1

    def forward(self, positions: np.ndarray) -> np.ndarray:
        """From the whole to the part."""
        if not len(positions) or positions[0] >> 32 >= self.end or positions[-1] >> 32 < self.begin:
            return positions[:0]  # of all parts but one, mostly
        index = (positions >> 32) - self.begin
        inside = (index >= 0) & (index < self.end - self.begin) & (index % self.step == 0)
        moved: np.ndarray = index[inside] // self.step << 32 | positions[inside] & CHANNEL
        return moved

    def inverse(self, positions: np.ndarray) -> np.ndarray:
        """From the part to the whole."""
        return (positions >> 32) * self.step + self.begin << 32 | positions & CHANNEL


@dataclass(frozen=True)
class Inverse:
    """A map the other way round: a concatenation does what a slice undoes."""

    of: IndexMap

    def forward(self, positions: np.ndarray) -> np.ndarray:
        """From the output of `of` to its input."""
        return self.of.inverse(positions)

    def inverse(self, positions: np.ndarray) -> np.ndarray:
        """From the input of `of` to its output."""
        return self.of.forward(positions)


class Lost:
    """Where nobody knows where positions go; verification sees where they show."""

    def forward(self, positions: np.ndarray) -> np.ndarray:
        """No position."""
        return positions[:0]

    inverse = forward


def shape_of(function: Any, output: int = 0) -> tuple[int, ...]:
    """The shape of the tensor that an autograd node stands for; () where autograd does not know."""
    metadata = getattr(function, "_input_metadata", None)
    if metadata is None or output >= len(metadata):
        return ()
    return tuple(metadata[output].shape)


def saved_dims(function: Any, name: str, dims: int) -> list[int]:
    """The dimensions that an autograd node keeps under `name`, counted from 0; [] where it keeps none.

    None is all of them, as in x.norm(); so is an empty tuple where an operation reduces, as in x.amax().
    """
    if not hasattr(function, name):
        return []
    saved = getattr(function, name)
    if saved is None or (saved == () and function.name().startswith(_REDUCING)):
        return list(range(dims))
    wrapped = ((dim - (1 << 64) if dim >= 1 << 63 else dim) for dim in (saved if isinstance(saved, tuple) else [saved]))
    return [dim + dims if dim < 0 else dim for dim in wrapped]


def padding(function: Any, dim: int, dims: int) -> tuple[int, int]:
    """How many constants a pad puts (before, after) what lies along `dim`; (0, 0) for all other operations."""
    widths = [width - (1 << 64) if width >= 1 << 63 else width for width in getattr(function, "_saved_pad", ())]
    at = 2 * (dims - 1 - dim)  # they are kept from the last dimension on
    return (widths[at], widths[at + 1]) if 0 <= at < len(widths) - 1 else (0, 0)


def is_broadcast(function: Any, dim: int, shape: Sequence[int]) -> bool:
    """Whether an input of `shape` has one value for all channels along `dim` of an elementwise operation's output."""
    if not (hasattr(function, "name") and function.name().startswith(_BROADCASTING)):
        return False
    after = shape_of(function)
    at = dim - (len(after) - len(shape))
    return dim < len(after) and after[dim] > 1 and (at < 0 or shape[at] == 1)


def runs_over(function: Any, dim: int, dims: int) -> bool:
    """Whether an operation reduces or normalises over the dimension `dim` of its input of so many dimensions."""
    if not hasattr(function, "name"):
        return False
    along = saved_dims(function, "_saved_dim", dims)
    return dim not in along if function.name().startswith("Renorm") else \
        function.name().startswith(_REDUCING) and dim in along


def multiplies(function: Any) -> bool:
    """Whether an operation is a product, as of matrices, of which activations may be both."""
    return hasattr(function, "name") and function.name().startswith(_PRODUCTS)


def looks_up(function: Any) -> bool:
    """Whether an operation takes rows of a table."""
    return hasattr(function, "name") and function.name().startswith("Embedding")


def contracts(function: Any) -> bool:
    """Whether an operation sums over, picks or reorders what lies along a dimension of an input, as products do."""
    return not hasattr(function, "name") or function.name().startswith(_CONTRACTING)


def regrouped(function: Any, dim: int, before: Sequence[int]) -> IndexMap | None:
    """The map of an operation that makes one channel of several, or several of one; None for all other operations."""
    name: str = function.name() if hasattr(function, "name") else ""
    if name.startswith("Glu") and saved_dims(function, "_saved_dim", len(before)) == [dim]:
        return Inverse(ViewMap(before[dim] // 2, 1, 2))
    if name.startswith("PixelShuffle") and dim == len(before) - 3:
        square: int = function._saved_upscale_factor ** 2
        return Inverse(ViewMap(before[dim] // square, square, 1))
    if name.startswith("PixelUnshuffle") and dim == len(before) - 3:
        return ViewMap(before[dim], function._saved_downscale_factor ** 2, 1)
    if name.startswith("Im2Col") and (dim, len(before)) == (1, 4):
        return ViewMap(before[dim], math.prod(function._saved_kernel_size), 1)
    if name.startswith("Col2Im") and (dim, len(before)) == (1, 3):
        kernel = math.prod(function._saved_kernel_size)
        return Inverse(ViewMap(before[dim] // kernel, kernel, 1))
    if name.startswith("Repeat") and len(repeats := function._saved_repeats) >= len(before):
        return ViewMap(before[dim], 1, repeats[dim + len(repeats) - len(before)])
    return None


def of_groups(inputs: int, outputs: int) -> IndexMap | None:
    """The map of a grouped convolution from what it reads to what it makes of each, or of each set of them; None where
    each stays where it is."""
    if inputs == outputs:
        return None
    return ViewMap(inputs, outputs // inputs, 1) if inputs < outputs else \
        Inverse(ViewMap(outputs, inputs // outputs, 1))


def view(dim: int, before: Sequence[int], after: Sequence[int]) -> tuple[int, ViewMap] | None:
    """(the dimension that holds the channels of `dim` after a view, their map); None where more than one does."""
    channels, inner = before[dim], math.prod(before[dim + 1:])
    # one channel would lie in any dimension, repeated, and in any of size 1
    for at in sorted(range(len(after)), key=lambda at: (1, at) if after[at] != channels else (0, abs(at - dim))):
        size, inside = after[at], math.prod(after[at + 1:])
        if inside and inner % inside == 0 and size * inside % max(channels * inner, 1) == 0:
            return at, ViewMap(channels, inner // inside, size * inside // max(channels * inner, 1))
    return None


def divided(dim: int, before: Sequence[int], at: int, after: Sequence[int]) -> IndexMap | None:
    """The map of a view that makes several dimensions of `dim`, of which `at` holds the channels, which are repeated
    along the others. None where `at` is none of them."""
    behind, inside = math.prod(before[dim + 1:]), math.prod(after[at + 1:])
    whole = before[dim] * behind
    if not behind or inside % behind or whole % (inside * after[at]) or \
            whole not in (math.prod(after[i:]) for i in range(at + 1)):
        return None
    return Inverse(ViewMap(after[at], inside // behind, whole // (inside * after[at])))


def part(dim: int, before: Sequence[int], after: Sequence[int], open_at: int | None, kept: Container[int]
         ) -> int | None:
    """Which of the dimensions that a view divides `dim` over is to hold the channels, of whose parts each place goes at
    once: the one that is open in the code (-1), or else the largest of those whose sizes are not kept."""
    parts = [at for at, size in enumerate(after) if size > 1 and dim < len(before)
             and divided(dim, before, at, after) is not None]
    return max(parts, key=lambda at: (at == open_at, at not in kept, after[at], at), default=None)


def looked_up(function: Any, dim: int, dims: int) -> int | None:
    """Where the dimension `dim`, of so many, of a tensor lies in what is picked of it by indices; None where it is the
    one that they pick along, or where an operation picks nothing."""
    name: str = function.name() if hasattr(function, "name") else ""
    if looks_up(function):
        return len(shape_of(function)) - 1 if dim == dims - 1 else None
    if name.startswith("IndexSelect"):
        return None if dim in saved_dims(function, "_saved_dim", dims) else dim
    if not name.startswith("IndexBackward"):
        return None
    found = {at: index for at, index in enumerate(function._saved_indices) if index is not None}
    if dim in found or dim >= dims or not found or any(index.is_floating_point() or index.dtype == torch.bool
                                                       for index in found.values()):
        return None
    made, first = max(index.dim() for index in found.values()), min(found)
    if len(found) != max(found) - first + 1:  # apart, they come first
        first = 0
    rest = [at for at in range(dims) if at not in found].index(dim)
    return rest if rest < first else rest + made


def of_constants(function: Any, dim: int, dims: int) -> int | None:
    """Where the dimension `dim`, of so many, of a matrix, or of several, lies in its product with constants, which
    nothing made; None where the product sums over it, and of other operations."""
    if not hasattr(function, "name") or not function.name().startswith(("MmBackward", "BmmBackward")):
        return None
    factors = [factor for factor, _ in function.next_functions]
    if None not in factors:
        return None
    return None if dim == dims - (2 if factors[0] is None else 1) else dim


def channel_dim(function: Any, dim: int, before: Sequence[int], after: Sequence[int]) -> int:
    """Where the channels that lie along `dim` of the input lie in the output of an operation that is no view."""
    name: str = function.name() if hasattr(function, "name") else ""
    more = len(after) - len(before)
    if (at := looked_up(function, dim, len(before))) is not None:
        return at
    if name.startswith(("MvBackward", "DotBackward")) and dim == len(before) - 1:
        return len(after)  # they end there
    if name.startswith("Transpose"):
        one, other = (saved_dims(function, f"_saved_dim{i}", len(before))[0] for i in (0, 1))
        return {one: other, other: one}.get(dim, dim)
    if name.startswith("Permute"):
        order = saved_dims(function, "_saved_dims", len(before))
        return order.index(dim) if dim in order else dim
    if name.startswith(("Im2Col", "Col2Im", "ViewAsReal", "ViewAsComplex")):
        return dim  # the parts of a complex number come last
    if name.startswith("TBackward"):
        return len(after) - 1 - dim
    if name.startswith("Squeeze"):
        gone = saved_dims(function, "_saved_dim", len(before)) or [i for i, size in enumerate(before) if size == 1]
        return dim - sum(one < dim for one in gone) if more < 0 else dim
    if name.startswith(("Unsqueeze", "Stack")) and more:
        return dim + sum(one <= dim for one in saved_dims(function, "_saved_dim", len(after)))
    if name.startswith(("Select", "Unbind", "Mean", "Sum", "Amax", "Max")) and more < 0:
        return dim - sum(one < dim for one in saved_dims(function, "_saved_dim", len(before)))
    return max(dim + more, 0)  # broadcasting aligns the last dimensions
