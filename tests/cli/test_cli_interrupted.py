"""Ctrl-C at any moment of a long command: one line, exit code 130, and no file that was not there before."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interruptible import MODEL, calls, folder, run
from started import environment

import fastscore
from fastscore.pruning.budgets import latency

COMMANDS = {
    "repair": ["prune", *MODEL, "--macs", "0.6", "--repair", "asymmetric", "--out", "small.safetensors"],
    "latency": ["prune", *MODEL, "--latency", "0.99", "--no-repair", "--out", "small.onnx"],
    "curve": ["curve", *MODEL, "--macs", "0.8", "0.5", "--repair", "linear", "--out", "c.json", "--plot", "c.png"],
    "compare": ["compare", *MODEL, "--importances", "taylor-sq", "random", "--macs", "0.6", "--repair", "mean",
                "--plot", "c.png"]}


def clock(dense: latency.Call, other: latency.Call, *_: object) -> latency.Timing:
    """As fast as ever, so that a command calls its model as often as before."""
    with torch.no_grad():
        for call in (dense, other) * 9:
            call()
    return latency.Timing((1.0, 0.98), 0.0)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(latency, "time_pair", clock)
    with folder(tmp_path, monkeypatch, images=16):
        yield


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"__pycache__"}


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_in_the_middle(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    assert run(COMMANDS[command]) == 0
    last = calls()
    for name in files() - before:
        Path(name).unlink()
    for share in (0.1, 0.5, 0.9):  # in the last calls exporters run it, and the report is printed
        capsys.readouterr()
        assert run(COMMANDS[command], max(round(share * last), 1)) == 130
        said = capsys.readouterr()
        assert said.err.splitlines()[-1] == "fastscore: interrupted"
        assert "Traceback" not in said.err
        assert said.out == ""
        assert files() == before


def test_a_process_of_its_own_and_a_signal_from_outside() -> None:
    """In the middle of the repair; by a process, since there is no other way to see Python's own last words."""
    before = files()
    process = subprocess.Popen([sys.executable, "-m", "fastscore", *COMMANDS["repair"]], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment(SLEEP="60", REACHED="reached"),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(Path("reached"), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "fastscore: interrupted"
    assert "Traceback" not in err
    assert out == ""
    assert files() == before | {"reached"}


@pytest.mark.parametrize(("started", "quiet"), [(["-m", "fastscore", "info"], True), (["bin/fastscore", "info"], True),
                                                (["train.py"], False)])
def test_while_torch_is_imported(started: list[str], quiet: bool) -> None:
    """Which takes seconds: by the command nothing is said but that; what others start keeps Python's own way."""
    Path("bin").mkdir()
    Path("bin/fastscore").write_text("import sys\nfrom fastscore.cli import main\nsys.exit(main())\n")
    Path("train.py").write_text("import fastscore\n")
    Path("slow/torch").mkdir(parents=True)
    Path("slow/torch/__init__.py").write_text("import pathlib, time\npathlib.Path('reached').touch()\ntime.sleep(60)\n")
    library = str(Path(fastscore.__file__).parents[1])
    process = subprocess.Popen([sys.executable, *started], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(["slow", library])},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(Path("reached"), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == ""
    if quiet:
        assert (process.returncode, err) == (130, "fastscore: interrupted\n")
    else:
        assert "KeyboardInterrupt" in err
        assert process.returncode == -signal.SIGINT
