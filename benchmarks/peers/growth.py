"""How the cost of a pass grows with the batch, the images' size, the depth, the probes and the taps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from benchmarks.peers.contestants import BASELINE, CONTESTANTS, fastscore_pass
from benchmarks.peers.measure import Row, compare
from benchmarks.peers.task import Prepare, Task

OURS = "fastscore, random"
PAIR: Mapping[str, Prepare] = {name: CONTESTANTS[name] for name in (BASELINE, OURS)}
FACTORS = {"batch": "images at a time", "size": "size of an image", "depth": "network", "probes": "probes",
           "taps": "layers tapped"}
MODEL, BATCH, SIZE = "resnet18", 8, 224
BATCHES = (1, 2, 4, 8, 16, 32)
SIZES = (64, 96, 128, 160, 224, 288)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101")
PROBES = (1, 2, 4, 8)
TAPPED = (0.1, 0.25, 0.5, 1.0)  # of the groups, those nearest to the output first


def tables(make: Callable[[str, int, int], Task], repeats: int, device: str) -> Iterator[tuple[str, Iterable[Row]]]:
    """(factor, rows of one of its values), factor by factor; whatever is not varied is MODEL, BATCH, SIZE.

    make: (model, images, size) -> the task.
    """
    def rows(factor: str, value: str, task: Task, pair: Mapping[str, Prepare] = PAIR) -> tuple[str, Iterable[Row]]:
        return factor, _rows(factor, value, task, pair, repeats, device)

    for batch in BATCHES:
        yield rows("batch", f"{batch}", make(MODEL, batch, SIZE))
    for size in SIZES:
        yield rows("size", f"{size}²", make(MODEL, BATCH, size))
    for model in DEPTHS:
        yield rows("depth", model, make(model, BATCH, SIZE))
    task = make(MODEL, BATCH, SIZE)
    for probes in PROBES:
        yield rows("probes", f"{probes}", task, {BASELINE: PAIR[BASELINE], OURS: fastscore_pass(probes=probes)})
    names = [group.name for group in task.graph.groups]
    for share in TAPPED:
        left_out = tuple(names[:len(names) - max(1, round(share * len(names)))])
        fewer = Task.of(task.model, task.images, task.labels, left_out)
        yield rows("taps", f"{len(fewer.layers)}", fewer)


def _rows(factor: str, value: str, task: Task, pair: Mapping[str, Prepare], repeats: int, device: str) -> Iterator[Row]:
    """The rows of one value of a factor, which stands where a model's name does."""
    contestants = {name: partial(prepare, task) for name, prepare in pair.items()}
    for name, figures in compare(contestants, BASELINE, repeats, device).items():
        yield Row(factor, value, name, len(task.images), task.images.shape[-1], **figures)
