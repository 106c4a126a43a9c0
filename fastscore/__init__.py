"""fastscore: which channels of a trained network matter, without labels, and a smaller network without the rest."""

from fastscore import interrupts, ops  # noqa: F401 (interrupts first: it hears Ctrl-C while torch is imported)
from fastscore.pruning.compare import compare
from fastscore.pruning.curve import curve
from fastscore.pruning.iterative import IterativeResult, prune_iteratively
from fastscore.pruning.masking import mask
from fastscore.pruning.optimizers import rebuild_optimizer
from fastscore.pruning.prune import prune
from fastscore.pruning.report import PruneReport
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved.checkpoint import load_pruned, save_pruned
from fastscore.pruning.saved.export import save
from fastscore.recovery.distillation import distill
from fastscore.recovery.recalibration import recalibrate
from fastscore.recovery.reconstruct import reconstruct
from fastscore.scoring.engine import score
from fastscore.scoring.random_backward import random_backward
from fastscore.scoring.scorer import Scorer
from fastscore.scoring.scores import Scores

__all__ = ["IterativeResult", "PruneReport", "PruneResult", "Scorer", "Scores", "__version__", "compare", "curve",
           "distill", "load_pruned", "mask", "ops", "prune", "prune_iteratively", "random_backward",
           "rebuild_optimizer", "recalibrate", "reconstruct", "save", "save_pruned", "score"]
__version__ = "0.1.0"
