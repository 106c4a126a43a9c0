"""Scores: a mapping, a ranking, a file."""

import copy
import json
import os
import pickle
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from networks import NETWORKS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import fastscore
from fastscore import Scores

RESIDUAL = NETWORKS["residual"]


@pytest.fixture(scope="module")
def scores() -> Scores:
    return fastscore.score(RESIDUAL.traced(), [RESIDUAL.inputs()], ignore=["block2.conv1"], progress=False)


@pytest.fixture(scope="module")
def file(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "s.safetensors"
    scores.save(path)
    return path


def assert_equal(one: Scores, other: Scores) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[layer], other[layer]) for layer in one)
    assert all(torch.equal(one.totals[layer], other.totals[layer]) for layer in one)
    assert (one.origin, one.passes, one.samples, dict(one.skipped)) == \
        (other.origin, other.passes, other.samples, dict(other.skipped))


def test_a_mapping_from_layers_to_channels(scores: Scores) -> None:
    assert list(scores) == ["block1.conv1", "block2.conv2"]  # what block2.conv1 reads is kept, too
    assert len(scores) == 2
    assert "block1.conv1" in scores
    assert "block2.conv1" not in scores
    for layer, values in scores.items():
        assert values.dtype == torch.float32
        assert values.shape == (RESIDUAL.groups[layer].channels,)
    with pytest.raises(KeyError, match=r"block2\.conv1 has no score: ignored"):
        scores["block2.conv1"]
    with pytest.raises(KeyError, match="block9 has no score: list"):
        scores["block9"]


def test_ranking_is_every_channel_once_least_important_first(scores: Scores) -> None:
    ranking = scores.ranking()
    assert {(layer, channel) for layer, channel, _ in ranking} == \
        {(layer, channel) for layer in scores for channel in range(len(scores[layer]))}
    assert len(ranking) == sum(map(len, scores.values()))
    values = [value for _, _, value in ranking]
    assert values == sorted(values)
    for layer, channel, value in ranking:
        assert value == float(scores[layer][channel])


def test_ties_are_ranked_in_order_of_layer_and_channel() -> None:
    model = RESIDUAL.traced()
    for parameter in model.parameters():
        parameter.data.zero_()
    ranking = fastscore.score(model, [RESIDUAL.inputs()], importance="magnitude-l2", progress=False).ranking()
    assert [(layer, channel) for layer, channel, _ in ranking] == \
        [(layer, channel) for layer, spec in RESIDUAL.groups.items() for channel in range(spec.channels)]


def test_save_and_load(scores: Scores, file: Path, tmp_path: Path) -> None:
    assert_equal(Scores.load(file), scores)
    assert_equal(Scores.load(str(file)), scores)
    weights = fastscore.score(RESIDUAL.traced(), [RESIDUAL.inputs()], importance="magnitude-l2", progress=False)
    weights.save(tmp_path / "w.safetensors")
    assert_equal(Scores.load(tmp_path / "w.safetensors"), weights)
    Scores.load(file).save(tmp_path / "again.safetensors")
    assert_equal(Scores.load(tmp_path / "again.safetensors"), scores)


def test_copies_are_equal(scores: Scores) -> None:
    assert_equal(copy.deepcopy(scores), scores)
    assert_equal(pickle.loads(pickle.dumps(scores)), scores)


def test_loaded_scores_prune_and_merge(scores: Scores, file: Path) -> None:
    loaded = Scores.load(file)
    removed = [fastscore.prune(RESIDUAL.traced(), s, RESIDUAL.inputs(), channels=0.6).removed for s in (scores, loaded)]
    assert {layer: index.tolist() for layer, index in removed[0].items()} == \
        {layer: index.tolist() for layer, index in removed[1].items()}
    merged = loaded.merge(scores)
    assert merged.samples == 2 * scores.samples
    assert all(torch.equal(merged[layer], scores[layer]) for layer in scores)


@pytest.mark.parametrize("change", [{"importance": "taylor-abs"}, {"normalize": False}, {"seed": 1},
                                    {"reduction": "element"}, {"ignore": []}])
def test_scores_made_differently_cannot_be_merged(scores: Scores, change: dict[str, object]) -> None:
    other = fastscore.score(RESIDUAL.traced(), [RESIDUAL.inputs()], progress=False,
                            **{"ignore": ["block2.conv1"], **change})
    with pytest.raises(ValueError, match=r"^other: scores made differently cannot be merged: ."):
        scores.merge(other)


def test_scores_with_another_distribution_cannot_be_merged(scores: Scores) -> None:
    other = fastscore.score(RESIDUAL.traced(), [RESIDUAL.inputs()], ignore=["block2.conv1"], distribution="rademacher",
                            progress=False)
    with pytest.raises(ValueError, match="distribution"):
        scores.merge(other)


def test_scores_of_another_model_cannot_be_merged(scores: Scores) -> None:
    plain = NETWORKS["plain"]
    other = fastscore.score(plain.traced(), [plain.inputs()], progress=False)
    with pytest.raises(ValueError, match=r"^other: .*fingerprint"):
        scores.merge(other)


