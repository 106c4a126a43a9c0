"""The C++ kernels for the CPU under sanitizers: `python tests/ops/native/sanitized.py [pytest arguments]`.

Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer into a folder of its own, and runs the
tests of the ops (or whatever the arguments name) on it; any report ends the run with an error. ThreadSanitizer wants
every thread instrumented, PyTorch's too, so that one is for the kernels without PyTorch: see test_sanitizers.py.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["-O1", "-g1", "-std=c++20", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=fast", "-Wno-psabi",
         "-Wno-ignored-attributes", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined"]


def build(folder: Path) -> Path:
    """The package in `folder`, with a sanitized library; the library."""
    shutil.copytree(ROOT / "fastscore", folder / "fastscore", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    library = folder / "fastscore" / "_C.abi3.so"
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    includes = [f"-isystem{path}" for path in include_paths()]
    links = [f"-L{path}" for path in library_paths()]
    subprocess.run(["c++", *FLAGS, *includes, "-shared", *map(str, sources), *links, "-lc10", "-ltorch", "-ltorch_cpu",
                    "-o", str(library)], check=True)
    return library


def main(arguments: list[str]) -> int:
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    standard = subprocess.run(["c++", "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        preload = f"{runtime.stdout.strip()} {standard.stdout.strip()}"
        environment = {**os.environ, "PYTHONPATH": name, "LD_PRELOAD": preload,
                       # what Python and PyTorch leave at exit is not our concern
                       "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        tests = arguments or [str(ROOT / "tests" / "ops" / f"test_{subject}.py") for subject in
                              ("channel_sums", "normalize_gradient", "random_gradient", "clamp_backward", "winograd",
                               "fuzz")]
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o",
                               f"pythonpath={name}", *tests], env=environment, cwd=name, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
