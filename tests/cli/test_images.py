"""Images are prepared as those that the weights were made with; it is said in a line and kept with what comes of it."""

import hashlib
import json
import re
import shlex
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image

import fastscore
from fastscore.cli import images, main, models
from fastscore.pruning.budgets.costs import total_macs

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with nets.py and a picture of noise, wider than high, in photos/."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in "abcdefgh":
        pixels = torch.randint(256, (90, 130, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"photos/{name}.png")
    return Path("photos/a.png")


@pytest.mark.parametrize(("name", "weights"), [
    ("mobilenetv2_100", None), ("resnet50", "a1_in1k"), ("vit_base_patch16_clip_224", "openai"),
    ("cspdarknet53", None), ("dm_nfnet_f0", None), ("coat_lite_medium_384", "in1k")])  # the last two squash
def test_preprocessing_is_that_of_timm(photo: Path, name: str, weights: str | None) -> None:
    prepare = images.preprocessing(f"timm:{name}", weights)
    tagged = name if weights is None else f"{name}.{weights}"
    config = timm.get_pretrained_cfg(tagged)
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config.to_dict()))
    torch.testing.assert_close(prepare(photo), expected(Image.open(photo).convert("RGB")), rtol=0, atol=1e-6)
    assert prepare.source == f"as timm's {name}.{config.tag}"


def test_what_is_given_replaces_what_is_known() -> None:
    prepare = images.preprocessing("timm:mobilenetv2_100", size=112, std=[0.2, 0.2, 0.2])
    assert (prepare.size, prepare.resize, prepare.std) == (112, 128, (0.2, 0.2, 0.2))
    assert prepare.mean == timm.get_pretrained_cfg("mobilenetv2_100").mean
    assert prepare.source.endswith(", but for size, std as given; its size is 224")
    assert images.preprocessing("torchvision:resnet18", size=16).source.endswith("as given; its size is 224")
    assert images.preprocessing("torchvision:resnet18").source == "as torchvision's ResNet18_Weights.IMAGENET1K_V1"


