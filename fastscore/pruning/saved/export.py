"""A smaller model out to a file, in the format that its suffix names."""

import json
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import files
from fastscore.arguments import check_path
from fastscore.batches.calls import call_model
from fastscore.batches.outputs import OneTensor, floating_tensors
from fastscore.default_device import keeps_own_on_cpu
from fastscore.modules.modes import evaluating
from fastscore.modules.refused_batches import naming_argument
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved.checkpoint import save_pruned


@keeps_own_on_cpu
def save(model: nn.Module | PruneResult, example_inputs: Tensor, path: str | PathLike[str]) -> None:
    """Write a model, as it is in evaluation mode, in the format that the suffix names.

    Args:
        model: the model, or prune()'s result; it comes back in the modes that it was in.
        example_inputs: [N, ...] with N >= 2, which tells the exporters that N is free.
        path: .safetensors, for fastscore.load_pruned, where prune() has made the model; .pt2 (torch.export) and .onnx,
            which take any batch size (where the model's code fixes it, that of the example inputs: a warning says so);
            or .pt, the module itself, as a pickle. In .pt2 and .onnx an object of a library's own that holds one tensor
            (transformers' classifiers return such) becomes that tensor, so that the file is read without the library.
            In .onnx the input is called "input", and the output "output", those of a dict of tensors as its keys.

    Raises:
        ValueError: another suffix; for .pt2 and .onnx, fewer than two samples; for .safetensors, a model that prune()
            did not make. TypeError: for .pt2 and .onnx, inputs that are not one tensor.
        ImportError: ONNX without its packages.
    """
    suffix = check_suffix(path)
    if suffix == ".safetensors":
        return save_pruned(model, path)
    if suffix != ".pt" and not isinstance(example_inputs, Tensor):
        raise TypeError(f"example_inputs: {type(example_inputs).__name__}, and {suffix} files take one tensor "
                        "[N, ...]: give that tensor; a model that is called otherwise is exported by torch.export or "
                        "torch.onnx (result.model.eval()), or saved as .safetensors or .pt")
    if suffix != ".pt" and len(example_inputs) < 2:
        raise ValueError(f"example_inputs: {len(example_inputs)} sample, which {suffix} would take for the only size "
                         "there is: give two or more")
    model, notes = (model.model, model.report.kept_notes) if isinstance(model, PruneResult) else (model, {})
    with evaluating(model), files.whole(path) as part:
        if suffix != ".pt":
            with naming_argument("example_inputs: the model cannot take them:", model, call_model, example_inputs):
                plain(model, example_inputs)
        free = _WRITERS[suffix](model if suffix == ".pt" else plain(model, example_inputs), example_inputs, part, notes)
    if not free:
        warnings.warn(f"{path}: it takes {len(example_inputs)} samples in a call, no other number, since "
                      f"{type(model).__name__} does not leave it free (its code may write a batch size, or take len(x) "
                      "for one): have it use x.shape[0], or give example_inputs of as many samples as a call will have",
                      stacklevel=3)


def read_exported_notes(path: str | PathLike[str]) -> dict[str, str]:
    """What a .pt, .pt2 or .onnx file that `save` wrote of a PruneResult says of where the model comes from; no code of
    the file's is run.

    Raises ValueError for a file that is none of them, or damaged; ImportError for .onnx without its package.
    """
    try:
        if Path(path).suffix == ".onnx":
            return {entry.key.removeprefix(_NOTE): entry.value for entry in _onnx().load(path).metadata_props
                    if entry.key.startswith(_NOTE)}
        with zipfile.ZipFile(path) as archive:
            kept = [name for name in archive.namelist() if name.endswith(f"/extra/{_NOTES}")]
            found: dict[str, str] = json.loads(archive.read(kept[0])) if kept else {}
            return found
    except ImportError:
        raise
    except Exception as error:  # of zip, JSON or protobuf, which have no class in common
        raise ValueError(f"{path}: it cannot be read ({type(error).__name__}: {error}); write it again") from error


def plain(model: nn.Module, example_inputs: Tensor) -> nn.Module:
    """`model`, in evaluation mode, or one that returns the only tensor of an object that `model` returns."""
    with torch.no_grad():
        returned = model(example_inputs)
    if type(returned) in (Tensor, dict, tuple, list) or len(floating_tensors(returned)) != 1:
        return model
    return OneTensor(model, call_model).eval()


# Each returns whether the file takes any batch size.
def _write_module(model: nn.Module, example_inputs: Tensor, path: Path, notes: Mapping[str, str]) -> bool:
    torch.save(model, path)
    if notes:
        with zipfile.ZipFile(path, "a") as archive:  # which torch.load reads by the names that it knows
            archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/extra/{_NOTES}", json.dumps(notes))
    return True


def _write_program(model: nn.Module, example_inputs: Tensor, path: Path, notes: Mapping[str, str]) -> bool:
    free = True
    try:
        program = torch.export.export(model, (example_inputs,), dynamic_shapes=_free_batch())
    except Exception:  # a size that is no longer free, in one of several classes; of all else the next says what it is
        program, free = torch.export.export(model, (example_inputs,)), False
    torch.export.save(program, path, extra_files={_NOTES: json.dumps(notes)} if notes else None)
    return free


def _write_onnx(model: nn.Module, example_inputs: Tensor, path: Path, notes: Mapping[str, str]) -> bool:
    program = torch.onnx.export(model, (example_inputs,), dynamo=True, dynamic_shapes=_free_batch(),
                                input_names=["input"], output_names=_output_names(model, example_inputs), verbose=False)
    assert program is not None
    program.model.metadata_props.update({f"{_NOTE}{name}": text for name, text in notes.items()})
    program.save(path, external_data=False)
    shape = program.model.graph.inputs[0].shape
    return shape is None or not isinstance(shape[0], int)  # where it is not free, PyTorch's exporter fixes it unasked


def _output_names(model: nn.Module, example_inputs: Tensor) -> list[str]:
    """What the outputs are called in a file: of a dict of tensors as its keys; "output", and else as exporters will."""
    with torch.no_grad():
        returned = model(example_inputs)
    if not isinstance(returned, Mapping) or "input" in returned or not all(
            isinstance(each, Tensor) for each in returned.values()):
        return ["output"]
    return [str(key) for key in returned]


def _free_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


_NOTES, _NOTE = "fastscore.json", "fastscore "  # a file in .pt and .pt2; before each name in the metadata of .onnx
_WRITERS = {".pt2": _write_program, ".onnx": _write_onnx, ".pt": _write_module}


def check_suffix(path: str | PathLike[str], argument: str = "path") -> str:
    """The suffix of a model file that `save` can write. Raises ValueError, naming the argument, for any other,
    ImportError for .onnx without its packages."""
    check_path(argument, path)
    suffix = Path(path).suffix
    if suffix not in (".safetensors", *_WRITERS):
        raise ValueError(f"{argument}: {path}: its suffix must be .safetensors (weights and a recipe), .pt2 "
                         "(torch.export), .onnx or .pt (the module itself, as a pickle)")
    if suffix == ".onnx":
        _onnx()
    return suffix


def _onnx() -> Any:
    """The package. Raises ImportError, saying what to install."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(".onnx needs two more packages: pip install 'torch-fastscore[onnx]'") from error
    return onnx
