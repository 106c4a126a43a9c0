"""All of it on real images that need no download: train, score without labels, prune to half, fine-tune, compare."""

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.cli import side_by_side
from fastscore.progress import bar, shown
from fastscore.pruning.budgets.costs import total_macs
from fastscore.pruning.prune import prune
from fastscore.scoring.engine import score
from fastscore.wording import counted

IMPORTANCES = {"fastscore": "taylor-sq", "magnitude": "magnitude-l2", "random": "random"}
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the MACs, what remains
TARGET = 0.5
EPOCHS, PEAK = 8, 0.05
FINE_TUNING_EPOCHS = 2
REPAIR_IMAGES = 512  # of the training images: all take twice as long, and repair within the same spread


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut around them: [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, inputs, H, W]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def network() -> nn.Sequential:
    """A ResNet of 3 blocks for grey 8x8 images: [N, 1, 8, 8] -> logits [N, 10]."""
    return nn.Sequential(OrderedDict(
        stem=nn.Conv2d(1, 32, 3, padding=1, bias=False), norm=nn.BatchNorm2d(32), relu=nn.ReLU(),
        block1=Residual(32, 32, 1), block2=Residual(32, 64, 2), block3=Residual(64, 128, 2),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(128, 10)))


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, split: images float32 [N, 1, 8, 8] in [0, 1], labels int64 [N]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def split(cls, seed: int) -> "Digits":
        """Two thirds to train on, one third to test on, drawn with `seed`."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits come with scikit-learn: pip install 'torch-fastscore[demo]'") from error
        images, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held_out = len(x) // 3
        return cls((x[order[held_out:]], y[order[held_out:]]), (x[order[:held_out]], y[order[:held_out]]))


@dataclass(frozen=True)
class Outcome:
    """What became of one network. accuracy is on test images: `before` and `after` fine-tuning, and `repaired`, by
    fastscore.prune(calibration=) on REPAIR_IMAGES of the training images without their labels.

    seconds: of training for the dense network, of scoring and pruning for the others. curve: accuracy before
    fine-tuning at each of SHARES, widths: layer -> share of its channels that remains at TARGET; the dense network's
    are empty.
    """

    before: float
    repaired: float
    after: float
    macs: int
    params: int
    seconds: float
    curve: tuple[float, ...]
    widths: dict[str, float]


@dataclass(frozen=True)
class Result:
    """Outcomes of every network: under "dense" and under each name in IMPORTANCES, in the same order."""

    outcomes: dict[str, list[Outcome]]
    train_images: int
    test_images: int

    def __str__(self) -> str:
        networks = len(self.outcomes["dense"])
        lines = [f"{counted(networks, 'network')}, each trained on {self.train_images:,} digits and "
                 f"tested on the other {self.test_images:,}" + ("; mean ± standard deviation" if networks > 1 else ""),
                 "",
                 f"{'':10} {'test accuracy':>14} {'repaired':>14} {'fine-tuned':>14} {'MACs':>11} {'parameters':>11} "
                 f"{'seconds':>8}"]
        for name, outcomes in self.outcomes.items():
            repaired, after = ("" if name == "dense" else _spread([getattr(outcome, stage) for outcome in outcomes])
                               for stage in ("repaired", "after"))
            macs, params, seconds = (statistics.mean(values) for values in zip(
                *((outcome.macs, outcome.params, outcome.seconds) for outcome in outcomes), strict=True))
            before = _spread([outcome.before for outcome in outcomes])
            lines.append(f"{name:10} {before:>14} {repaired:>14} {after:>14} {macs:>11,.0f} {params:>11,.0f} "
                         f"{seconds:>8.2f}")
        lines += ["", f"pruned to {TARGET:.0%} of the MACs; repaired on {REPAIR_IMAGES} of the training images, "
                  f"without labels; or fine-tuned for {FINE_TUNING_EPOCHS} epochs, with labels",
                  "seconds: training the dense network, scoring and pruning the others",
                  "; ".join(f"{name}: {importance}" for name, importance in IMPORTANCES.items())
                  + " (fastscore's alone sees images; none sees labels)"]
        return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f} %" if len(values) > 1 else f"{mean} %"


def run(networks: int = 5, seed: int = 0, epochs: int = EPOCHS, progress: bool = True) -> Result:
    """Train networks with seeds seed, seed + 1, ...; prune and fine-tune each by every criterion; measure.

    As many networks at once as PyTorch has threads, each in a process of its own. One thread each: images this small
    leave nothing to share out, and waiting for a second thread costs the more the busier it is.
    """
    rounds = networks * (epochs + len(IMPORTANCES) * (len(SHARES) + 1 + FINE_TUNING_EPOCHS))
    with shown(progress), bar("demo", " rounds", rounds) as told:
        found = side_by_side.each(partial(_network, epochs=epochs), range(seed, seed + networks),
                                  min(networks, torch.get_num_threads()), told.update)
    return replace(found[0], outcomes={name: [one for result in found for one in result.outcomes[name]]
                                       for name in found[0].outcomes})


def _network(seed: int, done: Callable[[], object], epochs: int) -> Result:
    """Of one network."""
    with _one_thread(), torch.random.fork_rng(devices=[]):
        digits = Digits.split(seed)
        torch.manual_seed(seed)
        model = network()
        outcomes = {"dense": [_train_dense(model, digits, epochs, done)]}
        for name, importance in IMPORTANCES.items():
            outcomes[name] = [_prune(model, importance, digits, seed, done)]
    return Result(outcomes, len(digits.train[0]), len(digits.test[0]))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_dense(model: nn.Module, digits: Digits, epochs: int, done: Callable[[], object]) -> Outcome:
    start = time.perf_counter()
    train(model, *digits.train, epochs, PEAK, done)
    seconds = time.perf_counter() - start
    correct = accuracy(model, *digits.test)
    return Outcome(correct, correct, correct, total_macs(model, digits.test[0][:1]),
                   sum(parameter.numel() for parameter in model.parameters()), seconds, (), {})


def _prune(model: nn.Module, importance: str, digits: Digits, seed: int, done: Callable[[], object]) -> Outcome:
    """Score on the training images, without their labels; prune to every share; fine-tune at TARGET."""
    images, labels = digits.train
    start = time.perf_counter()
    scores = score(model, images.split(256), importance=importance, seed=seed, progress=False)
    result = prune(model, scores, images[:1], macs=TARGET)
    seconds = time.perf_counter() - start
    before = accuracy(result.model, *digits.test)
    curve = []
    for share in SHARES:
        curve.append(before if share == TARGET else
                     accuracy(prune(model, scores, images[:1], macs=share).model, *digits.test))
        done()
    calibration = images[:REPAIR_IMAGES].split(256)
    smaller = prune(model, scores, images[:1], macs=TARGET, calibration=calibration).model
    repaired = accuracy(smaller, *digits.test)
    done()
    train(result.model, images, labels, FINE_TUNING_EPOCHS, 0.02, done)
    report = result.report
    after = accuracy(result.model, *digits.test)
    return Outcome(before, repaired, after, report.macs[1], report.params[1], seconds, tuple(curve),
                   {group.layer: group.channels[1] / group.channels[0] for group in report.groups})


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, peak: float,
          done: Callable[[], object]) -> None:
    """SGD with Nesterov momentum, batches of 64, the learning rate up to `peak` and down again; leaves evaluation mode.

    images: [N, ...]. labels: int64 [N]. done: called after each epoch.
    """
    model.to(memory_format=torch.channels_last)  # a fifth less time on a CPU
    optimizer = torch.optim.SGD(model.parameters(), peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64)[:batches]:  # the last few wait for another epoch
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        done()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, ...] that `model`, in evaluation mode, gives their labels [N]."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())
