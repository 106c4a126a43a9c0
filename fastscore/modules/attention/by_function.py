"""Attention modules whose code hands the weights of layers that it does not call to F.multi_head_attention_forward, as
fairseq's, WavLM's and the pooling of CLIP's ResNets do. That function takes the width of what it reads for that of the
heads, and nobody sees what the layers read.

Such a module gets a class of its own: the same code, but that it calls the layers there.
"""

import ast
import inspect
from collections.abc import Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.attention import own_width
from fastscore.modules.attention.heads_read import what_heads_read
from fastscore.modules.changed_source import code_of, with_code
from fastscore.modules.hooks import has_users_hooks
from fastscore.modules.inspection import parametrized, runs_code_of
from fastscore.modules.made_classes import Made, made_class
from fastscore.modules.reachable_code import is_torchs
from fastscore.modules.source import tree_of

_FUNCTION = F.multi_head_attention_forward
_NAMES = tuple(inspect.signature(_FUNCTION).parameters)
_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")
_BIASES = ("in_proj_bias", "out_proj_bias")
_OF_LAYERS = {*_WEIGHTS, *_BIASES, "embed_dim_to_check", "in_proj_weight", "use_separate_proj_weight", "static_k",
              "static_v"}  # what the layers say themselves
_CALL = "attention_by_layers"


