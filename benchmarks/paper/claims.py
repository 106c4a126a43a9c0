"""Claim by claim: how much more accuracy one way of scoring leaves than another.

    python -m benchmarks.paper.claims benchmarks/results/paper/fashion-mnist.csv

Writes DATASET-claims.md beside what `python -m benchmarks.paper` wrote. A difference is between two curves of the same
trained network and the same samples, each averaged over its 31 points: mean ± standard deviation over networks trained
(and samples drawn) apart, in percentage points. Where a claim is about a criterion whatever its gradient, the
difference is averaged over these.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.results import Key, Results, read
from benchmarks.paper.variants import ABLATION, BASELINES, IMPORTANCES, LAYERWISE

Way = tuple[str, bool]  # a variant's name, and whether its removed channels are compensated
Pair = tuple[Way, Way]  # this one less that one
GRADIENTS = ("", ":norm", ":random", ":random:norm")
BASE = ABLATION[0].name  # taylor-sq:random:norm


def _each(one: Callable[[str], str], other: Callable[[str], str], endings: Sequence[str]) -> list[Pair]:
    """The pairs of plain ways for each ending."""
    return [((one(ending), False), (other(ending), False)) for ending in endings]


def _topics() -> Iterator[tuple[str, str, list[tuple[str, list[Pair]]]]]:
    """(title, units, (what is compared, the pairs whose differences are averaged))."""
    yield "Absolute value and square against the older criteria", "norms", [
        (f"{better} − {older}", _each((better + "{}").format, (older + "{}").format, GRADIENTS))
        for better in ("taylor-abs", "taylor-sq") for older in ("taylor", "molchanov-bn", "molchanov-group")]
    yield "Random gradient against the loss's", "norms", [
        (f"{criterion}: random − loss", _each((criterion + ":random{}").format, (criterion + "{}").format,
                                               ("", ":norm")))
        for criterion in IMPORTANCES]
    yield "Normalised gradient against the plain one", "norms", [
        (f"{criterion}, {words}: normalised − plain", _each((criterion + "{}:norm").format, (criterion + "{}").format,
                                                            (ending,)))
        for criterion in IMPORTANCES for words, ending in (("loss", ""), ("random", ":random"))]
    yield "A channel's positions one by one against their sum", "norms", [
        (f"{criterion}, {words}: element − sum", _each((criterion + "{}:element").format, (criterion + "{}").format,
                                                       (ending,)))
        for criterion in ("taylor-abs", "taylor-sq")
        for words, ending in (("loss", ":norm"), ("random", ":random:norm"))]
    yield "Layers scaled against layers as they are", "norms", [
        (f"{variant.name} − {BASE}", [((variant.name, False), (BASE, False))]) for variant in LAYERWISE]
    yield "Compensation", "groups", [
        (f"{variant.name}: compensated − not", [((variant.name, True), (variant.name, False))])
        for variant in (*ABLATION, *BASELINES)]
    yield "Mean ablation against zero ablation", "groups", [
        (f"taylor-sq, {words}: mean − zero", [((f"{BASE}:mean-ablation", compensated), (BASE, compensated))])
        for words, compensated in (("not compensated", False), ("compensated", True))]
    yield "Both together, and against other criteria, all compensated", "groups", [
        (f"{BASE}:mean-ablation, compensated − {BASE}, not", [((f"{BASE}:mean-ablation", True), (BASE, False))]),
        *((f"{name} − {BASE}", [((name, True), (BASE, True))]) for name in (
            f"{BASE}:element", "taylor-abs:random:norm", *(variant.name for variant in (*LAYERWISE, *BASELINES))))]
    yield "Torch-Pruning's Taylor", "groups", [
        ("random − loss", [(("torch-pruning:random:norm", False), ("torch-pruning", False))]),
        (f"{BASE} − torch-pruning", [((BASE, False), ("torch-pruning", False))])]


def differences(results: Results, network: str, samples: int, units: str, pairs: Sequence[Pair]) -> Tensor | None:
    """Percentage points of mean accuracy, averaged over the pairs: [seeds]; None where a curve is missing."""
    found = []
    for one, other in pairs:
        keys = [Key(network, samples, units, *way) for way in (one, other)]
        if any(key not in results.runs for key in keys):
            return None
        means = [dict(zip(results.seeds[key], results.runs[key].mean(1).tolist(), strict=True)) for key in keys]
        found.append({seeds: 100 * (means[0][seeds] - means[1][seeds]) for seeds in means[0] if seeds in means[1]})
    common = [seeds for seeds in found[0] if all(seeds in values for values in found)]
    return torch.tensor([[values[seeds] for seeds in common] for values in found], dtype=torch.float64).mean(0) \
        if common else None


def cell(values: Tensor | None) -> str:
    """`+1.2 ± 0.3`"""
    return "" if values is None else f"{values.mean():+.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def tables(results: Results) -> Iterator[str]:
    """A Markdown table for each topic that there are curves for, and the gap to the whole training set."""
    samples = results.values("samples")
    heading = " | ".join(f"D = {count:,}" for count in samples) + " |"
    for title, units, comparisons in _topics():
        rows = []
        for words, pairs in comparisons:
            for network in results.values("network", units=units):
                found = [differences(results, network, count, units, pairs) for count in samples]
                if any(values is not None for values in found):
                    rows.append(f"| {words} | {network} | " + " | ".join(map(cell, found)) + " |")
        if rows:
            yield "\n".join([f"### {title}", "", f"| {'gates' if units == 'norms' else 'channel groups'} | | {heading}",
                             "|---|---" + "|---:" * len(samples) + "|", *rows])
    rows = []
    for criterion in IMPORTANCES:
        for network in results.values("network", units="norms"):
            found = [_gap(results, network, count, samples[-1], [criterion + ending for ending in GRADIENTS])
                     for count in samples[:-1]]
            if any(values is not None for values in found):
                rows.append(f"| {criterion} | {network} | " + " | ".join(map(cell, found)) + " |")
    if rows:
        yield "\n".join([f"### Few samples against {samples[-1]:,}", "",
                         "| gates | | " + " | ".join(f"D = {count:,}" for count in samples[:-1]) + " |",
                         "|---|---" + "|---:" * (len(samples) - 1) + "|", *rows])


def _gap(results: Results, network: str, few: int, many: int, variants: Sequence[str]) -> Tensor | None:
    """Percentage points that `few` samples lack (negative) against `many`, averaged over variants: [training seeds]."""
    found = []
    for variant in variants:
        means = []
        for count in (few, many):
            key = Key(network, count, "norms", variant, False)
            if key not in results.runs:
                return None
            by_training: dict[str, list[float]] = {}
            for (training, _), curve in zip(results.seeds[key], results.runs[key].mean(1).tolist(), strict=True):
                by_training.setdefault(training, []).append(curve)
            means.append({training: sum(values) / len(values) for training, values in by_training.items()})
        found.append(torch.tensor([100 * (means[0][training] - means[1][training])
                                   for training in sorted(means[0].keys() & means[1].keys())], dtype=torch.float64))
    return torch.stack(found).mean(0) if len({len(values) for values in found}) == 1 and len(found[0]) else None


def write(path: Path) -> Path:
    """The tables of a CSV, beside it."""
    file = path.with_name(f"{path.stem}-claims.md")
    file.write_text("Differences in mean test accuracy over the 31 points of a curve, percentage points, mean ± "
                    "standard deviation between networks.\n\n" + "\n\n".join(tables(read(path))) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+", help="what python -m benchmarks.paper wrote")
    for path in parser.parse_args().csv:
        print(write(path))


if __name__ == "__main__":
    main()
