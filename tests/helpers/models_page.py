"""docs/models.md: what became of each model.

`python tests/helpers/models_page.py` runs every model in a process of its own, forked one after another, and writes the
page; with NAME ... (`*` and `?` are wildcards) these alone. Rows are added to a file as they come (--rows, default:
models.jsonl in the folder for temporary files), and those that are in it are not run again: stopped, it goes on where
it was. --page writes the page from what is in the file.
"""

import argparse
import fnmatch
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import reach
import torch
from architectures import HEADINGS, Row, one_line, row
from model_case import Case
from real_models import CASES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MEMORY, SECONDS = 4 << 30, 300  # that a model may take: bytes, and seconds of the processor
_MODELS_OF = ("torchvision", "timm", "transformers", "diffusers", "smp", "ultralytics")


_REACH = "How much of each family can shrink"
_REACH_SAYS = ("The shares of the MACs in layers whose outputs can go / that shrink, the least of the rows; wanted:",
               "of those that shrink. `python tests/helpers/models_page.py --page` writes this from the rows below.")


def chosen(names: list[str]) -> list[Case]:
    """The cases that the names, or patterns, stand for; all without any. Raises SystemExit for names of none."""
    there = [case.name for case in CASES]
    if unknown := [name for name in names if not fnmatch.filter(there, name)]:
        first = {name.partition(":")[0]: name for name in reversed(there) if ":" in name}
        near = [name for each in unknown for name in there if each.lower() in name.lower()]
        raise SystemExit(f"no model is called {', '.join(unknown)}: names are {there[0]} (of torchvision), "
                         f"{', '.join(reversed(first.values()))} and the like, with * for any letters"
                         + (f"; may be {', '.join(near[:5])}" if near else ""))
    return [case for case in CASES if not names or any(fnmatch.fnmatch(case.name, name) for name in names)]


def apart(case: Case, out: Path) -> None:
    """Add a case's row to `out`, from a process of its own, within MEMORY and SECONDS."""
    begun = time.monotonic()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(10 * SECONDS)  # where it waits for ever
        try:
            found = asdict(row(case)) | {"seconds": time.process_time()}
        except BaseException as error:
            found = asdict(Row(case.name, "–", kept=f"cannot be made: {type(error).__name__}: {one_line(str(error))}"))
        with out.open("a") as file:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        with out.open("a") as file:
            file.write(json.dumps(asdict(Row(case.name, "–", kept=f"stopped by signal {os.WTERMSIG(status)}")),
                                  ensure_ascii=False) + "\n")
    print(f"{case.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, Row]:
    """Name -> row of what is in a file of rows; the latest of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = {}
    for line in lines:
        fields = json.loads(line)
        fields.pop("seconds", None)
        found[fields["name"]] = Row(**fields)
    return found


def on_page() -> dict[str, str]:
    """Name -> line of the page."""
    found, library = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            library = line.removeprefix("## ")
            library = library if library in _MODELS_OF else ""
        elif library and line.startswith("| ") and not line.startswith("| model |"):
            name = line.split(" | ")[0].removeprefix("| ")
            found[name if library == "torchvision" else f"{library}:{name}"] = line
    return found


def write_page(rows: dict[str, Row]) -> None:
    """The tables of docs/models.md, with a summary of each library before them."""
    known = on_page()
    head, mark, _ = PAGE.read_text().partition("<!-- made by tests/helpers/models_page.py -->\n")
    lines = known | {name: str(row) for name, row in rows.items()}
    parts = ["| library | models | all scores exact | pruned | = masked | exported | trained | outputs can go | "
             "shrink |", "|---" * 9 + "|"]
    groups = {name: [lines[case.name] for case in CASES if case.library == name and case.name in lines]
              for name in _MODELS_OF}
    every = list(itertools.chain(*groups.values()))
    parts += [_summary(name, group) for name, group in (*groups.items(), ("all", every)) if group]
    parts += ["", f"## {_REACH}", "", *_REACH_SAYS, "", *reach.table(lines)]
    for name, group in groups.items():
        if group:
            parts += ["", f"## {name}", "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|", *group]
    PAGE.write_text(head + mark + "\n".join(parts) + "\n")


def _summary(name: str, lines: list[str]) -> str:
    cells = [dict(zip(HEADINGS, line.strip("| ").split(" | "), strict=False)) for line in lines]
    counts = [len(cells), sum("exact" in row["scores"] and "wrong" not in row["scores"] for row in cells),
              sum(row["pruned to"] != "–" for row in cells),
              *(sum(row[step] == "yes" for row in cells) for step in ("= masked", "exported", "trained"))]
    shares = [[int(row[column].rstrip("%")) for row in cells if row["MACs"] != "–"]
              for column in ("outputs can go", "shrink")]
    means = [f"{sum(values) / max(len(values), 1):.0f}%" for values in shares]
    return f"| {name} | " + " | ".join([*map(str, counts), *means]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()) / "models.jsonl")
    parser.add_argument("--page", action="store_true", help="write the page from the file alone")
    parser.add_argument("--again", action="store_true", help="run what is in the file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.page:
        for library in ("timm", "transformers", "diffusers", "segmentation_models_pytorch"):  # once, for all that fork
            import_module(library)
        known = {} if arguments.again else read(arguments.rows)
        for case in chosen(arguments.names):
            if case.name not in known:
                apart(case, arguments.rows)
    write_page(read(arguments.rows))


if __name__ == "__main__":
    main()
