"""FASTSCORE_PORTABLE=1: a CPU takes the path that a GPU takes, whose layouts can be looked at here."""

from typing import Any

import pytest
import torch
import torchvision
from networks import NETWORKS
from thin_members import THIN
from thinned import NIGHTLY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore
from fastscore.scoring.batch_passes import BatchPasses
from fastscore.taps.measures import unclamped

FAMILIES = ["densenet", "googlenet", "mobilenet v3", "resnet", "shufflenet", "vgg"]  # thin members
MORE = ["efficientnet", "mnasnet", "mobilenet v2", "regnet", "squeezenet"]
WHOLE = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "inception_v3",
           "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf",
           "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "vgg11_bn", "wide_resnet50_2"]
SIZES = {"inception_v3": 96, "maxvit_t": 224}  # others take 64 x 64


@pytest.fixture
def _portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSCORE_PORTABLE", "1")


def channels_last(x: Tensor) -> bool:
    """Whether channels lie closer together than positions, be it in a part of a larger tensor."""
    return x.stride(1) < x.stride(3)


class Layouts(TorchDispatchMode):
    """Notes the backward passes of convolutions, and those whose gradient lies otherwise in memory than their input."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.calls, self.mixed = False, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and func is torch.ops.aten.convolution_backward.default:
            self.calls += 1
            g, x = args[0], args[1]
            if len({channels_last(tensor) for tensor in (g, x) if 1 not in (tensor.shape[1], *tensor.shape[2:])}) > 1:
                self.mixed.append(f"{tuple(g.shape)} {g.stride()} beside {tuple(x.shape)} {x.stride()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_portable")
@pytest.mark.parametrize("name", FAMILIES + (MORE + WHOLE) * NIGHTLY)
def test_no_convolution_gets_a_gradient_of_another_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass, that is: the network is traced, and its groups are tried, as it was given."""
    options = {"init_weights": False} if name == "inception_v3" else {}
    model = THIN[name][0]() if name in THIN else torchvision.models.get_model(name, **options)
    model, size = model.eval(), SIZES.get(name, 64)
    seen, measure = Layouts(), BatchPasses._measure

    def watched(self: BatchPasses, *args: Any) -> Any:
        seen.on = True
        return measure(self, *args)

    monkeypatch.setattr(BatchPasses, "_measure", watched)
    with seen:
        scores = fastscore.score(model, [torch.randn(2, 3, size, size)], progress=False)
    assert seen.calls >= 3
    assert seen.mixed == []
    assert scores.plan is not None
    assert "FASTSCORE_PORTABLE=1" in str(scores.plan)
    assert not scores.plan.packed


@pytest.mark.parametrize("name", ["residual", "mobile", "squeeze-excite"])
def test_scores_are_those_of_the_cpus_own_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    model, batches = network.traced(dtype=torch.float32), [network.inputs().float()]
    own = fastscore.score(model, batches, progress=False)
    monkeypatch.setenv("FASTSCORE_PORTABLE", "1")
    portable = fastscore.score(model, batches, progress=False)
    assert own.plan is not None
    assert own.plan.packed
    for layer in own:
        torch.testing.assert_close(portable[layer], own[layer], rtol=1e-3, atol=1e-6 * float(own[layer].max()))


@pytest.mark.parametrize("bounds", [(0.0, torch.inf), (0.0, 6.0), (-1.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_back_through_a_clamp(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    """Nothing comes back from a bound, an infinite one included; NaN lets it through, so that it is seen."""
    ends: list[float] = [*bounds, -0.0, 0.5, torch.nan]
    y = torch.cat([torch.tensor(ends), torch.empty(59).uniform_(-1, 7).clamp(*bounds)]).to(dtype)
    y = y.view(2, 4, 2, 4).to(memory_format=torch.channels_last)
    for g in (torch.randn(2, 4, 2, 4).to(dtype), torch.ones(2, 4, 1, 1, dtype=dtype).expand(2, 4, 2, 4)):
        result: Tensor = unclamped(g, y, bounds)
        expected = g.clone()
        expected[(y <= bounds[0]) | (y >= bounds[1])] = 0
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last)
