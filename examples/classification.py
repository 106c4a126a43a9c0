"""Your own DataLoader: score without labels, prune, repair, fine-tune, write ONNX.

    python examples/classification.py --macs 0.5 --out small.onnx
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastscore
from fastscore.cli import digits  # real images and a small ResNet; put yours in their place


def main(macs: float = 0.5, out: str = "small.onnx", epochs: int = 4) -> dict[str, float]:
    """Returns the test accuracy at each stage."""
    torch.manual_seed(0)
    data = digits.Digits.split(0)
    model = digits.network()
    digits.train(model, *data.train, epochs, 0.1, done=lambda: None)

    # What scores and repairs read: no shuffle, no random augmentation. Labels are there and never read.
    calibration = DataLoader(TensorDataset(*data.train), batch_size=64)
    scores = fastscore.score(model, calibration, samples=512, ablation="mean", progress=False)
    result = fastscore.prune(model, scores, data.train[0][:2], macs=macs, calibration=list(calibration)[:8])
    print(result.report)
    found = {"dense": digits.accuracy(model, *data.test), "repaired": digits.accuracy(result.model, *data.test)}

    # Its parameters are new objects, so the optimizer is, too; at a fifth of the dense network's peak rate.
    small = result.model.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for x, y in DataLoader(TensorDataset(*data.train), batch_size=64, shuffle=True):
        F.cross_entropy(small(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["fine-tuned"] = digits.accuracy(small.eval(), *data.test)

    fastscore.save(replace(result, model=small), data.train[0][:2], out)  # given the result, the file says what remains
    for stage, accuracy in found.items():
        print(f"{stage:10} {accuracy:6.1%}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.5, help="share that remains (default: %(default)s)")
    parser.add_argument("--out", default="small.onnx", help=".onnx, .pt2 or .safetensors (default: %(default)s)")
    arguments = parser.parse_args()
    main(arguments.macs, arguments.out)
    print(f"wrote {arguments.out}; where it comes from: fastscore info {arguments.out}")
