"""Lightning's Trainer, run for real, with scores gathered on the way."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from events import logged
from lightning.pytorch.loggers import TensorBoardLogger
from networks import NETWORKS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastscore
from fastscore.integrations.lightning import ScoreCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and cards


class Module(lightning.LightningModule):
    """Training as it is usually written: a network inside, or the module itself called."""

    def __init__(self, lr: float = 0.1, itself: bool = False, fail_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr, self.itself, self.fail_at = NETWORKS["flattening"].build(), lr, itself, fail_at

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        if number == self.fail_at:
            raise ZeroDivisionError("in the training step")
        x, labels = batch
        return F.cross_entropy(self(x) if self.itself else self.net(x), labels)

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Leave(lightning.Callback):
    """A process that ends while gloo's threads run is aborted now and then."""

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


DATA = TensorDataset(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 4)


def fit(module: Module, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> lightning.Trainer:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(**{
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1,
        "callbacks": list(callbacks), **options})
    trainer.fit(module, DataLoader(DATA, batch_size=6, shuffle=True), DataLoader(DATA, batch_size=20),
                ckpt_path=ckpt_path)
    return trainer


def with_loss(model: nn.Module) -> fastscore.Scores:
    return fastscore.score(model, [DATA.tensors], gradient="loss", progress=False)


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in module.modules())


@pytest.mark.parametrize(("network", "itself"), [("net", False), ("", True), ("net", True)])
def test_scores_of_a_fit_are_those_of_its_samples(network: str, itself: bool, tmp_path: Path) -> None:
    """With a learning rate of zero the network stays what score() sees."""
    callback = ScoreCallback(tmp_path / "scores.safetensors", network=network)
    module = Module(lr=0, itself=itself)
    fit(module, callback)
    assert hooks(module) == 0
    whole = with_loss(module.get_submodule(network))
    saved = fastscore.Scores.load(tmp_path / "scores.safetensors")
    assert list(callback.scores) == list(saved) == list(whole)
    assert callback.scores.samples == saved.samples == 20
    for layer in whole:
        torch.testing.assert_close(callback.scores[layer], whole[layer], rtol=1e-4, atol=1e-9)
        assert torch.equal(saved[layer], callback.scores[layer])


def test_a_trainer_that_logs_to_tensorboard_gets_histograms(tmp_path: Path) -> None:
    callback, logger = ScoreCallback(network="net"), TensorBoardLogger(tmp_path)
    trainer = fit(Module(), callback, logger=logger)
    logger.experiment.flush()
    assert logged(Path(logger.log_dir)) == {f"importance/{layer}": (trainer.global_step, len(callback.scores[layer]))
                                            for layer in callback.scores}


def test_training_is_bit_for_bit_the_same() -> None:
    plain, scored = Module(), Module()
    fit(plain, max_epochs=2)
    fit(scored, ScoreCallback(network="net"), max_epochs=2)
    for ours, theirs in zip(scored.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_mixed_precision_and_accumulated_gradients() -> None:
    callback, module = ScoreCallback(network="net"), Module(lr=0)
    fit(module, callback, precision="bf16-mixed", accumulate_grad_batches=2)
    whole = with_loss(module.net)
    assert callback.scores.samples == 20
    for layer in whole:
        assert float((callback.scores[layer] - whole[layer]).abs().max()) < 0.1 * float(whole[layer].max()), layer


def test_a_checkpoint_takes_the_totals_along(tmp_path: Path) -> None:
    first, second, whole = (ScoreCallback(network="net") for _ in range(3))
    trainer = fit(Module(lr=0), first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(Module(lr=0), second, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    fit(Module(lr=0), whole, max_epochs=2)
    half, resumed, once = first.scores, second.scores, whole.scores
    assert (half.samples, resumed.samples, once.samples) == (20, 40, 40)
    for layer in once:
        torch.testing.assert_close(resumed[layer], once[layer], rtol=1e-4, atol=1e-9)


def test_processes_are_added_up(tmp_path: Path) -> None:
    callback, module = ScoreCallback(tmp_path / "scores.safetensors", network="net"), Module(lr=0)
    fit(module, callback, Leave(), strategy="ddp_fork", devices=2)
    whole, saved = with_loss(module.net), fastscore.Scores.load(tmp_path / "scores.safetensors")
    assert saved.samples == 20
    for layer in whole:
        torch.testing.assert_close(saved[layer], whole[layer], rtol=1e-4, atol=1e-9)


def test_an_exception_in_training_removes_the_taps_and_leaves_what_was_measured() -> None:
    callback, module = ScoreCallback(network="net"), Module(fail_at=2)
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    assert hooks(module) == 0
    assert callback.scorer is not None
    assert callback.scorer.scores().samples == 12


def test_a_network_that_the_training_step_does_not_call_is_told() -> None:
    """It calls self.net(x); a scorer of the whole module would wait for self(x)."""
    with pytest.raises(RuntimeError, match=r"call the model itself"):
        fit(Module(), ScoreCallback())
    with pytest.raises(ValueError, match=r"^gradient: 'random'"):
        ScoreCallback(gradient="random")
