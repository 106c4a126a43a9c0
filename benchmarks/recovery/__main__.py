"""Budget against what a pruned network still knows: top-1, agreement with the dense network, KL from it.

    python -m benchmarks.recovery --data DATA
    python -m benchmarks.recovery --data DATA --networks mobilenet_v2 --draws 0 --budgets 0.85 0.7

The adapted ResNets and the ViT are made first, by `python -m benchmarks.recovery.adapt` and `.vit`. Writes a row for
each network, draw of calibration images, method and budget to OUT/recovery.csv; what is there is not done again, unless
--again says so, and of two rows the later counts. `python -m benchmarks.recovery.page` makes tables and a picture.
"""

import argparse
import csv
import itertools
import warnings
from pathlib import Path

from tqdm import tqdm

from benchmarks.paper.data import Images
from benchmarks.recovery.contestants import METHODS, applicable, smaller
from benchmarks.recovery.judge import log_probabilities, verdict
from benchmarks.recovery.networks import NETWORKS, Task
from benchmarks.recovery.peers import macs

BUDGETS = (0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
FIELDS = ("network", "draw", "method", "budget", "macs", "params", "top1", "agreement", "kl", "seconds", "note")
KEY = FIELDS[:4]


def keys(path: Path) -> set[tuple[str, ...]]:
    """(network, draw, method, budget) of each row of a CSV; a last line that an interruption has torn is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(FIELDS) + "\n")
    written = path.read_bytes()
    if not written.endswith(b"\n"):
        path.write_bytes(written[:written.rfind(b"\n") + 1])
    with path.open(newline="") as file:
        return {tuple(row[field] for field in KEY) for row in csv.DictReader(file)}


def measure(name: str, task: Task, draw: int, methods: list[str], budgets: list[float], path: Path,
            scores: Path, again: bool = False, device: str = "cpu", calibrate: int | None = None) -> None:
    """Append to the CSV at `path` the rows of one network and draw that it does not have.

    calibrate: as many of the draw's images calibrate, None for all; the same ones judge.
    """
    done = set() if again else keys(path)
    task.model.to(device)
    calibration, judged = (Images(part.images.to(device), part.labels.to(device)) for part in task.draw(draw))
    calibration = Images(calibration.images[:calibrate], calibration.labels[:calibrate])
    before = macs(task.model, judged.images), sum(parameter.numel() for parameter in task.model.parameters())
    by_head: dict[str, dict[float, list[str]]] = {}
    for method, budget in itertools.product(applicable(task, methods), budgets):
        if (name, str(draw), method, f"{budget:g}") not in done:
            by_head.setdefault(method.split(" / ")[0], {}).setdefault(budget, []).append(method)
    if by_head:
        dense = log_probabilities(task.model, judged.images)
        if (name, str(draw), "dense", "1") not in done:
            write(path, [name, draw, "dense", 1, 1, 1, *vars(verdict(dense, dense, judged.labels)).values(), 0, ""])
    kept = scores / (f"{name}-{draw}" if calibrate is None else f"{name}-{draw}-{calibrate}")
    for head, wanted in by_head.items():
        bar = tqdm(smaller(task, calibration.images, wanted, draw, kept), mininterval=10,
                   desc=f"{name}, draw {draw}, {head}", total=sum(map(len, wanted.values())))
        for found in bar:
            shares = macs(found.model, judged.images) / before[0], \
                sum(parameter.numel() for parameter in found.model.parameters()) / before[1]
            judgement = verdict(dense, log_probabilities(found.model, judged.images), judged.labels)
            write(path, [name, draw, found.method, f"{found.budget:g}", *(f"{value:.6g}" for value in (
                *shares, *vars(judgement).values())), f"{found.seconds:.3g}", found.note])


def write(path: Path, row: list[object]) -> None:
    """One row more, at once: processes may share a file."""
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="see benchmarks/recovery/images.py")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=f"of {'; '.join(METHODS)}")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--scores", type=Path, help="folder in which scores are kept (default: DATA/scores)")
    parser.add_argument("--calibrate", type=int, metavar="IMAGES", help="calibrate with so many of a draw's alone; "
                        "rows go to OUT/recovery-IMAGES.csv")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch_pruning")
    file = "recovery.csv" if options.calibrate is None else f"recovery-{options.calibrate}.csv"
    for draw in options.draws:
        for name in options.networks:
            measure(name, NETWORKS[name](options.data), draw, options.methods, options.budgets, options.out / file,
                    options.scores or options.data / "scores", options.again, options.device, options.calibrate)


if __name__ == "__main__":
    main()
