"""What only a device can show of the ops: right in every language, in a CUDA graph, on the second of two devices.

    pytest benchmarks/ops/test_gpu_checks.py

Without a GPU the same checks run on the CPU's kernels, but for those of graphs and of a second device.
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import Tensor

import fastscore
from fastscore import ops
from fastscore.ops import backends, reference

DEVICES = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
LANGUAGES = [name for name in ("cuda", "triton") if not backends.unavailable(name)] or ["cpu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 16, 7, 7), (2, 7, 5, 5), (1, 3, 150, 151), (4, 64, 14, 14), (5, 48), (2, 17, 24), (300, 8), (0, 3, 4),
          (2, 3, 0), (1, 2, 128, 161))
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "cropped": lambda x: x[..., 1:] if x.dim() > 2 and x.shape[-1] > 1 else x,
    "late": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) if x.numel() else x,
}


@pytest.fixture(params=list(itertools.product(DEVICES, LANGUAGES)), ids=lambda pair: " ".join(pair))
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device, with each language's kernels."""
    name, language = request.param
    with nullcontext() if language == "cpu" else ops.use_backend(language):
        yield torch.device(name)


def normals(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def close(got: object, want: object, terms: float = 1.0) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * terms, check_device=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        a, g = (LAYOUTS[layout](normals(shape, dtype, device, seed)) for seed in (0, 1))
        terms = max(a.numel() / max(a.shape[0] * a.shape[1], 1), 1)
        close(ops.channel_sums(a, g), reference.channel_sums(a, g), terms)
        close(ops.channel_dot(a, g.flip(0)), reference.channel_dot(a, g.flip(0)), terms)
        close(ops.channel_powers(a, g), reference.channel_powers(a, g), terms)
        close(ops.channel_moments(a, g).unbind(), reference.channel_sums(a, g, 1, True), terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "late"])
def test_clamp_backward(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    for shape, bounds in zip(SHAPES, itertools.cycle([(0.0, float("inf")), (0.0, 6.0), (-0.3, 0.7)])):
        y, g, rest = (LAYOUTS[layout](normals(shape, dtype, device, seed)) for seed in (0, 1, 2))
        y = LAYOUTS[layout](y.clamp(*bounds))
        for other in (None, rest):
            want = reference.clamp_backward(y, g, other, *bounds)
            got = ops.clamp_backward(y, g.clone(), other, *bounds, overwrite=True)
            assert torch.equal(got[0], want[0]) or other is not None
            close(got[0], want[0])
            close(got[1:], want[1:], max(y.numel() / max(y.shape[0] * y.shape[1], 1), 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gradients(device: torch.device, dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 1, 77, 2**62 + 11, -1], device=device)
    for classes in (1, 10, 1000, 1001, 50257):
        for distribution in ("normal", "rademacher"):
            got = ops.random_gradient(ids, classes, 7, 1, distribution, True, dtype)
            want = reference.random_gradient(ids, classes, 7, 1, distribution, True, dtype)
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        g = normals((5, classes), dtype, device, 3)
        for scale in (1.0, 1e-20, 1e20) if dtype == torch.float32 else (1.0,):
            got, want = ops.normalize_gradient(g * scale), reference.normalize_gradient(g * scale)
            torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_same_bits_every_time(device: torch.device) -> None:
    a, g = (normals((1, 4, 300, 301), torch.float32, device, seed) for seed in (0, 1))
    first = ops.channel_moments(a, g)
    assert all(torch.equal(first, ops.channel_moments(a, g)) for _ in range(5))


def test_a_cuda_graph_of_the_ops(device: torch.device) -> None:
    if device.type != "cuda":
        return  # there are none
    with torch.cuda.device(device):
        a, g = (normals((2, 64, 56, 56), torch.float32, device, seed) for seed in (0, 1))
        ids = torch.arange(2, device=device)
        work = [lambda: ops.channel_moments(a, g), lambda: ops.clamp_backward_sums(a, g.clone(), None, -1.0, 1.0)[1],
                lambda: ops.random_gradient(ids, 1000, 0), lambda: ops.normalize_gradient(a.flatten(1))[0]]
        want = [each().clone() for each in work]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [each() for each in work]
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_scores_are_those_of_the_cpu(device: torch.device) -> None:
    """With graphs and without; and without TF32, which is another number."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    batches = [torch.randn(4, 3, 64, 64) for _ in range(4)]
    want = fastscore.score(model, batches, progress=False)
    model = model.to(device)
    for graph in ("auto", False):
        scores = fastscore.score(model, batches, progress=False, graph=graph)
        assert scores.plan is not None
        print(device, graph, scores.plan.graph)
        for layer in want:
            torch.testing.assert_close(scores[layer].cpu(), want[layer], rtol=5e-3,
                                       atol=1e-4 * float(want[layer].max()))
        assert device.type != "cuda" or (graph == "auto") == (scores.plan.graph == "1 CUDA graph"), scores.plan.graph


FRESH_THREAD = """
import threading, torch
from fastscore import ops
with ops.use_backend({language!r}):
    a = torch.empty(2, 3, 4, device="cuda:1")
    thread = threading.Thread(target=lambda: ops.channel_dot(a, a))
    thread.start(); thread.join()
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_second_device_leaves_no_context_on_the_first(language: str) -> None:
    if len(DEVICES) < 2:
        return  # there is no second
    done = subprocess.run([sys.executable, "-c", FRESH_THREAD.format(language=language)], capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
