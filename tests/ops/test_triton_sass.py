"""Triton kernels compiled for GPUs that are not here, as the launcher would compile them; judged by their SASS.

A stand-in for the CUDA driver names the target. Everything else is Triton's own launch path up to the launch: how
pointers and integers are specialised, what is constant, how many warps. Tensors are on the meta device, where
addresses are 0 and so as aligned as PyTorch's allocator makes them.

Kernels of each layout, reducer and dtype are read for one target, and a layout of another dtype for each other;
FASTSCORE_NIGHTLY=1 reads all for all.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from thinned import NIGHTLY, thinned

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fastscore.ops.reference import result_dtype  # noqa: E402
from fastscore.ops.triton import channel_sums, clamp_backward, normalize_gradient, random_gradient  # noqa: E402
from fastscore.ops.triton.common import Call  # noqa: E402
from fastscore.ops.triton.launch import (  # noqa: E402
    REGISTERS,
    plan_channel_sums,
    plan_normalize_gradient,
    plan_random_gradient,
)

ARCHITECTURES = (80, 90, 100, 120)
READ_WHOLE = ARCHITECTURES if NIGHTLY else (90,)
SMS = 132
META = torch.device("meta")
WIDE_AND_HALF = (torch.float32, torch.bfloat16)  # where float16 compiles to what bfloat16 does
ON_SM_90 = pytest.mark.parametrize("architecture", [90], indirect=True)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Compiled(NamedTuple):
    registers: int
    stack: int
    local: int
    loads: list[str]  # global loads, in order
    loop_loads: list[str]  # of them, those in a loop
    local_traffic: list[str]
    wide_stores: list[str]  # of 16 bytes
    signature: tuple[str, ...]


COMPILED: dict[str, Compiled] = {}


@pytest.fixture(params=READ_WHOLE, ids="sm_{}".format)
def architecture(request, monkeypatch) -> int:
    monkeypatch.setattr(driver, "_active", Driver(request.param))
    return request.param


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, instruction) of each line; branches by address."""
    return [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass)]


def compile_call(call: Call, folder: Path) -> Compiled:
    kernel = call.kernel.warmup(*call.args, grid=call.grid, **call.options)
    if kernel.hash not in COMPILED:
        COMPILED[kernel.hash] = disassemble(kernel, folder)
    return COMPILED[kernel.hash]


def disassemble(kernel, folder: Path) -> Compiled:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    code = instructions(sass)
    back = [(int(target, 16), address) for address, text in code
            for target in re.findall(r"\bBRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)", text) if int(target, 16) < address]
    loads = [(address, load) for address, text in code for load in re.findall(r"\bLDG\S*", text)]
    return Compiled(
        *map(int, numbers.groups()), [load for _, load in loads],
        [load for address, load in loads if any(start <= address <= end for start, end in back)],
        [text for _, text in code if re.search(r"\b(LDL|STL)\b", text)],
        [text for _, text in code if "STG.E.128" in text],
        tuple(str(kind) for kind in kernel.src.signature.values()))


def channel_calls(reducer, dtype, shape, a_last=False, g_last=False, offset=0) -> tuple[str, list[Call]]:
    """(the layout, the launches) for meta tensors of `shape`, channels last or not, `offset` elements into memory."""
    n, c, p = shape
    strides = [(c * p, 1, c) if last else (c * p, p, 1) for last in (a_last, g_last)]
    a, g = (torch.empty(n * c * p + offset, dtype=dtype, device="meta").as_strided(shape, stride, offset)
            for stride in strides)
    out = torch.empty(3, n * c, dtype=result_dtype(dtype), device="meta")
    plan = plan_channel_sums(shape, *strides, 1, dtype.itemsize, SMS)
    if reducer.startswith("clamp"):  # with the gradient of other readers, or without; all lie in memory as a does
        launch = clamp_backward.launch(plan, META, dtype, reducer == "clamp, rest", (0.0, float("inf")), mean=True)
        return plan.layout, launch.calls((a, g, a, out))
    return plan.layout, channel_sums.launch(plan, META, dtype, reducer, mean=reducer == "sums").calls((a, g, out))


CLAMPS = ("clamp", "clamp, rest")


def assert_lean(compiled: Compiled) -> None:
    assert compiled.registers <= REGISTERS
    assert (compiled.stack, compiled.local, compiled.local_traffic) == (0, 0, [])


LAYOUTS = {"rows": (False, False), "columns": (True, True), "mixed": (False, True)}


@pytest.mark.parametrize(("layout", "reducer", "dtype"), thinned(LAYOUTS, channel_sums.SUMS, WIDE_AND_HALF), ids=str)
def test_main_loops_load_16_bytes_and_spill_nothing(layout, reducer, dtype, architecture, tmp_path):
    """At 56 × 56 positions and 256 channels of 32 samples; split where the heuristic splits it."""
    chosen, calls = channel_calls(reducer, dtype, (32, 256, 56 * 56), *LAYOUTS[layout])
    main = compile_call(calls[0], tmp_path)
    assert chosen == layout
    assert len(main.loop_loads) >= 4  # two of each tensor
    assert set(main.loads) == {"LDG.E.128"}
    for call in calls:
        assert_lean(compile_call(call, tmp_path))


