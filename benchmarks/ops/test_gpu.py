"""Every kernel beside eager, torch.compile and the device's own copy, at the activations of real networks.

    pytest benchmarks -k gpu -s

writes benchmarks/results/gpu.md (one table) and gpu.png (a roofline: bandwidth over bytes moved, under the bandwidth
of a copy of as many bytes). Without a GPU it says so, and runs its CPU part: the same code on small batches, into
cpu.md and cpu.png.

How time is taken. On a GPU: inputs rotate through four times the L2 cache; one pass over them is captured in a CUDA
graph, so that Python and launch queues are left out; events around each replay; the median. On the CPU: the same
rotation, a clock, the median. Bytes are those of both inputs; results are small beside them. What is timed has first
been compared with the float64 reference.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastscore
from fastscore import ops
from fastscore.ops import backends, reference

matplotlib.use("Agg")
from matplotlib import pyplot

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CACHE = torch.cuda.get_device_properties(0).L2_cache_size if GPU else 32 * 2**20
BATCHES = tuple(map(int, os.environ.get("FASTSCORE_BATCHES", "32 256").split())) if GPU else (4,)
UNTIL = float(os.environ.get("FASTSCORE_UNTIL", "inf"))  # seconds since 1970: no case is begun after that
DTYPES = (torch.bfloat16, torch.float32) if GPU else (torch.float32,)
STAGES = None if GPU else 1  # of a network, first to last
REPEATS = 30 if GPU else 7
RESULTS = Path(os.environ.get("FASTSCORE_RESULTS", Path(__file__).parents[1] / "results"))
CLASSES = 1000


@dataclass(frozen=True)
class Row:
    case: str  # where it is from, shape, dtype, layout
    op: str
    backend: str
    bytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """GB/s"""
        return self.bytes / self.seconds / 1e9


EAGER: dict[str, Callable[..., Any]] = {
    "channel_dot": lambda a, g: (a * g).sum((2, 3), dtype=torch.float32),
    "channel_sums": lambda a, g: ((a * g).sum((2, 3), dtype=torch.float32), a.sum((2, 3), dtype=torch.float32),
                                  g.sum((2, 3), dtype=torch.float32)),
    "channel_powers": lambda a, g: ((a * g).abs().sum((2, 3), dtype=torch.float32),
                                    (a * g).square().sum((2, 3), dtype=torch.float32)),
    "normalize_gradient": lambda g: (nn.functional.normalize(g, eps=1e-30), g.norm(dim=1)),
}


def clamp_and_sums(y: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """What clamp_backward does, by PyTorch's own operations."""
    return torch.ops.aten.hardtanh_backward(g, y, -1.0, 1.0), *EAGER["channel_sums"](y, g)


def kernels() -> list[str]:
    """Backends of fastscore that can run here."""
    return [name for name in ("cuda", "triton") if not backends.unavailable(name)] if GPU else ["cpu"]


def chosen(backend: str) -> Any:
    return ops.use_backend(backend) if GPU else nullcontext()


