"""Models by name: a spec and a checkpoint in, a module out."""

import copy
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.arguments import needed
from fastscore.batches.outputs import OutputError, output_tensors
from fastscore.cli import hugging_face
from fastscore.cli.checkpoints import ResizedError, load_checkpoint
from fastscore.modules.evaluation_copy import own_copies
from fastscore.wording import counted

WEIGHTS = (".pth", ".pt", ".th", ".ckpt", ".bin", ".safetensors")  # suffixes of files that hold weights


def load(spec: str, *, checkpoint: str | PathLike[str] | None = None, weights: str | None = None,
         classes: int | None = None, seed: int = 0, tell: Callable[[str], object] | None = None) -> nn.Module:
    """The model that `spec` names, in evaluation mode.

    Args:
        spec: "torchvision:NAME", "timm:NAME", "hf:NAME" or "hf:FOLDER" for an image classifier of transformers, or
            "module:function" for a function (or class) that returns a module, or for the network itself, of which a
            copy is taken; the Python module is imported from the current directory or the Python path, or given as a
            path that ends in .py.
        checkpoint: safetensors, or what torch.load(weights_only=True) reads, with whatever training loops and wrappers
            put around the weights: see fastscore.cli.checkpoints.
        weights: torchvision's or timm's own, by name or "DEFAULT", downloaded when they are not cached. hf: has its
            weights anyway, unless a checkpoint takes their place.
        classes: the outputs of a torchvision or timm model.
        seed: of the weights when there is neither checkpoint nor `weights`.
        tell: called with a line where a checkpoint was more, or less, than a state dict of the model.

    Raises:
        ValueError: an unknown name, or a checkpoint that cannot be read or does not fit the model.
        TypeError: a function that returns no module, or that cannot be called without arguments.
        ImportError: a module that is not there.
    """
    source, name = parse(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source == "hf":
            _sets_its_own(spec, weights, classes)
            model = hugging_face.load(name, weights=checkpoint is None)
        else:
            model = {"torchvision": _torchvision, "timm": _timm}.get(source, _call)(spec, weights, classes)
    if checkpoint is not None:
        try:
            note = load_checkpoint(model, checkpoint)
        except ResizedError as error:
            hint = f": if it is of {counted(error.outputs, 'class', 'classes')}, --classes {error.outputs}" \
                if classes is None and source in ("torchvision", "timm") and error.outputs else ""
            raise ValueError(f"{error}{hint}") from error
        if note and tell is not None:
            tell(note)
    return model.eval()


def check_runs(model: nn.Module, spec: str, example: Tensor) -> None:
    """Raise ValueError for a model that does not take [N, channels, height, width] such as `example`, or does not
    return one tensor."""
    shape = " x ".join(map(str, example.shape[1:]))
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        raise ValueError(f"model: {spec} is in {str(dtype).removeprefix('torch.')}, and images are in float32; name a "
                         "function that returns model.float(): --precision computes in half precision all the same")
    try:
        with torch.no_grad():
            output_tensors(model(example), type(model).__name__)
    except OutputError as error:
        raise ValueError(f"model: {str(error).partition(';')[0]}; the command line takes models that return one "
                         "tensor: name a function that returns yours inside a module whose forward returns that tensor"
                         ) from error
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"model: {spec} cannot run on images of {shape} ({type(error).__name__}: {error}); --size "
                         "says how large they are, and one number each after --mean and --std makes them grey"
                         ) from error


def parse(spec: str) -> tuple[str, str]:
    """("torchvision", "timm", "hf" or a module, the name in it). Raises ValueError for what is no spec."""
    source, _, name = spec.partition(":") if spec.startswith("hf:") else spec.rpartition(":")
    weights = Path(spec).suffix in WEIGHTS  # C:\net.pth has a colon
    if not source or not name or weights:
        hint = f"; a file of weights needs one of them, and --checkpoint {spec}" if weights else \
            f"; name the function in it: {spec}:build" if spec.endswith(".py") else \
            _meant(spec)
        raise ValueError(f"model: {spec!r} is none of torchvision:NAME, timm:NAME, hf:NAME and module:function{hint}")
    return source, name


def _meant(name: str) -> str:
    """What a name alone may stand for, of what there is."""
    if (Path(name) / "config.json").is_file():
        return f"; hf:{name}, where save_pretrained wrote that folder?"
    if Path(f"{name}.py").is_file():
        return f"; name the function in it: {name}:build"
    with suppress(ImportError):
        return f"; torchvision:{name}?" if name in torchvision_models().list_models() else ""
    return ""


def torchvision_models() -> Any:
    """torchvision.models. Raises ImportError, saying what to install."""
    return needed("torchvision.models", "torchvision cannot be imported", "'torch-fastscore[vision]'")


