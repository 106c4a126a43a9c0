"""The precision of an evaluation copy's passes."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastscore.batches.calls import Forward
from fastscore.batches.devices import to_dtype
from fastscore.batches.parts import Batch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cast(eval_model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters, buffers and inputs in `dtype`; hooks on the model still see the inputs as they come."""
    # no cycle: the copy goes as soon as it is let go of
    own, model = type(eval_model.to(dtype)).forward, weakref.ref(eval_model)
    forward = vars(eval_model).get("forward", lambda *args, **kwargs: own(model(), *args, **kwargs))
    vars(eval_model)["forward"] = lambda *args, **kwargs: forward(*to_dtype(args, dtype), **to_dtype(kwargs, dtype))


def check_runs(eval_model: nn.Module, batch: Batch, run: Forward, precision: str) -> None:
    """Raise ValueError, naming the layer, where the copy does not run on `batch` as it was cast."""
    running: list[str] = []
    handles = []
    for name, module in eval_model.named_modules():
        handles += [module.register_forward_pre_hook(lambda module, args, name=name: running.append(name)),
                    module.register_forward_hook(_pop(running))]
    try:
        with torch.no_grad():
            run(eval_model, batch)
    except (RuntimeError, TypeError) as error:
        name = running[-1] if running else ""
        where = f"{name} ({type(eval_model.get_submodule(name)).__name__})" if name else type(eval_model).__name__
        raise ValueError(f"precision: {where} does not run in {precision}: {error}; use precision=None") from error
    finally:
        for handle in handles:
            handle.remove()


def _pop(running: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def pop(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    return pop


def described(dtype: torch.dtype, device: torch.device) -> str:
    """The precision's name, and what is to be known of it on this machine."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16 and device.type == "cpu" and not (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return f"{name} (slower than float32: this processor has no arithmetic for it)"
    return name
