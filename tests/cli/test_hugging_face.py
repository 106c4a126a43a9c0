"""transformers' image classifiers by folder: their processors' settings, and every command that takes a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import onnxruntime
import pytest
import sklearn.datasets
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fastscore
from fastscore.cli import images, main, models

SQUARE, SHORTER = {"height": 32, "width": 32}, {"shortest_edge": 40}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "ViT": lambda: transformers.ViTImageProcessor(size=SQUARE),
    "ViT, bicubic, not normalised": lambda: transformers.ViTImageProcessor(size=SQUARE, resample=3, do_normalize=False),
    "BiT": lambda: transformers.BitImageProcessor(size=SHORTER, crop_size=SQUARE),
    "CLIP": lambda: transformers.CLIPImageProcessor(size=SHORTER, crop_size={"height": 40, "width": 40}),
    "DeiT": lambda: transformers.DeiTImageProcessor(size={"height": 48, "width": 48}, crop_size=SQUARE),
    "ConvNeXt": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8),
    "ConvNeXt, large": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
}


@pytest.fixture(scope="module")
def china(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "china.png"
    Image.fromarray(sklearn.datasets.load_sample_images().images[0]).save(path)
    return path


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_is_that_of_the_processor(kind: str, china: Path, tmp_path: Path) -> None:
    processor = PROCESSORS[kind]()
    processor.save_pretrained(tmp_path)
    prepare = images.preprocessing(f"hf:{tmp_path}")
    expected = processor(images=Image.open(china), return_tensors="pt")["pixel_values"][0]
    assert prepare(china).shape == expected.shape
    assert float((prepare(china) - expected).abs().mean()) < 0.5 / 255 / min(prepare.std)  # Pillow rounds, tensors too
    assert prepare.source == f"as the {type(processor).__name__} of hf:{tmp_path}"
    if "not normalised" in kind:
        assert "values in [0, 1]" in str(prepare)


@pytest.mark.parametrize("make", [
    lambda: transformers.ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5),
    lambda: transformers.BitImageProcessor(size=SHORTER, do_center_crop=False),
    lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 48}),
], ids=["rescales otherwise", "no square", "a rectangle"])
def test_a_processor_that_does_more_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ImageProcessor does more than to resize to a square.*--size, --mean, --std"):
        images.preprocessing(f"hf:{tmp_path}")


@pytest.fixture
def vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, china: Path) -> nn.Module:
    """A working directory with a small ViT in vit/ and a folder of photographs, photos/."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5))
    model.save_pretrained("vit")
    transformers.ViTImageProcessor(size=SQUARE).save_pretrained("vit")
    Path("photos").mkdir()
    for number in range(8):
        Image.open(china).crop((40 * number, 20 * number, 40 * number + 200, 400)).save(f"photos/{number}.png")
    return model.eval()


def test_a_saved_folder_is_scored_shown_and_pruned(vit: nn.Module, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load("hf:vit")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vit.state_dict().values(), strict=True))
    assert main(["info", "hf:vit", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["images"]
    assert "both sides to 32 pixels (bilinear), the middle 32 x 32, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in said
    assert main(["score", "hf:vit", "--images", "photos", "--out", "s.safetensors"]) == 0
    notes = fastscore.Scores.load("s.safetensors").notes
    assert notes["preprocessing"] == said
    assert notes["revision"].startswith("sha256 ")
    assert main(["report", "s.safetensors", "hf:vit", "--out", "r.html"]) == 0
    assert said in Path("r.html").read_text()
    x = torch.randn(3, 3, 32, 32)
    for name in ("m.safetensors", "m.onnx", "m.pt2", "m.pt"):
        assert main(["prune", "hf:vit", "--scores", "s.safetensors", "--params", "0.9", "--out", name]) == 0
    config = transformers.AutoConfig.from_pretrained("vit")
    small = fastscore.load_pruned(lambda: transformers.AutoModelForImageClassification.from_config(config),
                                  "m.safetensors").eval()
    with torch.no_grad():
        expected = small(x).logits
        assert torch.equal(torch.load("m.pt", weights_only=False)(x).logits, expected)
    assert torch.equal(torch.export.load("m.pt2").module()(x), expected)
    logits = onnxruntime.InferenceSession("m.onnx").run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    kept = []
    monkeypatch.setattr(torch, "load", None)  # no pickle is read for it
    for name in ("m.safetensors", "m.pt2", "m.onnx", "m.pt"):
        assert main(["info", name, "--json"]) == 0
        kept.append(json.loads(capsys.readouterr().out)[name])
        assert kept[-1].pop("date") >= notes["date"]  # of the pruning
    assert kept[0]["preprocessing"] == said
    assert "% of the parameters" in kept[0]["remains"]
    assert kept[0] == kept[1] == kept[2] == kept[3]
    Path("m.pt2").write_bytes(Path("m.pt2").read_bytes()[:1000])
    assert main(["info", "m.pt2"]) == 2
    assert "m.pt2: it cannot be read (BadZipFile" in capsys.readouterr().err


def test_a_checkpoint_takes_the_place_of_the_saved_weights(vit: nn.Module) -> None:
    state = {name: tensor + 1 for name, tensor in vit.state_dict().items()}
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, "c.ckpt")
    loaded = models.load("hf:vit", checkpoint="c.ckpt").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Name of a repository -> a folder for its files, in a cache as huggingface_hub keeps it; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def folder(name: str) -> Path:
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        return repository / "snapshots" / COMMIT

    return folder


def test_a_name_of_the_hub_is_read_from_its_cache(vit: nn.Module, hub: Callable[[str], Path]) -> None:
    kept = hub("someone/vit")
    for path in Path("vit").iterdir():
        path.rename(kept / path.name)
    assert main(["score", "hf:someone/vit", "--images", "photos", "--out", "s.safetensors"]) == 0
    notes = fastscore.Scores.load("s.safetensors").notes
    assert notes["revision"] == COMMIT
    assert notes["preprocessing"].endswith("(as the ViTImageProcessor of hf:someone/vit)")
    loaded = models.load("hf:someone/vit")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vit.state_dict().values(), strict=True))


@pytest.mark.parametrize(("spec", "weights"), [
    ("timm:test_resnet", "DEFAULT"), ("timm:test_resnet", "r160_in1k"), ("timm:test_resnet.r160_in1k", "DEFAULT")])
def test_weights_of_timm_are_read_from_the_cache_of_its_hub(hub: Callable[[str], Path], spec: str, weights: str,
                                                            china: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(china.parent)
    trained = timm.create_model("test_resnet")
    torch.nn.init.constant_(trained.fc.bias, 0.25)
    save_file(trained.state_dict(), hub("timm/test_resnet.r160_in1k") / "model.safetensors")
    loaded = models.load(spec, weights=weights)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    if spec != "timm:test_resnet":
        assert main(["prune", spec, "--weights", weights, "--importance", "magnitude-l2", "--params", "0.8", "--out",
                     "small.safetensors"]) == 0
        small = fastscore.load_pruned(models.load(spec), "small.safetensors")
        assert torch.equal(small.fc.bias, trained.fc.bias)


@pytest.mark.parametrize(("arguments", "named"), [
    (("hf:photos",), "model: hf:photos cannot be read as an image classifier"),
    (("hf:vit", "--weights", "DEFAULT"), "weights: only torchvision:NAME and timm:NAME have it"),
    (("hf:vit", "--classes", "3"), "classes: only torchvision:NAME and timm:NAME have it"),
])
def test_bad_input_is_one_line(vit: nn.Module, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
                               named: str) -> None:
    assert main(["score", *arguments, "--images", "photos"]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
