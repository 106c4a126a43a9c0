"""Every script in examples/ runs as it stands and does what it says, with the oracle that suits it."""

import ast
import csv
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import fastscore
from fastscore.cli import digits
from fastscore.pruning.budgets.costs import total_macs

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_names_every_script() -> None:
    rows = re.findall(r"^\| \[(\w+\.(?:py|ipynb))\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def test_classification() -> None:
    found = example("classification").main(macs=0.6, out="small.onnx")
    assert found["dense"] > 0.9
    assert found["repaired"] > 0.8
    assert found["fine-tuned"] > 0.9
    images, labels = digits.Digits.split(0).test
    logits = onnxruntime.InferenceSession("small.onnx").run(None, {"input": images.numpy()})[0]
    correct = float((torch.from_numpy(logits).argmax(1) == labels).float().mean())
    assert correct == pytest.approx(found["fine-tuned"], abs=2e-3)  # a tie may fall the other way


def test_a_training_loop_with_the_drop_in_trains_the_same_network() -> None:
    module = example("training_loop")
    assert len(re.findall(r"# \+$", inspect.getsource(module), re.MULTILINE)) == 5
    with_scores, without = module.main(epochs=2, out="scores.safetensors"), module.main(epochs=2, score=False)
    for (name, one), other in zip(with_scores.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    scores = fastscore.Scores.load("scores.safetensors")
    assert scores.samples == 18 * 64  # the last epoch's
    assert scores.origin.gradient == "loss"


def test_a_decoder_loses_a_fifth_and_generates() -> None:
    dense, small = example("decoder").main()
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    assert 0.75 < sizes[1] / sizes[0] <= 0.8
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    expected = (torch.arange(5) + 10) % 24  # it counts on
    for model in (dense, small):
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
                              pad_token_id=0)
        assert torch.equal(made[0, 5:], expected)


def test_a_vision_transformer_in_its_trainer() -> None:
    module = example("vision_transformer")
    found = module.main(params=0.7, out="vit.safetensors")
    assert found["dense"] > 0.8
    assert found["repaired"] > found["dense"] - 0.05
    assert found["trained on"] > found["dense"] - 0.05
    dense = module.network()
    small = fastscore.load_pruned(dense, "vit.safetensors")
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    assert 0.65 < sizes[1] / sizes[0] <= 0.7


def test_a_detector_keeps_its_outputs() -> None:
    dense, small, images = example("detection").main(macs=0.8)
    assert total_macs(small, images[:1]) / total_macs(dense, images[:1]) <= 0.8
    with torch.no_grad():
        for (name, one), other in zip(dense(images).items(), small(images).values(), strict=True):
            assert one.shape == other.shape, name
            assert float(((one - other) ** 2).mean() / one.var()) < 1, name


def test_a_fleet_from_one_file_of_scores() -> None:
    rows = example("budgets").main("fleet", (0.8, 0.5))
    assert {path.name for path in Path("fleet").iterdir()} == {
        "scores.safetensors", "fleet.csv", "macs-0.8.safetensors", "macs-0.5.safetensors"}
    with open("fleet/fleet.csv", newline="") as file:
        assert [float(row["budget"]) for row in csv.DictReader(file)] == [0.8, 0.5]
    dense = total_macs(digits.network().eval(), torch.zeros(1, 1, 8, 8))
    for row in rows:
        small: nn.Module = fastscore.load_pruned(digits.network, f"fleet/macs-{row['budget']:g}.safetensors")
        assert total_macs(small.eval(), torch.zeros(1, 1, 8, 8)) == row["macs"] <= row["budget"] * dense
        assert round(digits.accuracy(small, *digits.Digits.split(0).test), 4) == row["accuracy"]


def test_yolo_is_pruned_and_trained_by_its_own_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", ".")
    ultralytics = pytest.importorskip("ultralytics", reason="pip install ultralytics")
    dense, small, kept = example("yolo").main(macs=0.8)
    x = torch.zeros(1, 3, 64, 64)
    assert total_macs(small.float().eval(), x, lambda model, x: model(x)[0]) <= \
        0.8 * total_macs(dense, x, lambda model, x: model(x)[0])
    trained = ultralytics.YOLO(kept)
    widths = [[module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
              for model in (small, trained.model, dense)]
    assert widths[0] == widths[1]
    assert sum(widths[0]) < sum(widths[2])
    assert len(trained.predict("yolo/images/0.png", imgsz=64, device="cpu", verbose=False)) == 1


def test_the_notebook_runs_cell_after_cell(capsys: pytest.CaptureFixture[str]) -> None:
    """In IPython's place: the last expression of a cell is shown, as HTML where it has it."""
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    shown = []
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        body = ast.parse(source).body
        last = ast.unparse(body.pop()) if isinstance(body[-1], ast.Expr) else "None"
        exec("\n".join(ast.unparse(line) for line in body), names)
        shown.append(eval(last, names))
    tables = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(tables) == 4  # scores, pandas' own, the curve, the result
    assert all("<table" in table for table in tables)
    assert {path.name for path in Path().iterdir()} == {"curve.png", "small.onnx", "small.safetensors"}
    said = re.findall(r"([\d.]+)% of the test images", capsys.readouterr().out)
    dense, small = (float(share) / 100 for share in said)
    assert dense > 0.9
    assert small > 0.9
    assert names["result"].report.macs[1] / names["result"].report.macs[0] <= 0.5
