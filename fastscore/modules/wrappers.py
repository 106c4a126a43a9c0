"""What stands around a model, or around parts of it, for training: on several devices, or with less memory."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, cast

import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

_SHARDED = ("FSDPModule", "FullyShardedDataParallel")  # fully_shard and its forerunner, slow to import


def unwrapped(model: nn.Module, argument: str = "model") -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or what torch.compile made, whose layers have the names
    that they have there. Raises TypeError, naming the argument, for what is no module."""
    if not isinstance(model, nn.Module):
        shown = type(model).__name__ if isinstance(model, Mapping) else f"{' '.join(repr(model).split()):.80}"
        raise TypeError(f"{argument}: {shown}, where a torch.nn.Module is meant{_nearest(model)}")
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _nearest(other: object) -> str:
    """Where the module is that was meant by something else; of a checkpoint, what to do with it."""
    if isinstance(getattr(other, "model", None), nn.Module):
        return "; its .model is one"
    if isinstance(other, Mapping):
        for key, value in other.items():
            if isinstance(value, nn.Module):
                return f"; its [{key!r}] is one"
    weights = isinstance(other, (Mapping, str, PathLike)) and not type(other).__module__.startswith("fastscore.")
    return "; build it, and load_state_dict(the weights)" if weights else ""


def check_filled(model: nn.Module) -> None:
    """Raise ValueError where parameters or buffers have no shape yet, or parameters hold no values."""
    for owner, module in model.named_modules():
        for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            name = f"{owner}.{key}".lstrip(".")
            if tensor is not None and is_lazy(tensor):
                raise ValueError(f"model: {name} ({type(module).__name__}) has no shape before the model has run: call "
                                 "it once, model(batch), first")
            if isinstance(tensor, nn.Parameter) and tensor.is_meta:
                raise ValueError(f"model: {name} is on the meta device, which holds no values: load the weights first")


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the block, what torch.compile made of `model`, or of parts of it, and what compiled itself
    (`module.compile()`), runs as it is: hooks that are set after it has run are not seen otherwise."""
    inside = _inside(model)
    with ExitStack() as stack:
        if inside is not None:
            stack.enter_context(uncompiled(inside))
        if "dynamo_ctx" in vars(model):
            before = vars(model)["forward"]
            vars(model)["forward"] = inside
            stack.callback(vars(model).__setitem__, "forward", before)
        for module in model.modules():
            if (call := module._compiled_call_impl) is not None:
                module._compiled_call_impl = None
                stack.callback(setattr, module, "_compiled_call_impl", call)
        yield


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        return cast(nn.Module, model.module)
    return model._modules.get("_orig_mod") if "dynamo_ctx" in vars(model) else None


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which no copy can be made that runs, or whose layers cannot be seen.

    Raises TypeError where torch.jit or torch.export made it; ValueError where its parameters are sharded, hold no
    values or have no shape yet, or were made under torch.inference_mode, or a part of it is compiled, or in
    DistributedDataParallel.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: {type(model).__name__}, which torch.jit made, has no layers that could be measured or "
                        "made smaller: pass the nn.Module that it was made from, and script or trace the smaller one")
    if _is_program(model):
        raise TypeError(f"model: {type(model).__name__}, which torch.export made, has no layers that could be measured "
                        "or made smaller: pass the nn.Module that it was made from, and export the smaller one")
    check_filled(model)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(f"model: {name} was made under torch.inference_mode, of which no gradient can be taken: "
                             "make the model outside of it, or under torch.no_grad")
    for name, module in model.named_modules():
        if name and "dynamo_ctx" in vars(module):
            raise ValueError(f"model: {name} is what torch.compile made of a part, whose layers are not seen when they "
                             f"run: put the part itself back (its _orig_mod, not {name}), and compile it in the "
                             "smaller model, or by its own compile(); a whole model may be compiled")
        if name and isinstance(module, DistributedDataParallel):
            raise ValueError(f"model: {name} is a part in DistributedDataParallel, of which no copy can be made: put "
                             f"{name}.module in its place, and wrap the whole model")
        if any(cls.__name__ in _SHARDED for cls in type(module).__mro__):
            raise ValueError(
                f"model: the parameters of {name or type(model).__name__} are sharded, and what is done here is done "
                "on a copy, which needs them whole: load torch.distributed.checkpoint.state_dict.get_model_state_dict("
                "model, options=StateDictOptions(full_state_dict=True)) into a model that is not sharded; or use a "
                "Scorer in the training loop, with the ChannelGraph that fastscore.graph.tracing.trace found before "
                "sharding")


def _is_program(model: nn.Module) -> bool:
    """Whether its graph calls kernels alone, of plain modules that hold weights: what torch.fx traces calls layers."""
    return isinstance(model, GraphModule) and any(isinstance(node.target, OpOverload) for node in model.graph.nodes) \
        and all(type(module) is nn.Module for module in model.modules() if module is not model and module._parameters)


_blocks: Counter[int] = Counter()  # thread -> blocks of without_checkpoints that it is in
_lock = threading.Lock()
_originals: dict[str, Any] = {}  # what stands in torch.utils.checkpoint otherwise, while some thread is in a block


def _original(name: str) -> Any:
    """For threads that are in no block; None for those that are."""
    return None if _blocks[threading.get_ident()] else _originals.get(name)


class _PlainCall:
    """In place of checkpoint.CheckpointFunction."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        original = _original("CheckpointFunction")
        return function(*args) if original is None else original.apply(function, preserve_rng_state, *args)


def _plain_generator(name: str) -> Callable[..., Iterator[None]]:
    """In place of the generator called `name` that the layers run between two steps of."""

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        original = _original(name)
        return iter((None,)) if original is None else original(*args, **kwargs)

    return generator


_PLAIN = {"CheckpointFunction": _PlainCall} | {name: _plain_generator(name) for name in (
    "_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")}


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Within the block, activation checkpoints of this thread call their layers as they are.

    Reentrant ones hide a part of the autograd graph, and take backward() alone; the others run layers once more in the
    backward pass, and compare what they see then. Blocks of several threads may overlap: the last to end brings back
    what the first found.
    """
    with _lock:
        if not _blocks.total():
            _originals.update({name: getattr(checkpoint, name) for name in _PLAIN if hasattr(checkpoint, name)})
            for name in _originals:
                setattr(checkpoint, name, _PLAIN[name])
        _blocks[threading.get_ident()] += 1
    try:
        yield
    finally:
        with _lock:
            _blocks[threading.get_ident()] -= 1
            if not _blocks.total():
                for name, original in _originals.items():
                    setattr(checkpoint, name, original)
                _originals.clear()
                _blocks.clear()
