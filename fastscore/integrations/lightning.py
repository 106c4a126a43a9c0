"""Scores gathered while Lightning trains."""

from os import PathLike
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from fastscore.batches.parts import Batch
from fastscore.scoring.options import check_of_loss
from fastscore.scoring.scorer import Scorer
from fastscore.scoring.scores import Scores

__all__ = ["ScoreCallback"]


class ScoreCallback(Callback):  # type: ignore[misc]
    """Scores every channel from the backward passes of trainer.fit(), whose gradients stay bit for bit what they were.

        callback = ScoreCallback("scores.safetensors", network="net")
        lightning.Trainer(callbacks=[callback]).fit(module, loader)
        callback.scores

    The totals are part of Lightning's checkpoints, and those of all processes are added up at the end. While training
    runs, and after it stopped for an exception, `callback.scorer` has what was measured. Where the trainer logs to
    TensorBoard, it gets a histogram of importances for each layer when training ends.

    Args:
        path: where the scores are saved when training ends; None: nowhere.
        network: qualified name of the module that the training step calls, such as "net" for self.net(x); "" for
            self(x).
        example_inputs: see fastscore.Scorer; by default the first batch.
        options: of fastscore.Scorer.

    Raises:
        ValueError: a gradient other than the loss's.
    """

    def __init__(self, path: str | PathLike[str] | None = None, *, network: str = "", example_inputs: Batch = None,
                 **options: Any) -> None:
        check_of_loss(options)
        self.path, self.network, self.example_inputs, self.options = path, network, example_inputs, options
        self.scorer: Scorer | None = None
        self.scores: Scores | None = None
        self._state: dict[str, Any] | None = None  # of a checkpoint, until there is a scorer to go on from it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the taps before the first step."""
        if self.scorer is None:
            example = batch if self.example_inputs is None else self.example_inputs
            self.scorer = Scorer(pl_module.get_submodule(self.network), example, **self.options)
            if self._state is not None:
                self.scorer.load_state_dict(self._state)
            self.scorer.attach()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the taps; add up over processes; save."""
        if self.scorer is None:
            return
        self.scorer.detach()
        if trainer.world_size > 1:
            self.scorer.all_reduce()
        self.scores = self.scorer.scores()
        if self.path is not None and trainer.is_global_zero:
            self.scores.save(self.path)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                self.scores.log_histograms(logger.experiment, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the taps."""
        if self.scorer is not None:
            self.scorer.detach()

    def state_dict(self) -> dict[str, Any]:
        """The totals up to now, for Lightning's checkpoint."""
        return {"scorer": self._state if self.scorer is None else self.scorer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's totals."""
        self._state = state_dict["scorer"]
