"""The precision of an evaluation copy's passes."""

import itertools
import weakref
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.devices import to_dtype
from fastscore.batches.parts import Batch
from fastscore.modules.hooks import put_on
from fastscore.modules.inspection import device_of

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WRONG = ("precision: PyTorch computes {0} wrong in bfloat16 on this processor (a convolution that makes a single "
         "column, at a stride, on AMX), and all that is scored with it: use float32, precision=\"float32\"")
_OFF = 0.05  # of the largest value: rounding is a tenth of that


def cast(eval_model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters, buffers and inputs in `dtype`; hooks on the model still see the inputs as they come."""
    # no cycle: the copy goes as soon as it is let go of
    own, model = type(eval_model.to(dtype)).forward, weakref.ref(eval_model)
    forward = vars(eval_model).get("forward", lambda *args, **kwargs: own(model(), *args, **kwargs))
    vars(eval_model)["forward"] = lambda *args, **kwargs: forward(*to_dtype(args, dtype), **to_dtype(kwargs, dtype))


def check_runs(eval_model: nn.Module, batch: Batch, run: Forward, precision: str) -> None:
    """Raise ValueError, naming the layer, where the copy does not run on `batch` as it was cast."""
    running: list[str] = []

    def leave(*args: object) -> None:
        running.pop()

    handles = []
    for name, module in eval_model.named_modules():
        handles += [module.register_forward_pre_hook(lambda module, args, name=name: running.append(name)),
                    module.register_forward_hook(leave)]
    try:
        with put_on(handles), torch.no_grad():
            run(eval_model, batch)
    except (RuntimeError, TypeError) as error:
        name = running[-1] if running else ""
        where = f"{name} ({type(eval_model.get_submodule(name)).__name__})" if name else type(eval_model).__name__
        raise ValueError(f"precision: {where} does not run in {precision}: {error}; use precision=None") from error


def wrong_convolutions(model: nn.Module, inputs: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[str]:
    """Layers that PyTorch computes wrong in bfloat16 on processors with AMX: of convolutions whose kernel goes over
    several rows in one column, at a stride, some are (PyTorch 2.14; by oneDNN). Each is tried.

    inputs: layer -> the shape that it reads.
    """
    if dtype != torch.bfloat16 or device_of(model).type != "cpu" or not torch.cpu._is_amx_tile_supported():
        return []
    layers = {name: model.get_submodule(name) for name in inputs}
    return [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
            and layer.kernel_size[1] > 1 < layer.stride[1] and _is_wrong(layer, inputs[name])]


def _is_wrong(layer: nn.Conv2d, shape: tuple[int, ...]) -> bool:
    """Whether F.conv2d makes something else in bfloat16 of a layer's shapes."""
    def made_of(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    of_weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    of_input = (layer.in_channels, *shape[-2:])
    rows, columns = made_of(torch.empty(1, *of_input, device="meta"), torch.empty(of_weight, device="meta")).shape[-2:]
    if columns != 1 or rows == 1:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(of_weight, generator=generator).bfloat16()
    for samples, form in itertools.product((1, 4), (torch.contiguous_format, torch.channels_last)):
        x = torch.randn(samples, *of_input, generator=generator).bfloat16().contiguous(memory_format=form)
        made, right = made_of(x, weight).float(), made_of(x.float(), weight.float())
        if not bool(((made - right).abs() <= _OFF * right.abs().max()).all()):
            return True
    return False


def described(dtype: torch.dtype, device: torch.device) -> str:
    """The precision's name, and what is to be known of it on this machine."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16 and device.type == "cpu" and not (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return f"{name} (slower than float32: this processor has no arithmetic for it)"
    return name
