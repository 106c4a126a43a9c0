"""Several processes that do one command's work together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

# torchrun sets these, and so do other launchers
_RANK, _SIZE, _LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"


class ProcessLostError(RuntimeError):
    """Another process has ended, or has not answered in time."""


def rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes) that the launcher has given; (0, 1) without one. Raises ValueError for nonsense."""
    rank, size = os.environ.get(_RANK), os.environ.get(_SIZE)
    if rank is None and size is None:
        return 0, 1
    try:
        found = int(rank or ""), int(size or "")
    except ValueError:
        found = 0, 0
    if not 0 <= found[0] < found[1]:
        raise ValueError(f"{_RANK}, {_SIZE}: they are {rank} and {size} in the environment; start the processes with "
                         "torchrun, or unset both")
    return found


def own_device(device: torch.device) -> torch.device:
    """`device`; where that is "cuda" without a number, the GPU of this process."""
    local = os.environ.get(_LOCAL)
    if device.type == "cpu" or device.index is not None or local is None:
        return device
    return torch.device(device.type, int(local))


@contextmanager
def group(device: torch.device, timeout: timedelta) -> Iterator[distributed.ProcessGroup | None]:
    """The group of all processes that the launcher has started, of which each works on `device`; None without one.

    timeout: how long one process waits for another. Raises ProcessLostError where another has ended, or has not
    answered in that time.
    """
    if _RANK not in os.environ and _SIZE not in os.environ:
        yield None
        return
    rank_and_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lost = False
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        yield distributed.group.WORLD
    except RuntimeError as error:  # of gloo or NCCL, which have no class of their own in common
        lost = _lost(error)
        if not lost:
            raise
        raise ProcessLostError(f"another process has ended, or has not answered within {timeout}; what it said is the "
                               f"reason ({str(error).splitlines()[0]})") from error
    finally:
        if not lost and distributed.is_initialized():  # with a process lost, gloo would abort this one, too
            distributed.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Whether the error comes of talking to another process."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
