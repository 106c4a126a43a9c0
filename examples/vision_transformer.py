"""Hugging Face's Trainer trains a ViT and scores it on the way; pruned and repaired, the same Trainer trains it on.

    python examples/vision_transformer.py --params 0.7 --out vit.safetensors

Real digits and a small ViT stand in for yours: AutoModelForImageClassification.from_pretrained(...).
"""

import argparse

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fastscore
from fastscore.cli import digits  # real images
from fastscore.integrations.transformers import ScoreCallback, forward


def network() -> ViTForImageClassification:
    """Sixteen tokens of 2 x 2 pixels."""
    return ViTForImageClassification(ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=10, hidden_dropout_prob=0.0))


def main(params: float = 0.7, epochs: int = 8, out: str = "vit.safetensors") -> dict[str, float]:
    """Returns test accuracies: dense, cut and repaired, trained on."""
    torch.manual_seed(0)
    data = digits.Digits.split(0)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(*data.train, strict=True)]

    def train(model: nn.Module, epochs: float, rate: float, *callbacks: ScoreCallback) -> None:
        arguments = TrainingArguments(
            "trainer", num_train_epochs=epochs, learning_rate=rate, per_device_train_batch_size=32, warmup_steps=20,
            use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()

    def accuracy(model: nn.Module) -> float:
        images, labels = data.test
        with torch.no_grad():
            return float((model.eval()(pixel_values=images).logits.argmax(1) == labels).float().mean())

    model = network()
    train(model, epochs, 5e-3)
    callback = ScoreCallback(out)
    train(model, 1, 1e-4, callback)  # scores of a network that is nearly trained; its gradients stay what they were

    batches = [{"pixel_values": images} for images in data.train[0].split(64)[:8]]
    result = fastscore.prune(model, callback.scores, batches[0], params=params, calibration=batches, repair="linear",
                             forward=forward, progress=False)
    print(result.report)
    found = {"dense": accuracy(model), "repaired": accuracy(result.model)}
    train(result.model, 2, 1.5e-3)  # a third of the first rate
    found["trained on"] = accuracy(result.model)
    fastscore.save_pruned(result, out)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=0.7, help="share that remains (default: %(default)s)")
    parser.add_argument("--out", default="vit.safetensors", help="default: %(default)s")
    arguments = parser.parse_args()
    for name, share in main(arguments.params, out=arguments.out).items():
        print(f"{name}: {share:.1%} of the test images")
    print(f"wrote {arguments.out}")
