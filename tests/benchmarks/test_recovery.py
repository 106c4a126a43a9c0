"""The recovery evidence on tiny networks and generated images: shortcuts, judgements, rows, tables, peers."""

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import randomize
from thinned import thinned
from torch import Tensor, nn

import fastscore
from benchmarks.paper.data import Images
from benchmarks.recovery import __main__ as command
from benchmarks.recovery import adapt, contestants, first_picture, images, judge, page, peers, resnet
from benchmarks.recovery.networks import Task


def small() -> nn.Module:
    """Two convolutions with BatchNorms and a classifier, with weights far from their defaults."""
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                                   nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))).eval()


def task(model: nn.Module | None = None) -> Task:
    draw = torch.Generator().manual_seed(0)
    data = Images(torch.randn(64, 3, 8, 8, generator=draw), torch.randint(5, (64,), generator=draw))
    return Task(model or small(), data, None, 32, 32, 16)


def test_a_resnets_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    block = resnet.Block(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)  # the branch adds nothing
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_a_checkpoint_is_read_as_it_comes_in_the_wild(tmp_path: Path) -> None:
    model = resnet.ResNet(8)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}, "best": 1.0},
               tmp_path / "wild.th")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(resnet.load(tmp_path / "wild.th", 8)(x), model.eval()(x))


def test_images_are_read_from_class_folders_once(tmp_path: Path) -> None:
    pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    for name in ("airplane", "truck"):
        folder = tmp_path / "cifar10-jpeg" / "test" / name
        folder.mkdir(parents=True)
        torchvision.io.write_jpeg(pixels, str(folder / "0.jpg"), quality=100)
    found, labels = images.cifar(tmp_path, "test")
    assert labels.tolist() == [0, 1]
    assert found.shape == (2, 3, 32, 32)
    (tmp_path / "cifar10-jpeg" / "test" / "truck" / "0.jpg").unlink()
    assert torch.equal(images.cifar(tmp_path, "test")[0], found)
    with pytest.raises(FileNotFoundError, match="0 of 1,000 images"):
        images.imagenet(tmp_path)


def test_a_draw_never_judges_by_what_calibrated() -> None:
    data = Images(torch.arange(50.).reshape(50, 1, 1, 1), torch.arange(50))
    first, rest = images.split(data, 1, 20)
    assert sorted([*first.labels.tolist(), *rest.labels.tolist()]) == list(range(50))
    assert not torch.equal(images.split(data, 2, 20)[0].labels, first.labels)


def test_a_verdict_is_what_its_words_say() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.25, 0.75], [0.6, 0.4], [0.7, 0.3]])
    found = judge.verdict(p.double().log(), q.double().log(), torch.tensor([1, 0, 1]))
    kl = sum(a * math.log(a / b) for row, other in zip(p.tolist(), q.tolist(), strict=True)
             for a, b in zip(row, other, strict=True)) / 3
    assert found.top1 == pytest.approx(2 / 3)
    assert found.agreement == pytest.approx(1 / 3)  # the first is a tie, which the dense network settles for class 0
    assert found.kl == pytest.approx(kl, rel=1e-6)


def test_macs_are_counted_as_fastscore_counts_them() -> None:
    subject = task()
    scores = fastscore.score(subject.model, subject.images.images.split(16), progress=False)
    result = fastscore.prune(subject.model, scores, subject.images.images[:1], macs=0.6)
    x = subject.images.images
    assert (peers.macs(subject.model, x), peers.macs(result.model, x)) == result.report.macs


@pytest.mark.parametrize(("criterion", "scope"), thinned(list(peers.CRITERIA), ["local", "global"]))
def test_torch_prunings_networks_keep_the_budgets(criterion: str, scope: str) -> None:
    subject = task()
    x = subject.images.images
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = dict(peers.smaller(subject.model, criterion, scope, x, 16, (0.8, 0.5)))
    dense = peers.macs(subject.model, x)
    assert list(found) == [0.8, 0.5]
    for budget, model in found.items():
        assert budget - 0.25 < peers.macs(model, x) / dense <= budget  # a channel is a twelfth here
        assert model(x).shape == (64, 5)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_pseudo_labels_are_the_networks_own() -> None:
    model, x = small(), task().images.images
    peers.pseudo_label_gradients(model, x, 10)
    in_batches = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    output = model(x)
    F.cross_entropy(output, output.argmax(1)).backward()
    for parameter, found in zip(model.parameters(), in_batches, strict=True):
        torch.testing.assert_close(parameter.grad, found)


