"""The whole way on a GPU: scored, pruned, repaired, distilled, masked, timed, saved; and the same numbers as on a CPU.

    pytest benchmarks/passes/test_gpu_pipeline.py

Without a GPU the same runs on the CPU.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastscore
from fastscore.ops import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in ("cuda", "triton", "composite") if not backends.unavailable(name)]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "densenet121": torchvision.models.densenet121,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "swin_t": torchvision.models.swin_t,
    "vit": lambda: torchvision.models.VisionTransformer(64, 16, 4, 4, 128, 256),
}


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    found = NETWORKS[request.param]().eval()
    if isinstance(getattr(found, "heads", None), nn.Sequential):
        nn.init.normal_(found.heads[-1].weight, std=0.02)  # torchvision's ViT begins with zeros
    return found


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(8 * count, 3, 64, 64, generator=torch.Generator().manual_seed(1)).split(8))


def placed(model: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    return copy.deepcopy(model).to(DEVICE), [batch.to(DEVICE) for batch in batches()]


def test_scores_and_the_smaller_network_are_those_of_the_cpu(model: nn.Module) -> None:
    ours, images = placed(model)
    found = fastscore.score(ours, images, ablation="mean", progress=False)
    want = fastscore.score(model, batches(), ablation="mean", progress=False)
    print(found.plan)
    for layer in want:
        torch.testing.assert_close(found[layer].cpu(), want[layer], rtol=1e-2, atol=1e-3 * float(want[layer].max()))
    # one order for both, so that the same channels go
    small = fastscore.prune(ours, found, images[0][:1], macs=0.7, calibration=images, repair="linear", progress=False)
    on_cpu = fastscore.prune(model, found, batches()[0][:1], macs=0.7, calibration=batches(), repair="linear",
                             progress=False)
    assert all(parameter.device.type == DEVICE.type for parameter in small.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small.model(images[0]).cpu(), on_cpu.model(batches()[0]), rtol=1e-2, atol=1e-2)


def test_the_default_repair_and_distillation(model: nn.Module, tmp_path: Path) -> None:
    ours, images = placed(model)
    scores = fastscore.score(ours, images, ablation="mean", progress=False)
    result = fastscore.prune(ours, scores, images[0][:1], macs=0.7, calibration=images, progress=False)
    print(result.report)
    with fastscore.mask(ours, scores, fraction=0.2, example_inputs=images[0][:1]), torch.no_grad():
        assert torch.isfinite(ours(images[0])).all()
    for precision in (None, "bfloat16"):
        fastscore.distill(ours, result, images, steps=3, looks=1, precision=precision, progress=False)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    back = fastscore.load_pruned(lambda: copy.deepcopy(model), tmp_path / "small.safetensors").to(DEVICE).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(images[0]), result.model.eval()(images[0]))


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"graph": False}, {"compile": True}], ids=str)
def test_ways_to_score(model: nn.Module, options: dict[str, object]) -> None:
    ours, images = placed(model)
    want = fastscore.score(ours, images, progress=False)
    found = fastscore.score(ours, images, progress=False, **options)
    print(found.plan)
    share = 0.1 if "precision" in options else 1e-3
    for layer in want:
        torch.testing.assert_close(found[layer], want[layer], rtol=1e-2, atol=share * float(want[layer].max()))


def test_a_scorer_in_a_training_loop_with_mixed_precision(model: nn.Module) -> None:
    ours, images = placed(model)
    ours.train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-3)
    scorer = fastscore.Scorer(ours, images[0][:2])
    with scorer:
        for batch in images:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(ours(batch), torch.arange(len(batch), device=DEVICE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    scores = scorer.scores()
    assert all(torch.isfinite(scores[layer]).all() for layer in scores)


def test_a_budget_of_time() -> None:
    """Of a network that keeps the device busy: of a small one, a GPU takes as long for few channels as for many."""
    name, batch, size = ("resnet50", 64, 224) if DEVICE.type == "cuda" else ("resnet18", 2, 64)
    torch.manual_seed(0)
    ours = torchvision.models.get_model(name).eval().to(DEVICE)
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    scores = fastscore.score(ours, [images], progress=False)
    result = fastscore.prune(ours, scores, images, latency=0.8, progress=False)
    print(result.report)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_scores(backend: str) -> None:
    torch.manual_seed(0)
    ours, images = placed(torchvision.models.mobilenet_v2().eval())
    want = fastscore.score(ours, images, progress=False)
    with fastscore.ops.use_backend(backend):
        found = fastscore.score(ours, images, progress=False)
    print(found.plan)
    for layer in want:
        torch.testing.assert_close(found[layer], want[layer], rtol=1e-3, atol=1e-4 * float(want[layer].max()))