def prepared(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """One pass through all of `inputs`, warmed up; on a GPU as a captured graph, whatever backend is chosen later."""
    def sweep() -> None:
        for arguments in inputs:
            function(*arguments)

    sweep()
    if not GPU:
        return sweep
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sweep()
    return graph.replay


def medians(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each, taken in turn, so that none has the machine to itself."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            times[name].append((_events if GPU else _clock)(function))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _clock(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _events(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def activations(network: str) -> list[tuple[int, ...]]:
    """(C, *positions) of the inputs of convolutions and linear layers: the most channels at each size of positions."""
    with torch.device("meta"):
        model, images = torchvision.models.get_model(network), torch.empty(2, 3, 224, 224)
    most: dict[tuple[int, ...], int] = {}

    def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        _, *rest = arguments[0].shape
        channels, *positions = rest if isinstance(module, nn.Conv2d) else reversed(rest)
        if positions and arguments[0] is not images:
            most[tuple(positions)] = max(channels, most.get(tuple(positions), 0))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(see)
    model(images)
    return [(channels, *positions) for positions, channels in most.items()][:STAGES]


def cases() -> Iterator[tuple[str, tuple[int, ...], bool, torch.dtype]]:
    """(name, [N, C, H, W], channels last or not, dtype); a transformer's tokens are W, its layout channels last."""
    layouts = {"resnet50": (False, True), "mobilenet_v2": (True,), "vit_b_16": (True,)}
    for network, batch, dtype in itertools.product(layouts, BATCHES, DTYPES):
        for channels, *positions in activations(network):
            shape = (batch, channels, *([1] * (2 - len(positions))), *positions)
            for last in layouts[network]:
                layout = "channels last" if last else "contiguous"
                name = f"{network} {'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}"
                yield name, shape, last, dtype


def rotated(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Pairs of activation and gradient, together four times the cache."""
    layout = torch.channels_last if last else torch.contiguous_format
    one = torch.Size(shape).numel() * dtype.itemsize * 2
    count = min(256, max(2, 4 * CACHE // one + 1))
    return [tuple(torch.randn(shape, device=DEVICE).to(dtype, memory_format=layout) for _ in range(2))
            for _ in range(count)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def agree(got: Any, want: Any, atol: float) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row | str]]:
    """Collects measurements; writes table and plot at the end."""
    collected: list[Row | str] = []
    yield collected
    write(collected)


def test_gpu_channel_sums(rows: list[Row | str]) -> None:
    if not GPU:
        print(f"\nGPU timings need a CUDA device, and torch {torch.__version__} finds none; this is the CPU part.")
    for case, shape, last, dtype in cases():
        if time.time() > UNTIL:
            rows.append(f"Out of time before {case}.")
            break
        pairs = rotated(shape, last, dtype)
        moved = sum(x.nbytes for x in pairs[0])
        for name in ("channel_dot", "channel_sums", "channel_powers"):
            op, (a, g) = getattr(ops, name), pairs[0]
            want, functions = getattr(reference, name)(a, g), {}
            for backend in kernels():
                with chosen(backend):
                    agree(op(a, g), want, atol=1e-3)  # sums of thousands of terms near 1
                    functions[backend] = prepared(op, pairs)
            functions["eager"] = prepared(EAGER[name], pairs)
            functions["compile"] = prepared(compiled(EAGER[name]), pairs)
            rows += [Row(case, name, *row) for row in timed(functions, moved, len(pairs))]
        clamps = {}
        for backend in kernels():
            with chosen(backend):
                y, g = pairs[0]
                agree(ops.clamp_backward(y, g, None, -1.0, 1.0), reference.clamp_backward(y, g, None, -1.0, 1.0), 1e-3)
                clamps[backend] = prepared(lambda y, g: ops.clamp_backward_sums(y, g, None, -1.0, 1.0, True), pairs)
        clamps["eager"] = prepared(clamp_and_sums, pairs)
        rows += [Row(case, "clamp_backward", *row) for row in timed(clamps, moved * 3 // 2, len(pairs))]
        copy = {"torch": prepared(lambda a, g: g.copy_(a), pairs)}
        rows += [Row(case, "copy", *row) for row in timed(copy, moved, len(pairs))]
        write(rows)  # case by case: whoever set a time limit has what was measured before it


def timed(functions: dict[str, Callable[[], Any]], moved: int, calls: int) -> Iterator[tuple[str, int, float]]:
    """(backend, bytes, seconds) of one of the `calls` of each function."""
    for backend, taken in medians(functions).items():
        yield backend, moved, taken / calls


def test_gpu_output_gradients(rows: list[Row | str]) -> None:
    for batch in BATCHES:
        case = f"logits {batch}×{CLASSES} float32"
        ids, g = torch.arange(batch, device=DEVICE), torch.randn(batch, CLASSES, device=DEVICE)
        drawn, normalized = {}, {}
        for backend in kernels():
            with chosen(backend):
                agree(ops.random_gradient(ids, CLASSES, 0), reference.random_gradient(ids, CLASSES, 0), 1e-6)
                agree(ops.normalize_gradient(g), reference.normalize_gradient(g), 1e-6)
                drawn[backend] = prepared(lambda ids: ops.random_gradient(ids, CLASSES, 0), [(ids,)] * 16)
                normalized[backend] = prepared(ops.normalize_gradient, [(g,)] * 16)
        eager = EAGER["normalize_gradient"]
        normalized |= {"eager": prepared(eager, [(g,)] * 16), "compile": prepared(compiled(eager), [(g,)] * 16)}
        rows += [Row(case, "random_gradient", *row) for row in timed(drawn, g.nbytes, 16)]
        rows += [Row(case, "normalize_gradient", *row) for row in timed(normalized, 2 * g.nbytes, 16)]


def test_gpu_training_step(rows: list[Row | str]) -> None:
    """What the taps of a Scorer add to a step of a training loop."""
    name, batch, size = ("resnet50", 128, 224) if GPU else ("resnet18", 4, 64)
    model = torchvision.models.get_model(name).to(DEVICE, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scorer = fastscore.Scorer(model, images[:1])

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def tapped(backend: str) -> Callable[[], None]:
        def run() -> None:
            with chosen(backend), scorer:
                step()
        run()
        return run

    step()
    taken = medians({"plain": step, **{backend: tapped(backend) for backend in kernels()}})
    rows += [f"Training step of {name}, batch {batch} at {size}²: {1e3 * taken['plain']:.1f} ms; with taps ({backend}) "
             f"{1e3 * taken[backend]:.1f} ms, {100 * (taken[backend] / taken['plain'] - 1):+.1f} %."
             for backend in kernels()]


def write(rows: list[Row | str]) -> None:
    """The table and the plot."""
    measured = [row for row in rows if isinstance(row, Row)]
    copies = {row.case: row.bandwidth for row in measured if row.op == "copy"}
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"# {device}, torch {torch.__version__}", "",
             *(row for row in rows if isinstance(row, str)), "",
             "| case | op | backend | µs | GB/s | of copy |", "|---|---|---|--:|--:|--:|"]
    for row in measured:
        share = f"{row.bandwidth / copies[row.case]:.2f}" if row.case in copies else ""
        lines.append(f"| {row.case} | {row.op} | {row.backend} | {1e6 * row.seconds:.1f} | {row.bandwidth:.1f} "
                     f"| {share} |")
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / DEVICE.type.replace("cuda", "gpu")
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")

    figure, axes = pyplot.subplots(figsize=(8, 5))
    roof: dict[int, float] = {}
    for row in measured:
        if row.op == "copy":
            roof[row.bytes] = max(row.bandwidth, roof.get(row.bytes, 0))
    axes.plot(*zip(*sorted(roof.items()), strict=True), color="black", marker=".", label="copy")
    for backend in dict.fromkeys(row.backend for row in measured if row.op == "channel_sums"):
        points = [(row.bytes, row.bandwidth) for row in measured if row.backend == backend and row.op == "channel_sums"]
        axes.scatter(*zip(*points, strict=True), s=12, label=backend)
    axes.set(xscale="log", yscale="log", xlabel="bytes moved", ylabel="GB/s", title=f"channel_sums on {device}")
    axes.legend()
    figure.savefig(target.with_suffix(".png"), dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    print(f"\nwrote {target.with_suffix('.md')} and {target.with_suffix('.png')}")
