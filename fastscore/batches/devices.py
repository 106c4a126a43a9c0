"""Batches on a device, in a dtype and a memory format."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor, distributed

from fastscore.batches.checks import check_batch
from fastscore.batches.parts import Batch, can_be_cut, first_input, first_samples, map_tensors


def on_device(batches: Iterable[Batch], device: torch.device, samples: int | None = None) -> Iterator[Batch]:
    """The batches on `device`, without empty ones, cut off after `samples` samples."""
    left = samples
    for batch in batches:
        check_batch(batch, "batches", counted=True)
        if not len(first_input(batch)):
            continue  # a loss over no sample is NaN
        batch = to_device(map_tensors(usable, batch), device)
        if left is not None:
            count = len(first_input(batch))
            if not can_be_cut(batch):
                raise ValueError("samples: these batches cannot be cut by their rows, of which integers beside them "
                                 "tell which belong together: give fewer batches, or samples=\"auto\"")
            if count > left:
                batch = first_samples(batch, left)
            left -= min(left, count)
        yield batch
        if left == 0:
            return


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` on `device`. To a CUDA device it is copied from pinned memory, on a stream of its own: while the device
    works on the batch before, and without a wait of the host."""
    if device.type != "cuda":
        return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)

    def move(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor.to(device, non_blocking=True)
        with torch.cuda.stream(stream):
            moved = (tensor.pin_memory() if tensor.layout == torch.strided else tensor).to(device, non_blocking=True)
        moved.record_stream(current)
        return moved

    batch = map_tensors(move, batch)
    current.wait_stream(stream)
    return batch


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache
def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Apple's and some of Intel's do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True


def with_float64(tensor: Tensor) -> Tensor:
    """`tensor` where float64 is to be had: on its device, or else on the CPU."""
    return tensor if has_float64(tensor.device) else tensor.cpu()


def wide(x: Tensor) -> Tensor:
    """A floating-point tensor in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rank_and_size(process_group: distributed.ProcessGroup | None) -> tuple[int, int]:
    """(the number of this process among those that share the work, how many they are); (0, 1) of one alone. Raises
    TypeError for what is no group."""
    if process_group is None:
        return 0, 1
    if not hasattr(process_group, "size"):
        raise TypeError(f"process_group: {process_group!r:.80}, where a torch.distributed.ProcessGroup is meant, such "
                        "as torch.distributed.group.WORLD after init_process_group()")
    return distributed.get_rank(process_group), process_group.size()


def usable(tensor: Tensor) -> Tensor:
    """A tensor that can be followed: none made under inference_mode, which autograd does not take, and none of a
    subclass that adds nothing to operations, whose results are views that in-place layers write to."""
    plain, own = (getattr(kind.__torch_function__, "__func__", None) for kind in (Tensor, type(tensor)))
    if type(tensor) is not Tensor and own is plain:
        tensor = tensor.as_subclass(Tensor)
    return tensor.clone() if tensor.is_inference() else tensor


def to_channels_last(batch: Batch) -> Batch:
    """The 4-D tensors of a batch, or a tensor, in channels_last memory format."""
    return map_tensors(lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4
                       else tensor, batch)


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The floating-point tensors of a batch, or a tensor, in `dtype`."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)
