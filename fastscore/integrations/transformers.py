"""Hugging Face's transformers: their batches and outputs, and scores gathered while their Trainer trains."""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastscore.batches.parts import Batch, map_tensors
from fastscore.integrations.plain_transformers import save_pretrained
from fastscore.modules.inspection import device_of
from fastscore.rng import fork_rng
from fastscore.scoring.options import check_of_loss
from fastscore.scoring.scorer import Scorer
from fastscore.scoring.scores import Scores

__all__ = ["ScoreCallback", "forward", "save_pretrained"]


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What a model makes of a tokenizer's batch, without labels and caches, which scores have no use for.

    For fastscore.score and its kin, as forward=. Padding is told by attention_mask, see sample_dims of fastscore.score.

    Args:
        model: one of transformers.
        batch: name -> argument, as a tokenizer makes it.

    Returns:
        Its logits, or else its last hidden states.

    Raises:
        TypeError: a model that returns neither.
    """
    output = model(**_inputs(batch), **({"use_cache": False} if _caches(model) else {}))
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    raise TypeError(f"{type(model).__name__} returns {type(output).__name__}, which has neither logits nor "
                    "last_hidden_state: pass forward=lambda model, batch: <the tensor>")


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _caches(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "use_cache", False))


def _with_cache(model: nn.Module, batch: Mapping[str, Any]) -> Callable[[nn.Module], Any] | None:
    """The call that users make of a model that caches, which fewer channels must not break."""
    return (lambda model: model(**_inputs(batch))) if _caches(model) else None


forward.with_cache = _with_cache  # type: ignore[attr-defined]


class ScoreCallback(TrainerCallback):  # type: ignore[misc]
    """Scores every channel from the backward passes of trainer.train(), whose gradients stay what they were.

        callback = ScoreCallback("scores.safetensors")
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        callback.scores

    The scores are of the samples of this call of train(), those of all processes together. While training runs,
    `callback.scorer` has what was measured; after an exception, callback.scorer.detach() removes the taps.

    Args:
        path: where the scores are saved when training ends; None: nowhere.
        example_inputs: see fastscore.Scorer; by default a batch of the trainer's (give one where batches can be taken
            once only, from a stream).
        writer: a SummaryWriter of TensorBoard, for a histogram of importances for each layer when training ends.
        options: of fastscore.Scorer.

    Raises:
        ValueError: a gradient other than the loss's.
    """

    def __init__(self, path: str | PathLike[str] | None = None, *, example_inputs: Batch = None,
                 writer: Any = None, **options: Any) -> None:
        check_of_loss(options)
        self.path, self.example_inputs, self.writer, self.options = path, example_inputs, writer, options
        self.scorer: Scorer | None = None
        self.scores: Scores | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **others: Any) -> None:
        """Set the taps."""
        model: nn.Module = others["model"]
        device = device_of(model)
        example = self.example_inputs
        if example is None:
            with fork_rng(device):  # the order of the samples stays what it was
                example = next(iter(others["train_dataloader"]))
        self.scorer = Scorer(model, map_tensors(lambda tensor: tensor.to(device), example), **self.options)
        self.scorer.attach()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                     **others: Any) -> None:
        """Remove the taps; add up over processes; save."""
        assert self.scorer is not None
        self.scorer.detach()
        if args.world_size > 1:
            self.scorer.all_reduce()
        self.scores = self.scorer.scores()
        if not state.is_world_process_zero:
            return
        if self.path is not None:
            self.scores.save(self.path)
        if self.writer is not None:
            self.scores.log_histograms(self.writer, state.global_step)
