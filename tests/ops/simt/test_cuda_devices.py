"""The host's side of every CUDA op, with stand-ins for PyTorch and the CUDA runtime: which device is current when
anything is allocated, asked or launched, and how much is."""

import subprocess
from pathlib import Path

from shim import KERNELS, compile_driver

STANDS_IN = ("cuda_runtime.h", "torch/csrc/stable/accelerator.h", "torch/csrc/stable/library.h",
             "torch/csrc/stable/ops.h", "torch/csrc/stable/tensor.h", "torch/headeronly/core/ScalarType.h")


def build(folder: Path, kernels: Path = KERNELS) -> Path:
    """devices.cpp with empty headers of those names in place of theirs, as devices.h has all that is needed."""
    for name in STANDS_IN:
        (folder / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / name).write_text("")
    return compile_driver(folder / "devices", "-O0", f"-I{folder / 'include'}", source="devices.cpp", kernels=kernels)


def test_the_device_guard_comes_first(tmp_path: Path) -> None:
    """Everything happens on cuda:1 and its stream, and cuda:0 is left without a context; each op launches as often as
    its page says."""
    done = subprocess.run([build(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        # op, how, launches, allocations, devices with a context
        "channel_dot,whole,1,2,1", "channel_sums,whole,1,2,1", "channel_powers,whole,1,2,1",
        "clamp_backward_,whole,1,2,1",
        "channel_dot,split,2,2,1", "channel_sums,split,2,2,1", "channel_powers,split,2,2,1",
        "clamp_backward_,split,2,2,1",
        "normalize_gradient,one pass,1,3,1", "normalize_gradient,split,2,3,1", "random_gradient,,1,1,1"]
