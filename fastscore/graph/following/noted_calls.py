"""What a traced run shows beside what autograd keeps of it."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches.parts import memory_of, tensors_of
from fastscore.graph.autograd_nodes import reach
from fastscore.graph.cutting.cut_widths import Cut, View, calling_module, calling_modules, cut_of, view_of
from fastscore.graph.following.asked_sizes import SLICES, SPLITS, VIEWS, ZEROS, AskedSizes
from fastscore.graph.following.made_tables import MadeTables
from fastscore.graph.following.nested import Nested
from fastscore.modules.hooks import put_on
from fastscore.modules.marked_numbers import Place
from fastscore.modules.weights.parameter_layers import ParameterLayer

_JOINS = (torch.cat, torch.concat, torch.concatenate)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.baddbmm,
             torch.einsum, F.scaled_dot_product_attention)


def factors_of(args: Any, weights: Container[int]) -> list[Tensor]:
    """What a product is of that layers made. weights: ids of those of layers, which code of their own may turn."""
    return [x for x in tensors_of(args) if x.grad_fn is not None and id(x._base) not in weights]


@dataclass(frozen=True)
class MetZeros:
    """Zeros that an operation takes together with what layers make.

    shape: of the zeros. code: that made them. dim, begin: of a concatenation, or of what was made of one, the dimension
    that it joins, and where they begin in that; dim is None of any other.
    """

    shape: tuple[int, ...]
    code: Cut
    dim: int | None = None
    begin: int = 0


@contextmanager
def states_given(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Recurrent module -> the tensors that it was given as its state, in the calls within the block."""
    given: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.setdefault(module, []).extend(tensors_of((args[1:], kwargs.get("hx"))))

    with put_on(module.register_forward_pre_hook(note, with_kwargs=True) for module in modules):
        yield given


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Any]]]:
    """Module -> the autograd function of the tensor that it returned, in each call within the block."""
    made: dict[nn.Module, list[Any]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        made.setdefault(module, []).append(output.grad_fn if isinstance(output, Tensor) else None)

    with put_on(module.register_forward_hook(note) for module in modules):
        yield made


class NotedCalls(TorchFunctionMode):
    """Notes what autograd does not keep: splits into parts of a given width (which look like those of chunk()) and
    slices, with the module whose code they stand in, the widths that a concatenation joins, those of tensors that
    need no gradient included, which modules' code reads the weights of other modules' layers, where zeros that the code
    of modules makes meet what layers make, and what is computed and not used.

    weights: id of a weight -> the layers that hold it, with their names. model: that runs.
    """

    def __init__(self, weights: Mapping[int, Mapping[str, nn.Module]], model: nn.Module) -> None:
        super().__init__()
        self._weights = weights
        self.read_elsewhere: dict[str, str] = {}  # layer -> the class of the module whose code reads its weight
        self.read_detached: dict[str, str] = {}  # the same, where no gradient comes back to the weight
        self.taken = set[int]()  # ids of parameters that anything is computed from
        self._taken = Counter[int]()  # id of a weight -> how often it is taken, by what the outputs are made of or not
        self.cuts: list[Cut] = []
        self.concatenated: dict[Any, list[int]] = {}  # autograd function -> the widths of what it joins
        # modules whose code multiplies activations, the innermost first -> the sizes of these
        self.products: dict[tuple[nn.Module, ...], set[int]] = {}
        self._views: dict[Any, View] = {}  # by their autograd functions
        self.run: Callable[[], object] = list  # of the model, once more
        self._asked: AskedSizes | None = None  # what they are made of
        self._zeros: dict[int, tuple[Tensor, Cut]] = {}  # memory -> zeros there, and the code that made them
        # memory -> (its shape, the zeros in it) of what zeros were joined to others to make, none of which a layer made
        self._parts: dict[int, tuple[torch.Size, list[MetZeros]]] = {}
        self._like: dict[int, tuple[Tensor, Tensor]] = {}  # id of zeros that code made like another tensor -> they, it
        self.met: dict[Any, list[MetZeros]] = {}  # autograd's function of an operation, module whose code calls it
        self.tables = MadeTables(model)
        self._nested = Nested()
        self._unused: dict[Any, Tensor] = {}  # autograd function -> what it made, and no later one is known to take

    def ends(self, outputs: Iterable[Tensor]) -> tuple[list[Tensor], set[Any]]:
        """What was computed, and is used for none of `outputs` and for nothing else; and the autograd functions that
        only this is computed by. What was noted is let go."""
        used, found = set[Any](), list[Tensor]()
        for tensor in outputs:
            reach(tensor.grad_fn, used)
        reached = used.copy()
        for tensor in reversed(self._unused.values()):
            if tensor.grad_fn is not None and tensor.grad_fn not in reached:
                found.append(tensor)
                reach(tensor.grad_fn, reached)
        self._unused.clear()
        self._nested.forget()
        self.taken.update(id(source.variable) for node in used for source, _ in node.next_functions
                          if hasattr(source, "variable"))
        self._taken = Counter(id(source.variable) for node in reached for source, _ in node.next_functions
                              if hasattr(source, "variable") and id(source.variable) in self._weights)
        return found, reached - used

    def note_unseen_readers(self, calls: Callable[[str], int | None]) -> None:
        """Add to `read_elsewhere` layers whose weights are taken more often than layers with them are called: by
        functions of torch.autograd, which nothing else shows. calls(layer): how often; None where its own code may take
        its weight more often than that."""
        for weight, times in self._taken.items():
            called = [calls(name) for name in self._weights[weight]]
            if None not in called and times > sum(filter(None, called)):
                self.read_elsewhere = dict.fromkeys(self._weights[weight], "the model") | self.read_elsewhere

    def forget(self) -> None:
        """Let go what autograd keeps of operations that were noted."""
        for noted in (self.cuts, self.concatenated, self._zeros, self._parts, self._like, self.met, self._views,
                      self.products):
            noted.clear()
        self.tables.forget()
        self.run, self._asked = list, None

    def view_of(self, function: Any) -> View:
        """What the code says of the sizes of a view, given its autograd function."""
        return self._views.get(function, View({}, None))

    def asked(self, model: nn.Module) -> AskedSizes:
        """What is known of the numbers that sizes may be made of. The model runs once more, the first time."""
        if self._asked is None:
            codes = (*self.cuts, *(code for _, code in self._zeros.values()),
                     *(view.code for view in self._views.values() if view.code is not None))
            places = set[Place]().union(*(code.places() for code in codes),
                                        *(view.places() for view in self._views.values()))
            self._asked = AskedSizes(model, self.run, places)
        return self._asked

    def zeros_of(self, zeros: Tensor) -> Cut | None:
        """The code that made what such zeros are, or were made from; None of anything else."""
        known = self._zeros.get(memory_of(zeros)) if self._zeros else None
        return None if known is None else known[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _JOINS and args and self._like:
            args = ([self._from_what_it_is_like(x) for x in args[0]], *args[1:])
        output = self._nested.passed(args, kwargs, func(*args, **kwargs))
        if args and (func is torch.zeros_like or _of_its_shape(func, args, kwargs)) and args[0].requires_grad:
            self._like[id(output)] = output, args[0]
        self._note_unused(output)
        part = output[0] if func in SPLITS and output else output if func in SLICES else None
        if part is not None and part.grad_fn is not None and (
                cut := cut_of(part.grad_fn, _numbers((*args[1:], *kwargs.values())))) is not None:
            self.cuts.append(cut)
        if func in VIEWS and output.grad_fn is not None:
            self._views[output.grad_fn] = view_of(output, _asked(args, kwargs), cut_of(output.grad_fn))
        if func in PRODUCTS and len(factors := factors_of(args, self._weights)) > 1:
            sizes = (size for x in factors for size in x.shape[:-1])
            self.products.setdefault(tuple(calling_modules()), set()).update(sizes)
        joined = None
        if func in _JOINS:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            joined = list(args[0] if args else kwargs["tensors"]), dim
        if isinstance(output, Tensor) and output.dim():
            self._note_zeros(func, (args, tuple(kwargs.values())), output, joined)
            self.tables.note((args, tuple(kwargs.values())), output)
        self._note_parameters(func, args, kwargs, output)
        if joined is not None and output.grad_fn is not None:
            self.concatenated[output.grad_fn] = _widths(*joined)
        return output

    def _from_what_it_is_like(self, x: Tensor) -> Tensor:
        """Zeros like another tensor, and not written to, as autograd keeps what is computed from that: they have as
        many channels as it has."""
        zeros, like = self._like.get(id(x), (None, x))
        if zeros is not x or x._version or x.dtype != like.dtype:
            return x
        return like.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)

    def _note_unused(self, output: Any) -> None:
        for tensor in tensors_of(output):
            if tensor.grad_fn is not None and tensor.layout is torch.strided and not tensor.is_nested and \
                    torch._C._functorch.maybe_get_level(tensor) == -1:
                for source, _ in tensor.grad_fn.next_functions:
                    self._unused.pop(source, None)
                self._unused[tensor.grad_fn] = tensor

    def _note_parameters(self, func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Which parameters a function takes, and whose code it is that has the weights of others' layers."""
        if next(iter(tensors_of(output)), None) is None:  # but a shape, say
            return
        for weight in tensors_of((args, tuple(kwargs.values()))):
            self.taken.add(id(weight))
            layers = self._weights.get(id(weight), {})
            computed = bool(layers) and _computed_from(output, weight, args, kwargs)
            reader = calling_module() if computed or (layers and _takes_values(func, weight, args)) else None
            own = (module for layer in layers.values() for module in layer.modules())
            if reader is not None and not any(reader is module for module in own):
                found = self.read_elsewhere if computed else self.read_detached
                found.update(dict.fromkeys(layers, type(reader).__name__))

    def _note_zeros(self, func: Any, args: Any, output: Tensor, joined: tuple[list[Tensor], int] | None) -> None:
        """Zeros, what is made of them alone (in another dtype, say), and where they meet what layers make.

        joined: of a concatenation, of what, and along which dimension."""
        if func in ZEROS:
            if output.is_floating_point() and (code := cut_of(None, output.shape)) is not None and \
                    not isinstance(code.module, ParameterLayer):  # whose code is no user's
                self._zeros.setdefault(memory_of(output), (output, code))
            return
        taken = list(tensors_of(args)) if joined is None else joined[0]
        for at, x in enumerate(taken) if self._zeros else ():
            if (code := self.zeros_of(x)) is None:
                continue
            parts = self._parts_of(x, code) if joined is None else [_joined(taken, at, joined[1] % output.dim(), code)]
            if output.grad_fn is None:
                self._zeros.setdefault(memory_of(output), (output, code))
                if joined is not None or x.shape == output.shape:
                    self._parts.setdefault(memory_of(output), (output.shape, []))[1].extend(parts)
                continue
            for where in (output.grad_fn, calling_module()):
                self.met.setdefault(where, []).extend(parts)

    def _parts_of(self, x: Tensor, code: Cut) -> list[MetZeros]:
        """What is zeros of what an operation takes: all, or where what was joined to make it was zeros."""
        shape, parts = self._parts.get(memory_of(x), (None, []))
        return parts.copy() if shape == x.shape else [MetZeros(tuple(x.shape), code)]


def _numbers(given: Any) -> Iterator[int]:
    """The whole numbers that a function is called with."""
    if type(given) is int:
        yield given
    parts = (given.start, given.stop) if isinstance(given, slice) else given
    for part in parts if isinstance(parts, tuple | list) else ():
        yield from _numbers(part)


def _joined(tensors: Sequence[Tensor], at: int, dim: int, code: Cut) -> MetZeros:
    """Those at a place of tensors that are joined along `dim`."""
    return MetZeros(tuple(tensors[at].shape), code, dim, sum(_widths(tensors[:at], dim)))


def _takes_values(func: Any, tensor: Tensor, args: Any) -> bool:
    """Whether a function takes more of a tensor than its shape, dtype and device."""
    name: str = getattr(func, "__name__", "")
    return not (name.startswith("new_") or name.endswith(("_like", "_as")) or (name == "to" and args[0] is not tensor))


def _of_its_shape(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is x.new_zeros(x.shape), which has the shape from the tensor, not from numbers in the code."""
    size = (*args[1:2], kwargs.get("size"))[0] if func is Tensor.new_zeros else None
    return isinstance(size, torch.Size) and size == args[0].shape


def _widths(tensors: Iterable[Tensor], dim: int) -> list[int]:
    """Of tensors that are joined along `dim`."""
    return [tensor.shape[dim] if tensor.dim() > 1 else tensor.numel() for tensor in tensors]


def _asked(args: Any, kwargs: Mapping[str, Any]) -> tuple[int, list[int]]:
    """(the first dimension that a view is asked to make, the sizes of those that it is asked for)."""
    given = [*args[1:], *kwargs.values()]
    sizes = next((list(each) for each in given if isinstance(each, tuple | list)), None)
    dims = [each for each in given if isinstance(each, int)]
    return (0, dims) if sizes is None else (dims[0] if dims else 0, sizes)


def _computed_from(output: Any, weight: Tensor, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether autograd has the output of a function of `args` computed from the weight itself."""
    others = {tensor.grad_fn for tensor in tensors_of((args, tuple(kwargs.values()))) if tensor is not weight}
    work = [tensor.grad_fn for tensor in tensors_of(output)]
    while work:
        node = work.pop()
        if node is None or node in others:
            continue
        if getattr(node, "variable", None) is weight:
            return True
        work += [source for source, _ in node.next_functions]
    return False
