"""Which backend serves each device, why the others do not, and how to choose one of them for a while.

PyTorch's dispatcher does the choosing: the native library registers C++ kernels for the CPU and, where it was built
with them, CUDA kernels. Where it was not, or they cannot run (an older driver, ROCm), Triton kernels take their place,
imported when one is called. Where there is no Triton, and on every other device, a few of PyTorch's own operations do.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastscore.ops import checks, composite, library, reference

BackendName = Literal["cuda", "triton", "composite", "reference"]

FAMILIES = {
    "channel_sums": "channel_sums",
    "channel_dot": "channel_sums",
    "channel_powers": "channel_sums",
    "clamp_backward_": "clamp_backward",
    "random_gradient": "random_gradient",
    "normalize_gradient": "normalize_gradient",
}
"""Each op, and the file that holds its kernels in every backend."""

# Asked before Triton registers anything.
NATIVE_CUDA: bool = torch._C._dispatch_has_kernel_for_dispatch_key("fastscore::channel_sums", "CUDA")


class Backend(NamedTuple):
    """One row of `fastscore info`."""

    name: str
    serves: str  # the devices it serves now; empty for none
    unavailable: str  # why it cannot be used, and what to do; empty if it can


def portable() -> bool:
    """Whether a CPU takes the path that other devices take: no packed layers, no kernel that only a CPU has.

    The environment variable FASTSCORE_PORTABLE=1 asks for it.
    """
    return os.environ.get("FASTSCORE_PORTABLE") == "1"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _native_unusable() -> str:
    """Why the library's CUDA kernels run on no GPU here; empty if they do. No device is asked: CUDA would start."""
    if not NATIVE_CUDA:
        return f"{library.LIBRARY.name} has no CUDA kernels: install a wheel that has, or build where nvcc is found"
    if torch.version.hip:
        return f"torch {torch.__version__} is built for ROCm, whose devices run Triton's kernels"
    driver = library.cuda_driver() if torch.version.cuda else 0
    if 0 < driver // 1000 < library.CUDA_RUNTIME // 1000:
        return (f"{library.LIBRARY.name} is built with CUDA {library.CUDA_RUNTIME // 1000}, and the driver is for CUDA "
                f"{driver // 1000}.{driver % 1000 // 10}: update the NVIDIA driver")
    return ""


def _no_device() -> str:
    """Why kernels cannot run on a GPU here; empty if they can."""
    if torch.version.cuda is None and not torch.version.hip:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device: check the driver with nvidia-smi"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}: 8.0 (Ampere) or newer is needed"
    return ""


def unavailable(backend: str) -> str:
    """Why `backend` cannot be used here, and what to do; empty if it can."""
    if backend == "cuda":
        return _native_unusable() or _no_device()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        return "" if _interpreting() else _no_device()
    return ""


def _lazy(op: str) -> Callable[..., Any]:
    """The Triton function of `op`, imported when it is first called."""
    function: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal function
        if function is None:
            function = _imported(op)
        return function(*args, **kwargs)

    return call


