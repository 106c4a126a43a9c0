"""Input of the command line that cannot be used: one line that says the way out, and exit code 2."""

import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from photographed import MODEL, PRUNE, SCORE

import fastscore
from fastscore.cli import main, models

OWN = ("score", "nets:build", "--size", "48", "--images", "photos")


@pytest.mark.parametrize(("arguments", "named"), [
    (("score", "resnet18"), "none of torchvision:NAME, timm:NAME, hf:NAME and module:function"),
    (("score", "resnet18"), "module:function; torchvision:resnet18?"),
    (("info", "nets"), "module:function; name the function in it: nets:build"),
    (("info", "wrote"), "module:function; hf:wrote, where save_pretrained wrote that folder?"),
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
    ((*SCORE, "--images", "empty"), "images: there is none in empty (looked for .bmp"),
    ((*SCORE, "--images", "photos", "--samples", "3"), "holds 2 images: give --samples 2 or fewer"),
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
    ((*SCORE, "--images", "photos", "--out", "nowhere/s.safetensors"), "out: nowhere/s.safetensors: there is no"),
    ((*SCORE, "--images", "photos", "--plot", "s.plot"), "plot: s.plot: a plot's suffix is one of"),
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
    ((*SCORE, "--images", "damaged", "--out", "empty"), "out: empty: it is a folder; name a file in it"),
    ((*SCORE, "--images", "damaged", "--out", "/proc/s.safetensors"), "nothing can be written to /proc"),
    ((*PRUNE, "--images", "photos", "--macs", "0.000001"), "cannot be reached"),
    ((*PRUNE, "--scores", "net.safetensors", "--macs", "0.5"), "scores: net.safetensors: not a fastscore score file"),
    ((*PRUNE, "--scores", "no.safetensors", "--macs", "0.5"), "scores: no.safetensors: there is no such score file"),
    ((*PRUNE, "--scores", "pruned.safetensors", "--macs", "0.5"), "but fastscore-pruned-1; name a score file, or"),
    ((*PRUNE, "--scores", "small.pt2", "--macs", "0.5"), "out: small.pt2 is the file of scores, too; name another"),
    ((*OWN, "--checkpoint", "net.safetensors", "--out", "photos/../net.safetensors"), "is the file of checkpoint, too"),
    ((*OWN, "--resume", "run", "--out", "run"), "out: run is the file of resume, too; name another"),
    ((*SCORE, "--images", "photos", "--size", "32x32"), "--size: 32x32: it must be a whole number, 1 or more"),
    (("prune", *MODEL, "--images", "photos", "--macs", "0.5", "--out", "small.pkl"), "suffix"),
    ((*PRUNE, "--images", "photos", "--agreement", "0.9", "--no-repair"), "agreement: it is judged on images, and by"),
    ((*PRUNE, "--importance", "random", "--agreement", "0.9"), "give --images FOLDER, and neither"),
    ((*PRUNE, "--images", "photos", "--agreement", "0.9"), "images: 2, and one of 4 is held out to judge by; give 4"),
    ((*PRUNE, "--images", "photos/flowers", "--macs", "0.5"), "images: 1, and a repair holds some out to choose by;"),
    ((*PRUNE, "--images", "photos/flowers", "--macs", "0.5"), "give 2 or more, or --no-repair"),
    (("curve", *MODEL, "--images", "photos/flowers"), "images: 1, and one of 4 is held out to judge by; give 4"),
    (("curve", *MODEL, "--images", "photos", "--held-out", "photos/flowers"), "share 1 image, flower.JPG for"),
    (("compare", *MODEL, "--images", "photos", "--held-out", "none"), "held-out: there is no folder none"),
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
    if "wrote" in arguments:
        Path("wrote").mkdir()
        Path("wrote/config.json").write_text("{}")
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


def test_scores_of_another_model_are_refused(folder, capsys):
    main(["score", "nets:grey", "--images", "photos", "--size", "32", "--mean", "0", "--out", "g.safetensors"])
    assert main([*PRUNE, "--scores", "g.safetensors", "--macs", "0.5"]) == 2
    assert "scores: " in capsys.readouterr().err.splitlines()[-1]


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