@pytest.mark.parametrize(("architecture", "layout"), thinned([80, 100, 120], LAYOUTS), indirect=["architecture"])
def test_main_loops_on_other_targets(layout, architecture, tmp_path):
    test_main_loops_load_16_bytes_and_spill_nothing(layout, "sums", torch.bfloat16, architecture, tmp_path)


@pytest.mark.parametrize(("layout", "reducer", "dtype"), thinned(["rows", "columns"], CLAMPS, WIDE_AND_HALF), ids=str)
def test_clamp_backward_loads_and_stores_16_bytes_and_spills_nothing(layout, reducer, dtype, architecture, tmp_path):
    chosen, calls = channel_calls(reducer, dtype, (32, 256, 56 * 56), *LAYOUTS[layout])
    main = compile_call(calls[0], tmp_path)
    assert chosen == layout
    assert len(main.loop_loads) >= (6 if reducer == "clamp, rest" else 4)  # two of each tensor
    assert set(main.loads) == {"LDG.E.128"}
    assert len(main.wide_stores) >= 2
    for call in calls:
        assert_lean(compile_call(call, tmp_path))


ACTIVATIONS = [
    ((32, 64, 112 * 112), False, {2: "LDG.E.128", 4: "LDG.E.128"}),
    ((32, 512, 28 * 28), False, {2: "LDG.E.128", 4: "LDG.E.128"}),
    ((32, 1024, 14 * 14), False, {2: "LDG.E.64", 4: "LDG.E.128"}),  # 196 positions: rows start every 8 bytes
    ((32, 2048, 7 * 7), False, {2: "LDG.E.U16", 4: "LDG.E"}),  # 49 positions: rows start anywhere
    ((32, 64, 112 * 112), True, {2: "LDG.E.128", 4: "LDG.E.128"}),
    ((32, 2048, 7 * 7), True, {2: "LDG.E.128", 4: "LDG.E.128"}),
    ((32, 768, 197), True, {2: "LDG.E.128", 4: "LDG.E.128"}),  # ViT-B/16
    ((32, 2048, 1), True, {2: "LDG.E.128", 4: "LDG.E.128"}),
    ((1, 64, 112 * 112), False, {2: "LDG.E.128", 4: "LDG.E.128"}),
]


@ON_SM_90
@pytest.mark.parametrize(("shape", "last", "load", "dtype"), [
    (*activations, dtype) for activations, dtype in thinned(ACTIVATIONS, WIDE_AND_HALF)], ids=str)
def test_loads_at_the_activations_of_networks(shape, last, load, dtype, architecture, tmp_path):
    _, calls = channel_calls("sums", dtype, shape, last, last)
    main = compile_call(calls[0], tmp_path)
    assert set(main.loads) == {load[dtype.itemsize]}
    assert_lean(main)


@ON_SM_90
def test_loads_of_a_view_that_starts_anywhere_are_narrow(architecture, tmp_path):
    """So the assertions above can fail."""
    _, calls = channel_calls("dot", torch.bfloat16, (32, 256, 56 * 56), offset=1)
    assert "LDG.E.128" not in compile_call(calls[0], tmp_path).loads


@ON_SM_90
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_shape_is_not_compiled_anew(layout, architecture):
    hashes = set()
    for shape in ((64, 256, 56 * 56), (96, 320, 48 * 48), (1, 2048, 112 * 112)):
        call = channel_calls("dot", torch.bfloat16, shape, *LAYOUTS[layout])[1][0]
        hashes.add(call.kernel.warmup(*call.args, grid=call.grid, **call.options).hash)
    assert len(hashes) == 1


@ON_SM_90
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout, architecture, tmp_path):
    """One sample of 64 channels and 2³³ positions: 64-bit strides and positions, and loads as wide as ever."""
    _, calls = channel_calls("sums", torch.bfloat16, (1, 64, 2**33), *LAYOUTS[layout])
    main = compile_call(calls[0], tmp_path)
    assert calls[0].options["WIDE"]
    assert "i64" in str(main.signature)
    assert set(main.loads) == {"LDG.E.128"}
    assert_lean(main)


@pytest.mark.parametrize(("normal", "normalize", "classes"), [
    (*how, classes) for how, classes in thinned([(True, True), (True, False), (False, True)], [1000, 50257])])
def test_random_gradient_spills_nothing(classes, normal, normalize, architecture, tmp_path):
    ids, out = torch.empty(32, dtype=torch.int64, device="meta"), torch.empty(32, classes, device="meta")
    launch = random_gradient.launch(plan_random_gradient(32, classes), META, 1, normal, normalize)
    for call in launch.calls((ids, out), (2**40, 0)):
        assert_lean(compile_call(call, tmp_path))


@pytest.mark.parametrize(("classes", "dtype"), thinned([1000, 50000], WIDE_AND_HALF), ids=str)
def test_normalize_gradient_loads_16_bytes_and_spills_nothing(classes, dtype, architecture, tmp_path):
    g, unit = torch.empty(2, 32, classes, dtype=dtype, device="meta")
    plan = plan_normalize_gradient(tuple(g.shape), g.stride(), unit.stride(), dtype.itemsize)
    for call in normalize_gradient.launch(plan, META, 0.0).calls((g, unit, torch.empty(32, device="meta"))):
        compiled = compile_call(call, tmp_path)
        assert "LDG.E.128" in compiled.loads
        assert_lean(compiled)