class _ByLayers(Made):
    """What the classes made here have besides the code of their modules. _layers: names of the layers that each call
    is of: queries, keys, values, output; and whether these three, and the last, have a bias there."""

    _layers: tuple[tuple[tuple[str, str, str, str], bool, bool], ...]

    def attention_by_layers(self: Any, layers: tuple[str, str, str, str], query: Tensor, key: Tensor, value: Tensor,
                            num_heads: int, bias_k: Tensor | None = None, bias_v: Tensor | None = None,
                            add_zero_attn: bool = False, dropout_p: float = 0.0, training: bool = True,
                            key_padding_mask: Tensor | None = None, need_weights: bool = True,
                            attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                            is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """As F.multi_head_attention_forward of the weights of layers of these names."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        *projections, output = (self._modules[name] for name in layers)
        q, k, v = (layer(x.transpose(0, 1)).transpose(0, 1)  # the samples first, as layers are called elsewhere
                   for layer, x in zip(projections, (query, key, value), strict=True))
        read, weights = what_heads_read(
            q, k, v, num_heads, bias_k, bias_v, add_zero_attn, dropout_p if training else 0.0, key_padding_mask,
            need_weights, attn_mask, average_attn_weights, is_causal, vars(self).get(own_width.DENSE_WIDTH))
        made: Tensor = output(read.transpose(0, 1)).transpose(0, 1)
        if not batched:
            return made.squeeze(1), None if weights is None else weights.squeeze(0)
        return made, weights


def replacement(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same by calling the layers; None for a module whose code does something else, or
    whose layers are no Linears, or do more when they are called than hand on their product."""
    if isinstance(module, _ByLayers) or type(module).__module__.startswith("torch."):
        return None
    kind: Any = type(module)
    made: Any = by_layers(kind)
    return made if made is not None and all(
        _fits(module, name, bias) for names, first, last in made._layers
        for name, bias in zip(names, (first, first, first, last), strict=True)) else None


def _fits(module: nn.Module, name: str, has_bias: bool) -> bool:
    layer = module._modules.get(name)
    return isinstance(layer, nn.Linear) and runs_code_of(layer, nn.Linear) and not has_users_hooks(layer) and \
        not parametrized(layer) and (layer.bias is not None) == has_bias


def without_bias(model: nn.Module) -> set[str]:
    """The layers of a model with such modules that have no bias, where the code of the user's class would add none."""
    return {f"{name}.{layer}".lstrip(".") for name, module in model.named_modules() if isinstance(module, _ByLayers)
            for names, first, last in module._layers
            for layer, bias in zip(names, (first, first, first, last), strict=True) if not bias}


def is_made(module: nn.Module) -> bool:
    """Whether a module has such a class."""
    return isinstance(module, _ByLayers)


def is_one(cls: Any) -> bool:
    """Whether a class has such code, or another in its place already."""
    return issubclass(cls, _ByLayers) or by_layers(cls) is not None


@cache
def by_layers(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of the same code, but for what calls the function; None where nothing does, or with other weights."""
    functions: dict[str, FunctionType] = {}
    layers = list[Any]()
    names = {name: None for each in cls.__mro__ if not is_torchs(each) for name, held in vars(each).items()
             if isinstance(held, FunctionType) and _FUNCTION.__name__ in held.__code__.co_names}
    for name in names:
        held = inspect.getattr_static(cls, name)
        changed = _rewritten(held) if isinstance(held, FunctionType) else None
        if changed is None:
            return None
        functions[name] = with_code(held, changed[0], None)
        layers += changed[1]
    return made_class(_ByLayers, cls, by_layers, **functions, _layers=tuple(layers)) if functions else None


def _rewritten(function: FunctionType) -> tuple[CodeType, list[Any]] | None:
    """The code of a method, and what `_layers` says of its calls; None where one is not of layers' weights."""
    tree = tree_of(function)
    if tree is None or function.__closure__ or not isinstance(tree.body[0], ast.FunctionDef) or \
            tree.body[0].decorator_list or not tree.body[0].args.args:
        return None
    body, owner, layers = tree.body[0], tree.body[0].args.args[0].arg, list[Any]()
    for call in [node for node in ast.walk(body) if isinstance(node, ast.Call)]:
        if _taken(call.func, function) is not _FUNCTION:
            continue
        found = _of_call(call, owner, function)
        if found is None:
            return None
        layer, given = found
        layers.append(layer)
        call.func = ast.Attribute(ast.Name(owner, ast.Load()), _CALL, ast.Load())
        call.args = [ast.Constant(layer[0])]
        call.keywords = [ast.keyword(name, value) for name, value in given.items() if name not in _OF_LAYERS]
    if not layers or any(_taken(node, function) is _FUNCTION for node in ast.walk(body)):
        return None  # which is handed on, say
    return code_of(tree, function), layers


def _of_call(call: ast.Call, owner: str, function: FunctionType) -> tuple[Any, dict[str, ast.expr]] | None:
    """What `_layers` says of a call, and its arguments by their names."""
    if any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords):
        return None
    given = {**dict(zip(_NAMES, call.args, strict=False)), **{str(each.arg): each.value for each in call.keywords}}
    names = tuple(_name_of(given.get(key), owner, "weight") for key in _WEIGHTS)
    separate = given.get("use_separate_proj_weight")
    biases = _parts(given.get("in_proj_bias"), function)
    if None in names or not (isinstance(separate, ast.Constant) and separate.value is True) or biases is None or \
            not all(_is_none(given.get(key)) for key in ("static_k", "static_v")):
        return None
    if biases and [_name_of(bias, owner, "bias") for bias in biases] != list(names[:3]):
        return None
    last = given.get("out_proj_bias")
    if not _is_none(last) and _name_of(last, owner, "bias") != names[3]:
        return None
    return (names, bool(biases), not _is_none(last)), given


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _parts(value: ast.expr | None, function: FunctionType) -> Sequence[ast.expr] | None:
    """Of `torch.cat([a, b, c])`, these; none of None; None of all else."""
    if _is_none(value):
        return ()
    if not isinstance(value, ast.Call) or _taken(value.func, function) not in (torch.cat, torch.concat):
        return None
    first, *others = (*value.args, *(each.value for each in value.keywords))
    zero = all(isinstance(each, ast.Constant) and each.value == 0 for each in others)
    return first.elts if zero and isinstance(first, (ast.List, ast.Tuple)) else None


def _name_of(value: ast.expr | None, owner: str, key: str) -> str | None:
    """Of `self.name.weight`, or `self.name.bias`, the name."""
    if not isinstance(value, ast.Attribute) or value.attr != key or not isinstance(value.value, ast.Attribute):
        return None
    held = value.value
    return held.attr if isinstance(held.value, ast.Name) and held.value.id == owner else None


def _taken(node: ast.AST, function: FunctionType) -> Any:
    """What a name of a function's module, or an attribute of what one is, stands for; None of all else."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id) if node.id not in function.__code__.co_varnames else None
    return getattr(_taken(node.value, function), node.attr, None) if isinstance(node, ast.Attribute) else None