MADE = "taylor-sq (sum, zero ablation) of groups, random gradient, normalized, 4 samples, seed 0"


def test_printed(scores: Scores) -> None:
    text = str(scores)
    assert text.splitlines()[0] == MADE
    for layer, values in scores.items():
        (row,) = (line.split() for line in text.splitlines() if line.split()[0] == layer)
        assert int(row[1]) == len(values)
        for shown, value in zip(row[2:5], (values.min(), values.quantile(0.5), values.max()), strict=True):
            assert float(shown) == pytest.approx(float(value), rel=5e-3)
        assert int(row[5]) == int((values == 0).sum())
    assert "block2.conv1: kept (ignored" in text
    assert len(repr(scores).splitlines()) == 1
    assert repr(scores).startswith(f"<Scores: {MADE}; ")


def test_a_table_for_notebooks(scores: Scores) -> None:
    page = ElementTree.fromstring(f"<div>{scores._repr_html_()}</div>")
    cells = [[cell.text for cell in row.findall("td")] for row in page.findall("table/tbody/tr")]
    assert [row[0] for row in cells] == list(scores)
    for row, values in zip(cells, scores.values(), strict=True):
        assert float(row[3]) == pytest.approx(float(values.quantile(0.5)), rel=1e-3)
    assert "block2.conv1: kept (ignored" in "".join(note.text or "" for note in page.findall("p"))
    evil = Scores({"<b>": torch.ones(2, dtype=torch.float64)}, scores.origin, skipped={"<i>": "&"})
    assert "<b>" not in evil._repr_html_()
    assert "<i>" not in evil._repr_html_()


def test_a_frame_of_pandas(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    table = scores.to_pandas()
    assert list(table.columns) == ["layer", "channel", "importance"]
    for layer, values in scores.items():
        rows = table[table.layer == layer]
        assert rows.channel.tolist() == list(range(len(values)))
        assert torch.equal(torch.tensor(rows.importance.tolist()), values)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        scores.to_pandas()


def test_histograms_for_tensorboard(scores: Scores, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        scores.log_histograms(writer, step=7)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == [f"importance/{layer}" for layer in scores]
    for layer, values in scores.items():
        (event,) = events.Histograms(f"importance/{layer}")
        held = event.histogram_value
        assert (event.step, held.num) == (7, len(values))
        assert (held.min, held.max, held.sum) == pytest.approx(
            (float(values.min()), float(values.max()), float(values.double().sum())), rel=1e-5)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        Scores.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder; name a score file"):
        Scores.load(tmp_path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    for contents in (b"", b"\0", b"hello, world, this is no such file", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(4096),
                     b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match="foreign"):
            Scores.load(path)
    torch.save({"stem.0": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="foreign"):
        Scores.load(path)
    safetensors.torch.save_file({"stem.0": torch.ones(3, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match="not a fastscore score file"):
        Scores.load(path)
    safetensors.torch.save_model(nn.Linear(2, 2), str(path), {"format": "pt"})
    with pytest.raises(ValueError, match="not a fastscore score file"):
        Scores.load(path)


def test_every_truncation_is_noticed(file: Path, tmp_path: Path) -> None:
    contents = file.read_bytes()
    path = tmp_path / "short.safetensors"
    for size in range(0, len(contents), 3):
        path.write_bytes(contents[:size])
        with pytest.raises(ValueError, match=r"short\.safetensors"):
            Scores.load(path)
    path.write_bytes(contents + b"\0")
    with pytest.raises(ValueError, match=r"short\.safetensors"):
        Scores.load(path)


def test_every_flipped_bit_is_noticed(scores: Scores, file: Path, tmp_path: Path) -> None:
    """Each either raises, or (in padding, say) changes nothing. Every byte at night, every fifth otherwise."""
    contents = bytearray(file.read_bytes())
    places = range(0, len(contents), 1 if "FASTSCORE_NIGHTLY" in os.environ else 5)
    path = tmp_path / "flipped.safetensors"
    noticed = 0
    for place in places:
        for bit in (0, 5):
            contents[place] ^= 1 << bit
            path.write_bytes(contents)
            contents[place] ^= 1 << bit
            try:
                loaded = Scores.load(path)
            except ValueError as error:
                assert "flipped.safetensors" in str(error)  # noqa: PT017
                noticed += 1
            else:
                assert_equal(loaded, scores)
    assert noticed > 0.98 * 2 * len(places)


def test_a_file_of_a_later_format_is_not_misread(scores: Scores, file: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for change in ({"format": "fastscore-scores-99"}, {"header": json.dumps({"origin": {}})}, {"sha256": "0" * 64}):
        safetensors.torch.save_file(tensors, tmp_path / "s", {**metadata, **change})
        with pytest.raises(ValueError, match="s: "):
            Scores.load(tmp_path / "s")


def test_saving_to_a_folder_that_is_not_there(scores: Scores, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        scores.save(tmp_path / "nowhere" / "s.safetensors")


def test_plot(scores: Scores, tmp_path: Path) -> None:
    scores.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
