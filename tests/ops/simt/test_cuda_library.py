"""The CUDA kernels inside the native library in use: targets, loads, registers, and what the library depends on.

The instructions of the oldest target are read in a normal run; FASTSCORE_NIGHTLY=1 reads those of all. A library that
was built with FASTSCORE_CUDA_TARGETS is tested with it, too.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastscore.ops.library import LIBRARY

TARGETS = tuple(f"sm_{target}" for target in os.environ.get("FASTSCORE_CUDA_TARGETS", "80 90 100 120").split())
READ = TARGETS if "FASTSCORE_NIGHTLY" in os.environ else TARGETS[:1]
# for devices between the targets, such as sm_87, and beyond
PTX = tuple(target for target in TARGETS if target in ("sm_80", "sm_120"))
OPS = ("channel_sums", "clamp_backward_", "channel_dot", "channel_powers", "random_gradient", "normalize_gradient")
# Registers of a thread: three blocks of 256 threads to a multiprocessor have 80 each, two have 128.
MOST_REGISTERS = {"normalize_held": 128, "scale": 80, "sum_squares": 80, "sum_rows": 64, "sum_columns": 64,
                  "sum_strided": 80, "add_partials": 80, "random_rows": 80, "clamp_rows": 80, "clamp_columns": 80}
LOADS = {"sum_rows": 4, "sum_columns": 4, "normalize_held": 8, "sum_squares": 2, "scale": 2, "clamp_rows": 6,
         "clamp_columns": 2}
STORES = {"normalize_held": 8, "scale": 2, "clamp_rows": 2, "clamp_columns": 1}
WIDE = re.compile(r"D(ADD|MUL|FMA)")  # arithmetic in float64


@pytest.fixture(scope="module")
def library() -> Path:
    """The library with CUDA kernels; without nvcc there can be none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (home and shutil.which(Path(home, "bin", "nvcc"))) or shutil.which("nvcc")
    built = torch._C._dispatch_has_kernel_for_dispatch_key("fastscore::channel_sums", "CUDA") and has_cubins(LIBRARY)
    if not nvcc and not built:
        pytest.skip("no nvcc on this machine, so the library has no CUDA kernels")
    assert built, (f"{LIBRARY} has no CUDA kernels though nvcc is at {nvcc}: rebuild with "
                   "FASTSCORE_CUDA=1 pip install --no-build-isolation -e .")
    return LIBRARY


def has_cubins(path: Path) -> bool:
    return b".nv_fatbin" in path.read_bytes()


def cuobjdump(*arguments: str | Path) -> str:
    """What CUDA's own disassembler says; it comes with the toolkit and with Triton."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ["PATH"]]
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if home := os.environ.get("CUDA_HOME"):
        folders.append(str(Path(home) / "bin"))
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    assert tool, "cuobjdump is not found: install Triton (pip install triton), or set CUDA_HOME to a full CUDA toolkit"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True,
                          env={**os.environ, "PATH": path}).stdout


def kernel(symbol: str) -> str:
    """`_ZN9fastscore4cuda8sum_rowsI...` -> `sum_rows`: symbols spell each name after its length."""
    found = re.match(r"_ZN9fastscore4cuda(\d+)", symbol)
    assert found, symbol
    return symbol[found.end():found.end() + int(found[1])]


def test_every_op_is_registered(library: Path) -> None:
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastscore::{op}", "CUDA")


def test_depends_on_no_cuda_library(library: Path) -> None:
    needed = re.findall(r"Shared library: \[(.*?)\]", subprocess.run(["readelf", "-d", library], check=True, text=True,
                                                                     capture_output=True).stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("cuda|cudart|nvrtc|torch_python|libpython", name)]
    symbols = subprocess.run(["nm", "-D", library], check=True, text=True, capture_output=True).stdout
    assert not re.findall(r" \S (cuda\w+|cu[A-Z]\w+)", symbols), "the CUDA runtime's symbols are for this library alone"


def test_targets(library: Path) -> None:
    cubins = Counter(re.findall(r"(sm_\d+)\.cubin", cuobjdump("-lelf", library)))
    assert cubins == dict.fromkeys(TARGETS, 1)  # all sources are compiled in one piece
    assert Counter(re.findall(r"(sm_\d+)\.ptx", cuobjdump("-lptx", library))) == dict.fromkeys(PTX, 1)


def test_registers_and_no_spills(library: Path) -> None:
    usage = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
                       cuobjdump("-res-usage", library))
    assert len(usage) >= len(TARGETS) * 60
    for symbol, registers, stack, _, local in usage:
        assert (int(stack), int(local)) == (0, 0), symbol
        assert int(registers) <= MOST_REGISTERS[kernel(symbol)], symbol


def test_loads_are_16_bytes_wide_and_nothing_is_atomic(library: Path) -> None:
    seen, wide_arithmetic = set(), dict[tuple[str, str], set[int]]()
    code = "".join(cuobjdump("-sass", "-arch", target, library) for target in READ)
    for of_target in re.split(r"\tcode for ", code)[1:]:
        target = of_target.split()[0]
        for of_function in of_target.split("Function : ")[1:]:
            symbol = of_function.split()[0]
            instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z]\S*)", of_function, flags=re.MULTILINE)
            assert not [i for i in instructions if i.startswith(("ATOM", "RED.", "LDL", "STL"))], symbol
            name = kernel(symbol)
            if name in ("sum_columns", "clamp_columns") and "Li1E" in symbol:
                continue  # a channel at a time, for channels that fill no packs
            wide = [i for i in instructions if re.match(r"LDG\.E\.(\w+\.)*128", i)]
            assert len(wide) >= LOADS.get(name, 0), f"{symbol} for {target}"
            stores = sum("STG.E" in i and "128" in i for i in instructions)
            assert stores >= STORES.get(name, 0), f"{symbol} for {target}"
            seen.add((target, name))
            if "normalize_held" in name and "IdE" not in symbol:
                wide_arithmetic.setdefault((target, name), set()).add(sum(bool(WIDE.match(i)) for i in instructions))
    # the same for 32 elements to a thread (float32) as for 64: none of it is theirs
    assert all(len(counts) == 1 and max(counts) < 128 for counts in wide_arithmetic.values()), wide_arithmetic
    assert seen == {(target, name) for target in READ for name in MOST_REGISTERS}
