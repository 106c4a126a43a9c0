"""The command line as a user meets it: real pictures, checkpoints of every kind, and what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import pytest
import safetensors.torch
import torch
import torchvision
from photographed import MODEL, SCORE
from PIL import Image
from started import environment

import fastscore
from fastscore.cli import images, main, models
from fastscore.ops.backends import backends


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


def test_what_an_exporter_does_not_take_is_kept_as_weights_and_a_recipe(folder, capsys, monkeypatch):
    def refuses(*arguments, **options):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.export, "export", refuses)
    prune = ("prune", *MODEL, "--importance", "magnitude-l2", "--macs", "0.5", "--size", "48", "--out")
    assert main([*prune, "small.pt2"]) == 2
    said = capsys.readouterr()
    assert "remains: " in said.out
    assert ("--out: small.pt2 could not be written (RuntimeError: no such operator); the smaller model is in "
            "small.pt2.safetensors, which fastscore.load_pruned reads") in said.err
    small = fastscore.load_pruned(lambda: models.load("nets:build", checkpoint="net.safetensors"),
                                  "small.pt2.safetensors")
    assert small(torch.zeros(1, 3, 48, 48)).isfinite().all()
    assert not Path("small.pt2").exists()


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


def test_a_network_can_be_named_in_place_of_its_function(folder):
    """A copy of it, so that a checkpoint changes nothing in the user's module."""
    first, second = models.load("nets:network"), models.load("nets:network", checkpoint="net.safetensors")
    assert not torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(models.load("nets:network")[0].weight, first[0].weight)


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


def test_info_names_versions_and_every_backend():
    """In a process of its own, as `python -m fastscore`."""
    facts = json.loads(subprocess.check_output([sys.executable, "-m", "fastscore", "info", "--json"],
                                               env=environment()))
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
