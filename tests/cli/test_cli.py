"""The command line as a user meets it: real pictures, checkpoints of every kind, and input that cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy
import onnxruntime
import pytest
import safetensors.torch
import sklearn.datasets
import torch
import torchvision
import working_folder
from PIL import Image

import fastscore
from fastscore.cli import images, main, models
from fastscore.ops.backends import backends

NETS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def number():
    return 3

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        features = self.net(x)
        return self.head(features.mean((2, 3))), features

def two():
    return Two()

network = build()

def half():
    return grey().half()

def wide(width):
    return nn.Linear(3, width)

def broken():
    raise ValueError("this is the user's own")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with nets.py, its checkpoint net.safetensors, and two photographs in photos/."""
    working_folder.enter(tmp_path, monkeypatch, NETS)
    torch.manual_seed(1)
    safetensors.torch.save_file(models.load("nets:build", seed=7).state_dict(), "net.safetensors")
    Path("photos/flowers").mkdir()
    photographs = sklearn.datasets.load_sample_images()
    for name, pixels in zip(("photos/china.png", "photos/flowers/flower.JPG"), photographs.images, strict=True):
        Image.fromarray(pixels).save(name)
    Path("photos/.hidden.jpg").write_text("not an image")
    Path("photos/notes.txt").write_text("not an image")
    return tmp_path


MODEL = ("nets.py:build", "--checkpoint", "net.safetensors", "--size", "48")


def test_score_then_prune_is_what_the_library_does(folder, capsys):
    assert main(["score", *MODEL, "--images", "photos", "--out", "s.safetensors", "--plot", "s.png"]) == 0
    model = models.load("nets:build", checkpoint="net.safetensors")
    prepare = images.Preprocessing(48, 48, (0.0,) * 3, (1.0,) * 3)
    expected = fastscore.score(model, images.batches(images.find("photos"), prepare, 32), progress=False)
    scores = fastscore.Scores.load("s.safetensors")
    assert scores.samples == 2
    for layer in expected:
        torch.testing.assert_close(scores[layer], expected[layer])
    assert str(scores) in capsys.readouterr().out
    assert Image.open("s.png").size > (600, 400)

    assert main(["prune", *MODEL, "--scores", "s.safetensors", "--params", "0.6", "--out", "small.pt2"]) == 0
    pruned = fastscore.prune(model, expected, torch.zeros(2, 3, 48, 48), params=0.6)
    assert str(pruned.report) in capsys.readouterr().out
    small = torch.export.load("small.pt2").module()
    for batch in (1, 5):
        x = torch.randn(batch, 3, 48, 48)
        torch.testing.assert_close(small(x), pruned.model.eval()(x))


def test_prune_writes_the_same_model_as_onnx_and_as_a_module(folder):
    budget = ("--images", "photos", "--macs", "0.5", "--seed", "3")
    assert main(["prune", *MODEL, *budget, "--out", "small.onnx"]) == 0
    assert main(["prune", *MODEL, *budget, "--out", "small.pt"]) == 0
    module = torch.load("small.pt", weights_only=False)
    session = onnxruntime.InferenceSession("small.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, 3, 48, 48)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), module(x).detach(),
                                   rtol=1e-4, atol=1e-5)


