"""A run that was stopped goes on, and ends with the scores of one that was not; no file misleads it."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from started import environment
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore import Scorer, Scores, files
from fastscore.scoring import options as scoring_options
from fastscore.scoring import run_file, runs
from fastscore.scoring.options import Checkpoint

RESIDUAL = NETWORKS["residual"]
BATCHES = RESIDUAL.inputs(11).split(3)


@pytest.fixture(autouse=True)
def _every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each batch, however long it takes."""
    monkeypatch.setattr(run_file, "SHARE", float("inf"))


def score(batches: Any = BATCHES, model: nn.Module | None = None, **options: Any) -> Scores:
    return fastscore.score(RESIDUAL.traced() if model is None else model, batches, progress=False, **options)


def stopped(after: int, by: type[BaseException] = RuntimeError) -> Iterator[Tensor]:
    """Batches, of which the next after so many does not come."""
    yield from BATCHES[:after]
    raise by("stopped")


def stop(path: Any, after: int = 2, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        score(stopped(after), resume=path, **options)


def assert_same_bits(one: Scores, other: Scores) -> None:
    for kind in ("totals", "means", "half_totals"):
        ours, theirs = getattr(one, kind), getattr(other, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for count in ("origin", "passes", "half_passes", "samples", "zero_gradients", "skipped"):
        assert getattr(one, count) == getattr(other, count)


def test_killed_time_and_again(tmp_path: Path) -> None:
    """SIGKILL, in a process of its own: at 6 random moments (FASTSCORE_NIGHTLY=1: 14) and at 6 in the middle of writing
    the file."""
    kills = 20 if "FASTSCORE_NIGHTLY" in os.environ else 12
    said = json.loads(subprocess.check_output([sys.executable, "-m", "killed", str(tmp_path), str(kills), "0",
                                              "score"], env=environment(), cwd=tmp_path))
    assert len(said["stood at"]) == kills
    assert len(set(said["stood at"])) > 3
    assert said["ended at"] == 8 * kills
    assert said["same"]
    assert {path.name for path in tmp_path.iterdir()} == {"log", "whole", "resumed", "s.ckpt"}


@pytest.mark.parametrize(("options", "after"), thinned(
    [{}, {"probes": 3, "distribution": "orthogonal"}, {"ablation": "mean"}, {"importance": "molchanov-bn"},
     {"importance": "molchanov-group"}, {"units": "norms"}, {"reduction": "element"}, {"samples": 10},
     {"fixed_order": True}, {"gradient": "loss", "loss": lambda output, batch: output.square().sum()}], [1, 3]))
def test_stopped_by_an_error(tmp_path: Path, options: dict[str, Any], after: int) -> None:
    stop(tmp_path / "s.ckpt", after, **options)
    assert_same_bits(score(resume=tmp_path / "s.ckpt", **options), score(**options))


def test_an_interrupt_within_a_batch_counts_none_of_it(tmp_path: Path) -> None:
    """However far the batch has come: at each of its calls into the totals, and in the middle of the forward pass."""
    calls = []

    def interrupt(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(len(batch))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return model(batch)

    stop_at = 0
    whole = score(forward=interrupt)
    first = len(calls) - len(BATCHES)
    for stop_at in range(first + 1, first + 4):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            score(forward=interrupt, resume=tmp_path / f"{stop_at}.ckpt")
        calls.clear()
        if stop_at > first + 1:
            assert files.read_state(tmp_path / f"{stop_at}.ckpt", runs.FORM, "", "")["done"] == stop_at - first - 1
        stop_at = 0
        assert_same_bits(score(forward=interrupt, resume=tmp_path / f"{first + 1}.ckpt"), whole)


def test_an_interrupt_between_two_probes_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(probes=3)
    original = fastscore.scoring.totals.Totals.add
    passes = []

    def add(self: Any, *arguments: Any, **options: Any) -> Any:
        returned = original(self, *arguments, **options)
        passes.append(self)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return returned

    with monkeypatch.context() as patch:
        patch.setattr(fastscore.scoring.totals.Totals, "add", add)
        with pytest.raises(KeyboardInterrupt):
            score(resume=tmp_path / "s.ckpt", probes=3)
    assert_same_bits(score(resume=tmp_path / "s.ckpt", probes=3), whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "s.ckpt"
    whole = score(resume=path)
    contents = path.read_bytes()
    assert_same_bits(score(resume=str(path)), whole)
    assert path.read_bytes() == contents
    assert [file.name for file in tmp_path.iterdir()] == ["s.ckpt"]


def test_more_batches_than_before(tmp_path: Path) -> None:
    score(BATCHES[:2], resume=tmp_path / "s.ckpt")
    assert_same_bits(score(resume=tmp_path / "s.ckpt"), score())


def test_as_many_samples_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_options, "AUTO_LEAST", 4)
    batches = RESIDUAL.inputs(64).split(2)
    whole = score(batches, samples="auto", agreement=(0.3, 0.5))
    assert 4 <= whole.samples < 64

    def some() -> Iterator[Tensor]:
        yield from batches[:1]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        score(some(), samples="auto", agreement=(0.3, 0.5), resume=tmp_path / "s.ckpt")
    for _ in range(2):
        assert_same_bits(score(batches, samples="auto", agreement=(0.3, 0.5), resume=tmp_path / "s.ckpt"), whole)


def test_only_when_stopped(tmp_path: Path) -> None:
    path = tmp_path / "s.ckpt"
    path.write_text("not a checkpoint")
    score(resume=Checkpoint(path, only_when_stopped=True))
    assert path.read_text() == "not a checkpoint"
    stop(Checkpoint(path, only_when_stopped=True))
    assert_same_bits(score(resume=path), score())


def test_saving_takes_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a batch takes 10, saving 10, so that 50 go by between one save and the next."""
    now, saves = [0.0], []
    monkeypatch.setattr(run_file, "SHARE", 0.02)
    monkeypatch.setattr(run_file.time, "monotonic", lambda: now[0])
    original = files.write_state

    def write_slowly(*arguments: Any) -> None:
        saves.append(now[0])
        now[0] += 10
        original(*arguments)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        now[0] += 10
        return model(batch)

    monkeypatch.setattr(files, "write_state", write_slowly)
    score([RESIDUAL.inputs(2)] * 110, RESIDUAL.traced(), resume=tmp_path / "s.ckpt", forward=forward,
          ignore=["block2"])
    assert [after - before - 10 for before, after in itertools.pairwise(saves)][:2] == [500, 500]


class TestRefused:
    """What is not the run that was stopped, or not whole, is named, and nothing is changed."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        stop(tmp_path / "s.ckpt")
        return tmp_path / "s.ckpt"

    def refused(self, path: Path, match: str, batches: Any = BATCHES, model: nn.Module | None = None,
                **options: Any) -> None:
        before, model = path.read_bytes(), RESIDUAL.traced() if model is None else model
        with untouched(model), pytest.raises(ValueError, match=match):
            score(batches, model, resume=path, **options)
        assert path.read_bytes() == before

    def test_other_weights(self, path: Path) -> None:
        self.refused(path, r"^resume: .*s\.ckpt is of another run, which differs in weights; ", model=RESIDUAL.model(1))
        model = RESIDUAL.traced()
        model.stem[1].running_var[2] += 1e-12
        self.refused(path, "differs in weights;", model=model)

    def test_other_layers(self, path: Path) -> None:
        model = RESIDUAL.traced()
        model.block1.relu = nn.LeakyReLU(0.2)
        self.refused(path, "differs in model;", model=model)
        self.refused(path, "differs in model, weights, fingerprint", NETWORKS["plain"].inputs(4).split(2),
                     NETWORKS["plain"].traced())

    @pytest.mark.parametrize(("options", "named"), [
        ({"seed": 1}, "seed"), ({"probes": 2}, "probes"), ({"importance": "taylor-abs"}, "importance"),
        ({"normalize": False}, "normalize"), ({"layerwise": "l2"}, "layerwise"), ({"ignore": ["block1.*"]}, "ignored"),
        ({"fixed_order": True}, "fixed_order"), ({"distribution": "rademacher"}, "distribution"),
        ({"forward": lambda model, batch: model(batch)}, "forward"), ({"center": True}, "center")])
    def test_another_way_of_scoring(self, path: Path, options: dict[str, Any], named: str) -> None:
        self.refused(path, f"differs in {named};", **options)

    def test_other_batches(self, path: Path) -> None:
        changed = [batch.clone() for batch in BATCHES]
        changed[1][2, 0, 0, 0] += 1e-9
        for batches in (BATCHES[::-1], changed, RESIDUAL.inputs(11).split(4)):
            self.refused(path, r"^batches: the first 2 are not those in .*s\.ckpt", batches)
        self.refused(path, r"^batches: .*s\.ckpt has seen 2, and there are 1;", BATCHES[:1])

    def test_every_truncation(self, path: Path) -> None:
        contents = path.read_bytes()
        for size in range(0, len(contents), 97):
            path.write_bytes(contents[:size])
            with pytest.raises(ValueError, match=r"s\.ckpt: .* remove it to start over"):
                files.read_state(path, runs.FORM, "checkpoint", "remove it to start over")
        self.refused(path, r"s\.ckpt: ")

    def test_flipped_bits(self, path: Path) -> None:
        """Each is noticed, or changes nothing (an entry of the header that stands elsewhere)."""
        contents = bytearray(path.read_bytes())
        whole = files.read_state(path, runs.FORM, "", "")
        noticed = tried = 0
        for place in range(0, len(contents), 5):
            contents[place] ^= 1 << place % 8
            path.write_bytes(contents)
            contents[place] ^= 1 << place % 8
            tried += 1
            try:
                assert str(files.read_state(path, runs.FORM, "", "")) == str(whole)
            except ValueError:
                noticed += 1
        assert noticed > 0.98 * tried
        contents[len(contents) // 2] ^= 4
        path.write_bytes(contents)
        self.refused(path, r"s\.ckpt: ")

    def test_foreign_files(self, path: Path) -> None:
        torch.save({"a": torch.ones(3)}, path)
        self.refused(path, r"s\.ckpt: not a readable safetensors file")
        score().save(path)
        self.refused(path, r"s\.ckpt: not a fastscore file of score")

    def test_what_needs_no_checkpoint(self, path: Path) -> None:
        self.refused(path, "^resume: magnitude-l2 reads the weights alone", importance="magnitude-l2")

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            score(resume=tmp_path / "nowhere" / "s.ckpt")


def test_a_scorer_goes_on_in_another_process(tmp_path: Path) -> None:
    whole, first, second = (Scorer(RESIDUAL.traced(), BATCHES[0], gradient="random", ablation="mean") for _ in range(3))
    for scorer, batches in ((whole, BATCHES), (first, BATCHES[:2])):
        model = scorer._taps.model
        with scorer:
            for batch in batches:
                scorer.probe(model(batch))
    first.save(tmp_path / "scorer.ckpt")
    second.load(tmp_path / "scorer.ckpt")
    with second:
        for batch in BATCHES[2:]:
            second.probe(second._taps.model(batch))
    assert_same_bits(second.scores(), whole.scores())
    other = Scorer(RESIDUAL.traced(), BATCHES[0], gradient="random")
    with pytest.raises(ValueError, match="state: "):
        other.load(tmp_path / "scorer.ckpt")
    score().save(tmp_path / "s")
    with pytest.raises(ValueError, match="not a fastscore scorer state"):
        other.load(tmp_path / "s")
