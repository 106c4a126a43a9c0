"""Checkpoints as people have them: what is around the weights comes off and is said, what is missing is named."""

import argparse
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastscore.cli.checkpoints import load_checkpoint

State = dict[str, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False))


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


COUNTER = "1.num_batches_tracked"
KINDS = {
    "plain": (lambda state: state, ""),
    "net, accuracy and epoch": (lambda state: {"net": state, "acc": 92.1, "epoch": 3}, "under 'net'; left: acc, epoch"),
    "averaged": (lambda state: {"model_ema": {**prefixed(state, "module."), "n_averaged": torch.tensor(7)}},
                 "under 'model_ema'; 'module.' taken off its names; left: n_averaged"),
    "both": (lambda state: {"model": state, "model_ema": {key: value + 1 for key, value in state.items()},
                            "optimizer": {}}, "under 'model'; left: model_ema, optimizer"),
    "with arguments": (lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, path=Path("/data"))},
                       "under 'model'; left: args"),
    "Lightning": (lambda state: {"state_dict": {**prefixed(state, "student.net."), "loss.weight": torch.ones(3)},
                                 "pytorch-lightning_version": "2.0"},
                  "'student.net.' taken off its names; left: loss.weight"),
    "parts compiled": (lambda state: {key.replace("0.", "0._orig_mod."): value for key, value in state.items()},
                       "'_orig_mod.' taken out of its names"),
    "a teacher, too": (lambda state: {**prefixed(state, "student."), **prefixed(state, "teacher.")},
                       "'student.' taken off its names; it holds the model more than once, and teacher. was left"),
    "no counter": (lambda state: {key: value for key, value in state.items() if key != COUNTER},
                   f"without {COUNTER}, which evaluation does not read"),
    "a counter too many": (lambda state: {**state, "0.num_batches_tracked": torch.tensor(1)},
                           "left: 0.num_batches_tracked"),
    "nested": (lambda state: {"model": {"state_dict": state}}, "under 'model' / 'state_dict'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_around_comes_off_and_is_said(kind: str, tmp_path: Path) -> None:
    write, said = KINDS[kind]
    torch.manual_seed(0)
    expected = network().state_dict()
    torch.save(write(expected), tmp_path / "c.pth")
    model = network()
    note = load_checkpoint(model, tmp_path / "c.pth")
    assert said in note
    assert bool(note) == (kind != "plain")
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_safetensors_with_a_prefix(tmp_path: Path) -> None:
    expected, model = network().state_dict(), network()
    safetensors.torch.save_file(prefixed(expected, "module."), tmp_path / "c.safetensors")
    assert "'module.' taken off" in load_checkpoint(model, tmp_path / "c.safetensors")
    assert torch.equal(model[3].weight, expected["3.weight"])


@pytest.mark.parametrize(("change", "named"), [
    (lambda state: {key: value for key, value in state.items() if key != "3.weight"}, "it lacks 3.weight"),
    (lambda state: {**state, "9.weight": torch.ones(1)}, "the model lacks 9.weight"),
    (lambda state: {**state, "3.weight": torch.ones(5, 4, 1, 1)}, r"other shapes: 3.weight \(5, 4, 1, 1\) for"),
    (lambda state: {"module.x": 1, "weights": {}}, "holds no state dict .* it has module.x, weights"),
    (lambda state: [1, 2], "no state dict .* but list"),
])
def test_what_does_not_fit_changes_nothing(change: object, named: str, tmp_path: Path) -> None:
    torch.save(change(network().state_dict()), tmp_path / "c.pth")  # type: ignore[operator]
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        load_checkpoint(model, tmp_path / "c.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_whole_module_is_refused_and_the_way_out_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole, model = network(), network()
    torch.save(whole, "c.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors \(torch\.nn") as caught:
        load_checkpoint(model, "c.pth")
    command = str(caught.value).split("run once ")[1].split(", with torch.jit")[0]
    exec(command, {"torch": torch})
    load_checkpoint(model, "weights.pt")
    assert torch.equal(model[3].weight, whole[3].weight)