def test_what_was_assumed_is_said_and_kept(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(models.load("nets.py:build").state_dict(), "c.pth")
    model = ["nets.py:build", "--checkpoint", "c.pth", "--size", "32"]
    assert main(["score", *model, "--images", "photos", "--out", "s.safetensors"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: images: ")]
    assert len(said) == 1
    assert "values in [0, 1] (assumed: nets.py:build does not say" in said[0]
    notes = fastscore.Scores.load("s.safetensors").notes
    assert said[0] == f"note: images: {notes['preprocessing']}"
    assert notes["model"] == "nets.py:build"
    assert notes["images"] == "photos"
    assert notes["checkpoint"].startswith("c.pth (sha256 ")
    age = datetime.now(timezone.utc) - datetime.fromisoformat(notes["date"])
    assert timedelta(0) <= age < timedelta(minutes=30)
    assert notes["versions"] == f"fastscore {fastscore.__version__}, torch {torch.__version__}"

    smaller = ["--macs", "0.6", "--out", "m.safetensors", "--json"]
    assert main(["prune", *model[:3], "--scores", "s.safetensors", *smaller]) == 0  # the scores know the size
    told = capsys.readouterr()
    pruned = json.loads(told.out)["notes"]
    kept = {name: text for name, text in notes.items() if name != "date"}
    assert {name: text for name, text in pruned.items() if name not in ("date", "scores", "ties")} == kept
    assert "note: size 32: as s.safetensors says" in told.err
    assert main(["report", "s.safetensors", "--out", "s.html"]) == 0
    assert notes["preprocessing"] in Path("s.html").read_text()
    held = json.loads(re.search(r'id="data">(.*?)</script>', Path("s.html").read_text(), re.DOTALL)[1])
    assert main([*shlex.split(held["command"])[1:], "--channels", "0.7", "--out", "small.onnx"]) == 0
    assert main(["report", "s.safetensors", "nets.py:build", "--out", "s.html"]) == 0
    held = json.loads(re.search(r'id="data">(.*?)</script>', Path("s.html").read_text(), re.DOTALL)[1])
    assert held["costs"]["macs"]["dense"]["macs"] == total_macs(models.load("nets.py:build"), torch.zeros(1, 3, 32, 32))
    dense, small = json.loads(told.out)["macs"]
    capsys.readouterr()
    assert main(["info", "s.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["s.safetensors"]
    assert told.pop("made").startswith(str(fastscore.Scores.load("s.safetensors")).splitlines()[0])
    assert told == notes
    assert main(["info", "m.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["m.safetensors"]
    assert f"{small / dense:.1%} of the MACs" in found.pop("remains")
    assert found == pruned
    assert main(["info", "c.safetensors"]) == 2


def test_what_was_given_is_not_assumed(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "nets.py:build", "--size", "32", "--images", "photos", "--mean", "0.5", "0.5", "0.5", "--std",
                 "0.25", "0.25", "0.25", "--json"]) == 0
    said = capsys.readouterr().err
    grey = ["nets.py:grey", "--size", "16", "--images", "photos", "--mean", "0.5", "--std", "0.2"]
    assert main(["score", *grey, "--out", "g.safetensors"]) == 0
    assert main(["curve", "nets.py:grey", "--scores", "g.safetensors", "--images", "photos", "--macs", "0.9"]) == 0
    assert "note: size 16, mean 0.5, std 0.2: as g.safetensors says" in capsys.readouterr().err
    assert "mean 0.5 0.5 0.5, std 0.25 0.25 0.25 (as given)" in said
    assert "assumed" not in said


def test_a_file_of_torchvision_is_known_by_its_hash(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--checkpoint mobilenet_v2-b0353104.pth, whatever the file is called, is prepared for as those weights were."""
    weights = torchvision.models.MobileNet_V2_Weights
    torch.save({"x": torch.zeros(2)}, "mine.pth")
    digest = hashlib.sha256(Path("mine.pth").read_bytes()).hexdigest()
    other = images.preprocessing("torchvision:mobilenet_v2", checkpoint="mine.pth")
    assert (other.resize, other.source) == (232, f"as torchvision's {weights.IMAGENET1K_V2}, assumed for mine.pth")
    monkeypatch.setattr(weights.IMAGENET1K_V1.value, "url", f"https://somewhere/mobilenet_v2-{digest[:8]}.pth")
    known = images.preprocessing("torchvision:mobilenet_v2", checkpoint="mine.pth")
    assert (known.resize, known.source) == (256, f"as torchvision's {weights.IMAGENET1K_V1}, whose file it is")
    assert images.preprocessing("timm:resnet18", checkpoint="mine.pth").source.endswith(", assumed for mine.pth")


def test_folders_by_links_are_read_and_hidden_ones_are_not(photo: Path) -> None:
    names = images.find("photos")
    Path("elsewhere").mkdir()
    photo.rename("elsewhere/a.png")
    Path("photos/linked").symlink_to(Path("elsewhere").resolve())
    Path("elsewhere/back").symlink_to(Path("photos").resolve())
    Path("photos/.ipynb_checkpoints").mkdir()
    Path("photos/.ipynb_checkpoints/a-checkpoint.png").write_bytes(b"")
    assert images.find("photos") == sorted([*names[1:], Path("photos/linked/a.png")])


def test_images_of_a_repair_are_kept_where_they_are_not_those_of_the_scores(
        photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("others").mkdir()
    for path in Path("photos").iterdir():
        path.rename(f"others/{path.name}") if path.name > "d" else None
    assert main(["score", "nets.py:build", "--size", "32", "--images", "photos", "--out", "s.safetensors"]) == 0
    notes = fastscore.Scores.load("s.safetensors").notes
    for given, more in ((("photos",), None), (("others",), f"others: {notes['preprocessing']}"),
                        (("photos", "--size", "48"), f"photos: {notes['preprocessing'].replace('32', '48')}")):
        capsys.readouterr()
        assert main(["prune", "nets.py:build", "--scores", "s.safetensors", "--macs", "0.8", "--out", "m.safetensors",
                     "--images", *given]) == 0
        assert (f"note: repaired on {more}" in capsys.readouterr().err) is (more is not None)
        main(["info", "m.safetensors", "--json"])
        assert json.loads(capsys.readouterr().out)["m.safetensors"].get("repaired on") == more


def test_tags_of_timm() -> None:
    assert images.preprocessing("timm:resnet50.a1_in1k").source == "as timm's resnet50.a1_in1k"
    for spec, asked in (("timm:resnet50.nothing", None), ("timm:resnet50", "nothing")):
        with pytest.raises(ValueError, match="weights: timm has no 'nothing' for resnet50; it has DEFAULT, a1_in1k"):
            images.preprocessing(spec, asked)
    with pytest.raises(ValueError, match=r"weights: timm:resnet50\.a1_in1k names a1_in1k, and --weights a2_in1k"):
        images.preprocessing("timm:resnet50.a1_in1k", "a2_in1k")
