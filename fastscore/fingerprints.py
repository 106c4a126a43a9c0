"""Fingerprints: whether a model, a way of scoring and data are the same as they were; an id for each sample."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import files
from fastscore.batches.parts import Batch, tensors_of

# SplitMix64 (Steele, Lea, Flood, 2014), as signed 64-bit integers, which wrap the same.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def run_fingerprint(model: nn.Module, origin: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What makes two runs the same one: fingerprints of the model and of its weights, and the way of scoring.

    Functions among the options count by name.
    """
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, module in model.named_modules():
        structure.update(f"{name}\0{type(module).__qualname__}\0{settings_of(module)}\0".encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        weights.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        weights.update(files.bytes_of(tensor))
    named = {name: f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value
             for name, value in options.items()}
    made = {"model": structure.hexdigest(), "weights": weights.hexdigest(), **origin, **named}
    known: dict[str, Any] = json.loads(json.dumps(made, default=lambda value: type(value).__qualname__))
    return known


def settings_of(module: nn.Module) -> str:
    """What a module says of its settings; of one that cannot, as a convolution whose padding code has set to a single
    number, all that it holds beside tensors and modules, as far as that is plain."""
    try:
        return module.extra_repr()
    except Exception:  # whatever its code does with settings that it does not expect
        return ", ".join(f"{name}={value!r}" for name, value in sorted(vars(module).items())
                         if not name.startswith("_") and name != "training" and _is_plain(value))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, (bool, int, float, str))


def digest_of(before: str, batch: Batch) -> str:
    """A chain over the content of batches."""
    digest = hashlib.sha256(before.encode())
    for tensor in tensors_of(batch):
        digest.update(f"{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(files.bytes_of(sample_ids(tensor if tensor.dim() else tensor[None])))
    return digest.hexdigest()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, element by element: int64 -> int64."""
    for shift, multiplier in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return x ^ ((x >> 31) & (2**33 - 1))


def _weights(count: int, device: torch.device) -> Tensor:
    """Odd int64 [count], one for each position of a sample."""
    return _mix(torch.arange(1, count + 1, device=device) * _GOLDEN) | 1


_KEPT = 2**21  # words of a sample whose weights are kept for the next batch: 16 MiB, an image of 836 x 836
_PRODUCTS, _PRODUCTS_CPU = 2**24, 2**17  # words of samples multiplied at once: 128 MiB; what fits in a CPU's cache
_kept_weights = functools.lru_cache(maxsize=1)(_weights)


def sample_ids(x: Tensor) -> Tensor:
    """An id for each sample, made from what it holds: int64 [N] from [N, ...].

    A sample has the same id in every batch, order, worker and memory layout, so its random gradient is the same too.
    The hash is Σ word·weight(position) modulo 2⁶⁴; trailing zeros (padding) do not change it.
    """
    bits = x.detach().reshape(x.shape[0], math.prod(x.shape[1:])).contiguous()
    if bits.dtype == torch.bool or bits.is_complex():
        bits = bits.to(torch.uint8) if bits.dtype == torch.bool else torch.view_as_real(bits).flatten(1)
    words = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    count = words.shape[1]
    weights = _kept_weights(count, x.device) if count <= _KEPT else _weights(count, x.device)
    # so many samples at a time: a batch of products would hold eight bytes for each of its values at once
    products = _PRODUCTS_CPU if x.device.type == "cpu" else _PRODUCTS
    sums = [(rows * weights).sum(1) for rows in words.split(max(products // max(count, 1), 1))]
    return _mix(sums[0] if len(sums) == 1 else torch.cat(sums))


def token_ids(ids: Tensor, tokens: int) -> Tensor:
    """An id for each token, by its sample's (int64 [N]) and its place: int64 [N·T]."""
    places = torch.arange(1, tokens + 1, device=ids.device) * _GOLDEN
    return _mix(ids[:, None] + _mix(places)).flatten()
