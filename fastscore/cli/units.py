"""What a command says of the units that were asked for."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from fastscore.graph.heads.head_dims import HEAD_DIMENSIONS
from fastscore.graph.scored_units import WHOLE, among
from fastscore.modules.weights.experts import holds_experts
from fastscore.scoring.scores import Scores

# ending of a name -> what is said of what has it
_KEEPS = {HEAD_DIMENSIONS: "keeps whole heads", WHOLE["experts"]: "keeps all experts",
          WHOLE["blocks"]: "cannot go whole"}


@contextmanager
def told_here() -> Iterator[None]:
    """In the block, nothing warns of what `say` says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "units: .* has no mixture of experts")
        yield


def say(units: str, model: nn.Module, scores: Scores, tell: Callable[[str], None]) -> None:
    """Tell which units there are none of, and why some are kept."""
    modules = dict(model.named_modules())
    asked = among(units)
    alone = ", so channels alone can go" if len(asked) == 1 else ""
    if "blocks" in asked and all(len(scores[name]) > 1 for name in scores):
        tell(f"units: this model has no residual branch that can go whole{alone}")
    if "experts" in asked and not any(name in modules and holds_experts(modules[name]) for name in scores):
        tell(f"units: this model has no mixture whose experts can go whole{alone}")
    for name, reason in scores.skipped.items():
        for ending, keeps in _KEEPS.items():
            if name.endswith(ending):
                tell(f"units: {name.removesuffix(ending)} {keeps}: {reason}")
