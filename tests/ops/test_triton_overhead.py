"""What an op of Triton's costs the host, counted: the calls of Python functions on the way to a launch.

A stand-in for the CUDA driver takes the launches, on tensors of the CPU; what it is handed is compared with what
Triton's own launch hands it. All else is as on a GPU: the dispatcher, and kernels compiled for sm_90.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fastscore import ops  # noqa: E402
from fastscore.ops import backends  # noqa: E402
from fastscore.ops.triton import channel_sums, clamp_backward, common, normalize_gradient, random_gradient  # noqa: E402

LAUNCHED: list[tuple[Any, ...]] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        """Grid, stream, function, metadata, hooks, and the kernel's arguments."""
        LAUNCHED.append(args)


class Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, hash(kernel), 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}


class Driver:
    """What Triton asks of a driver; device 9, so that no other test's kernels are found."""

    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self) -> int:
        return 9

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


FAMILIES = (channel_sums, clamp_backward, normalize_gradient, random_gradient)


@pytest.fixture(autouse=True)
def _recording_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(backends, "_interpreting", lambda: True)  # Triton serves the CPU
    for family in FAMILIES:
        monkeypatch.setattr(family, "multiprocessors", lambda device: 1)
        monkeypatch.setattr(family, "_launches", {})
    LAUNCHED.clear()
    with ops.use_backend("triton"):
        yield


A, G = (torch.randn(4, 64, 14, 14) for _ in range(2))
LONG = torch.randn(1, 2, 4 * 8192)
IDS, OPS = torch.arange(8), torch.ops.fastscore
CASES: dict[str, tuple[Callable[[], Any], int]] = {  # op, and how many kernels it is
    "channel_dot": (lambda: OPS.channel_dot(A, G), 1),
    "channel_sums": (lambda: OPS.channel_sums(LONG, LONG, 1, True), 2),  # split
    "clamp_backward_": (lambda: OPS.clamp_backward_(A, G, A.cos(), 0.0, 6.0), 1),
    "random_gradient": (lambda: OPS.random_gradient(IDS, 50257, 2**40, 3), 2),
    "normalize_gradient": (lambda: OPS.normalize_gradient(LONG[0], 1e-3), 2),
}


def described(launch: tuple[Any, ...]) -> tuple[Any, ...]:
    """A launch without the addresses of its tensors, and its metadata."""
    grid_and_function, hooks, args = launch[:5], launch[7:9], launch[9:]
    return (*grid_and_function, *hooks, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in args))


@pytest.mark.parametrize("name", CASES)
def test_what_is_launched_is_what_triton_would_launch(name: str) -> None:
    op, kernels = CASES[name]
    op()
    first = [described(launch) for launch in LAUNCHED]
    LAUNCHED.clear()
    op()
    assert [described(launch) for launch in LAUNCHED] == first
    assert len(first) == kernels


@pytest.mark.parametrize("name", CASES)
def test_a_launch_takes_few_calls_of_python(name: str) -> None:
    """Of an op that was called before: 36 to 52 for one kernel, without what it has found out then."""
    op, kernels = CASES[name]
    op()
    names: list[str] = []
    gc.disable()  # or what it calls for other tests' leavings counts, too
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        op()
    finally:
        sys.setprofile(None)
        gc.enable()
    checks = {"random_gradient": 1, "clamp_backward_": 8}.get(name, 0)  # of numbers, and of what is written to
    assert len(names) <= 12 + checks + 6 * kernels, names
    assert not any("import" in each for each in names)


def test_what_starts_anywhere_is_launched_as_triton_would() -> None:
    """Triton's kernel for addresses of 16 bytes would load from an address that is not one."""
    buffer = torch.randn(2, 8 * 64 + 1)
    whole, late = buffer[:, :-1].clone().unflatten(1, (8, 64)), [x[1:].unflatten(0, (1, 8, 64)) for x in buffer]
    aligned = [x[None] for x in whole]
    for a, g in (late, aligned, late, aligned, (aligned[0], late[1])):
        OPS.channel_dot(a, g)
    functions = [launch[4] for launch in LAUNCHED]
    assert functions[1] == functions[3]
    assert functions[0] == functions[2]
    assert len({functions[0], functions[1], functions[4]}) == 3


def test_another_dtype_shape_or_layout_is_another_launch() -> None:
    def grids(*tensors: Tensor) -> tuple[Any, ...]:
        LAUNCHED.clear()
        for x in tensors:
            OPS.channel_dot(x, x)
        return tuple(described(launch) for launch in LAUNCHED)

    variants = (A, A[:2], A.to(memory_format=torch.channels_last), A.bfloat16())
    assert len(set(grids(*variants, *variants))) == len(variants)
    with pytest.raises(ValueError, match="differ in shape"):
        OPS.channel_dot(A, A[:2])


def test_launches_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MOST_LAUNCHES", 3)
    for n in range(1, 8):
        OPS.random_gradient(IDS[:n], 16, 0)
        assert 1 <= len(random_gradient._launches) <= 3
