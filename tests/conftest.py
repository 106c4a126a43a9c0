"""Every test: no deadline for hypothesis, whose examples take as long as the machine is busy; the same random numbers
each time, and other examples of hypothesis with FASTSCORE_NIGHTLY=1 alone; one thread for each of several processes
(`pytest -n 2`), which would otherwise wait for each other's; and no search for garbage among what was imported, a
million objects that stay."""

import gc
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow],
                          derandomize="FASTSCORE_NIGHTLY" not in os.environ)
settings.load_profile("untimed")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or torch.compile starts processes, to import torch anew
gc.disable()  # until all is imported


def pytest_configure(config: pytest.Config) -> None:
    """File after file as they lie: by number of tests, xdist's order, files of one long test each would come last, and
    one process wait for the other."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws when it is imported, it draws again next time, whichever files are tried."""
    if isinstance(collector, pytest.Module):
        _start_over()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _start_over()


def _start_over() -> None:
    """Random weights now and then have no channel that lives, and a test fails for that alone."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # else torch.manual_seed() would keep, each time, where it was called
        torch.cuda.manual_seed_all(0)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # a trace makes as many objects as there are, and leaves few in circles
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _threads_are_left_as_they_were() -> Iterator[None]:
    """A second thread that one file leaves behind would slow all that follow, as processes wait for each other's."""
    import torch

    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
