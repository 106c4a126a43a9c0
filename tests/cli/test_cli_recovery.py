"""prune that repairs, curve and compare, from the command line: what the library does, said in a line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import working_folder
from PIL import Image

import fastscore
from fastscore.cli import images, main, models, repair_time
from fastscore.cli.info import file_notes
from fastscore.modules.zero_branch import ZeroBranch
from fastscore.recovery.reconstruct import reconstruct

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

class Residual(nn.Module):
    def __init__(self, width, scale):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 1))
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.branch(x)

def residual():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), Residual(6, 0.3), Residual(8, 0.01),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

class Bent(Residual):
    def forward(self, x):
        return x + self.branch(x).relu()

def bent():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), Bent(6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 5))

class Decoder(nn.Module):
    def __init__(self):
        import transformers
        super().__init__()
        sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=5,
                     num_key_value_heads=2, max_position_embeddings=16)
        self.patches, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 5)
        self.body = transformers.MixtralModel(transformers.MixtralConfig(
            **sizes, num_local_experts=4, use_cache=False, experts_implementation="batched_mm"))

    def forward(self, x):
        x = self.body(inputs_embeds=self.patches(x).flatten(2).mT.contiguous()).last_hidden_state
        return self.head(x.mean(1))

def mixture():
    return Decoder()
"""
MODEL = ("nets.py:build", "--size", "12", "--images", "photos", "--batch-size", "8")
PREPARE = images.Preprocessing(12, 12, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with nets.py and 40 images."""
    generator = torch.Generator().manual_seed(0)
    shade = torch.randint(200, (40, 1, 1, 3), generator=generator)
    pixels = shade + torch.randint(56, (40, 12, 12, 3), generator=generator)
    working_folder.enter(tmp_path, monkeypatch, NETS, pixels.byte())


def batches(part: str = "all") -> images.ImageBatches:
    paths = images.find("photos")
    held_out = paths[3::4]
    chosen = {"all": paths, "held out": held_out, "work": [path for path in paths if path not in held_out]}[part]
    return images.batches(chosen, PREPARE, 8)


def dense() -> torch.nn.Module:
    return models.load("nets.py:build", seed=0)


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_prune_repairs_by_default_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model, example = dense(), torch.zeros(2, 3, 12, 12)
    scores = fastscore.score(model, batches(), ablation="mean", progress=False)
    expected = fastscore.prune(model, scores, example, macs=0.3, calibration=batches())
    assert main(["prune", *MODEL, "--macs", "0.3", "--out", "small.safetensors"]) == 0
    said = capsys.readouterr()
    assert "\n".join(map(str, expected.report.repairs)) in said.out
    before = expected.report.repairs[0]
    (after,) = [row for row in expected.report.repairs if row.chosen]
    assert after.name != "none"
    assert f"{before.agreement:.1%} before the repair, {after.agreement:.1%} after it" in said.err
    assert "judged by 10 decisions about samples that it is not fitted to: the true share may be up to 36" in said.err
    same(fastscore.load_pruned(dense, "small.safetensors"), expected.model)


def test_prune_says_where_no_repair_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    scores = fastscore.score(dense(), batches(), ablation="mean", progress=False)
    expected = fastscore.prune(dense(), scores, torch.zeros(2, 3, 12, 12), macs=0.6, calibration=batches())
    (taken,) = [row for row in expected.report.repairs if row.chosen]
    assert taken.name == "none"
    assert main(["prune", *MODEL, "--macs", "0.6", "--out", "small.safetensors"]) == 0
    said = capsys.readouterr().err
    assert f"{taken.agreement:.1%} as it was cut (KL {taken.kl:.3g}), which no repair bettered" in said


def test_a_long_repair_is_said_before_it_starts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    """In passes over the images, and in time where a pass of 40 images takes a second; nothing where it is short."""
    commands = {("prune", "--macs", "0.6", "--out", "s.safetensors"): 1, ("curve", "--macs", "0.8", "0.6"): 2,
                ("compare", "--macs", "0.8", "--importances", "magnitude-l2", "random"): 2}
    for (name, *more), networks in commands.items():
        for repair, said in (("linear", False), ("asymmetric", True)):
            with monkeypatch.context() as slow:
                slow.setattr(repair_time, "_of_a_pass", lambda *given: 1.0)
                assert main([name, *MODEL, *more, "--repair", repair, "--no-measured"]) == 0
            told, several = capsys.readouterr().err, "" if networks == 1 else " of 2 networks"
            there, count = 40 if name == "prune" else 30, 26 * networks
            line = f"note: the repair{several} takes about as long as {count} passes over the {there} images: some " \
                f"{count} s here, more where they are few; --repair linear takes {2 * networks} passes"
            assert (line in told) == said
    assert main(["prune", *MODEL, "--macs", "0.6", "--out", "s.safetensors"]) == 0
    assert "passes" not in capsys.readouterr().err
    assert repair_time.passes(400, 1, 20) == 26 + 20 * 3 * 50 / 400  # three cuts of each group, judged on 50 images
    assert repair_time.passes(80, 2, 20) == 52 + 20 * 3 * 10 / 80  # on half of those held out


@pytest.mark.parametrize(("room", "decoded_again"), [(1 << 20, False), (5 * 3 * 12 * 12 * 4, True)])
def test_a_repair_decodes_an_image_once(monkeypatch: pytest.MonkeyPatch, room: int, decoded_again: bool) -> None:
    """As long as there is room: of 40, the second holds five."""
    decoded: list[Path] = []
    own = images.Preprocessing.__call__

    def counted(prepare: images.Preprocessing, path: Path) -> torch.Tensor:
        decoded.append(path)
        return own(prepare, path)

    monkeypatch.setattr(images.Preprocessing, "__call__", counted)
    monkeypatch.setattr(images, "KEPT", room)
    assert main(["prune", *MODEL, "--macs", "0.6", "--repair", "linear", "--out", "s.safetensors"]) == 0
    assert len(set(decoded)) == 40
    assert (len(decoded) > 40) is decoded_again
    again = images.batches(images.find("photos"), PREPARE, 8, keep=True)
    for _ in range(2):
        for batch, plain in zip(again, batches(), strict=True):
            assert torch.equal(batch, plain)
            batch.zero_()  # a model may write to its batch


def test_prune_without_repair(capsys: pytest.CaptureFixture[str]) -> None:
    model, example = dense(), torch.zeros(2, 3, 12, 12)
    scores = fastscore.score(model, batches(), progress=False)
    for option, compensate in (("--no-repair", None), ("--no-compensate", False)):
        assert main(["prune", *MODEL, "--macs", "0.6", option, "--out", "small.safetensors"]) == 0
        assert "agreement" not in capsys.readouterr().err
        expected = fastscore.prune(model, scores, example, macs=0.6, compensate=compensate)
        same(fastscore.load_pruned(dense, "small.safetensors"), expected.model)


def test_scores_from_a_file_and_a_repair_of_a_kind() -> None:
    fastscore.score(dense(), batches(), progress=False).save("s")
    assert main(["prune", *MODEL, "--scores", "s", "--macs", "0.6", "--repair", "linear", "--out",
                 "a.safetensors"]) == 0
    model = dense()
    cut = fastscore.prune(model, fastscore.Scores.load("s"), torch.zeros(2, 3, 12, 12), macs=0.6, cost_aware=True)
    repaired = reconstruct(model, cut, batches(), "linear")
    same(fastscore.load_pruned(dense, "a.safetensors"), repaired.model)


def test_the_smallest_that_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *MODEL, "--agreement", "0.8", "--repair", "mean", "--out", "s.safetensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = dense()
    scores = fastscore.score(model, batches("work"), ablation="mean", progress=False)
    expected = fastscore.prune(model, scores, torch.zeros(2, 3, 12, 12), agreement=0.8, calibration=batches("work"),
                               held_out=batches("held out"), repair="mean")
    assert report["macs"] == list(expected.report.macs)
    assert [row["agreement"] for row in report["judged"]] == [row.agreement for row in expected.report.judged]


def test_images_of_a_folder_of_their_own_judge(capsys: pytest.CaptureFixture[str]) -> None:
    Path("others").mkdir()
    for path in images.find("photos")[3::4]:
        path.rename(Path("others", path.name))
    judges, model = images.batches(images.find("others"), PREPARE, 8), dense()
    scores = fastscore.score(model, batches(), ablation="mean", progress=False)
    more = ("--held-out", "others", "--repair", "mean")
    assert main(["prune", *MODEL, *more, "--agreement", "0.8", "--out", "s.safetensors", "--json"]) == 0
    small = fastscore.prune(model, scores, torch.zeros(2, 3, 12, 12), agreement=0.8, calibration=batches(),
                            held_out=judges, repair="mean")
    assert [row["agreement"] for row in json.loads(capsys.readouterr().out)["judged"]] == [
        row.agreement for row in small.report.judged]
    expected = fastscore.curve(model, scores, batches(), macs=(0.8,), held_out=judges, repair="mean", progress=False)
    assert (main(["curve", *MODEL, *more, "--macs", "0.8"]), str(expected) in capsys.readouterr().out) == (0, True)


def test_what_held_the_agreement_is_what_is_said_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *MODEL, "--agreement", "0.7", "--repair", "linear", "--out", "s.safetensors"]) == 0
    said = capsys.readouterr()
    kept = file_notes("s.safetensors")
    (chosen,) = re.findall(r"^chosen: (.* of the MACs: (agreement [\d.]+%).*)$", said.out, re.MULTILINE)
    assert kept["judged"] == chosen[0]
    assert f"agreement with the dense model: {chosen[1].split()[1]} (KL" in said.err
    assert "judged by 10 decisions about samples that no repair has seen" in said.err
    assert "%" not in kept["repair"]  # by which repairs were told apart, on other samples
    assert "before the repair" not in said.err


def test_few_images_that_judge_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("--json",)):
        assert main(["prune", *MODEL, "--agreement", "0.8", "--repair", "mean", "--out", "s.safetensors", *more]) == 0
        told = capsys.readouterr()
        said = re.findall("of 10 decisions agree, .*--confidence 0.95", told.out + told.err)
        assert len(said) == 1 + bool(more)  # for whoever reads no JSON


def test_branches_go_and_what_is_left_is_repaired(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", "nets.py:residual", *MODEL[1:], "--units", "blocks", "--out", "small.safetensors"]
    assert main([*arguments, "--macs", "0.3"]) == 0
    told = capsys.readouterr()
    assert "no residual branch" not in told.err
    model, example = models.load("nets.py:residual", seed=0), torch.zeros(2, 3, 12, 12)
    scores = fastscore.score(model, batches(), units="blocks", progress=False)
    expected = fastscore.prune(model, scores, example, calibration=batches(), macs=0.3)
    assert "3.branch" in expected.removed
    assert "\n".join(map(str, expected.report.repairs)) in told.out
    small = fastscore.load_pruned(models.load("nets.py:residual", seed=1), "small.safetensors")
    assert isinstance(small.get_submodule("3.branch"), ZeroBranch)
    same(small, expected.model)
    assert main([*arguments, "--agreement", "0.9", "--repair", "asymmetric"]) == 0
    assert "chosen: asymmetric" in capsys.readouterr().out
    small = fastscore.load_pruned(models.load("nets.py:residual", seed=1), "small.safetensors")
    assert isinstance(small.get_submodule("3.branch"), ZeroBranch)


def test_info_names_branches_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    for units, stays in (("groups", False), ("blocks", True)):
        assert main(["info", "nets.py:bent", "--size", "12", "--units", units]) == 0
        line = "2.branch (whole branch): kept (what it returns goes through Relu in the code around it before it is"
        assert (line in capsys.readouterr().out) == stays
    assert main(["info", "--units", "blocks"]) == 2
    assert main(["score", "nets.py:bent", *MODEL[1:], "--units", "blocks", "--out", "s.safetensors"]) == 0
    assert "units: 2.branch cannot go whole: what it returns goes through Relu" in capsys.readouterr().err


@pytest.mark.parametrize(("units", "told"), [("blocks", "no residual branch that can go whole"),
                                              ("experts", "no mixture whose experts can go whole")])
def test_a_model_without_them_is_told_so_once(capsys: pytest.CaptureFixture[str], units: str, told: str) -> None:
    assert main(["score", *MODEL, "--units", units, "--out", "s.safetensors"]) == 0
    assert capsys.readouterr().err.count(f"this model has {told}") == 1


@pytest.mark.parametrize(("units", "unit"), [("experts", "body.layers.0.mlp.experts"),
                                             ("head_dims", "body.layers.0.self_attn.q_proj"),
                                             ("experts+head_dims", "body.layers.0.mlp.experts")])
def test_experts_and_head_dimensions_go(capsys: pytest.CaptureFixture[str], units: str, unit: str) -> None:
    arguments = ["prune", "nets.py:mixture", *MODEL[1:], "--units", units, "--params", "0.6", "--no-repair"]
    assert main([*arguments, "--out", "small.safetensors"]) == 0
    assert "units: " not in capsys.readouterr().err
    model = models.load("nets.py:mixture", seed=0)
    scores = fastscore.score(model, batches(), units=units, progress=False)
    expected = fastscore.prune(model, scores, torch.zeros(2, 3, 12, 12), params=0.6)
    assert unit in expected.removed
    same(fastscore.load_pruned(models.load("nets.py:mixture", seed=1), "small.safetensors"), expected.model)


def test_a_curve(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["curve", *MODEL, "--macs", "0.8", "0.5", "--repair", "mean", "--plot", "curve.png"]
    assert main(arguments) == 0
    model = dense()
    scores = fastscore.score(model, batches("work"), ablation="mean", progress=False)
    expected = fastscore.curve(model, scores, batches("work"), (0.8, 0.5), held_out=batches("held out"),
                               repair="mean", progress=False)
    assert str(expected) in capsys.readouterr().out
    assert expected.decisions == 10
    assert Image.open("curve.png").size > (600, 400)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [pytest.approx(row) for row in expected.records()]


def test_images_that_scored_and_judge_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of a file are of all images of a folder, of which one of four judges then."""
    assert main(["score", *MODEL, "--out", "s.safetensors"]) == 0
    said = "note: s.safetensors was scored on photos, too, and so on the images that judge"
    for command in (("curve", "--macs", "0.8"), ("prune", "--agreement", "0.5", "--out", "small.safetensors")):
        for scores in (("--scores", "s.safetensors"), ()):
            assert main([command[0], *MODEL, *command[1:], "--repair", "mean", *scores]) == 0
            assert capsys.readouterr().err.count(said) == len(scores) // 2
    assert main(["prune", *MODEL, "--macs", "0.8", "--scores", "s.safetensors", "--out", "small.safetensors"]) == 0
    assert said not in capsys.readouterr().err


def test_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *MODEL, "--importances", "taylor-sq", "magnitude-l2", "--params", "0.7", "--repair", "mean",
                 "--plot", "compared.png"]) == 0
    expected = fastscore.compare(dense(), batches("work"), ["taylor-sq", "magnitude-l2"], params=(0.7,),
                                 held_out=batches("held out"), repair="mean", progress=False)
    assert str(expected) in capsys.readouterr().out
    assert Path("compared.png").stat().st_size > 5000


