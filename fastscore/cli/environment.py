"""What is installed, and which kernels serve which device here."""

import importlib.metadata
import platform

import torch

from fastscore.ops import library
from fastscore.ops.backends import backends

_PACKAGES = ("torch-fastscore", "torch", "triton", "torch-pruning", "torchvision")


def facts() -> dict[str, dict[str, str]]:
    """Section -> name -> fact: `versions`, `machine`, and `backends` (the devices each serves, or why it does not)."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        "library": str(library.LIBRARY),
    }
    rows = {row.name: f"unavailable: {row.unavailable}" if row.unavailable
            else f"serves {row.serves}" if row.serves else "available, not in use" for row in backends()}
    rows["cpu"] += f" (SIMD: {library.simd_tier()})"
    return {"versions": versions, "machine": machine, "backends": rows}


def table(facts: dict[str, dict[str, str]]) -> str:
    """`facts` as text, a line each."""
    width = max(len(name) for section in facts.values() for name in section)
    return "\n\n".join("\n".join([section, *(f"  {name:<{width}}  {fact}" for name, fact in lines.items())])
                       for section, lines in facts.items())
