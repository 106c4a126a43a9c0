"""Image classifiers of Hugging Face's transformers, by name or by the folder that save_pretrained wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastscore.arguments import needed
from fastscore.cli.checkpoints import sha256

Found = TypeVar("Found")


def load(name: str, weights: bool = True) -> nn.Module:
    """The image classifier `name` of the hub (downloaded where it is not cached), or of a folder that save_pretrained
    wrote, with the weights that it was saved with, or random ones; no code of its own is run.

    Raises ValueError for no such model, or one that is no image classifier, ImportError without transformers.
    """
    library = _transformers()
    classifiers = library.AutoModelForImageClassification
    made = _named(name, lambda: classifiers.from_pretrained(name) if weights else
                  classifiers.from_config(library.AutoConfig.from_pretrained(name)))
    model: nn.Module = made
    return model


def processor(name: str) -> Any:
    """Its image processor. Raises ValueError where it has none that can be read, ImportError without transformers."""
    return _named(name, lambda: _transformers().AutoImageProcessor.from_pretrained(name))


def processed(processor: Any, pixels: Tensor) -> Tensor:
    """What a processor makes of a picture, uint8 [3, H, W]: float32 [3, h, w]."""
    result: Tensor = processor(images=pixels, return_tensors="pt")["pixel_values"][0]
    return result.to(torch.float32)


def revision(name: str) -> str:
    """Which weights `name` stands for: the hash of a folder's files of weights; of the hub, its commit."""
    files = sorted(path for kind in ("*.safetensors", "*.bin") for path in Path(name).glob(kind))
    if not files:
        config = _named(name, lambda: _transformers().utils.cached_file(name, "config.json"))
        return Path(config).parent.name  # snapshots/COMMIT/config.json in the hub's cache
    return f"sha256 {sha256(*files)}"


def _transformers() -> Any:
    return needed("transformers", "transformers cannot be imported", "'torch-fastscore[transformers]'")


def _named(name: str, read: Callable[[], Found]) -> Found:
    """What `read` returns; its errors in one line that names the model."""
    try:
        return read()
    except (OSError, ValueError, KeyError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model: hf:{name} cannot be read as an image classifier of transformers, by name or from a "
                         f"folder that save_pretrained wrote: {said[:300]}") from error
