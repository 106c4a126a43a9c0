"""The evaluation copy: a model that shares the parameters of the user's, and may be changed at will."""

import ast
import copy
import inspect
import itertools
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from fastscore.batches.parts import tensors_of
from fastscore.modules import scripted, written_parameters
from fastscore.modules.attention import multihead_attention
from fastscore.modules.copying import ATOMS, deepcopy, own_attributes
from fastscore.modules.inspection import runs_own_code
from fastscore.modules.modes import enter_evaluation
from fastscore.modules.reachable_code import is_torchs, names_in
from fastscore.modules.source import tree_of
from fastscore.modules.weights import (
    called_layers,
    computed_weights,
    held_weights,
    own_norms,
    own_products,
    transposed_linear,
)
from fastscore.modules.wrappers import check_whole


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors with a history that modules hold, in plain objects too, and copy.deepcopy() refuses: a weight that
    weight_norm computes, what RAFT keeps of its last call."""
    held: list[Any] = list({  # each thing once: all modules of a transformer hold its configuration
        id(value): value for module in model.modules() for value in (module._buffers, *own_attributes(module).values())
        if type(value) not in ATOMS}.values())
    known = (nn.Module, Tensor, type, ModuleType)
    held += [vars(value) for value in held if hasattr(value, "__dict__") and not isinstance(value, known)]
    return [tensor for tensor in tensors_of(held) if not tensor.is_leaf]


def own_copies(model: nn.Module) -> dict[int, Any]:
    """For copy.deepcopy() of a model: id of each thing in it that it refuses, or copies with a history -> a copy."""
    computed: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed_tensors(model)}
    return computed | scripted.copies(model)


def may_be_written(model: nn.Module) -> Iterator[nn.Parameter | None]:
    """The parameters that a forward pass of modules' own code was seen to write to, or may: rows of an embedding that
    are scaled in place to a norm; what code that writes to tensors (`self.weight.data *= self.mask`) holds, or names in
    its parts."""
    if written := written_parameters.noted(model):
        yield from (parameter for name, parameter in model.named_parameters() if name in written)
    named: dict[type[nn.Module], set[str]] = {}  # most modules of a model are of few classes
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            yield from module._parameters.values()
        kind = type(module)
        if is_torchs(kind):
            continue
        if kind not in named:
            named[kind] = _named_in_forward(kind)
        names = named[kind]
        if not any(name in ("data", "max_norm") or name.endswith("_") for name in names):
            continue
        yield from module._parameters.values()
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in names or names & _ALL_PARAMETERS:
                yield parameter


_ALL_PARAMETERS = {"parameters", "named_parameters", "state_dict", "_parameters"}


def _named_in_forward(kind: type[nn.Module]) -> set[str]:
    """The attributes that a class's forward names, and so do the methods and functions of its file that it calls; with
    "max_norm" where they hand it on, as F.embedding(x, w, max_norm=1), which scales rows of w in place; or may do so by
    its place."""
    held: dict[str, Any] = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    names, work = set[str](), [inspect.unwrap(held["forward"])]
    seen = set[Any]()
    while work:
        function = work.pop()
        if not inspect.isfunction(function) or function in seen or is_torchs(function):
            continue
        seen.add(function)
        codes = [function.__code__]
        names |= {"max_norm"} if _may_scale(function) else set()
        while codes:
            code = codes.pop()
            codes += [part for part in code.co_consts if inspect.iscode(part)]  # those of lambdas, say
            names |= {name for name in code.co_names if name != "requires_grad_" and not name.endswith("__")}
            names |= {"max_norm" for names_given in code.co_consts if isinstance(names_given, tuple) and
                      "max_norm" in names_given}
            for name in code.co_names:
                found: Any = held.get(name, function.__globals__.get(name))
                work.append(inspect.unwrap(getattr(found, "fget", getattr(found, "__func__", found))))
    return names


def _may_scale(function: FunctionType) -> bool:
    """Whether a function calls F.embedding or F.embedding_bag with as many arguments as max_norm needs, or with a list
    of them."""
    names = {"embedding", "embedding_bag"}
    if names.isdisjoint(names_in(function.__code__)):
        return False
    tree = tree_of(function)
    return tree is None or any(
        isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in names and
        (len(node.args) > 3 or any(isinstance(each, ast.Starred) for each in node.args) or
         any(each.arg is None for each in node.keywords)) for node in ast.walk(tree))


def evaluation_copy(model: nn.Module, plain: bool = True) -> nn.Module:
    """A copy of `model` in evaluation mode with frozen parameters, which share their memory with the model's own unless
    a forward pass writes to them.

    Its nn.MultiheadAttention runs its projections as layers, transformers' Conv1D is nn.Linear there and its experts
    are two layers, what torch.jit made is one module, and layers that compute their weight are plain ones, unless
    `plain` is False, but for those that compute_on() was told of. Raises what fastscore.modules.wrappers.check_whole
    does.
    """
    check_whole(model)
    shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
                              for parameter in model.parameters()}
    shared |= {id(parameter): nn.Parameter(parameter.detach().clone(), requires_grad=False)
               for parameter in may_be_written(model) if parameter is not None}
    shared |= {id(part): scripted.opaque(part) for _, part in scripted.outermost(model)}
    shared |= {id(tensor): tensor.detach() for tensor in computed_tensors(model)}
    try:
        eval_model = spell_out(deepcopy(model, shared))
    except TypeError as error:
        if (held := _not_copied(model)) is None:
            raise
        raise ValueError(f"model: {held} cannot be copied ({error}), and what is done here is done on a copy: take it "
                         "out of the model meanwhile, or give its class a __deepcopy__") from error
    computed_weights.mark_copies(model, eval_model)
    written_parameters.note(eval_model, written_parameters.noted(model))
    enter_evaluation(eval_model)
    of_what_was_noted = (weights.replace(eval_model, model) for weights in (called_layers, own_products, own_norms))
    for handle in itertools.chain(*of_what_was_noted, multihead_attention.replace_attention(eval_model),
                                  held_weights.replace(eval_model)):
        handle.make_permanent()
    for module in filter(transposed_linear.is_transposed, list(eval_model.modules())):
        transposed_linear.become_linear(module)
    for module in eval_model.modules() if plain else ():
        computed_weights.make_layer_plain(module, keep=True)
    return eval_model


def _not_copied(model: nn.Module) -> str | None:
    """The attribute of a module, with its class, that Python cannot copy, as an open file or a lock; None where there
    is none."""
    for name, module in model.named_modules():
        for key, value in own_attributes(module).items():
            try:
                copy.deepcopy(value)
            except TypeError:
                return f"{name}.{key}".lstrip(".") + f" ({type(value).__name__})"
            except Exception:  # of tensors with a history, which are copied otherwise
                continue
    return None


def spell_out(model: nn.Module) -> nn.Module:
    """Have each convolution of a copy hold one number for each dimension, and the padding that follows from those, as
    one has that was made with them; returns the copy. Code may have changed its settings since, `conv.padding = 2`, as
    encoders whose strides are replaced by dilation do: PyTorch computes by what is set there, and leaves what it
    derived from the old numbers. Those of classes with code of their own, which may read such a number, stay."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and not runs_own_code(layer):
            _spell_out(layer)
    return model


def _spell_out(conv: Any) -> None:
    for name in ("stride", "padding", "dilation", "output_padding"):
        if not isinstance(value := getattr(conv, name), str):
            given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            setattr(conv, name, given * len(conv.kernel_size) if len(given) == 1 else given)
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        conv._reversed_padding_repeated_twice = tuple(size for size in reversed(conv.padding) for _ in range(2))
