"""Fingerprints: whether a model, a way of scoring and data are the same as they were."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastscore import files
from fastscore.batches import Batch, tensors_of
from fastscore.scoring.gradients import sample_ids


def run_fingerprint(model: nn.Module, origin: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What makes two runs the same one: fingerprints of the model and of its weights, and the way of scoring.

    Functions among the options count by name.
    """
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, module in model.named_modules():
        structure.update(f"{name}\0{type(module).__qualname__}\0{module.extra_repr()}\0".encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        weights.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        weights.update(files.bytes_of(tensor))
    named = {name: f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value
             for name, value in options.items()}
    made = {"model": structure.hexdigest(), "weights": weights.hexdigest(), **origin, **named}
    known: dict[str, Any] = json.loads(json.dumps(made, default=lambda value: type(value).__qualname__))
    return known


def digest_of(before: str, batch: Batch) -> str:
    """A chain over the content of batches."""
    digest = hashlib.sha256(before.encode())
    for tensor in tensors_of(batch):
        digest.update(f"{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(files.bytes_of(sample_ids(tensor if tensor.dim() else tensor[None])))
    return digest.hexdigest()
