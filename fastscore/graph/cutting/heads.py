"""What an attention module has once for each head, beside the layers that make and read its heads."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.attention import multihead_attention, own_width
from fastscore.modules.narrower import staying
from fastscore.modules.reachable_code import functions_in, is_torchs, names_in

# where an attention module has its projections: query, key, value (one name where they are one layer), output
LAYERS = (
    ("qkv", "qkv", "qkv", "proj"),
    ("to_qkv", "to_qkv", "to_qkv", "merge"),
    ("to_qkv", "to_qkv", "to_qkv", "to_out"),
    ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),
    ("query_key_value", "query_key_value", "query_key_value", "dense"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("query_proj", "key_proj", "value_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("query", "key", "value", "dense"),
    ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    ("Wqkv", "Wqkv", "Wqkv", "Wo"),
    ("Wqkv", "Wqkv", "Wqkv", "out_proj"),
    ("to_q", "to_k", "to_v", "to_out.0"),
    ("q", "k", "v", "proj"),
    ("q", "kv", "kv", "proj"),
    ("to_q", "to_kv", "to_kv", "to_out"),
    ("to_q", "to_kv", "to_kv", "to_out.0"),
    ("q", "k", "v", "o"),
)
_KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "all_head_dim", "split_size", "dim_out")
# `attribute` of a member for heads: what is called as one of the widths above is none of them; what the module's
# children count is none of them, as heads of what picks keys
COUNTS_ALONE, OWN_ALONE = " alone", " own"
SIDES = ("heads", f"heads{COUNTS_ALONE}", f"heads{OWN_ALONE}")
# parameter or buffer of the module -> (dimension that holds heads, times that it holds them all)
_TENSORS = {"in_proj_weight": (0, 3), "in_proj_bias": (0, 3), "q_proj_weight": (0, 1), "k_proj_weight": (0, 1),
            "v_proj_weight": (0, 1), "bias_k": (2, 1), "bias_v": (2, 1), "q_bias": (0, 1), "k_bias": (0, 1),
            "v_bias": (0, 1), "relative_position_bias_table": (1, 1), "logit_scale": (0, 1),
            "temperature": (0, 1), "sinks": (0, 1)}
_ONE_EACH = ("logit_scale", "temperature", "sinks")  # of these, one number a head: as many as there are heads
PROJECTIONS = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def count(module: nn.Module) -> int | None:
    """How many (query) heads an attention module says that it has; None where it says nothing."""
    return _first(module, own_width.COUNTS)


def total_of(module: nn.Module) -> int | None:
    """The same, or what its code reads of a config that it shares."""
    config = _config_read(module)
    return count(module) or (config and _first_of(config, own_width.COUNTS))


def width(module: nn.Module) -> int | None:
    """Channels of one head, as an attention module has them written down; None where it has not."""
    return _first(module, own_width.HEAD_WIDTHS)


def is_known(attribute: str) -> bool:
    """Whether a number is known by its name, as one of heads or their widths is."""
    return attribute in (*own_width.COUNTS, *_KEY_COUNTS, *_WIDTHS, *own_width.HEAD_WIDTHS)


def counted(module: nn.Module, which: str = "") -> set[tuple[str, str]]:
    """(child, or "" for the module itself, attribute) of the numbers that `remove` changes. which: "", COUNTS_ALONE or
    OWN_ALONE."""
    return {*_kept(module, which)} if count(module) is not None else set()


def _kept(module: nn.Module, which: str) -> Iterator[tuple[str, str]]:
    """See `counted`; also of a module whose config alone says how many heads it has."""
    names = (*own_width.COUNTS, *_KEY_COUNTS, *(_WIDTHS if which != COUNTS_ALONE else ()))
    for child, owner in (("", module), *(module.named_children() if which != OWN_ALONE else ())):
        yield from ((child, name) for name, value in [*vars(owner).items()] if name in names and isinstance(value, int))


def tensors(module: nn.Module) -> Iterator[str]:
    """Names of the module's own parameters and buffers that hold heads in one dimension, if it has that."""
    return (name for name, (dim, _) in _TENSORS.items() if isinstance(
        held := module._parameters.get(name, module._buffers.get(name)), Tensor) and held.dim() > dim)


