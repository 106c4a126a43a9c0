"""Builds fastscore/_C, the native kernels: one abi3 library for every Python >= 3.10 and torch >= 2.11.

CUDA kernels go into it where nvcc is found, in CUDA_HOME or on the PATH; no GPU is needed, nor a torch with CUDA.
FASTSCORE_CUDA=0 leaves them out, FASTSCORE_CUDA=1 makes their absence an error; FASTSCORE_CUDA_TARGETS="80 90" builds
them for these compute capabilities alone, in less time. MAX_JOBS bounds what runs at once for CPUs, and for CUDA beside
it; with MAX_JOBS=1 one comes after the other.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # torch 2.11
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
             "-fno-trapping-math", "-Wall", "-Wno-psabi", "-Wno-ignored-attributes"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--compiler-options", "-fPIC,-fvisibility=hidden,-g0"]
CUDA_TARGETS = (80, 90, 100, 120)  # compute capabilities
CUDA_PTX = (80, 120)  # what is compiled when first run: by devices between these, and by what comes after
JOBS = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def files(*patterns: str) -> list[str]:
    """Every file under csrc/ that matches one of the patterns."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def find_nvcc() -> Path | None:
    """The CUDA compiler to use, or None where there is none or none is wanted."""
    choice = os.environ.get("FASTSCORE_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"FASTSCORE_CUDA is {choice!r}: set it to 1 (with CUDA kernels), 0 (without) or not at all")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which(Path(home, "bin", "nvcc")) if home else None
    found = found or shutil.which("nvcc")
    if found is None and choice == "1":
        raise SystemExit("FASTSCORE_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on the PATH: install the CUDA "
                         "toolkit and set CUDA_HOME, or unset FASTSCORE_CUDA to build for the CPU")
    return Path(found) if found else None


def cuda_targets() -> list[int]:
    """The compute capabilities to build for."""
    chosen = os.environ.get("FASTSCORE_CUDA_TARGETS", "").split() or [str(target) for target in CUDA_TARGETS]
    if not {*chosen} <= {str(target) for target in CUDA_TARGETS}:
        raise SystemExit(f"FASTSCORE_CUDA_TARGETS is {' '.join(chosen)!r}: name some of "
                         f"{' '.join(map(str, CUDA_TARGETS))}, with spaces between, or unset it to build for all")
    return [int(target) for target in chosen]


def output_of(*command: str | Path) -> str:
    """What a command prints, errors included."""
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


class BuildKernels(BuildExtension):
    """BuildExtension whose extensions may have .cu files in csrc/cuda.

    They are compiled here: torch's own way asks that nvcc have the major version of torch's CUDA, which a library
    that sees torch through its stable ABI alone does not need.
    """

    compiled: "Future[None] | None" = None

    def build_extensions(self) -> None:
        nvcc = find_nvcc()
        self.targets = cuda_targets()
        print(f"CUDA kernels: compiled by {nvcc}" if nvcc else "CUDA kernels: left out, as no nvcc is found or wanted")
        with ThreadPoolExecutor(1) as beside:
            if nvcc:
                self.compiled = beside.submit(self.add_cuda(self.extensions[0], nvcc))
                if JOBS == 1:
                    self.compiled.result()
            super().build_extensions()

    def get_libraries(self, ext: Extension) -> list[str]:
        """Asked for before linking, for which all has to be compiled."""
        if self.compiled is not None:
            self.compiled.result()
        libraries: list[str] = super().get_libraries(ext)
        return libraries

    def add_cuda(self, extension: Extension, nvcc: Path) -> Callable[[], None]:
        """What compiles csrc/cuda, in one piece, as most of the time goes into headers; the extension is linked with
        it, and with the CUDA runtime as a static library."""
        supported = {int(number) for number in re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))}
        targets = [target for target in self.targets if target in supported]
        flags = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
        flags += [f"-gencode=arch=compute_{target},code=compute_{target}" for target in targets if target in CUDA_PTX]
        flags += [f"-D{name}={value}" for name, value in extension.define_macros]
        # Objects outlive a build: torch's headers may come and go with it, as only its stable ABI is used.
        folder = Path("build", "cuda", hashlib.sha256(repr([nvcc, *NVCC_FLAGS, *flags]).encode()).hexdigest()[:8])
        flags += [f"-isystem={include}" for include in extension.include_dirs]
        headers = [*files("*.h", "cuda/*.h", "cuda/*.cuh"), __file__]
        sources, output = files("cuda/*.cu"), folder / "kernels.o"
        newest = max(Path(file).stat().st_mtime for file in (*sources, *headers))

        def compile_sources() -> None:
            if not output.exists() or output.stat().st_mtime < newest:
                folder.mkdir(parents=True, exist_ok=True)
                together = output.with_suffix(".cu")
                together.write_text("".join(f'#include "{Path(source).resolve()}"\n' for source in sources))
                command = [str(nvcc), *NVCC_FLAGS, *flags, "--threads", str(JOBS), "-c", str(together), "-o",
                           str(output)]
                print(shlex.join(command), flush=True)
                subprocess.run(command, check=True)

        extension.extra_objects.append(str(output))
        folders = re.search(r"LIBRARIES=(.*)", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull))
        extension.library_dirs += [flag.removeprefix("-L") for flag in shlex.split(folders[1] if folders else "")]
        extension.libraries += ["cudart_static", "dl", "pthread", "rt"]
        # Its symbols must not meet those of the CUDA runtime that torch loads.
        extension.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
        return compile_sources


setup(
    ext_modules=[CppExtension("fastscore._C", files("*.cpp", "cpu/*.cpp"), depends=files("**/*.h"),
                              define_macros=MACROS, extra_compile_args={"cxx": CXX_FLAGS},
                              py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
