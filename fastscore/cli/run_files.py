"""What the files of runs that can go on say of them: how far they are."""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from fastscore import files
from fastscore.pruning import iterative
from fastscore.pruning.report import PruneReport
from fastscore.recovery import distillation_run, kept
from fastscore.recovery.divergence import names
from fastscore.scoring import runs, scorer
from fastscore.wording import counted

Path = str | PathLike[str]
_RESUMED = "kept by resume=: the same call goes on from it"


def _iterative(path: Path) -> dict[str, str]:
    header, _ = files.read(path, iterative.FORM, "checkpoint of prune_iteratively", "start the run again")
    reports = [PruneReport.of(report) for report in header["reports"]]
    return {"run": f"of prune_iteratively, {_RESUMED}", "done": f"{len(reports)} of {header['same']['steps']} steps",
            **({"remains": _share(reports)} if reports else {})}


def _share(reports: list[PruneReport]) -> str:
    return ", ".join(f"{getattr(reports[-1], unit)[1] / getattr(reports[0], unit)[0]:.1%} of the {name}"
                     for unit, name in (("macs", "MACs"), ("params", "parameters")))


def _distillation(path: Path) -> dict[str, str]:
    state = _state(path, distillation_run.FORM)
    last: list[Mapping[str, Any]] = state["looks"][-1:]
    return {"run": f"of distill, {_RESUMED}", "done": counted(state["step"], "step"),
            **{f"{label} on held-out samples, last looked at": f"{look[key]:.4g}" for look in last
               for key, label in zip(("agreement", "kl"), names(look.get("by_error", False), look.get("mixed", "")),
                                     strict=True) if look[key] is not None}}


def _moments(path: Path) -> dict[str, str]:
    passes: Mapping[str, Any] = _state(path, kept.FORM)["passes"]
    return {"run": f"of reconstruct, {_RESUMED}", "done": "; ".join(
        f"{name}: {counted(each['done'], 'batch', 'batches')}{', all' if each['whole'] else ''}"
        for name, each in passes.items())}


def _scorer(path: Path) -> dict[str, str]:
    counts = _state(path, scorer.FORM)["counts"]
    return {"run": "of a Scorer, written by Scorer.save: load() of one made alike goes on from it",
            "done": counted(counts["samples"], "sample")}


def _state(path: Path, form: str) -> dict[str, Any]:
    return files.read_state(path, form, "file of a run", "start the run again")


# form of a file -> what it says
NOTES: Mapping[str, Callable[[Path], dict[str, str]]] = {
    runs.FORM: runs.run_notes, iterative.FORM: _iterative, distillation_run.FORM: _distillation, kept.FORM: _moments,
    scorer.FORM: _scorer}
