"""fastscore info: what is installed, which kernels serve which device here, and what scoring a model will do."""

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastscore
from fastscore import files
from fastscore.cli import models, needs, options, units
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.ops import library
from fastscore.ops.backends import backends
from fastscore.pruning import iterative
from fastscore.pruning.report import PruneReport
from fastscore.pruning.saved.checkpoint import read_notes
from fastscore.pruning.saved.export import read_exported_notes
from fastscore.recovery import distillation_run, kept
from fastscore.recovery.divergence import names
from fastscore.scoring import runs, scorer
from fastscore.scoring.scores import Scores
from fastscore.wording import counted

_NONE = {"notes": "none: fastscore did not prune it; give weights as --checkpoint, behind the name of their model"}
_RESUMED = "kept by resume=: the same call goes on from it"
_PACKAGES = ("torch-fastscore", "torch", "triton", "torch-pruning", "torchvision")


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "info", run, "[MODEL or FILE] ", "what is installed here, and what scoring a model will do",
        "Versions, and which kernels serve which device on this machine, or why they do not.\n"
        "For a model: how its images are prepared, what is made of it to score it, layer by layer, and what cannot\n"
        "lose channels, with the reason; with --units, also which branches, experts or heads stay as they are.\n"
        "For a file of scores or of a pruned model (.safetensors, .pt2, .onnx, .pt): where it comes from,\n"
        "and what remains. For the file of a run that can go on (resume=): what it is of, and how far it is.",
        "fastscore info\nfastscore info --json\nfastscore info torchvision:resnet18 --units blocks\n"
        "fastscore info scores.safetensors\nfastscore info small.onnx\nfastscore info run.ckpt")
    options.add_model(command, optional=True)
    options.add_pixels(command)
    options.add_units(command)
    command.set_defaults(seed=0)
    add_json(command, "the facts")


def run(arguments: argparse.Namespace) -> None:
    """Print what is installed, or a model's plan."""
    if arguments.model is None:
        known = facts()
        print(json.dumps(known) if arguments.json else table(known))
        return
    if needs.names_file(arguments.model):
        notes = {arguments.model: file_notes(arguments.model)}
        print(json.dumps(notes) if arguments.json else table(notes))
        return
    place = Path(arguments.model)
    if place.is_file() and place.suffix not in (".py", *models.WEIGHTS):
        raise ValueError(f"info: it reads scores, pruned models ({', '.join(needs.READ_BY_INFO)}) and runs that are "
                         f"kept, and {place} is none of them; name one, or MODEL")
    prepare = options.preprocessing(arguments)
    with units.told_here():
        scores = fastscore.score(options.model(arguments, prepare), [options.example(arguments, prepare)],
                                 units=arguments.units, progress=False)
    assert scores.coverage is not None
    alone = "".join(f"\n{line}" for line in (*scores.coverage.lines(), *(
        f"{layer}: kept ({reason})" for layer, reason in scores.skipped.items())))
    print(json.dumps({"images": str(prepare), "plan": str(scores.plan), "coverage": asdict(scores.coverage),
                      "skipped": dict(scores.skipped)})
          if arguments.json else f"images: {prepare}\n{scores.plan}{alone}")


def file_notes(path: str) -> dict[str, str]:
    """What a file of scores, of a pruned model or of a run that goes on says of where it comes from.

    Raises FileNotFoundError, or ValueError for a file that is neither, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; info reads scores and pruned models, or MODEL: "
                                "torchvision:NAME, timm:NAME, hf:NAME or module:function")
    form = files.form_of(path)
    if form in _RUNS:
        return _RUNS[form](path)
    if form == "" and not path.endswith(".safetensors"):
        return read_exported_notes(path) or _NONE
    try:
        scores = Scores.load(path)
        notes = {"made": repr(scores).removeprefix("<Scores: ").removesuffix(">"), **scores.notes}
    except ValueError:
        notes = read_notes(path)
    return dict(notes) or _NONE


def _iterative(path: str) -> dict[str, str]:
    header, _ = files.read(path, iterative.FORM, "checkpoint of prune_iteratively", "start the run again")
    reports = [PruneReport.of(report) for report in header["reports"]]
    return {"run": f"of prune_iteratively, {_RESUMED}", "done": f"{len(reports)} of {header['same']['steps']} steps",
            **({"remains": _share(reports)} if reports else {})}


def _share(reports: list[PruneReport]) -> str:
    return ", ".join(f"{getattr(reports[-1], unit)[1] / getattr(reports[0], unit)[0]:.1%} of the {name}"
                     for unit, name in (("macs", "MACs"), ("params", "parameters")))


def _distillation(path: str) -> dict[str, str]:
    state = _state(path, distillation_run.FORM)
    last: list[Mapping[str, Any]] = state["looks"][-1:]
    return {"run": f"of distill, {_RESUMED}", "done": counted(state["step"], "step"),
            **{f"{label} on held-out samples, last looked at": f"{look[key]:.4g}" for look in last
               for key, label in zip(("agreement", "kl"), names(look.get("by_error", False), look.get("mixed", "")),
                                     strict=True) if look[key] is not None}}


def _moments(path: str) -> dict[str, str]:
    passes: Mapping[str, Any] = _state(path, kept.FORM)["passes"]
    return {"run": f"of reconstruct, {_RESUMED}", "done": "; ".join(
        f"{name}: {counted(each['done'], 'batch', 'batches')}{', all' if each['whole'] else ''}"
        for name, each in passes.items())}


def _scorer(path: str) -> dict[str, str]:
    counts = _state(path, scorer.FORM)["counts"]
    return {"run": "of a Scorer, written by Scorer.save: load() of one made alike goes on from it",
            "done": counted(counts["samples"], "sample")}


def _state(path: str, form: str) -> dict[str, Any]:
    return files.read_state(path, form, "file of a run", "start the run again")


# form of the file of a run -> what it says of how far that is
_RUNS: Mapping[str, Callable[[str], dict[str, str]]] = {
    runs.FORM: runs.run_notes, iterative.FORM: _iterative, distillation_run.FORM: _distillation, kept.FORM: _moments,
    scorer.FORM: _scorer}


def facts() -> dict[str, dict[str, str]]:
    """Section -> name -> fact: `versions`, `machine`, and `backends` (the devices each serves, or why it does not)."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "gpu": _gpu(),
        "library": str(library.LIBRARY),
    }
    rows = {row.name: f"unavailable: {row.unavailable}" if row.unavailable
            else f"serves {row.serves}" if row.serves else "available, not in use" for row in backends()}
    rows["cpu"] += f" (SIMD: {library.simd_tier()})"
    return {"versions": versions, "machine": machine, "backends": rows}


def _gpu() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}{' (ROCm)' if torch.version.hip else ''}"
    found = torch.accelerator.current_accelerator(check_available=True)
    return "none that torch can use" if found is None else found.type


def table(facts: dict[str, dict[str, str]]) -> str:
    """`facts` as text, a line each."""
    width = max(len(name) for section in facts.values() for name in section)
    return "\n\n".join("\n".join([section, *(f"  {name:<{width}}  {fact}" for name, fact in lines.items())])
                       for section, lines in facts.items())