def _imported(op: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(f"fastscore.ops.triton.{FAMILIES[op]}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(f"fastscore::{op} on a GPU needs Triton or a native library with CUDA kernels: "
                           "pip install triton, or install a wheel that has them") from error
    function: Callable[..., Any] = getattr(module, op)
    return function


def _checked(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which would broadcast operands of different shapes, once they are seen to be of one."""
    if FAMILIES[op] != "channel_sums":
        return function

    def call(a: Tensor, g: Tensor, channel_dim: int = 1, *mean: bool, **kwargs: bool) -> Any:
        checks.check_pair(a, g, channel_dim)
        return function(a, g, channel_dim, *mean, **kwargs)

    return call


def _of_composite(op: str) -> Callable[..., Any]:
    """It serves whatever has no kernel, and so sees tensors that are not dense, too."""
    function = _checked(op, getattr(composite, op))

    def call(*args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_quantized):
                kind = "quantized" if x.is_quantized else str(x.layout)
                raise TypeError(f"fastscore::{op} takes dense tensors, not {kind} ones: use to_dense() or dequantize()")
        return function(*args, **kwargs)

    return call


def _of_reference(op: str) -> Callable[..., Any]:
    """The reference of `op` as its schema has it: several results of one shape are one tensor."""
    function = _checked(op, getattr(reference, op))
    returns = getattr(torch.ops.fastscore, op).default._schema.returns

    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return torch.stack(out) if isinstance(out, tuple) and len(returns) == 1 else out

    return call


_KERNELS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "triton": _lazy, "composite": _of_composite, "reference": _of_reference}
"""Backend in Python -> op -> its function, called as the op's schema says."""


def _register(backend: str, *devices: str) -> torch.library.Library:
    """Puts the kernels of `backend` before those registered earlier, until the library is destroyed."""
    registered = torch.library.Library("fastscore", "IMPL")
    for op in FAMILIES:
        for device in devices:
            if (backend, op, device) != ("composite", "random_gradient", "CPU"):  # which calls the CPU's
                # torch 2.11 takes a second kernel for a device only if that is said
                registered.impl(op, _KERNELS[backend](op), device, allow_override=True)
    return registered


def _of_gpus() -> BackendName:
    """What serves GPUs while nothing else is chosen."""
    if not _native_unusable():
        return "cuda"
    return "composite" if importlib.util.find_spec("triton") is None else "triton"


GPU_BACKEND: BackendName = _of_gpus()
_defaults = [_register("composite", "CompositeExplicitAutograd")]
if GPU_BACKEND != "cuda":
    _defaults.append(_register(GPU_BACKEND, "CUDA"))

_selected: BackendName | None = None
_overrides: torch.library.Library | None = None


def _select(backend: BackendName | None) -> None:
    global _selected, _overrides
    if _overrides is not None:
        _overrides._destroy()
    _overrides = None
    if backend in _KERNELS:
        _overrides = _register(backend, "CUDA", *["CPU"] * _serves_cpu(backend))
    _selected = backend


def _serves_cpu(backend: str | None) -> bool:
    """Whether choosing `backend` takes CPU tensors from the CPU's kernels."""
    return backend in ("composite", "reference") or (backend == "triton" and _interpreting())


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Inside, every op on a GPU runs on the backend `name`, whoever calls it; for tests and benchmarks.

    "composite" and "reference" serve CPU tensors as well, and so does "triton" under its interpreter
    (TRITON_INTERPRET=1). The choice holds for the whole process, nests, and ends with the block, also by an exception.

    Args:
        name: "cuda", "triton", "composite" (a few operations of PyTorch, which any device has) or "reference" (exact,
            and slow).

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot be used here; the message says why, and what to do.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"name is {name!r}, but has to be one of {get_args(BackendName)}")
    if reason := unavailable(name):
        raise RuntimeError(f"name is {name!r}, which cannot be used here: {reason}")
    before = _selected
    _select(name)
    try:
        yield
    finally:
        _select(before)


def backends() -> list[Backend]:
    """Every backend: what it serves now, or why it cannot be used."""
    chosen = _selected if _serves_cpu(_selected) else None
    rows = [Backend("cpu", "" if chosen else "cpu", "")]
    for name in get_args(BackendName):
        reason = unavailable(name)
        serves = ["cpu"] * (name == chosen) + ["cuda"] * (name == (_selected or GPU_BACKEND)) \
            + ["every other device"] * (name == "composite")
        rows.append(Backend(name, "" if reason else ", ".join(serves), reason))
    return rows


_NAMES = {"cuda": "CUDA kernels", "triton": "Triton kernels", "reference": "the reference",
          "composite": "operations of PyTorch in place of kernels"}


def serving(device: torch.device) -> str:
    """What serves `device` now, in words, for a plan; and why that, where it is not what would be fastest."""
    if device.type == "cpu" and not _serves_cpu(_selected):
        return f"CPU kernels ({library.simd_tier()})"
    if device.type not in ("cpu", "cuda"):
        return f"{_NAMES['composite']}: there is none for {device.type}"
    name = _selected or GPU_BACKEND
    because = "chosen by use_backend()" if _selected else _native_unusable()
    return f"{_NAMES[name]}{': ' if because else ''}{because}"
