"""fastscore: which channels of a trained network matter, without labels, and a smaller network without the rest."""

from fastscore import ops
from fastscore.engine import score
from fastscore.iterative import IterativeResult, prune_iteratively
from fastscore.masking import mask
from fastscore.optimizers import rebuild_optimizer
from fastscore.prune import PruneResult, prune
from fastscore.prune_report import PruneReport
from fastscore.pruned_files import load_pruned, save_pruned
from fastscore.random_backward import random_backward
from fastscore.scorer import Scorer
from fastscore.scores import Scores

__all__ = ["IterativeResult", "PruneReport", "PruneResult", "Scorer", "Scores", "load_pruned", "mask", "ops", "prune",
           "prune_iteratively", "random_backward", "rebuild_optimizer", "save_pruned", "score"]
