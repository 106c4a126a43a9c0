"""The ways of scoring that are compared: the paper's twenty, and further ones."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """See fastscore.score for the fields; importance "torch-pruning" is Torch-Pruning's Taylor (see helped.py)."""

    importance: str
    gradient: Literal["random", "loss"] = "loss"
    normalize: bool = False
    reduction: Literal["sum", "element"] = "sum"
    ablation: str = "zero"
    layerwise: str = "none"

    @property
    def name(self) -> str:
        """`taylor-sq:random:norm`, say, as in the paper's figures."""
        parts = {"random": self.gradient == "random", "norm": self.normalize, "element": self.reduction == "element",
                 "mean-ablation": self.ablation == "mean", f"by-layer-{self.layerwise}": self.layerwise != "none"}
        return ":".join([self.importance, *(word for word, holds in parts.items() if holds)])


IMPORTANCES = ("taylor", "molchanov-bn", "molchanov-group", "taylor-abs", "taylor-sq")
PAPER = tuple(Variant(importance, gradient, normalize) for importance in IMPORTANCES
              for gradient in ("loss", "random") for normalize in (False, True))
ELEMENT = tuple(Variant(importance, gradient, True, "element") for importance in ("taylor-abs", "taylor-sq")
                for gradient in ("loss", "random"))
LAYERWISE = tuple(Variant("taylor-sq", "random", True, layerwise=layerwise) for layerwise in ("l2", "mean"))
ABLATION = (Variant("taylor-sq", "random", True), Variant("taylor-sq", "random", True, ablation="mean"),
            Variant("taylor-abs", "random", True))
HELPED = (Variant("torch-pruning"), Variant("torch-pruning", "random", True))
# They read weights alone, and take the means for compensation from the others' pass.
BASELINES = tuple(Variant(importance) for importance in ("magnitude-l2", "bn-scale", "random"))