def torchvision_weights(spec: str, name: str = "DEFAULT") -> Any:
    """torchvision's entry for weights of the model "torchvision:NAME"; nothing is downloaded.

    Raises ValueError, naming what there is, for a model or weights that torchvision does not have.
    """
    library, model = torchvision_models(), parse(spec)[1]
    known = library.list_models()
    if model not in known:
        raise _unknown("torchvision", model, known)
    entries = library.get_model_weights(model)
    if name not in entries.__members__:
        raise ValueError(f"weights: torchvision has no {name!r} for {model}; it has {', '.join(entries.__members__)}")
    return entries[name]


def _unknown(library: str, model: str, known: Iterable[str]) -> ValueError:
    """What is raised for a model that a library does not have, with those whose names are near."""
    near = difflib.get_close_matches(model, [*known])
    return ValueError(f"model: {library} has no {model!r}" + (f"; near it: {', '.join(near)}" if near else ""))


def _torchvision(spec: str, weights: str | None, classes: int | None) -> nn.Module:
    if weights is not None and classes is not None:
        raise ValueError("classes: torchvision's weights come with their own; give one or the other")
    entry = torchvision_weights(spec, weights or "DEFAULT")
    own: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    try:
        model: nn.Module = torchvision_models().get_model(parse(spec)[1], weights=weights and entry, **own)
    except OSError as error:
        raise ValueError(f"weights: {entry.url} cannot be fetched ({error}); give a checkpoint instead") from error
    return model


def timm_settings(spec: str, weights: str | None = None) -> Any:
    """timm's pretrained_cfg of the model "timm:NAME" with `weights`, or with its default ones; nothing is downloaded.

    Raises ValueError, naming what there is, for a model or weights that timm does not have; ImportError without timm.
    """
    timm, tagged = _timm_name(spec, weights)
    return timm.get_pretrained_cfg(tagged)


def _timm_name(spec: str, weights: str | None) -> tuple[Any, str]:
    """(timm, the name by which it knows the model with these weights)."""
    timm = needed("timm", "timm cannot be imported", "'torch-fastscore[timm]'")
    name = parse(spec)[1]
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    name, _, own = name.partition(".")  # "resnet50.a1_in1k" names weights, too
    known = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{name}.*")]
    asked = own if weights in (None, "DEFAULT") else weights
    if asked and asked not in known:
        raise ValueError(f"weights: timm has no {asked!r} for {name}; it has {', '.join(['DEFAULT', *known])}")
    if own and asked != own:
        raise ValueError(f"weights: {spec} names {own}, and --weights {asked}; give one of them")
    return timm, f"{name}.{asked}" if asked else name


def _timm(spec: str, weights: str | None, classes: int | None) -> nn.Module:
    timm, tagged = _timm_name(spec, weights)
    own: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    try:
        model: nn.Module = timm.create_model(tagged, pretrained=weights is not None, **own)
    except OSError as error:
        raise ValueError(f"weights: {tagged} cannot be fetched ({error}); give a checkpoint instead") from error
    return model


def _sets_its_own(spec: str, weights: str | None, classes: int | None) -> None:
    for option, value in (("weights", weights), ("classes", classes)):
        if value is not None:
            raise ValueError(f"{option}: only torchvision:NAME and timm:NAME have it; {spec} sets its own")


def _call(spec: str, weights: str | None, classes: int | None) -> nn.Module:
    source, name = parse(spec)
    _sets_its_own(spec, weights, classes)
    path = Path(source)
    with _importable(path.parent if path.suffix == ".py" else Path()):
        module = _of_file(path) if path.suffix == ".py" else _of_name(source)
        make: Any = getattr(module, name, None)
        if isinstance(make, nn.Module):
            return copy.deepcopy(make, own_copies(make))
        if not callable(make):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            raise ValueError(f"model: {source} has no function {name!r}"
                             + (f"; it has {', '.join(own)}" if own else ""))
        try:
            inspect.signature(make).bind()
        except TypeError as error:
            raise TypeError(f"model: {spec} cannot be called without arguments ({error}); write a function that "
                            "returns the model, and name that") from error
        model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {spec} returns {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` comes first on the Python path while the user's code is loaded, and last from then on.

    So its modules find each other at any time, and a file in it that is called like a package which fastscore imports
    later is not taken for that package.
    """
    place = str(folder.resolve())
    if place in sys.path:
        yield
        return
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        sys.path.append(place)


def _of_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise
        raise ImportError(f"model: there is no module {name!r} in {Path().resolve()} or on the Python path") from error


def _of_file(path: Path) -> ModuleType:
    """The module in this very file, whatever else has its name."""
    if not path.is_file():
        raise ImportError(f"model: there is no file {path}")
    own, name = path.resolve(), path.stem
    known = sys.modules.get(name) or importlib.util.find_spec(name)
    origin = getattr(known, "__file__", None) or getattr(known, "origin", None)
    if known is not None and (origin is None or Path(origin).resolve() != own):
        name = f"{name} of {own.parent}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, own)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
