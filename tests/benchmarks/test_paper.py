"""The paper's protocol: fast evaluation against forward hooks on the network as it was trained; curves read back.

The largest network with FASTSCORE_NIGHTLY=1 alone.
"""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomize
from thinned import NIGHTLY, thinned
from torch import Tensor, nn

import fastscore
from benchmarks.paper import __main__ as command
from benchmarks.paper import data, evaluation, figures, results, training
from benchmarks.paper.data import Images
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.protocol import EXPERIMENTS, FIELDS, KEY

SIZES = {"resnet20": (1, 28), "vgg6": (1, 28), "resnet18": (3, 64), "vgg19": (3, 32)}  # channels, width and height
EVALUATED = list(SIZES)[:None if NIGHTLY else -1]


def trained_like(name: str) -> tuple[nn.Module, Images]:
    """A network with weights and statistics far from their defaults, and 62 images, two for each point."""
    channels, size = SIZES[name]
    torch.manual_seed(0)
    model = randomize(NETWORKS[name](channels, 10)).eval()
    return model, Images(torch.randn(62, channels, size, size), torch.randint(10, (62,)))


def hooked(model: nn.Module, removed: Mapping[str, Tensor], means: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the untouched model computes with outputs of its BatchNorms set to zero or to their means, in float64."""
    def setting(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output.clone()
            for channel in removed[name].tolist():
                output[:, channel] = means[name][channel] if means else 0
            return output
        return hook

    handles = [model.get_submodule(name).register_forward_hook(setting(name)) for name in removed]
    with torch.no_grad():
        output = model.double()(x.double())
    model.float()
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize(("name", "compensate"), thinned(EVALUATED, [False, True]))
def test_masked_gates_are_what_hooks_on_the_batchnorms_make(name: str, compensate: bool) -> None:
    model, images = trained_like(name)
    x = images.images[:4]
    scores = fastscore.score(model, [x], units="norms", progress=False)
    evaluator = evaluation.Evaluator(model, images, "norms")
    draw = torch.Generator().manual_seed(1)
    removed = {group.name: torch.randperm(group.channels, generator=draw)[:group.channels // 4].sort().values
               for group in evaluator.groups}
    exact = hooked(model, removed, scores.means if compensate else {}, x)
    with torch.no_grad():
        fast = evaluator.without(removed, scores, compensate)(x)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    assert (hooked(model, {}, {}, x) - exact).abs().max() > 0.01 * exact.abs().max()


@pytest.mark.parametrize(("name", "compensate"), thinned(EVALUATED, [False, True]))
def test_removed_channels_are_what_the_mask_makes(name: str, compensate: bool) -> None:
    model, images = trained_like(name)
    x = images.images[:4]
    scores = fastscore.score(model, [x], importance="taylor-abs", progress=False)
    evaluator = evaluation.Evaluator(model, images, "groups")
    with torch.no_grad(), fastscore.mask(model, scores, 0.3, x, compensate=compensate) as removed:
        exact = model(x)
    with torch.no_grad():
        fast = evaluator.without(removed, scores, compensate)(x)
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def test_a_bias_that_other_code_reads_takes_no_means() -> None:
    class Read(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self[2].get_parameter("bias").square().sum())

    torch.manual_seed(0)
    model = Read(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 1, 9, 9)
    scores = fastscore.score(model, [x], progress=False)
    evaluator = evaluation.Evaluator(model, Images(x, torch.zeros(4).long()), "groups")
    with torch.no_grad(), fastscore.mask(model, scores, 0.3, x, compensate=True) as removed:
        exact = model(x)
    assert "0" in removed
    with torch.no_grad():
        torch.testing.assert_close(evaluator.without(removed, scores, True)(x), exact)


@pytest.mark.parametrize("units", ["norms", "groups"])
@pytest.mark.parametrize("stride", [1, 31])
def test_a_curve_is_what_masking_its_points_by_hand_gives(units: str, stride: int) -> None:
    model, images = trained_like("vgg6")
    scores = fastscore.score(model, [images.images[:4]], units=units, progress=False)
    rows = evaluation.Evaluator(model, images, units).curve(scores, stride=stride)
    total = sum(len(scores[layer]) for layer in scores)
    assert [row["removed"] for row in rows] == [int(total / 2 * point / 30 + 1e-9) for point in range(31)]
    assert sum(row["images"] for row in rows) == (62 * 31 if stride == 1 else 62)
    for point in (0, 7, 30):
        removed: dict[str, list[int]] = {}
        for layer, channel, _ in scores.ranking()[:rows[point]["removed"]]:
            removed.setdefault(layer, []).append(channel)
        part = Images(images.images[point % stride::stride], images.labels[point % stride::stride])
        norms = {layer if units == "norms" else _norm_behind(model, layer): torch.tensor(channels)
                 for layer, channels in removed.items()}
        right = hooked(model, norms, {}, part.images).argmax(1) == part.labels
        assert rows[point]["right"] == int(right.sum())


def _norm_behind(model: nn.Module, layer: str) -> str:
    """In a plain sequence, the BatchNorm follows its convolution, and zero stays zero up to the next."""
    return str(int(layer) + 1)


def test_the_papers_curves_have_the_means_of_its_table() -> None:
    """Means over the 31 points, % (arXiv 2310.20203)."""
    for dataset, network, variant, means in (("cifar100", "resnet56", "taylor", (15.6, 18.7, 17.3, 17.4)),
                                             ("cifar100", "vgg19", "taylor-sq:random:norm", (27.7, 39.6, 51.6, 48.3)),
                                             ("stl10", "resnet18", "molchanov-bn:norm", (35.4, 38.0, 52.2, 58.2))):
        paper = results.published(dataset, network)
        assert paper is not None
        found = [float(100 * paper.runs[results.Key(network, samples, "norms", variant, False)].mean())
                 for samples in paper.values("samples")]
        assert found == pytest.approx(means, abs=0.051)
    assert results.published("fashion-mnist", "resnet20") is None


def written(path: Path, seeds: int = 3) -> None:
    """Every curve of a network for two D, with accuracies that say which curve they are of."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for samples in ("100", "all"):
            for units, variants, kinds in EXPERIMENTS.values():
                for number, variant in enumerate(variants):
                    for compensated in kinds:
                        for seed in range(seeds):
                            for point in range(31):
                                right = 1000 - 10 * point + 20 * seed + number
                                writer.writerow(("fashion-mnist", "vgg6", seed, 0, samples, units, variant.name,
                                                 int(compensated), 7 * point, 448, right, 2000))


def test_curves_are_read_back_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist.csv"
    written(path)
    with path.open("a") as file:  # an interruption: a curve that is not whole, and a torn line
        file.write("fashion-mnist,vgg6,7,0,100,norms,taylor,0,0,448,9,2000\nfashion-mnist,vgg6,7,0,100,norms,taylor,0,7,44")
    found = results.read(path)
    runs = found.runs[results.Key("vgg6", 60000, "norms", "taylor", False)]
    expected = torch.tensor([[(1000 - 10 * point + 20 * seed) / 2000 for point in range(31)] for seed in range(3)])
    torch.testing.assert_close(runs, expected.double(), rtol=0, atol=1e-7)
    assert len(found.runs[results.Key("vgg6", 100, "norms", "taylor", False)]) == 3
    assert "| taylor | 43.5 ± 1.0 | 43.5 ± 1.0 |" in results.table(found, "vgg6", "norms")
    files = list(figures.draw(path))
    assert {file.name for file in files} == {f"fashion-mnist{ending}" for ending in (
        "-curves.png", "-samples.png", "-compensation.png", "-element.png", "-helped.png", ".md")}
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_file_without_a_whole_curve_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist.csv"
    path.write_text(",".join(FIELDS) + "\n")
    with pytest.raises(ValueError, match="no curve of 31 points"):
        results.read(path)


def test_only_whole_curves_count_as_done_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist.csv"
    assert command.complete(path) == set()
    written(path, seeds=1)
    whole = path.read_bytes()
    every = command.complete(path)
    assert len(every) == 2 * sum(len(variants) * len(kinds) for _, variants, kinds in EXPERIMENTS.values())
    last = tuple(whole.decode().splitlines()[-1].split(",")[:len(KEY)])
    path.write_bytes(whole[:-5])
    assert command.complete(path) == every - {last}
    assert whole.startswith(path.read_bytes())
    assert path.read_bytes().endswith(b"\n")


def test_the_command_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but for most variants, in this process, on images that are noise."""
    units, variants, kinds = EXPERIMENTS["compensation"]
    variants = variants if NIGHTLY else variants[:2]
    monkeypatch.setitem(EXPERIMENTS, "compensation", (units, variants, kinds))
    draw = torch.Generator().manual_seed(0)
    sets = [Images(torch.randn(size, 1, 28, 28, generator=draw), torch.randint(10, (size,), generator=draw))
            for size in (64, 62)]
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: data.DataSet("fashion-mnist", *sets, 10))
    monkeypatch.setattr(training, "trained", lambda *args, **kwargs: trained_like("vgg6")[0])
    pools: list[int] = []

    class Pool:
        """The part of multiprocessing's that is used."""

        def __init__(self, jobs: int, *initializer: Any) -> None:
            pools.append(jobs)

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        imap_unordered = staticmethod(map)

    monkeypatch.setattr(command.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": Pool}))
    monkeypatch.setattr("sys.argv", ["paper", "--data", "nowhere", "--networks", "vgg6", "--samples", "8", "--stride",
                                     "31", "--training-seeds", "0", "--jobs", "2", "--out", str(tmp_path),
                                     "--experiments", "compensation"])
    threads = torch.get_num_threads()
    try:
        command.main()
        path = tmp_path / "fashion-mnist.csv"
        whole = path.read_bytes().splitlines(keepends=True)
        assert len(whole) == 1 + 31 * len(variants) * len(kinds)
        path.write_bytes(b"".join(whole[:-40]) + whole[-40][:9])
        command.main()
        assert set(path.read_bytes().splitlines(keepends=True)) == set(whole)
        command.main()
        assert len(path.read_bytes().splitlines()) == len(whole) + 22  # the rows of one curve were there already
    finally:
        torch.set_num_threads(threads)
    assert pools == [2, 2, 2]