def test_a_measured_curve_goes_into_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *MODEL, "--out", "s.safetensors"]) == 0
    assert main(["curve", *MODEL, "--scores", "s.safetensors", "--macs", "0.8", "0.6", "--out", "c.json"]) == 0
    told = capsys.readouterr()
    assert "wrote c.json" in told.err
    assert main(["report", "s.safetensors", "nets.py:build", "--curve", "c.json", "--out", "r.html"]) == 0
    held = json.loads(re.search(r'id="data">(.*?)</script>', Path("r.html").read_text(), re.DOTALL)[1])
    for line, row in zip(told.out.splitlines()[-4:], held["curve"]["rows"], strict=False):
        assert f"{row['repaired_agreement']:.1%}" in line
    assert [row["budget"] for row in held["curve"]["rows"]] == [0.8, 0.6]
    assert main(["report", "s.safetensors", "--curve", "s.safetensors", "--out", "r.html"]) == 2
    assert "curve: s.safetensors is not what fastscore curve --out writes" in capsys.readouterr().err


def test_how_outputs_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"repair": "mean", "outputs": {"": "error"}, "progress": False}
    options = (*MODEL, "--repair", "mean", "--outputs", "error", "--macs", "0.6")
    model, example, said = dense(), torch.zeros(2, 3, 12, 12), "outputs: by squared error, as a share of the dense"
    scores = fastscore.score(model, batches(), ablation="mean", progress=False)
    expected = fastscore.prune(model, scores, example, macs=0.6, calibration=batches(), **given)
    assert main(["prune", *options, "--out", "small.safetensors"]) == 0
    told = capsys.readouterr()
    assert "\n".join(map(str, expected.report.repairs)) in told.out
    assert said in told.out
    assert "R² with the dense model: " in told.err
    assert main(["curve", *options]) == 0
    scores = fastscore.score(model, batches("work"), ablation="mean", progress=False)
    curve = fastscore.curve(model, scores, batches("work"), (0.6,), held_out=batches("held out"), **given)
    told = capsys.readouterr()
    assert str(curve).splitlines()[:2] == told.out.splitlines()[:2]
    assert said in told.out
    assert main(["compare", *options, "--importances", "taylor-sq"]) == 0
    compared = fastscore.compare(model, batches("work"), ["taylor-sq"], (0.6,), held_out=batches("held out"), **given)
    told = capsys.readouterr()
    assert str(compared).splitlines()[:2] == told.out.splitlines()[:2]
    assert said in told.out
    with pytest.raises(SystemExit):
        main(["curve", *MODEL, "--outputs", "largest"])