def by_head(name: str, values: Tensor, heads: int) -> Tensor:
    """Values of the shape of the tensor called `name` -> [heads, everything else]."""
    dim, times = _TENSORS[name]
    return values.movedim(dim, 0).reshape(times, heads, -1).transpose(0, 1).flatten(1)


def remove(module: nn.Module, index: Tensor, apart: Collection[str] = (), which: str = "") -> None:
    """Take heads out of what a module itself holds, in place: its tensors and its counts.

    Parameters are new objects afterwards. The layers below it lose their channels elsewhere.

    index: the heads that go, int64 [R]. apart: names of tensors that lose their part elsewhere. which: see `counted`.
    """
    for handle in multihead_attention.replace_attention(module):  # PyTorch's own cannot be narrower than its embedding
        handle.make_permanent()
    config = _config_read(module)
    held = [name for name in tensors(module) if name not in apart]
    total = total_of(module) or next((getattr(module, name).shape[_TENSORS[name][0]] for name in held
                                      if name in _ONE_EACH), None)
    if total is None:
        return  # it takes as many heads as its layers make
    kept = staying(total, index)
    for name in held:
        dim, times = _TENSORS[name]
        old = getattr(module, name)
        rows = torch.arange(old.shape[dim]).reshape(times, total, -1)[:, kept].flatten()
        new = old.detach().index_select(dim, rows.to(old.device))
        setattr(module, name, nn.Parameter(new, old.requires_grad) if name in module._parameters else new)
    for child, name in [*_kept(module, which)]:
        owner = module.get_submodule(child)
        setattr(owner, name, _of_fewer(getattr(owner, name), total, len(kept)))
    if config is not None:
        module.config = NarrowedConfig(config, {  # type: ignore[assignment]
            name: _of_fewer(value, total, len(kept)) for name in (*own_width.COUNTS, *_KEY_COUNTS)
            if isinstance(value := getattr(config, name, None), int)})


def _of_fewer(value: int, total: int, left: int) -> int:
    """A number that goes down with the heads, of which `left` stay of `total`; keys and values of all queries are one
    head, as long as there are any."""
    return value * left // total or min(value, left)


def narrow(module: nn.Module, dims: int) -> None:
    """Take `dims` dimensions off the width of a head that an attention module keeps, in place, before its layers lose
    any. Products of queries and keys stay scaled by the dense width, which `own_width.DENSE_WIDTH` names."""
    for handle in multihead_attention.replace_attention(module):
        handle.make_permanent()
    output, total = own_width.output_projection(module), count(module)
    before = width(module) or (output.in_features // total if output is not None and total else None)
    if before is None:
        return
    vars(module).setdefault(own_width.DENSE_WIDTH, before)
    for owner in (module, *module.children()):
        for name, value in list(vars(owner).items()):
            if isinstance(value, int) and (name in own_width.HEAD_WIDTHS or (name in _WIDTHS and total
                                                                   and value == total * before)):
                setattr(owner, name, value // before * (before - dims))


class NarrowedConfig:
    """A config that many modules share, as one of them sees it: with other counts of heads."""

    def __init__(self, config: Any, counts: Mapping[str, int]) -> None:
        vars(self).update(counts, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in vars(self):  # not there yet, in a copy that is being made
            raise AttributeError(name)
        return getattr(vars(self)["_config"], name)


def _config_read(module: nn.Module) -> Any:
    """The config of a module that keeps no count of heads itself, whatever its children do, and whose code reads one
    there; None where it does not."""
    config = vars(module).get("config")
    if config is None:
        return None
    mentioned = {name for cls in type(module).__mro__ if not is_torchs(cls) for method, held in vars(cls).items()
                 if method != "__init__" for function in functions_in(held) for name in names_in(function.__code__)}
    read = [name for name in (*own_width.COUNTS, *_KEY_COUNTS) if name in mentioned]
    own = any(isinstance(vars(module).get(name), int) for name in own_width.COUNTS)
    return config if not own and _first_of(config, read) and _first_of(config, own_width.COUNTS) else None


def _first_of(config: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((value for owner in (module, *module.children()) for name in names
                 if isinstance(value := vars(owner).get(name), int) and not isinstance(value, bool)), None)
