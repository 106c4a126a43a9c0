"""Scores: one importance per channel, and what one does with them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastscore import importance as importances

_FORMAT = "fastscore-scores-1"


@dataclass(frozen=True)
class Origin:
    """How scores were made; scores are comparable, and can be merged, only where this is equal.

    gradient: "loss", "random", or "none" for a criterion that reads weights alone. fingerprint: of the model's channel
    graph (see fastscore.groups.ChannelGraph).
    """

    importance: str
    reduction: str
    gradient: str
    normalize: bool
    seed: int
    distribution: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """A mapping from a layer's qualified name to the importance of its output channels, float32 [C].

    totals: layer -> float64 [C], the running sums the importances are made from. passes: samples x probes in them.
    samples: samples seen. skipped: layer -> why it has no score.
    """

    totals: Mapping[str, Tensor]
    origin: Origin
    passes: int = 1
    samples: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.totals:
            reason = self.skipped.get(layer)
            raise KeyError(f"{layer} has no score: {reason or 'list(scores) names the layers that do'}")
        mean = self.totals[layer] / self.passes
        row = importances.GRADIENT_IMPORTANCES.get((self.origin.importance, self.origin.reduction))
        return (mean if row is None else row.finish(mean)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.totals)

    def __len__(self) -> int:
        return len(self.totals)

    def ranking(self) -> list[tuple[str, int, float]]:
        """(layer, channel, importance) of every channel, least important first; ties in order of layer and channel."""
        rows = [(layer, channel, value) for layer in self for channel, value in enumerate(self[layer].tolist())]
        return sorted(rows, key=lambda row: row[2])

    def merge(self, other: "Scores") -> "Scores":
        """The scores of both sets of samples together. Raises ValueError where the two were not made the same way."""
        if self.origin != other.origin or list(self) != list(other):
            ours, theirs = asdict(self.origin), asdict(other.origin)
            differing = [f"{key} {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
            raise ValueError("other: scores made differently cannot be merged: "
                             f"{'; '.join(differing) or 'they cover other layers'}")
        if self.origin.gradient == "none":
            return self
        totals = {layer: total + other.totals[layer] for layer, total in self.totals.items()}
        return replace(self, totals=totals, passes=self.passes + other.passes, samples=self.samples + other.samples)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: the totals, and a JSON header with origin, counts and a checksum."""
        totals = {layer: total.contiguous() for layer, total in self.totals.items()}
        header = {"origin": asdict(self.origin), "passes": self.passes, "samples": self.samples,
                  "skipped": dict(self.skipped), "layers": list(totals)}
        text = json.dumps(header)
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}; make it first")
        metadata = {"format": _FORMAT, "header": text, "sha256": _checksum(text, totals)}
        safetensors.torch.save_file(totals, str(path), metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Scores":
        """Read what `save` wrote. Raises ValueError for a file that is foreign, truncated or altered."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such score file")
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); score the model again") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a fastscore score file; write one with scores.save()")
        text = metadata.get("header", "")
        if _checksum(text, tensors) != metadata.get("sha256"):
            raise ValueError(f"{path}: its contents do not match its checksum; copy it or score the model again")
        header: dict[str, Any] = json.loads(text)
        return cls({layer: tensors[layer] for layer in header["layers"]}, Origin(**header["origin"]), header["passes"],
                   header["samples"], header["skipped"])

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw each layer's distribution of importances, layers from input to output, to an image file.

        Raises ImportError without matplotlib (pip install 'torch-fastscore[plot]').
        """
        from fastscore import plots

        plots.importances(self, path)

    def __str__(self) -> str:
        origin = self.origin
        gradient = "" if origin.gradient == "none" else \
            f", {origin.gradient} gradient{', normalized' if origin.normalize else ''}, {self.samples} samples"
        width = max([len("layer"), *map(len, self.totals)])
        lines = [f"{origin.importance} ({origin.reduction}){gradient}",
                 f"{'layer':<{width}} {'channels':>8} {'min':>10} {'median':>10} {'max':>10} {'zero':>5}"]
        for layer in self:
            values = self[layer]
            lines.append(f"{layer:<{width}} {len(values):>8} {values.min():>10.3g} {values.median():>10.3g} "
                         f"{values.max():>10.3g} {int((values == 0).sum()):>5}")
        lines += [f"{layer}: no score: {reason}" for layer, reason in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()
