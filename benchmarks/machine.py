"""What figures depend on besides the code: the allocator's settings, the threads, the versions.

glibc's malloc hands the pages of freed tensors back to the system, and takes them anew, zeroed page by page, in the
next step. That charges a contestant for the order and the sizes of its allocations, and it differs between programs;
so every benchmark here runs its contestants in one process whose settings are chosen, and says which.
"""

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

# Freed memory stays with the process: none is mapped for one tensor alone (glibc ignores mmap thresholds over 32 MiB,
# and tensors are larger), and none is cut off the heap's end.
ALLOCATORS = {"keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}, "default": {}}
_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_",
             "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD")


def add_arguments(parser: argparse.ArgumentParser, allocator: str = "keep") -> None:
    """What every benchmark of whole passes can be told: --device, --threads, --layout, --allocator."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--layout", default="contiguous", choices=("contiguous", "channels_last"),
                        help="of the model and the images that every contestant gets")
    parser.add_argument("--allocator", default=allocator, choices=tuple(ALLOCATORS),
                        help=f"keep: glibc keeps freed memory; default: as it comes (default here: {allocator})")


def settle(arguments: argparse.Namespace) -> None:
    """Take over what `add_arguments` was told; starts the command again where malloc's settings are not those.

    Raises SystemExit for a device that is not there.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    environment = malloc_environment(arguments.allocator)
    if environment != dict(os.environ) and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    torch.set_num_threads(arguments.threads)


def malloc_environment(allocator: str) -> dict[str, str]:
    """This process's environment with the settings of `allocator` alone, for a process to be started with."""
    kept = {name: value for name, value in os.environ.items()
            if name not in _SETTINGS or name in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    return {**kept, **ALLOCATORS[allocator], "KINETO_LOG_LEVEL": "99"}  # the profiler speaks to stderr otherwise


def malloc() -> str:
    """The C library's name and version, and those of its settings that are set."""
    settings = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    return " ".join([*platform.libc_ver(), *(settings or ["as it comes"])])


def facts(device: str) -> dict[str, str | int]:
    """What a table of figures is to say of itself: a column each."""
    processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {name: _version(name) for name in ("torch", "torch-pruning", "captum")}
    return {"processor": processor, "threads": torch.get_num_threads(), "allocator": malloc(), **versions}


def describe(device: str) -> str:
    """The facts in a line or two, with how busy the machine is at this moment."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    return f"{', '.join(f'{name} {value}' for name, value in facts(device).items())}\n{load}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
