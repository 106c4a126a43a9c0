"""Models by name: a spec and a checkpoint in, a module out."""

import difflib
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

# What training loops and wrappers put around a state dict, and in front of its keys.
_ENVELOPES = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def load(spec: str, *, checkpoint: str | PathLike[str] | None = None, weights: str | None = None,
         classes: int | None = None, seed: int = 0) -> nn.Module:
    """The model that `spec` names, in evaluation mode.

    spec: "torchvision:NAME", "timm:NAME", or "module:function" for a function (or class) that returns a module; the
    module is imported from the current directory or the Python path, or given as a path that ends in .py. checkpoint:
    safetensors, or what torch.load(weights_only=True) reads: a state dict, alone or under "state_dict",
    "model_state_dict" or "model". weights: torchvision's or timm's own, by name or "DEFAULT", downloaded when they are
    not cached. classes: the outputs of a torchvision or timm model. seed: of the weights when there is neither
    checkpoint nor `weights`.

    Raises ValueError for an unknown name, or a checkpoint that cannot be read or does not fit the model; TypeError
    where the function returns no module; ImportError for a module that is not there.
    """
    make = {"torchvision": _torchvision, "timm": _timm}.get(parse(spec)[0], _call)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(spec, weights, classes)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def parse(spec: str) -> tuple[str, str]:
    """("torchvision", "timm" or a module, the name in it). Raises ValueError for what is no spec."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise ValueError(f"model: {spec!r} is none of torchvision:NAME, timm:NAME and module:function")
    return source, name


def load_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Read `path` into `model`. Raises ValueError, naming the first layers, where the two do not fit."""
    own = model.state_dict()
    state = _unprefixed(read_checkpoint(path), own)
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    resized = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in own
               if key in state and state[key].shape != own[key].shape]
    problems = [f"{what} {_some(keys)}" for what, keys in
                (("it lacks", missing), ("the model lacks", unexpected), ("other shapes:", resized)) if keys]
    if problems:
        raise ValueError(f"checkpoint: {path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file; no code of the file's is run. Raises ValueError where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    if Path(path).suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"checkpoint: {path} is not a readable safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint: {path} holds more than tensors, or is damaged; save model.state_dict() with "
                         "torch.save, or write safetensors") from error
    for envelope in _ENVELOPES:
        if isinstance(state, Mapping) and isinstance(state.get(envelope), Mapping):
            state = state[envelope]
            break
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"checkpoint: {path} holds no state dict (name -> tensor), neither alone nor under "
                         f"{', '.join(_ENVELOPES)}")
    return dict(state)


def torchvision_models() -> ModuleType:
    """torchvision.models. Raises ImportError, saying what to install."""
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(f"torchvision cannot be imported ({error}): pip install 'torch-fastscore[vision]'") from error


def torchvision_weights(spec: str, name: str = "DEFAULT") -> Any:
    """torchvision's entry for weights of the model "torchvision:NAME"; nothing is downloaded.

    Raises ValueError, naming what there is, for a model or weights that torchvision does not have.
    """
    library, model = torchvision_models(), parse(spec)[1]
    known = library.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known)
        raise ValueError(f"model: torchvision has no {model!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    entries = library.get_model_weights(model)
    if name not in entries.__members__:
        raise ValueError(f"weights: torchvision has no {name!r} for {model}; it has {', '.join(entries.__members__)}")
    return entries[name]


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


def _timm(spec: str, weights: str | None, classes: int | None) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"timm cannot be imported ({error}): pip install 'torch-fastscore[timm]'") from error
    name = parse(spec)[1]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models())
        raise ValueError(f"model: timm has no {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    known = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{name}.*")]
    if weights is not None and weights != "DEFAULT" and weights not in known:
        raise ValueError(f"weights: timm has no {weights!r} for {name}; it has {', '.join(['DEFAULT', *known])}")
    own: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    tagged = name if weights in (None, "DEFAULT") else f"{name}.{weights}"
    try:
        model: nn.Module = timm.create_model(tagged, pretrained=weights is not None, **own)
    except OSError as error:
        raise ValueError(f"weights: {tagged} cannot be fetched ({error}); give a checkpoint instead") from error
    return model


def _call(spec: str, weights: str | None, classes: int | None) -> nn.Module:
    source, name = parse(spec)
    for option, value in (("weights", weights), ("classes", classes)):
        if value is not None:
            raise ValueError(f"{option}: only torchvision:NAME and timm:NAME have it; {spec} sets its own")
    path = Path(source)
    with _importable(path.parent if path.suffix == ".py" else Path()):
        module = _of_file(path) if path.suffix == ".py" else _of_name(source)
        make: Any = getattr(module, name, None)
        if not callable(make):
            raise ValueError(f"model: {source} has no function {name!r}")
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


def _unprefixed(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`state` without the prefixes that wrappers (DataParallel, torch.compile, Lightning) gave every key."""
    first = next(iter(expected), "")
    while True:
        prefix = next((prefix for prefix in _PREFIXES if state and all(key.startswith(prefix) for key in state)), None)
        if prefix is None or first.startswith(prefix):
            return state
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
