"""What is no batch is said before a model sees it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastscore.batches.parts import Batch, fields_of, tensors_of


def check_batch(batch: Batch, argument: str, counted: bool = False) -> None:
    """Raise TypeError, naming the argument, where a batch holds no tensor [N, ...]; counted: by its first one."""
    check_rows(batch, argument)
    tensors = list(tensors_of(batch))
    for tensor in tensors[:1]:
        if tensor.layout is not torch.strided:
            raise TypeError(f"{argument}: a tensor of layout {tensor.layout}, of which rows cannot be taken: give "
                            "dense ones, .to_dense()")
        if tensor.is_meta:
            raise TypeError(f"{argument}: a tensor on the meta device, which holds no values: give one that does, as "
                            "made within `with torch.device(\"cpu\")`")
    if any(tensor.dim() for tensor in tensors[:1 if counted else None]):
        return
    shown = repr(batch) if len(repr(batch)) < 60 else type(batch).__name__
    advice = "; torch.from_numpy makes one of an array" if type(batch).__module__ == "numpy" else \
        "; x[None] makes one of a sample x, and samples are told by the first tensor" * bool(tensors)
    raise TypeError(f"{argument}: {shown}, where a batch is meant: a tensor [N, ...], a tuple that begins with one, a "
                    f"dict of keyword arguments, or a dataclass{advice}")


def check_rows(batch: Batch, argument: str) -> None:
    """Raise TypeError, naming the argument, where samples of different lengths lie one after the other in a batch."""
    if isinstance(batch, PackedSequence):
        raise TypeError(f"{argument}: a PackedSequence has no row for each sample: give batches (padded, lengths), as "
                        "pad_packed_sequence(packed, batch_first=True) makes, and pass forward=lambda model, batch: "
                        "model(pack_padded_sequence(batch[0], batch[1].cpu(), batch_first=True, enforce_sorted=False))")
    if isinstance(batch, Tensor):
        if batch.is_nested:
            raise TypeError(f"{argument}: a nested tensor has no row for each sample: give padded ones, as in "
                            "torch.nested.to_padded_tensor(batch, 0.0), and a mask where the model takes one")
        return
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else \
        fields_of(batch).values()
    for part in parts:
        check_rows(part, argument)


def check_iterable(batches: object, argument: str) -> None:
    """Raise TypeError, naming the argument, where `batches` are none: one tensor, one dict, no iterable."""
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        shown = "one tensor" if isinstance(batches, Tensor) else type(batches).__name__
        raise TypeError(f"{argument}: {shown}, where an iterable of batches is meant; for a single one: [batch]")
