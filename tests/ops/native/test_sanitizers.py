"""The C++ kernels for the CPU, without PyTorch, under the compiler's sanitizers.

AddressSanitizer in a normal run, on the widest SIMD tier that this processor has, which is the one that is used. With
FASTSCORE_NIGHTLY=1 every tier under every sanitizer, whose builds take a minute each, the kernels for aarch64 in an
emulator, and the whole native library under the tests of the ops:
`python tests/ops/native/sanitized.py`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastscore.ops import library

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
COMMON = [HERE / "driver.cpp", CSRC / "cpu" / "reduction.cpp"]
SOURCES = [*COMMON, *sorted(CSRC.glob("cpu/tier_*.cpp"))]
NIGHTLY = "FASTSCORE_NIGHTLY" in os.environ
FLAGS = ["-std=c++20", "-Og", "-g1", "-ffp-contract=fast", "-Wno-psabi", "-Wno-ignored-attributes", f"-I{CSRC}"]


def build(target: Path, sanitizers: str, sources: list[Path], *more: str) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        raise RuntimeError("these tests compile csrc/cpu: install a C++ compiler (c++) and put it on the PATH")
    subprocess.run([compiler, *FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *more,
                    *map(str, sources), "-o", str(target), "-lpthread"], check=True)
    return target


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # where addresses are too random for ThreadSanitizer, it starts itself anew without, unless that is forbidden
    return subprocess.run([str(program)], capture_output=True, text=True, check=False,
                          env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})


def test_kernels_of_the_tier_that_is_used(tmp_path):
    name = library.simd_tier()
    tier = name.removeprefix("x86-64-")
    result = run(build(tmp_path / "driver", "address", [*COMMON, CSRC / "cpu" / f"tier_{tier}.cpp"],
                       f"-DONLY_TIER={tier}"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout == f"{name}: 161 layouts\n"


@pytest.mark.skipif(not NIGHTLY, reason="a minute each")
@pytest.mark.parametrize("sanitizers", ["address", "address,undefined", "thread"])
def test_kernels_of_every_tier(sanitizers, tmp_path):
    result = run(build(tmp_path / "driver", sanitizers, SOURCES))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "baseline: 161 layouts" in result.stdout


@pytest.mark.skipif(not NIGHTLY, reason="half a minute, and Debian's g++-aarch64-linux-gnu and qemu-user")
def test_aarch64(tmp_path):
    """Built by a cross compiler, with NEON's instructions, and run by an emulator."""
    tools = [shutil.which(tool) for tool in ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64")]
    assert all(tools), "install g++-aarch64-linux-gnu and qemu-user"
    compiler, objdump, emulator = tools
    program = str(tmp_path / "driver")
    subprocess.run([compiler, *FLAGS, *map(str, SOURCES), "-static", "-o", program, "-lpthread"], check=True)
    code = subprocess.run([objdump, "-d", program], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bf(?:mla|mul|add)\s+v\d+\.(?:4s|2d)", code)) > 500
    result = subprocess.run([emulator, program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout == "baseline: 161 layouts\n"


@pytest.mark.skipif(not NIGHTLY, reason="minutes: a build of its own, then all op tests")
def test_the_whole_library():
    result = subprocess.run([sys.executable, str(HERE / "sanitized.py")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
