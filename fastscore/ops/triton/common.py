# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the kernels share: addresses, and the way a call gets to the device."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastscore.ops.triton.launch import LOAD_BYTES, REGISTERS

OLDEST_CAPABILITY = (8, 0)
MOST_LAUNCHES = 4096  # of an op, kept ready
T = TypeVar("T")


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


class Step(NamedTuple):
    """One kernel of an op. Its arguments: the op's tensors of these indices, the op's numbers, and the rest."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[int, ...]
    rest: tuple[Any, ...]
    options: dict[str, Any]


class Launch:
    """The kernels of an op for tensors of one shape, layout, dtype and device, launched in order by calling it.

    Triton finds out at each launch which of the kernels that it has compiled fits its arguments, which takes longer
    than the launch. Here that depends on nothing but where the tensors start: once all started at a multiple of 16
    bytes, what was found then is launched at once. (Where storages decide, too, as on AMD's devices, they cannot make
    it wrong: of one shape and layout, tensors reach equally far.)

    partials: shape and dtype of memory that is needed meanwhile, which becomes the last tensor.
    """

    def __init__(self, device: torch.device, steps: Sequence[Step],
                 partials: tuple[tuple[int, ...], torch.dtype] | None = None) -> None:
        self.steps, self._device, self._partials = steps, device, partials
        self._ready: list[tuple[Callable[..., None], Callable[[tuple[Tensor, ...]], tuple[Any, ...]],
                                tuple[Any, ...]]] = []

    def calls(self, tensors: tuple[Tensor, ...], numbers: tuple[int, ...] = ()) -> list[Call]:
        """What calling it launches."""
        return self._calls(self._with_partials(tensors), numbers)

    def __call__(self, tensors: tuple[Tensor, ...], numbers: tuple[int, ...] = ()) -> None:
        """Launches on the current stream of the tensors' device."""
        if self._partials is not None:
            tensors = self._with_partials(tensors)
        if not self._ready:
            self._find(tensors, numbers)
            return
        active, addresses = driver.active, 0
        for x in tensors:
            addresses |= x.data_ptr()
        device = active.get_current_device()
        if addresses % LOAD_BYTES or self._device.index not in (device, None):
            self._find(tensors, numbers)
            return
        stream = active.get_current_stream(device)
        for run, pick, rest in self._ready:
            run(*pick(tensors), *numbers, *rest, stream=stream)

    def _with_partials(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._partials is None:
            return tensors
        return *tensors, tensors[0].new_empty(self._partials[0], dtype=self._partials[1])

    def _calls(self, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> list[Call]:
        return [Call(step.kernel, step.grid, (*(tensors[index] for index in step.tensors), *numbers, *step.rest),
                     step.options) for step in self.steps]

    def _find(self, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> None:
        """Launches as Triton does, and notes what it launches, if that is for tensors that are aligned."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            found = [call.kernel[call.grid](*call.args, **call.options) for call in self._calls(tensors, numbers)]
            if self._ready or None in found or any(x.data_ptr() % LOAD_BYTES for x in tensors):
                return  # in Triton's interpreter, nothing is found
            self._ready = [(compiled[(*step.grid, 1, 1)[:3]], itemgetter(*step.tensors), step.rest + tuple(
                step.options[name] for name in step.kernel.arg_names if name in step.options))
                for compiled, step in zip(found, self.steps, strict=True)]


def register_limit() -> dict[str, int]:
    """The option that bounds a kernel's registers; AMD's compiler knows none."""
    return {} if torch.version.hip else {"maxnreg": REGISTERS}


def keep(launches: dict[Any, T], key: Any, launch: T) -> T:
    """launches[key] = launch; when there are many, those of long ago are let go with the others."""
    if len(launches) >= MOST_LAUNCHES:
        launches.clear()
    launches[key] = launch
    return launch


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
                           "tensors to the CPU, or use fastscore.ops.use_backend('composite')")
    return torch.cuda.get_device_properties(device).multi_processor_count
