"""Files are data: none of them runs code; and a model's name runs what it names, nothing else. See docs/trust.md."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks import NETWORKS
from torch import Tensor

import fastscore
from fastscore import files
from fastscore.cli import main, models
from fastscore.scoring import runs

NETWORK = NETWORKS["plain"]
NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
"""


class Hostile:
    """Whoever unpickles it makes the folder "owned"."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    assert not Path("owned").exists()
    for name in set(sys.modules) - before:
        if name.startswith("nets") or " of " in name or name in ("neighbour", "json"):
            del sys.modules[name]


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"0.weight": Hostile()}))


def write_zip(path: Path) -> None:
    torch.save({"state_dict": {"0.weight": torch.ones(3), "more": Hostile()}}, path)


def write_module(path: Path) -> None:
    torch.save(NETWORK.model(), path)


def write_script(path: Path) -> None:
    torch.jit.trace(NETWORK.model(), NETWORK.inputs(1)).save(str(path))


WRITERS = [write_pickle, write_zip, write_module]


def test_the_hostile_file_is_one() -> None:
    write_zip(Path("h"))
    torch.load("h", weights_only=False)
    assert Path("owned").is_dir()
    Path("owned").rmdir()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("write", [*WRITERS, write_script])
def test_checkpoints_of_models(write: Any) -> None:
    write(Path("c.pth"))
    model = NETWORK.traced()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^checkpoint: c\.pth holds more than tensors"):
        models.load_checkpoint(model, "c.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def loaders() -> dict[str, Any]:
    model, x = NETWORK.traced(), NETWORK.inputs(2)
    return {
        "scores": fastscore.Scores.load,
        "checkpoint": lambda path: fastscore.score(model, [x], resume=path, progress=False),
        "scorer": fastscore.Scorer(model, x).load,
        "pruned": lambda path: fastscore.load_pruned(model, path)}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", ["scores", "checkpoint", "scorer", "pruned"])
def test_files_of_its_own(kind: str, write: Any) -> None:
    write(Path("f"))
    with pytest.raises(ValueError, match=r"^f: not a readable safetensors file"):
        loaders()[kind](Path("f"))


@pytest.mark.parametrize("kind", ["scores", "checkpoint", "scorer", "pruned"])
def test_one_kind_of_file_is_not_taken_for_another(kind: str) -> None:
    model, x = NETWORK.traced(), NETWORK.inputs(2)
    scores = fastscore.score(model, [x], resume="checkpoint", progress=False)
    scores.save("scores")
    scorer = fastscore.Scorer(model, x)
    scorer.save("scorer")
    fastscore.save_pruned(fastscore.prune(model, scores, x, channels=0.8), "pruned")
    safetensors.torch.save_file({"0.weight": torch.ones(3)}, "foreign")
    for other in {"scores", "checkpoint", "scorer", "pruned", "foreign"} - {kind}:
        with pytest.raises(ValueError, match=rf"^{other}: not a fastscore "):
            loaders()[kind](Path(other))


def test_nothing_of_its_own_is_written_as_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pickled")

    for module, name in ((torch, "save"), (pickle, "dump"), (pickle, "dumps")):
        monkeypatch.setattr(module, name, refuse)
    model, x = NETWORK.traced(), NETWORK.inputs(2)
    scores = fastscore.score(model, [x], resume="checkpoint", progress=False)
    scores.save("scores")
    fastscore.Scorer(model, x).save("scorer")
    result = fastscore.prune(model, scores, x, channels=0.8)
    fastscore.save(result.model, x, "small.safetensors")


def test_a_state_keeps_what_it_holds() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": [1, "two", None, {"c": torch.tensor(True)}], "d": {},
             "e": torch.empty(0, 3, dtype=torch.float16), "f": 0.1}
    files.write_state("f", "some-1", state)
    back = files.read_state("f", "some-1", "state", "")

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(one, (dict, list)):
            pairs = [(one[key], other[key]) for key in (one if isinstance(one, dict) else range(len(one)))]
            return len(one) == len(other) and all(same(*pair) for pair in pairs)
        return bool(one == other)

    assert same(state, back)


@pytest.mark.parametrize("spec", ["nets.py:build", "nets:build"])
def test_what_lies_beside_a_model_is_not_run(spec: str, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a file that is called like a package which is needed later, when the model has been loaded."""
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    Path("nets.py").write_text(NETS)
    for name in ("matplotlib", "torchvision", "conftest", "sitecustomize"):
        Path(f"{name}.py").write_text("import os\nos.mkdir('owned')\n")
    assert main(["score", spec, "--size", "8", "--importance", "magnitude-l2", "--plot", "s.png"]) == 0
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")


def test_torchvisions_models_import_nothing_from_here() -> None:
    for name in ("torchvision", "resnet18", "json", "nets"):
        Path(f"{name}.py").write_text("import os\nos.mkdir('owned')\n")
    path = list(sys.path)
    models.load("torchvision:resnet18", classes=3)
    assert sys.path == path


def test_a_file_is_that_file() -> None:
    """Whatever module has its name: one of Python's own, one that is loaded already, one of another folder."""
    for folder in ("one", "two"):
        Path(folder).mkdir()
        for name in ("json", "nets"):
            Path(folder, f"{name}.py").write_text(NETS.replace("4, 5", "4, 7" if folder == "two" else "4, 6"))
    import json
    for name in ("json", "nets"):
        for folder, width in (("one", 6), ("two", 7), ("one", 6)):
            assert models.load(f"{folder}/{name}.py:build")[2].out_channels == width
    assert sys.modules["json"] is json
    assert hasattr(json, "dumps")


def test_neighbours_are_found_at_any_time() -> None:
    Path("deep").mkdir()
    Path("deep/neighbour.py").write_text("from torch import nn\nLAYER = nn.ReLU\n")
    Path("deep/nets.py").write_text("""
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        from neighbour import LAYER
        return LAYER()(x)

def build():
    return Net()
""")
    assert models.load("deep/nets.py:build")(torch.tensor([-1.0])) == 0


def test_a_module_that_fails_can_be_mended() -> None:
    Path("nets.py").write_text("raise ValueError('not yet')\n")
    with pytest.raises(ValueError, match="not yet"):
        models.load("nets.py:build")
    Path("nets.py").write_text(NETS + "\n# mended\n")
    assert len(models.load("nets.py:build")) == 3


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "none.py:build", "--size", "8", "--images", "photos"]) == 2
    assert "model: there is no file none.py" in capsys.readouterr().err


def test_the_page_names_every_kind_of_file() -> None:
    page = (Path(__file__).parents[2] / "docs/trust.md").read_text()
    for named in ("weights_only=True", "--resume", "safetensors", "torchrun", "Pillow", "load_pruned"):
        assert named in page
    assert runs.FORM.startswith("fastscore-")
