"""Ultralytics YOLO: score and prune without labels, then fine-tune by its own trainer, with labels.

    pip install ultralytics
    python examples/yolo.py --macs 0.8 --epochs 1

Ten pictures of coloured squares stand in for your data, and random weights for yours: YOLO("yolov8n.pt").
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("YOLO_AUTOINSTALL", "false")

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

import fastscore


def heads(model: nn.Module, images: Tensor) -> Tensor:
    """Boxes and classes before they are decoded, [N, 64 + classes, places]: what has a gradient."""
    raw = model(images)[1]
    return torch.cat([raw["boxes"], raw["scores"]], 1)


def write_data(folder: Path, size: int, count: int = 10) -> Path:
    """Pictures of one square each, red or blue, in the layout that ultralytics reads. Returns its data.yaml."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        kind, side = number % 2, size // 4
        top, left = (int(value) for value in torch.randint(0, size - side, (2,)))
        picture = torch.randint(0, 80, (3, size, size), dtype=torch.uint8)
        picture[2 * kind, top:top + side, left:left + side] = 255
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"images/{number}.png")
        middle = [(left + side / 2) / size, (top + side / 2) / size, side / size, side / size]
        (folder / f"labels/{number}.txt").write_text(f"{kind} {' '.join(map(str, middle))}\n")
    path = folder / "data.yaml"
    path.write_text(f"path: {folder.resolve()}\ntrain: images\nval: images\nnames: [red, blue]\n")
    return path


def main(macs: float = 0.8, epochs: int = 1, size: int = 64, out: str = "yolo") -> tuple[nn.Module, nn.Module, Path]:
    """Returns the dense network, the fine-tuned smaller one, and the file that ultralytics keeps it in."""
    torch.manual_seed(0)
    data = write_data(Path(out), size)
    dense = DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval()  # yours: YOLO("yolov8n.pt").model.eval()
    paths = sorted(Path(out, "images").glob("*.png"))
    images = torch.stack([pil_to_tensor(Image.open(path)) for path in paths]) / 255  # as its own loader makes them

    scores = fastscore.score(dense, images.split(2), forward=heads, progress=False)
    result = fastscore.prune(dense, scores, images[:2], macs=macs, forward=heads, progress=False)
    print(result.report)

    # Its trainer builds a network of the configuration, unless it is given one: the smaller one here.
    trainer = DetectionTrainer(overrides={
        "model": "yolov8n.yaml", "data": str(data), "imgsz": size, "epochs": epochs, "batch": 5, "device": "cpu",
        "workers": 0, "amp": False, "optimizer": "AdamW", "lr0": 0.001, "project": str(Path(out).resolve()),
        "name": "train", "exist_ok": True, "plots": False, "val": False})
    trainer.model = result.model
    trainer.train()
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (dense, trainer.model))
    print(f"{before:,} → {after:,} parameters; fine-tuned, for YOLO(...): {trainer.last}")
    return dense, trainer.model, trainer.last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.8, help="share that remains (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--out", default="yolo", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    main(arguments.macs, arguments.epochs, out=arguments.out)
