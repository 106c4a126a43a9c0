"""Loads the native kernels and tells PyTorch what each op returns without running it."""

import ctypes
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastscore.ops import checks
from fastscore.ops.reference import result_dtype


def load(folder: Path) -> Path:
    """Loads the native library in `folder` into PyTorch and returns its path; ImportError says why it cannot."""
    found = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not found:
        raise ImportError(f"fastscore's native library (_C) is not in {folder}. Install the package from a wheel with "
                          "`pip install torch-fastscore`, or build it in a source tree with "
                          "`pip install --no-build-isolation -e .` (needs a C++20 compiler).")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise ImportError(f"fastscore's native library {found[0]} does not load into torch {torch.__version__}: "
                          f"{error.__cause__ or error}. It needs torch >= 2.11: upgrade torch, or rebuild in the "
                          "source tree with `pip install --no-build-isolation --force-reinstall --no-deps .`"
                          ) from error
    return found[0]


LIBRARY = load(Path(__file__).resolve().parent.parent)


# The version of CUDA that the library's kernels need, as 13000; 0 without any, and in a library of before.
CUDA_RUNTIME: int = torch.ops.fastscore.cuda_runtime() if hasattr(torch.ops.fastscore, "cuda_runtime") \
    and torch._C._dispatch_has_kernel_for_dispatch_key("fastscore::cuda_runtime", "CompositeExplicitAutograd") else 0


def cuda_driver() -> int:
    """The newest version of CUDA that the NVIDIA driver knows, as 13000; 0 where there is none. Starts nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return 0 if driver.cuDriverGetVersion(ctypes.byref(version)) else version.value


def simd_tier() -> str:
    """The instruction set of the CPU kernels: "x86-64-v4" (AVX-512), "x86-64-v3" (AVX2) or "baseline".

    The widest that the processor has, unless the environment variable FASTSCORE_SIMD named one when a kernel first
    ran; RuntimeError if the processor lacks that one.
    """
    tier: str = torch.ops.fastscore.simd_tier()
    return tier


def _channel_dot(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    checks.check_pair(a, g, channel_dim)
    return a.new_empty((a.shape[0], a.shape[channel_dim]), dtype=result_dtype(a.dtype))


def _channel_sums(a: Tensor, g: Tensor, channel_dim: int = 1, mean: bool = False) -> Tensor:
    dot = _channel_dot(a, g, channel_dim)
    return dot.new_empty((3, *dot.shape))


def _channel_powers(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    absolute = _channel_dot(a, g, channel_dim)
    return absolute.new_empty((2, *absolute.shape))


def _clamp_backward_(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, mean: bool = False) -> Tensor:
    checks.check_clamp(y, g, rest)
    return _channel_sums(y, g)


def _random_gradient(sample_ids: Tensor, classes: int, seed: int, probe: int = 0, distribution: str = "normal",
                     normalize: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    checks.check_random(sample_ids, classes, seed, probe, distribution, dtype)
    return sample_ids.new_empty((sample_ids.shape[0], classes), dtype=dtype or torch.float32)


def _normalize_gradient(g: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    checks.check_gradient(g, eps)
    return torch.empty_like(g), g.new_empty((g.shape[0],), dtype=result_dtype(g.dtype))


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, padding_y: int, padding_x: int, low: float,
              high: float) -> Tensor:
    samples, _, height, width = x.shape
    return x.new_empty((samples, outputs, height + 2 * padding_y - 2, width + 2 * padding_x - 2)
                       ).contiguous(memory_format=torch.channels_last)


_FAKES: dict[str, Callable[..., object]] = {
    "channel_sums": _channel_sums,
    "channel_dot": _channel_dot,
    "channel_powers": _channel_powers,
    "clamp_backward_": _clamp_backward_,
    "random_gradient": _random_gradient,
    "normalize_gradient": _normalize_gradient,
    "winograd": _winograd,
}


def _undifferentiable(name: str) -> Callable[..., Any]:
    """Autograd's kernel of an op. Scores are read, never differentiated: results don't require grad, and where PyTorch
    would take them for constants without a word, an error says so."""
    op = getattr(torch.ops.fastscore, name).default
    names = [argument.name for argument in op._schema.arguments]
    writes = [place for place, argument in enumerate(op._schema.arguments) if argument.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or _transform() is not None:
            for argument, x in zip(op._schema.arguments, args, strict=False):
                if isinstance(x, Tensor) and _followed(x):
                    raise RuntimeError(f"fastscore::{name} has no derivative, and {argument.name} is differentiated "
                                       "by torch.func or in forward mode: call the op on "
                                       f"{argument.name}.detach(), or outside of it")
        for place in writes:
            checks.check_writable(args, place, names)
            if not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel


_is_compiling, _transform = torch.compiler.is_compiling, torch._C._functorch.peek_interpreter_stack


def plain_call() -> bool:
    """Whether no transform sees what is called now: torch.func, forward mode or torch.compile.

    Then an op goes past its kernel for autograd, `past_autograd`: that has nothing to refuse, and, being Python, takes
    as long as all else that a small call needs.
    """
    return forward_ad._current_level < 0 and _transform() is None and not _is_compiling()


past_autograd = torch._C._AutoDispatchBelowAutograd


def run(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an op that writes to no argument, past its kernel for autograd where it can."""
    if not plain_call():
        return op(*args)
    with past_autograd():
        return op(*args)


def _followed(x: Tensor) -> bool:
    """Whether torch.func or forward mode differentiates by `x`."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    return torch.is_grad_enabled() and x.requires_grad and torch._C._functorch.is_gradtrackingtensor(x)


_autograd = torch.library.Library("fastscore", "IMPL", "Autograd")
for _name, _fake in _FAKES.items():
    if (_arguments := [each.name for each in getattr(torch.ops.fastscore, _name).default._schema.arguments]) \
            != list(inspect.signature(_fake).parameters):
        raise ImportError(f"fastscore's native library {LIBRARY} is of another version than the Python beside it: its "
                          f"{_name} takes {', '.join(_arguments)}; rebuild it with "
                          "`pip install --no-build-isolation --force-reinstall --no-deps .`, or in a source tree "
                          "`python setup.py build_ext --inplace`")
    torch.library.register_fake(f"fastscore::{_name}", _fake)
    _autograd.impl(_name, _undifferentiable(_name), with_keyset=True)