def test_fewer_images_calibrate_and_the_same_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int | None, tuple[Path, torch.Tensor]] = {}
    rows: dict[int | None, str] = {}
    for count in (None, 7):
        monkeypatch.setattr(command, "smaller", lambda task, images, wanted, seed, kept, count=count:
                            given.update({count: (kept, images)}) or iter(()))
        path = tmp_path / f"{count}.csv"
        command.keys(path)
        command.measure("small", task(), 0, [contestants.DEFAULT], [0.8], path, tmp_path, calibrate=count)
        rows[count] = path.read_text()
    assert rows[None] == rows[7]  # the dense network, judged
    assert "dense" in rows[7]
    assert torch.equal(given[7][1], given[None][1][:7])
    assert [path.name for path, _ in given.values()] == ["small-0", "small-0-7"]


def test_rows_go_on_where_they_stopped_and_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "recovery.csv"
    methods = ["per MAC / mean", contestants.DEFAULT, "tp magnitude global", "tp magnitude global / recalibrated"]

    def measure(again: bool = False) -> list[dict[str, str]]:
        command.measure("small", task(), 0, methods, [0.8, 0.6], path, tmp_path / "scores", again)
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    command.keys(path)
    rows = measure()
    assert [row["method"] for row in rows] == ["dense", *methods[:2] * 2, *methods[2:] * 2]
    with path.open("a") as file:
        file.write("small,0,tp magn")  # torn
    assert measure() == rows
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert [row["method"] for row in measure()] == [row["method"] for row in rows]
    assert len(measure(again=True)) == 2 * len(rows)
    assert page.read(path)["small", contestants.DEFAULT, "0.6"].keys() == {"0"}


def test_what_is_there_without_batchnorm() -> None:
    plain = task(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)))
    names = contestants.applicable(plain, contestants.METHODS)
    assert contestants.DEFAULT in names
    assert not any("recalibrated" in name or "bn-scale" in name for name in names)


def write(path: Path, rows: list[tuple[str, int, str, str, float, float]]) -> Path:
    with path.open("w") as file:
        file.write(",".join(command.FIELDS) + "\n")
        for network, draw, method, budget, top1, kl in rows:
            file.write(f"{network},{draw},{method},{budget},{budget},1,{top1},{top1},{kl},1,\n")
    return path


def test_the_page_says_how_often_the_default_is_worse(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", [
        ("a", 0, "dense", "1", 0.9, 0), ("a", 0, page.DEFAULT, "0.8", 0.8, 0.2), ("a", 0, page.MEAN, "0.8", 0.7, 0.1),
        ("a", 1, page.DEFAULT, "0.8", 0.6, 0.3), ("a", 1, page.MEAN, "0.8", 0.5, 0.4),
        ("a", 0, "tp taylor local", "0.8", 0.3, 1), ("a", 0, "tp magnitude local", "0.8", 0.4, 1)])
    runs = page.read(path)
    assert page.worse(runs, "kl", -1) == (1, 2)
    assert page.worse(runs, "top1", 1) == (0, 2)
    text = page.page(runs)
    assert "kl: the default is worse than mean compensation alone in 1 of 2 cases" in text
    assert "| **per MAC / default** | 70.0 ± 14.1 |" in text
    best = page.curves(runs, "a")[page.BEST]
    assert best[1] == pytest.approx([40.0])
    assert "†" not in text.partition("##")[2]
    runs["a", page.DEFAULT, "0.8"]["1"]["older"] = 1.0
    assert page.worse(runs, "kl", -1) == (1, 1)
    assert "| **per MAC / default** | 70.0 ± 14.1 † |" in page.page(runs)
    page.draw(runs, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_adapting_fits_the_images(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    x: Tensor = torch.randn(64, 3, 16, 16, generator=draw) + (2.0 * labels - 1)[:, None, None, None]
    torch.manual_seed(0)
    model = resnet.ResNet(8)
    before = float(F.cross_entropy(model.eval()(x), labels))
    adapted = adapt.adapt(model, Images(x, labels), 8, 32, 0.05)
    assert not adapted.training
    assert float(F.cross_entropy(adapted(x), labels)) < before


def test_the_first_picture_draws_what_the_readme_says() -> None:
    with (first_picture.RESULTS / "recovery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    said = [next(top1 for share, top1 in first_picture.points(rows, "mobilenet_v2", method)
                 if share == pytest.approx(0.7, abs=1e-3)) for method, *_ in first_picture.LINES]
    readme = (first_picture.RESULTS.parents[2] / "README.md").read_text()
    repaired, cut, plain = (f"{top1:.1%}".replace("%", " %") for top1 in said)
    assert f"| **{repaired}** after the repair, {cut} before | {plain} by plain importance |" in readme
    dense = first_picture.points(rows, "mobilenet_v2", "dense")[0][1]
    assert f"MobileNetV2 at 0.7 of its MACs: ImageNet top-1, dense {100 * dense:.1f} % " in readme
