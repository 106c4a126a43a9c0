"""The Trainer of transformers, run for real, with scores gathered on the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from events import logged
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import fastscore
from fastscore.cli import digits
from fastscore.integrations.transformers import ScoreCallback


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.3))
    return model


def samples(count: int = 20) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 40, (8,), generator=draw), "labels": torch.tensor(i % 3),
             "attention_mask": (torch.arange(8) < 5 + i % 4).long()} for i in range(count)]


def train(model: nn.Module, folder: Path, *callbacks: Any, data: Any = None, **options: Any) -> None:
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4,
        "num_train_epochs": 1, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "learning_rate": 0.01, **options})
    Trainer(model, arguments, train_dataset=data or samples(), callbacks=list(callbacks)).train()


def with_loss(model: nn.Module) -> fastscore.Scores:
    batch = {name: torch.stack([sample[name] for sample in samples()]) for name in ("input_ids", "attention_mask")}
    labels = torch.arange(20) % 3
    return fastscore.score(model, [batch], gradient="loss", progress=False,
                           loss=lambda output, batch: nn.functional.cross_entropy(output, labels))


def test_scores_of_a_training_are_those_of_its_samples(tmp_path: Path) -> None:
    """With a learning rate of zero the network stays what score() sees."""
    with SummaryWriter(str(tmp_path / "events")) as writer:
        model, callback = bert(), ScoreCallback(tmp_path / "scores.safetensors", writer=writer)
        train(model, tmp_path, callback, learning_rate=0.0)
    assert logged(tmp_path / "events") == {f"importance/{layer}": (5, len(callback.scores[layer]))
                                           for layer in callback.scores}
    whole, saved = with_loss(model), fastscore.Scores.load(tmp_path / "scores.safetensors")
    assert callback.scores.samples == saved.samples == 20
    assert set(callback.scores) == set(whole)
    for layer in whole:
        torch.testing.assert_close(callback.scores[layer], whole[layer], rtol=1e-4, atol=1e-9)
        assert torch.equal(saved[layer], callback.scores[layer])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_training_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    plain, scored = bert(), bert()
    train(plain, tmp_path)
    train(scored, tmp_path, ScoreCallback())
    assert not torch.equal(plain.classifier.weight, bert().classifier.weight)
    for ours, theirs in zip(scored.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_mixed_precision_accumulated_gradients_and_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    """The model's loss comes from its own logits, of which the wrapper for bfloat16 hands out a float32 copy."""
    model, callback = bert(), ScoreCallback()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    train(model, tmp_path, callback, learning_rate=0.0, bf16=True, gradient_accumulation_steps=2)
    whole = with_loss(model)
    assert callback.scores.samples == 20
    for layer in whole:
        assert float((callback.scores[layer] - whole[layer]).abs().max()) < 0.1 * float(whole[layer].max()), layer


def test_scores_of_a_vision_transformer_are_those_of_its_images(tmp_path: Path) -> None:
    """Real digits; with a learning rate of zero the network stays what score() sees."""
    torch.manual_seed(0)
    model, callback = ViTForImageClassification(ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=10, hidden_dropout_prob=0.0)), ScoreCallback()
    images, labels = (values[:20] for values in digits.Digits.split(0).train)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    train(model, tmp_path, callback, data=rows, learning_rate=0.0)
    whole = fastscore.score(model, [{"pixel_values": images}], gradient="loss", progress=False,
                            loss=lambda output, batch: nn.functional.cross_entropy(output, labels))
    assert callback.scores.samples == 20
    assert set(callback.scores) == set(whole)
    assert "vit.embeddings.patch_embeddings.projection" in whole
    for layer in whole:
        torch.testing.assert_close(callback.scores[layer], whole[layer], rtol=1e-4, atol=1e-9)


def test_random_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^gradient: 'random'"):
        ScoreCallback(gradient="random")
