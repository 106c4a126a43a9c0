"""Scores: one importance per channel, and what one does with them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fastscore import files, plots, tables
from fastscore.arguments import check_number
from fastscore.fastpath.plan import Plan
from fastscore.graph import scored_units
from fastscore.scoring import criteria as importances
from fastscore.scoring.coverage import Coverage
from fastscore.scoring.gradients import DISTRIBUTIONS
from fastscore.scoring.row_notes import row_notes
from fastscore.scoring.weights import WEIGHT_IMPORTANCES
from fastscore.wording import counted

_FORMAT = "fastscore-scores-3"
_TENSORS = ("totals", "means", "half_totals")  # the fields that a file holds as tensors


@dataclass(frozen=True)
class Origin:
    """How scores were made; scores are comparable, and can be merged, only where this is equal. See fastscore.score.

    gradient: "loss", "random", or "none" for a criterion that reads weights alone. distribution: of random gradients;
    "basis" for probes="exact". units: of several kinds, their names with + between them. sample_dims: what a sample is,
    an example (1) or a token (2). fingerprint: of the model's channel graph (see
    fastscore.graph.groups.ChannelGraph).
    Raises ValueError, naming the field, for what does not exist or does not go together.
    """

    importance: str
    reduction: str
    gradient: str
    normalize: bool
    seed: int
    distribution: str
    fingerprint: str
    units: str = "groups"
    ablation: str = "zero"
    layerwise: str = "none"
    center: bool = False
    sample_dims: int = 1

    def __post_init__(self) -> None:
        plain = (self.reduction, self.ablation) == ("sum", "zero")
        weights = plain and self.importance in WEIGHT_IMPORTANCES and self.gradient == "none"
        if not weights:
            importances.gradient_importance(self.importance, self.reduction, self.ablation)
        choices: dict[str, tuple[str, ...]] = {
            "gradient": ("none",) if weights else ("random", "loss"),
            "distribution": ("none",) if weights else DISTRIBUTIONS, "layerwise": tuple(importances.LAYERWISE)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        units = scored_units.among(scored_units.named(self.units))
        plain = self.importance.startswith("taylor") and self.ablation == "zero" and \
            not ("experts" in units and self.reduction == "element")
        if not plain and units.isdisjoint(("groups", "norms")):
            raise ValueError(f'units: "{self.units}" are gated whole, which importance={self.importance!r}, '
                             f'ablation={self.ablation!r}, reduction={self.reduction!r} says nothing of: use a taylor '
                             'importance with ablation="zero" and reduction="sum", or units="groups"')
        if self.sample_dims not in (1, 2):
            raise ValueError(f"sample_dims: {self.sample_dims!r}; it is 1 (each example is a sample) or 2 (each token "
                             "is)")


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor], tables.Table):
    """A mapping from a layer's qualified name to the importance of its output channels, float32 [C].

    Attributes:
        totals: Layer -> float64 [..., C], the running sums that the importances are made from.
        origin: How they were made.
        passes: Samples x probes in them (minibatches x probes for the molchanov criteria).
        samples: Samples seen.
        skipped: Layer -> why it has no score.
        means: Layer that reads channels (a BatchNorm, with units="norms") -> float64 [C_in], the mean of its input's
            (output's) channels over samples and the positions that it reads; [0] where it read nothing for some sample
            (a mixture's expert that no token chose); empty for criteria that measure none.
        half_totals, half_passes: Of every other sample; see `overlap`.
        zero_gradients: Samples x probes whose output gradient was zero throughout, which no scaling makes as long as
            the others (normalize=True). They count, with s = 0.
        plan: How the model was run, where fastscore.score did so; not saved.
        notes: What the caller says of where they come from (model, checkpoint, images, preprocessing); saved, and
            passed on to reports and pruned files. Merged scores keep what both say.
        coverage: The share of the network's MACs in layers that can shrink, and what keeps the others; None for
            units="norms", whose channels can be masked and not removed, and in files of before.
    """

    totals: Mapping[str, Tensor]
    origin: Origin
    passes: int = 1
    samples: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)
    half_totals: Mapping[str, Tensor] = field(default_factory=dict)
    half_passes: int = 0
    zero_gradients: int = 0
    plan: Plan | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    coverage: Coverage | None = None

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.totals:
            reason = self.skipped.get(layer)
            raise KeyError(f"{layer} has no score: {reason or 'list(scores) names the layers that do'}")
        return self._finished(self.totals[layer] / self.passes).float()

    def _finished(self, mean: Tensor) -> Tensor:
        """The importances that a mean over samples stands for, float64 [C]."""
        origin = self.origin
        row = importances.GRADIENT_IMPORTANCES.get((origin.importance, origin.reduction, origin.ablation))
        return importances.LAYERWISE[origin.layerwise](mean if row is None else row.finish(mean))

    def __iter__(self) -> Iterator[str]:
        return iter(self.totals)

    def __len__(self) -> int:
        return len(self.totals)

    def ranking(self) -> list[tuple[str, int, float]]:
        """(layer, channel, importance) of every channel, least important first; ties in order of layer and channel."""
        rows = [(layer, channel, value) for layer in self for channel, value in enumerate(self[layer].tolist())]
        return sorted(rows, key=lambda row: row[2])

    def overlap(self, fraction: float = 0.3) -> float:
        """How far the even and the odd samples agree on which channels to prune.

        Args:
            fraction: The share of channels that each half would prune, 0 < fraction < 1.

        Returns:
            The share of those channels that both halves name. 1 is full agreement; independent rankings would agree on
            `fraction`.

        Raises:
            ValueError: The fraction is outside (0, 1), or fewer than two samples were measured.
        """
        check_number("fraction", fraction, "0.3")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: {fraction}; it is the share of channels to remove, 0 < fraction < 1")
        if not 0 < self.half_passes < self.passes:
            raise ValueError("overlap: it takes two samples or more that were measured; its halves are of "
                             f"{counted(self.half_passes, 'pass', 'passes')} and "
                             f"{counted(self.passes - self.half_passes, 'pass', 'passes')}")
        halves = [torch.cat([self._finished(total / self.half_passes) for total in self.half_totals.values()]),
                  torch.cat([self._finished((self.totals[layer] - total) / (self.passes - self.half_passes))
                             for layer, total in self.half_totals.items()])]
        count = max(1, round(fraction * len(halves[0])))
        pruned = [set(half.argsort(stable=True)[:count].tolist()) for half in halves]
        return len(pruned[0] & pruned[1]) / count

    def merge(self, other: "Scores") -> "Scores":
        """The scores of both sets of samples together.

        Raises:
            ValueError: The two were not made the same way; the message says what differs.
            TypeError: `other` is no Scores.
        """
        if not isinstance(other, Scores):
            raise TypeError(f"other: {type(other).__name__}; give what fastscore.score returned")
        if self.origin != other.origin or list(self) != list(other):
            ours, theirs = asdict(self.origin), asdict(other.origin)
            differing = [f"{key} {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
            raise ValueError("other: scores made differently cannot be merged: "
                             f"{'; '.join(differing) or 'they cover other layers'}")
        if self.origin.gradient == "none":
            return self
        samples = self.samples + other.samples
        both = {layer: (mean, other.means[layer]) for layer, mean in self.means.items() if layer in other.means}
        means = {layer: (mean * self.samples + more * other.samples) / samples if mean.numel() and more.numel() else
                 mean.new_empty(0) for layer, (mean, more) in both.items()}
        return replace(self, totals=_added(self.totals, other.totals), passes=self.passes + other.passes,
                       samples=samples, means=means, half_totals=_added(self.half_totals, other.half_totals),
                       half_passes=self.half_passes + other.half_passes,
                       zero_gradients=self.zero_gradients + other.zero_gradients,
                       notes={name: text for name, text in self.notes.items() if other.notes.get(name) == text})

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: the totals, and a JSON header with origin, counts and a checksum."""
        tensors = {f"{kind}:{layer}": tensor.contiguous() for kind in _TENSORS
                   for layer, tensor in getattr(self, kind).items()}
        header = {"origin": asdict(self.origin), "passes": self.passes, "half_passes": self.half_passes,
                  "samples": self.samples, "zero_gradients": self.zero_gradients, "skipped": dict(self.skipped),
                  "notes": dict(self.notes), "tensors": list(tensors),
                  "coverage": None if self.coverage is None else asdict(self.coverage)}
        files.write(path, _FORMAT, header, tensors)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Scores":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            IsADirectoryError: It is a folder.
            ValueError: The file is foreign, truncated or altered.
        """
        header, tensors = files.read(path, _FORMAT, "score file", "score the model again")
        named = {kind: {key.removeprefix(f"{kind}:"): tensors[key] for key in header["tensors"]
                        if key.startswith(f"{kind}:")} for kind in _TENSORS}
        coverage = header.get("coverage")
        return cls(origin=Origin(**header["origin"]), passes=header["passes"], half_passes=header["half_passes"],
                   samples=header["samples"], zero_gradients=header["zero_gradients"], skipped=header["skipped"],
                   notes=header.get("notes", {}), coverage=None if coverage is None else Coverage(**coverage),
                   totals=named["totals"], means=named["means"], half_totals=named["half_totals"])

    def plot(self, path: str | PathLike[str], fraction: float = 0.0) -> None:
        """Draw each layer's distribution of importances, layers from input to output, to an image file.

        Args:
            path: Its suffix is the format: .png, .svg, .pdf.
            fraction: The lowest share of all channels is drawn in another colour, one of each layer aside: the cut at
                that budget, 0 <= fraction < 1.

        Raises:
            ValueError: The fraction is outside [0, 1), or the suffix is unknown.
            ImportError: There is no matplotlib: pip install 'torch-fastscore[plot]'.
        """
        plots.importances(self, path, fraction)

    def records(self) -> list[dict[str, Any]]:
        """A row for each layer: its channels, their least, median and greatest importance, and how many are zero."""
        rows = []
        for layer in self:
            values = self[layer]
            rows.append({"layer": layer, "channels": len(values), "min": float(values.min()),
                         "median": float(values.quantile(0.5)), "max": float(values.max()),
                         "zero": int((values == 0).sum())})
        return rows

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each channel: layer, channel, importance.

        Raises:
            ImportError: There is no pandas.
        """
        return tables.frame({"layer": layer, "channel": channel, "importance": value}
                            for layer in self for channel, value in enumerate(self[layer].tolist()))

    def log_histograms(self, writer: Any, step: int = 0) -> None:
        """Draw each layer's importances as a histogram of TensorBoard, called importance/LAYER.

        Args:
            writer: A torch.utils.tensorboard.SummaryWriter, or what else has its add_histogram(tag, values, step).
            step: Where they stand on its axis of steps.
        """
        for layer in self:
            writer.add_histogram(f"importance/{layer}", self[layer], step)

    def __str__(self) -> str:
        width = max([len("layer"), *map(len, self.totals)])
        made, *remarks = self._remarks
        lines = [made, f"{'layer':<{width}} {'channels':>8} {'min':>10} {'median':>10} {'max':>10} {'zero':>5}"]
        lines += [f"{row['layer']:<{width}} {row['channels']:>8} {row['min']:>10.3g} {row['median']:>10.3g} "
                  f"{row['max']:>10.3g} {row['zero']:>5}" for row in self.records()]
        return "\n".join([*lines, *remarks])

    def __repr__(self) -> str:
        channels = sum(total.shape[-1] for total in self.totals.values())
        return (f"<Scores: {self._made}; {counted(channels, 'channel')} of {counted(len(self), 'layer')}; "
                f"{counted(len(self.skipped), 'layer')} kept>")

    @property
    def _made(self) -> str:
        """How they were made, in short."""
        origin = self.origin
        gradient = "" if origin.gradient == "none" else \
            f", {origin.gradient} gradient{', normalized' if origin.normalize else ''}, " + \
            f"{counted(self.samples, 'sample')}, seed {origin.seed}"
        return f"{origin.importance} ({origin.reduction}, {origin.ablation} ablation) of {origin.units}{gradient}"

    @property
    def _remarks(self) -> list[str]:
        lines = [self._made, *self.row_notes, *([] if self.coverage is None else self.coverage.lines())]
        lines += [f"{layer}: kept ({reason})" for layer, reason in self.skipped.items()]
        if self.zero_gradients:
            lines.append(f"{counted(self.zero_gradients, 'output gradient was', 'output gradients were')} zero "
                         "throughout, which says nothing of any channel")
        return [*lines, *([self.all_zero] if self.all_zero else [])]

    @property
    def row_notes(self) -> tuple[str, ...]:
        """What rows of the table stand for, where that is not plain."""
        return row_notes(self.origin.units, {layer: total.shape[-1] for layer, total in self.totals.items()})

    @property
    def all_zero(self) -> str:
        """What to think of scores that are all zero; empty where some are not."""
        if not self or any(bool(self[layer].any()) for layer in self):
            return ""
        return f"every score of {counted(len(self), 'layer')} is 0: the order among them is arbitrary; are the " \
            "head's weights zero?"


def _added(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer: total + theirs[layer] for layer, total in ours.items()}
