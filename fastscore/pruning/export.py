"""A smaller model out to a file, in the format that its suffix names."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from fastscore.pruning.checkpoint import save_pruned


def save(model: nn.Module, example_inputs: Tensor, path: str | PathLike[str]) -> None:
    """Write `model` in evaluation mode: .safetensors, for fastscore.load_pruned, where prune() has made it; .pt2
    (torch.export) and .onnx, which take any batch size; or .pt, the module itself, as a pickle.

    example_inputs: [N, ...] with N >= 2, which tells the exporters that N is free. Raises ValueError for another
    suffix, ImportError for ONNX without its packages.
    """
    suffix = check_suffix(path)
    model = model.eval()
    if suffix == ".pt":
        torch.save(model, path)
        return
    if suffix == ".safetensors":
        save_pruned(model, path)
        return
    free = ({0: torch.export.Dim("batch")},)
    if suffix == ".pt2":
        torch.export.save(torch.export.export(model, (example_inputs,), dynamic_shapes=free), path)
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("writing .onnx needs two more packages: pip install 'torch-fastscore[onnx]'") from error
    torch.onnx.export(model, (example_inputs,), path, dynamo=True, dynamic_shapes=free, external_data=False,
                      input_names=["input"], output_names=["output"], verbose=False)


def check_suffix(path: str | PathLike[str]) -> str:
    """The suffix of a model file that `save` can write. Raises ValueError for any other."""
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pt2", ".onnx", ".pt"):
        raise ValueError(f"out: {path}: its suffix must be .safetensors (weights and a recipe), .pt2 (torch.export), "
                         ".onnx or .pt (the module itself, as a pickle)")
    return suffix
