"""Pruned models leave Python: torch.export, ONNX and torch.compile, at batch sizes that were not shown to them.

One network here; FASTSCORE_NIGHTLY=1 takes four, and compiles with inductor in place of its front end alone (minutes).
"""

import os
import warnings
from pathlib import Path

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn

import fastscore

BATCHES = (2, 1, 7)
NIGHTLY = bool(os.environ.get("FASTSCORE_NIGHTLY"))
SHOWN = ["mobile", "residual", "grouped", "unet"][:4 if NIGHTLY else 1]
BACKEND = "inductor" if NIGHTLY else "aot_eager"


@pytest.fixture(scope="module", params=SHOWN)
def small(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Tensor]]:
    """A network pruned twice, with new biases, in float32, and inputs of several batch sizes."""
    network = NETWORKS[request.param]
    model, x = network.traced(dtype=torch.float32), network.inputs(3).float()
    for share in (0.8, 0.7):
        model = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, macs=share,
                                compensate=True).model
    return model, [network.inputs(count, seed=count).float() for count in BATCHES]


def check(run: object, model: nn.Module, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_torch_export(small: tuple[nn.Module, list[Tensor]], tmp_path: Path) -> None:
    model, inputs = small
    fastscore.save(model, inputs[0], tmp_path / "m.pt2")
    check(torch.export.load(tmp_path / "m.pt2").module(), model, inputs)


def test_onnx(small: tuple[nn.Module, list[Tensor]], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = small
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastscore.save(model, inputs[0], tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    check(lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model, inputs)


def test_torch_compile(small: tuple[nn.Module, list[Tensor]]) -> None:
    """Whole, forward and backward."""
    model, inputs = small
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=BACKEND)
    check(compiled, model, inputs)
    compiled(inputs[0]).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(inputs[0]).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)
    model.zero_grad()


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".safetensors"])
def test_saving_leaves_the_model_in_its_modes(suffix: str, tmp_path: Path) -> None:
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs(2)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.7)
    result.model.train()
    next(result.model.children()).eval()
    modes = {name: module.training for name, module in result.model.named_modules()}
    fastscore.save(result, x, tmp_path / f"m{suffix}")
    assert {name: module.training for name, module in result.model.named_modules()} == modes
    if suffix == ".pt":
        saved = torch.load(tmp_path / "m.pt", weights_only=False)
        assert not any(module.training for module in saved.modules())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_one_sample_does_not_tell_that_their_number_is_free(suffix: str, tmp_path: Path) -> None:
    network = NETWORKS["plain"]
    with pytest.raises(ValueError, match=r"example_inputs: 1 sample.*two or more"):
        fastscore.save(network.model(), network.inputs(1), tmp_path / f"small{suffix}")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_inputs_that_are_not_one_tensor_are_no_single_sample(suffix: str, tmp_path: Path) -> None:
    """A dict of one tensor [32, T] was "1 sample"."""
    network = NETWORKS["plain"]
    for given in ({"input_ids": network.inputs(4)}, (network.inputs(4),)):
        said = rf"example_inputs: {type(given).__name__}, and {suffix} files take one tensor"
        with pytest.raises(TypeError, match=said):
            fastscore.save(network.model(), given, tmp_path / f"small{suffix}")  # type: ignore[arg-type]


class Counts(nn.Module):
    """Its code takes the batch size for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.view(len(x), 4))
        return made


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_that_takes_one_batch_size_says_so(suffix: str, tmp_path: Path) -> None:
    model, x, path = Counts().eval(), torch.randn(5, 4), tmp_path / f"small{suffix}"
    said = r"it takes 5 samples in a call, no other number, since Counts .*x\.shape\[0\]"
    with pytest.warns(UserWarning, match=said):
        fastscore.save(model, x, path)
    if suffix == ".pt2":
        found = torch.export.load(path).module()(x)
    else:
        runtime = pytest.importorskip("onnxruntime")
        found = torch.from_numpy(runtime.InferenceSession(path).run(None, {"input": x.numpy()})[0])
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


class Heads(nn.Module):
    """Several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.count = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mask": self.mask(x), "count": self.count(x)}


def test_outputs_of_a_dict_keep_their_names_in_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = Heads().eval(), torch.randn(5, 4)
    fastscore.save(model, x[:2], tmp_path / "small.onnx")
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    assert [each.name for each in session.get_outputs()] == ["mask", "count"]
    for name, expected in model(x).items():
        (found,) = session.run([name], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
