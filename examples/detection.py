"""A model that returns several outputs: classes, boxes and objectness on two scales, as one-stage detectors have them.

    python examples/detection.py --macs 0.6
"""

import argparse
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Detector(nn.Module):
    """Two scales, each with a head for classes, boxes and objectness: [N, 3, H, W] -> dict of [N, ., H/s, W/s]."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 16, 2), block(16, 32, 2))
        self.low, self.high = block(32, 32), block(32, 64, 2)
        self.lateral = nn.Conv2d(64, 32, 1)
        self.heads = nn.ModuleDict({f"{name}_{scale}": nn.Conv2d(width, outputs, 1)
                                    for scale, width in (("low", 32), ("high", 64))
                                    for name, outputs in (("classes", classes), ("boxes", 4), ("objectness", 1))})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stem = self.stem(images)
        high = self.high(stem)
        low = self.low(stem) + F.interpolate(self.lateral(high), scale_factor=2.0)
        return {name: head(low if name.endswith("low") else high) for name, head in self.heads.items()}


def everything(model: nn.Module, images: Tensor) -> Tensor:
    """All outputs as one [N, K], so that scores weigh what each of them loses. What a network decodes afterwards (boxes
    above a threshold, NMS) has no gradient: stop at the heads."""
    returned: Mapping[str, Tensor] = model(images)
    return torch.cat([output.flatten(1) for output in returned.values()], 1)


def main(macs: float = 0.6, steps: int = 20) -> tuple[nn.Module, nn.Module, Tensor]:
    """Returns the dense network, the smaller one and images that neither scores nor repairs have seen."""
    torch.manual_seed(0)
    *batches, unseen = torch.randn(72, 3, 32, 32).split(8)  # yours, without labels
    # Yours, with its weights; this one, which was never trained, has no BatchNorm statistics yet.
    model = fastscore.recalibrate(Detector().eval(), batches)

    scores = fastscore.score(model, batches, forward=everything, progress=False)
    result = fastscore.prune(model, scores, batches[0][:2], macs=macs, forward=everything)
    print(result.report)
    # Boxes are no classes: what the dense network returns is learnt as it is. A thousand steps are the default.
    print(fastscore.distill(model, result, batches, steps=steps, loss=F.mse_loss, forward=everything, progress=False))
    with torch.no_grad():
        for (name, dense), small in zip(model(unseen).items(), result.model.eval()(unseen).values(), strict=True):
            error = float(((small - dense) ** 2).mean() / dense.var())
            print(f"{name:16} {list(small.shape)!s:18} squared error / variance {error:.3f}")
    return model, result.model, unseen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.6, help="share that remains (default: %(default)s)")
    main(parser.parse_args().macs)
