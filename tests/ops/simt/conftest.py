import sys
from pathlib import Path

import pytest
import shim as shim_module

sys.path.append(str(Path(__file__).resolve().parents[1]))  # samples.py, the inputs of the ops' own tests


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> shim_module.Shim:
    """The CUDA kernels, compiled for this machine's CPU."""
    library: Path = tmp_path_factory.mktemp("simt") / "driver.so"
    return shim_module.Shim(shim_module.compile_driver(library, "-shared", "-fPIC"))
