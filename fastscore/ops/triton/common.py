# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the kernels share: addresses, and the way a call gets to the device."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

OLDEST_CAPABILITY = (8, 0)


@triton.jit
def offsets(p, sizes, strides, ALIGN: tl.constexpr):
    """Σ_d index_d · stride_d of position p, counted row-major over `sizes`; int64, all multiples of ALIGN."""
    result = tl.zeros_like(p).to(tl.int64)
    for d in tl.static_range(len(sizes) - 1, 0, -1):
        result += (p % sizes[d]).to(tl.int64) * strides[d]
        p = p // sizes[d]
    return tl.multiple_of(result + p.to(tl.int64) * strides[0], ALIGN)


class Call(NamedTuple):
    """One kernel launch, ready to run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of `device`, which must be able to run the kernels."""
    if device.type != "cuda":
        if interpreting():
            return 1
        raise ValueError(f"Triton kernels run on GPUs, but a tensor is on {device}; move it with .cuda()")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise RuntimeError(f"{torch.cuda.get_device_name(device)} ({device}) has compute capability "
                           f"{capability[0]}.{capability[1]}, but the GPU kernels need 8.0 (Ampere) or newer; move the "
                           "tensors to the CPU, or use fastscore.ops.use_backend('reference')")
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(calls: Iterable[Call], device: torch.device) -> None:
    """Launches `calls` in order on the current stream of `device`."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for call in calls:
            call.kernel[call.grid](*call.args, **call.options)
