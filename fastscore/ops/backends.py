"""Which backend serves each device, why the others do not, and how to choose one of them for a while.

PyTorch's dispatcher does the choosing: the native library registers C++ kernels for the CPU and, where it was built
with them, CUDA kernels. Where it was not, Triton kernels take their place. Triton is imported when one is called.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch

from fastscore.ops import library, reference

BackendName = Literal["cuda", "triton", "reference"]

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


def _no_device() -> str:
    """Why kernels cannot run on a GPU here; empty if they can."""
    if torch.version.cuda is None:
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
        if not NATIVE_CUDA:
            return f"{library.LIBRARY.name} has no CUDA kernels: install a wheel that has, or build where nvcc is found"
        return _no_device()
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


def _of_reference(op: str) -> Callable[..., Any]:
    """The reference of `op` as its schema has it: several results of one shape are one tensor."""
    function, returns = getattr(reference, op), getattr(torch.ops.fastscore, op).default._schema.returns

    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return torch.stack(out) if isinstance(out, tuple) and len(returns) == 1 else out

    return call


def _register(backend: str) -> torch.library.Library:
    """Puts the kernels of `backend` before those registered earlier, until the library is destroyed."""
    overrides = torch.library.Library("fastscore", "IMPL")
    for op in FAMILIES:
        if backend == "triton":
            kernel = _lazy(op)
            devices = ["CUDA", "CPU"] if _interpreting() else ["CUDA"]
        else:
            kernel = _of_reference(op)
            devices = ["CUDA", "CPU"]
        for device in devices:
            overrides.impl(op, kernel, device)
    return overrides


_default = None if NATIVE_CUDA else torch.library.Library("fastscore", "IMPL")
if _default is not None:
    for _op in FAMILIES:
        _default.impl(_op, _lazy(_op), "CUDA")

_selected: BackendName | None = None
_overrides: torch.library.Library | None = None


def _select(backend: BackendName | None) -> None:
    global _selected, _overrides
    if _overrides is not None:
        _overrides._destroy()
    _overrides = _register(backend) if backend in ("triton", "reference") else None
    _selected = backend


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Inside, every op on a GPU runs on the backend `name`, whoever calls it; for tests and benchmarks.

    "reference" serves CPU tensors as well, and so does "triton" under its interpreter (TRITON_INTERPRET=1). The choice
    holds for the whole process, nests, and ends with the block, also by an exception.

    Args:
        name: "cuda", "triton" or "reference".

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
    gpu = _selected or ("cuda" if NATIVE_CUDA else "triton")
    everywhere = _selected == "reference" or (_selected == "triton" and _interpreting())
    rows = [Backend("cpu", "" if everywhere else "cpu", "")]
    for name in get_args(BackendName):
        reason = unavailable(name)
        serves = [device for device, here in (("cpu", name == _selected and everywhere), ("cuda", name == gpu)) if here]
        rows.append(Backend(name, "" if reason else ", ".join(serves), reason))
    return rows
