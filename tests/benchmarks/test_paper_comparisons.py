"""What the paper's experiment compares further, on tiny networks: against fastscore's own or a closed form."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import output_changes
from test_paper import written
from torch import Tensor

import fastscore
from benchmarks.paper import agreement, claims, mobilenet, page, results, scoring, stopping, variance
from benchmarks.paper.data import Images
from benchmarks.paper.helped import torch_pruning_taylor
from benchmarks.paper.protocol import EXPERIMENTS
from benchmarks.paper.variants import ABLATION, BASELINES, HELPED, LAYERWISE
from fastscore.scoring.weights import WEIGHT_IMPORTANCES

NETWORK = NETWORKS["residual"]


def images(count: int, seed: int = 0) -> Images:
    draw = torch.Generator().manual_seed(seed)
    return Images(torch.randn(count, 3, 8, 8, generator=draw), torch.randint(4, (count,), generator=draw))


def close(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    assert set(found) == set(exact)
    for name, values in exact.items():
        assert values.abs().max() > 0
        assert (found[name] - values).abs().max() <= tolerance * values.abs().max(), name


@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
def test_variants_from_shared_passes_are_those_of_score(experiment: str) -> None:
    model, data = NETWORK.traced(dtype=torch.float32), images(40)
    units, variants, _ = EXPERIMENTS[experiment]
    found = scoring.score_variants(model, data, variants, units, seed=3)
    assert set(found) == {variant.name for variant in variants}
    batches = list(zip(data.images.split(32), data.labels.split(32), strict=True))
    for variant in variants:
        if variant in HELPED:
            labels = data.labels if variant.gradient == "loss" else None
            exact: Mapping[str, Tensor] = torch_pruning_taylor(model, data.images, labels, 32, 3)
        else:
            how: dict[str, Any] = {} if variant.importance in WEIGHT_IMPORTANCES else {
                "gradient": variant.gradient, "normalize": variant.normalize, "reduction": variant.reduction,
                "ablation": variant.ablation}
            exact = fastscore.score(model, batches, importance=variant.importance, units=units, seed=3, progress=False,
                                    layerwise=variant.layerwise, **how)
        close(found[variant.name], exact)
    if experiment == "compensation":
        assert all(scores.means for scores in found.values())  # type: ignore[attr-defined]


def test_agreement_of_rankings() -> None:
    one, other = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([2.0, 1, 4, 3, 9])
    assert agreement.spearman(one, one) == pytest.approx(1)
    assert agreement.spearman(one, -one) == pytest.approx(-1)
    assert agreement.spearman(one, other) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert [agreement.overlap(one, other, share) for share in (0.2, 0.4, 0.6)] == pytest.approx([0, 1, 2 / 3])


@pytest.fixture(scope="module")
def basis() -> Mapping[str, Tensor]:
    """What the outputs change by in the passes of one basis."""
    model, x = NETWORK.traced(), NETWORK.inputs(5)
    u = variance.output_changes(model, x, batch=2)
    for name, spec in NETWORK.groups.items():
        torch.testing.assert_close(u[name], output_changes(model, spec, x).transpose(1, 2), rtol=1e-9, atol=1e-12)
    return u


@pytest.mark.parametrize(("distribution", "center", "probes"), list(variance.ways(4)))
def test_one_basis_of_passes_holds_every_random_gradient(basis: Mapping[str, Tensor], distribution: str, center: bool,
                                                         probes: int) -> None:
    model, x, u = NETWORK.traced(), NETWORK.inputs(5), basis
    if distribution == "basis":
        probes, how = next(iter(u.values())).shape[1], {"probes": "exact"}
    else:
        how = {"probes": probes, "distribution": distribution}
    ids = fastscore.fingerprints.sample_ids(x)  # type: ignore[attr-defined]
    found = {name: variance.importance(part, ids, distribution, center, probes, seed=2) for name, part in u.items()}
    close(found, fastscore.score(model, [x], center=center, seed=2, progress=False, **how))  # type: ignore[arg-type]


def test_variance_is_measured_drawn_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORK.traced(dtype=torch.float32)
    classes = model(images(1).images).shape[1]
    monkeypatch.setattr(variance, "HALVES", (4, 8))
    monkeypatch.setattr(variance, "CURVE_SAMPLES", 8)
    monkeypatch.setattr(variance, "CURVES", {("normal", 1), ("rademacher", 1), ("basis", classes)})
    rows = list(variance.measure(model, images(16), images(31, 1), (4, 8), 2))
    assert len(rows) == 2 * 2 * len(list(variance.ways(classes)))
    assert all(0 <= float(row["overlap"]) <= 1 and -1 <= float(row["spearman"]) <= 1 for row in rows)
    assert {row["distribution"] for row in rows if row["accuracy"]} == {"normal", "rademacher", "basis"}
    path = tmp_path / "variance.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, variance.FIELDS)
        writer.writeheader()
        writer.writerows({"network": "tiny", "training_seed": 0, **row} for row in rows)
    drawing, tables = variance.draw(path)
    assert drawing.stat().st_size > 1000
    of_normal = torch.tensor([float(row["overlap"]) for row in rows if (
        row["distribution"], row["center"], row["samples"], row["probes"]) == ("normal", 0, 4, 1)], dtype=torch.float64)
    assert f"| tiny, normal | {100 * of_normal.mean():.1f} ± {100 * of_normal.std():.1f} |" in tables.read_text()


def test_stopping_early_against_all(tmp_path: Path) -> None:
    model, train, test = NETWORK.traced(dtype=torch.float32), images(160), images(31, 1)
    way = list(stopping.on_the_way(model, train.images, 1))
    assert [scores.samples for scores in way] == [32, 64, 128, 160]
    whole = fastscore.score(model, train.images.split(32), seed=1, progress=False)
    close(way[-1], whole, 1e-5)
    assert way[-1].overlap() == whole.overlap()
    rows = list(stopping.measure(model, train, test, [0, 1]))
    assert [row["kind"] for row in rows] == ["way", "way", "way", "all", "auto", "auto"]
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    auto = fastscore.score(model, train.images[order].split(32), samples="auto", progress=False)
    assert rows[4]["samples"] == auto.samples
    assert rows[4]["overlap_of_halves"] == f"{auto.overlap(0.3):.4f}"
    path = tmp_path / "stopping.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, stopping.FIELDS)
        writer.writeheader()
        writer.writerows({"network": "tiny", "training_seed": 0, **row} for row in rows)
    drawing, tables = stopping.draw(path)
    assert drawing.stat().st_size > 1000
    assert f"| {100 * float(rows[3]['accuracy']):.1f} |" in tables.read_text()


def test_agreement_with_the_dense_network(tmp_path: Path) -> None:
    uniform, sure = torch.full((2, 4), 0.25).log(), torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]).clamp(min=1e-9).log()
    same, kl = mobilenet.agreement(sure, uniform)
    assert (same, kl) == pytest.approx((0.5, torch.tensor(4.0).log().item()), abs=1e-6)
    model, data = NETWORK.traced(dtype=torch.float32).eval(), images(16)
    scores = mobilenet.scored(model, data.images, (*ABLATION[:2], BASELINES[0]), 0)
    assert all(found.means for found in scores.values())
    rows = list(mobilenet.measure(model, scores, data.images, (0.1, 0.4), 0))
    dense = model(data.images).detach()
    for row in rows:
        share = row["removed"] / row["channels"]  # type: ignore[operator]
        with torch.no_grad(), fastscore.mask(model, scores[str(row["variant"])], share, data.images[:1],
                                             compensate=bool(row["compensated"])):
            masked = model(data.images)
        same = (masked.argmax(1) == dense.argmax(1)).double().mean()
        assert row["agreement"] == f"{same:.4f}"
    path = tmp_path / "mobilenet.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, mobilenet.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    drawing, tables = mobilenet.draw(path)
    assert drawing.stat().st_size > 1000
    assert f"| {100 * float(str(rows[0]['agreement'])):.0f} ({float(str(rows[0]['kl'])):.2f}) |" in tables.read_text()


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such_package/image\.png is not installed"):
        mobilenet.packaged("no_such_package/image.png")


def test_claims_are_differences_of_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist.csv"
    written(path)  # right: 1000 - 10 · point + 20 · seed + the variant's number, of 2000
    units, variants, _ = EXPERIMENTS["paper"]
    number = {variant.name: index for index, variant in enumerate(variants)}
    gained = sum(number[f"taylor-sq{ending}"] - number[f"taylor{ending}"] for ending in claims.GRADIENTS) / 4 / 20
    text = claims.write(path).read_text()
    assert f"| taylor-sq − taylor | vgg6 | {gained:+.1f} ± 0.0 | {gained:+.1f} ± 0.0 |" in text
    assert "| taylor-sq:random:norm: compensated − not | vgg6 | +0.0 ± 0.0 |" in text
    found = results.read(path)
    few = claims.differences(found, "vgg6", 100, units, [((LAYERWISE[0].name, False), (claims.BASE, False))])
    assert few is not None
    assert few.tolist() == pytest.approx([(number[LAYERWISE[0].name] - number[claims.BASE]) / 20] * 3)
    missing = [(("nothing", False), (claims.BASE, False))]
    assert claims.differences(found, "vgg6", 100, units, missing) is None
    for heading in ("Few samples against 60,000", "Torch-Pruning's Taylor"):
        assert f"### {heading}" in text


def test_the_page_holds_the_tables_that_the_commands_wrote() -> None:
    text = page.PAGE.read_text()
    assert page.refreshed(text) == text
    assert text.count("<!-- ") >= 5


def test_the_tables_are_those_of_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist.csv"
    path.write_bytes((page.RESULTS / path.name).read_bytes())
    assert claims.write(path).read_text() == (page.RESULTS / "fashion-mnist-claims.md").read_text()


def test_a_page_without_its_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.md").write_text("### One\n\n| a |\n|---|\n\n### Two\n\n| b |\n|---|\n")
    assert page.refreshed("x\n<!-- t.md: Two -->\n| old |\n| old |\n\ny\n", tmp_path) \
        == "x\n<!-- t.md: Two -->\n| b |\n|---|\n\ny\n"
    assert page.refreshed("<!-- t.md -->\n", tmp_path) == "<!-- t.md -->\n| a |\n|---|\n"
    with pytest.raises(ValueError, match="no table below the heading 'Three'"):
        page.refreshed("<!-- t.md: Three -->\n", tmp_path)
