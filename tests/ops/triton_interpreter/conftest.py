"""Triton kernels on the CPU, in Triton's interpreter: a process of its own, which tests/ops/test_triton_interpreter.py
starts with TRITON_INTERPRET=1. Elsewhere nothing here is collected."""

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]
else:
    from triton.runtime import interpreter

    torch.set_num_threads(1)


class Loads:
    """Bytes of all elements that were loaded; masked ones were not."""

    bytes = 0


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are read and written in place; the interpreter would copy every storage onto itself."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    counted, load = Loads(), interpreter.InterpreterBuilder.create_masked_load

    def counting(self, ptrs, mask, *args):
        counted.bytes += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    return counted


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch allocates uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
