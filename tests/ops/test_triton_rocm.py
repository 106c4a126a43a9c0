"""Triton's kernels compiled for AMD devices that are not here, with the options that they are launched with there."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fastscore.ops.triton import channel_sums, clamp_backward, normalize_gradient, random_gradient  # noqa: E402
from fastscore.ops.triton.common import Call  # noqa: E402
from fastscore.ops.triton.launch import (  # noqa: E402
    plan_channel_sums,
    plan_normalize_gradient,
    plan_random_gradient,
)

META = torch.device("meta")


class Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> str:
        return "gfx942"  # kernels are cached by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64)


@pytest.fixture(autouse=True)
def _rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(torch.version, "hip", "6.4")


def assembly(call: Call) -> str:
    kernel = call.kernel.warmup(*call.args, grid=call.grid, **call.options)
    assert kernel.asm["hsaco"]
    text: str = kernel.asm["amdgcn"]
    assert re.search(r"\.vgpr_spill_count: +0\b", text)
    return text


@pytest.mark.parametrize("clamp", [False, True], ids=["channel_sums", "clamp_backward"])
def test_channel_sums_load_16_bytes(clamp: bool) -> None:
    a, out = torch.empty(1, 64, 224 * 224, dtype=torch.bfloat16, device=META), torch.empty(3, 64, device=META)
    plan = plan_channel_sums(tuple(a.shape), a.stride(), a.stride(), 1, 2, 304)
    assert plan.splits > 1  # so that there is a second kernel
    first, second = clamp_backward.launch(plan, META, a.dtype, True, (0.0, 6.0), True).calls((a, a, a, out)) if clamp \
        else channel_sums.launch(plan, META, a.dtype, "sums", True).calls((a, a, out))
    assert "load_dwordx4" in assembly(first) or "load_b128" in assembly(first)
    assembly(second)


def test_output_gradients() -> None:
    ids, out = torch.empty(32, dtype=torch.int64, device=META), torch.empty(32, 50257, device=META)
    launch = random_gradient.launch(plan_random_gradient(32, 50257), META, 1, True, True)
    for call in launch.calls((ids, out), (2**40, 0)):
        assembly(call)
    g, unit = torch.empty(2, 32, 50257, dtype=torch.bfloat16, device=META)
    plan = plan_normalize_gradient(tuple(g.shape), g.stride(), unit.stride(), 2)
    for call in normalize_gradient.launch(plan, META, 0.0).calls((g, unit, torch.empty(32, device=META))):
        assembly(call)