def test_options_reach_the_library(folder, capsys):
    main(["score", *MODEL, "--images", "photos", "--importance", "taylor-abs", "--reduction", "element",
          "--probes", "3", "--seed", "5", "--ignore", "0", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["origin"]["importance"], said["origin"]["reduction"]) == ("taylor-abs", "element")
    assert said["origin"]["seed"] == 5
    assert said["samples"] == 2
    assert list(said["scores"]) == ["3"]
    assert said["skipped"]["0"] == "ignored"

    main(["prune", *MODEL, "--importance", "magnitude-l2", "--channels", "0.6", "--scope", "layer", "--round-to", "4",
          "--floor", "0.5", "--out", "small.pt", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {row["layer"]: row["channels"] for row in report["groups"]} == {"0": [8, 4], "3": [12, 8]}


def test_torchvision_model_with_classes_of_its_own(folder, capsys):
    model = torchvision.models.resnet18(num_classes=7)
    torch.save({"model": model.state_dict(), "epoch": 3}, "resnet.pth")
    arguments = ["torchvision:resnet18", "--checkpoint", "resnet.pth", "--classes", "7", "--size", "64"]
    assert main(["score", *arguments, "--images", "photos", "--samples", "1", "--out", "s.safetensors"]) == 0
    assert main(["prune", *arguments, "--scores", "s.safetensors", "--macs", "0.5", "--out", "small.pt", "--json"]) == 0
    output = capsys.readouterr().out
    report = json.loads(output[output.index("{"):])
    assert 0.45 < report["macs"][1] / report["macs"][0] <= 0.5
    assert torch.load("small.pt", weights_only=False)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("write", [
    lambda state: safetensors.torch.save_file(state, "c.safetensors"),
    lambda state: torch.save(state, "c.pth"),
    lambda state: torch.save({"state_dict": state, "epoch": 3}, "c.pth"),
    lambda state: torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, "c.pth"),
    lambda state: torch.save({f"_orig_mod.module.{key}": value for key, value in state.items()}, "c.pth"),
    lambda state: torch.save({f"module._orig_mod.{key}": value for key, value in state.items()}, "c.pth"),
], ids=["safetensors", "state dict", "under state_dict", "DataParallel", "compiled", "DataParallel of compiled"])
def test_checkpoints(folder, write):
    expected = models.load("nets:build", seed=7).state_dict()
    write(expected)
    loaded = models.load("nets:build", checkpoint=next(Path().glob("c.*")), seed=8).state_dict()
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_the_same_seed_makes_the_same_random_weights(folder):
    a, b, c = (models.load("nets:build", seed=seed).state_dict()["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])  # bilinear and bicubic
def test_preprocessing_is_that_of_torchvision(folder, name):
    prepare = images.preprocessing(f"torchvision:{name}")
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    for path in images.find("photos"):
        torch.testing.assert_close(prepare(path), preset(Image.open(path)))


def test_preprocessing_of_sizes_and_grey_images(folder):
    china = Path("photos/china.png")
    assert images.preprocessing("torchvision:resnet50", size=112).resize == 116
    prepare = images.preprocessing("nets:grey", size=32, mean=[0.5], std=[0.25])
    assert prepare(china).shape == prepare.shape == (1, 32, 32)
    Image.fromarray(numpy.asarray(Image.open(china).convert("L")).astype("uint16") * 256).save("sixteen.png")
    torch.testing.assert_close(prepare(Path("sixteen.png")), prepare(china), rtol=0, atol=0)
    colours = images.preprocessing("nets:build", size=32)(china)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    expected = ((colours * weights).sum(0, keepdim=True) - 0.5) / 0.25
    torch.testing.assert_close(prepare(china), expected, rtol=0, atol=3 / 255 / 0.25)
    assert main(["score", "nets:grey", "--images", "photos", "--size", "32", "--mean", "0.5", "--std", "0.25"]) == 0


def test_images_are_found_and_drawn(folder):
    assert [str(path) for path in images.find("photos")] == ["photos/china.png", "photos/flowers/flower.JPG"]
    drawn = {tuple(images.find("photos", 1, seed)) for seed in range(8)}
    assert len(drawn) == 2
    assert images.find("photos", 1, 3) == images.find("photos", 1, 3)


SCORE = ("score", *MODEL)
PRUNE = ("prune", *MODEL, "--out", "small.pt2")


OWN = ("score", "nets:build", "--size", "48", "--images", "photos")


@pytest.mark.parametrize(("arguments", "named"), [
    (("score", "resnet18"), "none of torchvision:NAME, timm:NAME, hf:NAME and module:function"),
    (("score", "resnet18"), "module:function; torchvision:resnet18?"),
    (("score", "nets.py"), "module:function; name the function in it: nets.py:build"),
    (("score", "nets:half", *OWN[2:]), "nets:half is in float16, and images are in float32; name a function that"),
    (("score", "net.safetensors"), "a file of weights needs one of them, and --checkpoint net.safetensors"),
    (("score", "C:\\nets\\net.pth"), "a file of weights needs one of them, and --checkpoint C:\\nets\\net.pth"),
    (("info", "no.safetensors"), "no.safetensors: there is no such file; info reads scores and pruned models"),
    (("score", "torchvision:resnet81", "--images", "photos"), "near it: resnet"),
    (("score", "torchvision:resnet18", "--weights", "BEST", "--images", "photos"), "IMAGENET1K_V1"),
    (("score", "torchvision:fcn_resnet50", "--images", "photos"), "not an image classifier"),
    (("score", "elsewhere:build", "--size", "48", "--images", "photos"), "no module 'elsewhere'"),
    (("score", "nets:built", "--size", "48", "--images", "photos"), "no function 'built'; it has build, grey, "),
    (("score", "nets:number", "--size", "48", "--images", "photos"), "returns int"),
    (("score", "nets:wide", "--size", "48", "--images", "photos"),
     "nets:wide cannot be called without arguments (missing a required argument: 'width'); write a function"),
    (("score", "nets:build", "--images", "photos"), "size: nets:build"),
    ((*OWN, "--weights", "DEFAULT"), "weights: only torchvision"),
    ((*OWN, "--checkpoint", "no.pth"), "there is no file no.pth"),
    ((*OWN, "--checkpoint", "nets.py"), "nets.py is no file of weights"),
    ((*OWN, "--checkpoint", "pruned.safetensors"), "is fastscore-pruned-1, not a state dict; what prune wrote comes"),
    ((*OWN, "--checkpoint", "cut.pt"), "cut.pt is cut short, or damaged; copy it again"),
    (("score", "nets:grey", *OWN[2:], "--checkpoint", "net.safetensors"), "does not fit"),
    ((*SCORE, "--device", "abacus", "--images", "photos"), "device: abacus"),
    (SCORE, "images: taylor-sq needs a folder"),
    ((*SCORE, "--images", "nowhere"), "images: there is no folder nowhere (looked in "),
    ((*SCORE, "--images", "empty"), "images: there is none in empty"),
    ((*SCORE, "--images", "photos", "--samples", "3"), "holds 2 images"),
    ((*SCORE, "--images", "photos", "--samples", "0"), "1 or more"),
    ((*SCORE, "--images", "photos", "--importance", "taylor"), "for gradients of a loss, fastscore.Scorer"),
    ((*SCORE, "--images", "photos", "--importance", "tailor"), "'tailor' is none of taylor-abs, taylor-sq"),
    (("compare", *MODEL, "--images", "photos", "--importances", "random", "taylor"), "taylor-sq or taylor-abs"),
    ((*SCORE, "--images", "photos", "--mean", "124", "116", "104", "--std", "58", "57", "57"),
     "mean: 124 116 104; pixels are in [0, 1]: divide --mean and --std by 255"),
    ((*SCORE, "--images", "photos", "--std", "58", "57", "57"), "std: 58 57 57; pixels are in [0, 1]: divide"),
    (("score", "nets:grey", *OWN[2:]), "cannot run on images of 3 x 48 x 48 (RuntimeError: "),
    (("score", "nets:grey", *OWN[2:]), "one number each after --mean and --std makes them grey"),
    (("score", "nets:two", *OWN[2:]), "returns tuple with [0] [2, 5], [1] [2, 8, 46, 46]; the command line takes"),
    (("score", "torchvision:resnet18", "--images", "photos", "--checkpoint", "ten.pt"),
     "fc.weight (10, 512) for (1000, 512), fc.bias (10,) for (1000,): if it is of 10 classes, --classes 10"),
    ((*SCORE, "--images", "photos", "--mean", "0.5", "0.5"), "mean and std"),
    ((*SCORE, "--images", "photos", "--ignore", "nothing"), "nothing"),
    ((*SCORE, "--images", "photos", "--out", "nowhere/s.safetensors"), "no folder nowhere"),
    ((*SCORE, "--images", "photos", "--plot", "s.plot"), "suffix is one of"),
    ((*SCORE, "--images", "damaged"), "damaged/half.jpg cannot be decoded"),
    ((*PRUNE, "--images", "photos"), "budget: name what is to remain: --macs 0.7, --params"),
    ((*PRUNE, "--images", "photos", "--macs", "1.5"), "macs: 1.5"),
    ((*PRUNE, "--images", "photos", "--macs", "70"), "it is the share that remains: 0.7 for 70 %"),
    ((*PRUNE, "--images", "photos", "--macs", "70%"), "'70%' is no number; a share such as 0.7"),
    ((*PRUNE, "--images", "damaged", "--macs", "0"), "macs: 0.0 is outside (0, 1]"),  # said before images are read
    (("curve", *MODEL, "--images", "damaged", "--params", "70"), "params: 70.0 is outside (0, 1]"),
    (("compare", *MODEL, "--images", "damaged", "--macs", "0"), "macs: 0.0 is outside (0, 1]"),
    ((*PRUNE, "--images", "damaged", "--macs", "0.5", "--floor", "10"), "floor: 10.0 is outside [0, 1]"),
    ((*SCORE, "--images", "photos/flowers/flower.JPG"), "is not a folder, but a file; give photos/flowers"),
    ((*OWN, "--checkpoint", "photos"), "checkpoint: photos is a folder; name a file in it"),
    ((*SCORE, "--images", "damaged", "--out", "empty"), "empty: it is a folder; name a file in it"),
    ((*SCORE, "--images", "damaged", "--out", "/proc/s.safetensors"), "nothing can be written to /proc"),
    ((*PRUNE, "--images", "photos", "--macs", "0.000001"), "cannot be reached"),
    ((*PRUNE, "--scores", "net.safetensors", "--macs", "0.5"), "not a fastscore score file"),
    ((*PRUNE, "--scores", "no.safetensors", "--macs", "0.5"), "no.safetensors"),
    ((*PRUNE, "--scores", "pruned.safetensors", "--macs", "0.5"), "(fastscore-scores-3) but fastscore-pruned-1"),
    ((*PRUNE, "--scores", "small.pt2", "--macs", "0.5"), "out: small.pt2 is the file of scores, too; name another"),
    ((*OWN, "--checkpoint", "net.safetensors", "--out", "photos/../net.safetensors"), "is the file of checkpoint, too"),
    ((*OWN, "--resume", "run", "--out", "run"), "out: run is the file of resume, too; name another"),
    ((*SCORE, "--images", "photos", "--size", "32x32"), "--size: 32x32: it must be a whole number, 1 or more"),
    (("prune", *MODEL, "--images", "photos", "--macs", "0.5", "--out", "small.pkl"), "suffix"),
    ((*PRUNE, "--images", "photos", "--agreement", "0.9", "--no-repair"), "agreement: it is judged on images, and by"),
    ((*PRUNE, "--importance", "random", "--agreement", "0.9"), "give --images FOLDER, and neither"),
    ((*PRUNE, "--images", "photos", "--agreement", "0.9"), "images: 2, and one of 4 is held out to judge by;"),
    (("curve", *MODEL), "images: they are needed here; give --images FOLDER"),
    (("curve", *MODEL, "--images", "photos", "--macs", "0.5", "--params", "0.5"), "not allowed with"),
    (("compare", *MODEL), "the following arguments are required: --images"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_input_that_cannot_be_used_is_one_line_and_exit_code_2(folder, capsys, arguments, named):
    Path("empty").mkdir()
    Path("damaged").mkdir()
    if "ten.pt" in arguments:
        torch.save(models.load("torchvision:resnet18", classes=10).state_dict(), "ten.pt")
    if "pruned.safetensors" in arguments:
        model = models.load("nets:build")
        x = torch.zeros(1, 3, 8, 8)
        scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
        fastscore.save_pruned(fastscore.prune(model, scores, x, channels=0.8), "pruned.safetensors")
    if "cut.pt" in arguments:
        torch.save(models.load("nets:build").state_dict(), "cut.pt")
        Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-100])
    whole = Path("photos/flowers/flower.JPG").read_bytes()
    Path("damaged/half.jpg").write_bytes(whole[:100])
    before = set(Path().rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    complaint = [line for line in said.err.splitlines() if line.startswith("fastscore: error: ")]
    assert code == 2
    assert len(complaint) == 1
    assert named in complaint[0]
    assert said.err.splitlines()[-1] == complaint[0]
    assert said.out == ""
    assert {path for path in Path().rglob("*") if "__pycache__" not in path.parts} <= before


def test_a_network_can_be_named_in_place_of_its_function(folder):
    """A copy of it, so that a checkpoint changes nothing in the user's module."""
    first, second = models.load("nets:network"), models.load("nets:network", checkpoint="net.safetensors")
    assert not torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(models.load("nets:network")[0].weight, first[0].weight)


def test_scores_of_another_model_are_refused(folder, capsys):
    main(["score", "nets:grey", "--images", "photos", "--size", "32", "--mean", "0", "--out", "g.safetensors"])
    assert main([*PRUNE, "--scores", "g.safetensors", "--macs", "0.5"]) == 2
    assert "scores: " in capsys.readouterr().err.splitlines()[-1]


def test_scores_of_another_file_of_weights_are_named(folder, capsys):
    for seed, file in enumerate(("one.pt", "other.pt")):
        torch.save(models.load("nets:build", seed=seed).state_dict(), file)
    own = ("nets:build", "--images", "photos", "--size", "48")
    main(["score", *own, "--checkpoint", "one.pt", "--out", "s.safetensors"])
    for file, said in (("one.pt", False), ("other.pt", True)):
        assert main(["prune", *own, "--checkpoint", file, "--scores", "s.safetensors", "--no-repair", "--macs", "0.7",
                     "--out", "small.safetensors"]) == 0
        assert ("s.safetensors is of one.pt (sha256 " in capsys.readouterr().err) is said


@pytest.mark.parametrize("name", ["small.onnx", "small.pt2", "small.pt", "small.safetensors"])
def test_a_file_stays_as_it_was_where_writing_fails(folder, name, monkeypatch):
    def fails(*arguments, **options):
        raise OSError("no space")

    model, images = models.load("nets:build"), torch.randn(2, 3, 48, 48)
    small = fastscore.prune(model, fastscore.score(model, [images], importance="magnitude-l2"), images, macs=0.7)
    Path(name).write_text("the old one")
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        fastscore.save(small, images, name)
    assert Path(name).read_text() == "the old one"
    assert not list(Path().glob("part-*"))


def test_weights_that_cannot_be_fetched(folder, capsys, monkeypatch):
    def unreachable(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", unreachable)
    assert main(["score", "torchvision:resnet18", "--weights", "DEFAULT", "--images", "photos"]) == 2
    assert "give a checkpoint" in capsys.readouterr().err


def test_an_error_in_the_users_own_code_keeps_its_traceback(folder):
    with pytest.raises(ValueError, match="this is the user's own"):
        main(["score", "nets:broken", "--size", "48", "--images", "photos"])


def test_without_torchvision_or_onnx_it_says_what_to_install(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision.models", None)
        assert main([*SCORE, "--images", "photos"]) == 2
        assert "torch-fastscore[vision]" in capsys.readouterr().err
    monkeypatch.setattr(fastscore, "score", lambda *arguments, **options: pytest.fail("said after the work"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert main(["prune", *MODEL, "--importance", "random", "--macs", "0.5", "--out", "small.onnx"]) == 2
        assert "torch-fastscore[onnx]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main([*PRUNE, "--importance", "random", "--latency", "0.5", "--clock", "openvino"]) == 2
    assert "torch-fastscore[openvino]" in capsys.readouterr().err


def test_interrupted_while_prune_scores_it_says_what_can_be_stopped(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastscore, "score", interrupted)
    assert main([*PRUNE, "--images", "photos", "--macs", "0.5"]) == 130
    said = capsys.readouterr().err
    assert "`fastscore score --resume FILE --out SCORES` can be stopped" in said
    assert said.endswith("fastscore: interrupted\n")


def test_info_names_versions_and_every_backend():
    """In a process of its own, as `python -m fastscore`."""
    facts = json.loads(subprocess.check_output([sys.executable, "-m", "fastscore", "info", "--json"]))
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["backends"].keys() == {row.name for row in backends()}
    assert facts["backends"]["cpu"].startswith("serves cpu")
    for row in backends():
        assert row.unavailable in facts["backends"][row.name]


def test_scores_that_are_not_kept_are_announced(folder, capsys):
    assert main([*SCORE, "--images", "photos"]) == 0
    assert "note: nothing is kept of these scores; --out FILE keeps them" in capsys.readouterr().err
    for option in (["--out", "s.safetensors"], ["--json"], ["--resume", "run.ckpt"]):
        assert main([*SCORE, "--images", "photos", *option]) == 0
        assert "nothing is kept" not in capsys.readouterr().err
