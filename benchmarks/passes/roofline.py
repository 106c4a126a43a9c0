"""`python -m benchmarks.passes.roofline`: how near fastscore's pass comes to what the machine can do, on a CPU.

products: the FLOPs of convolutions, linear layers and attention, forward and for the gradients of their inputs, from
the first tap on, at the best rate of this machine's matrix products in that precision (a large square one, as it comes
and with a matrix laid out beforehand; a 3x3 convolution).
elementwise: the bytes that remain when all else is part of some product. Behind the products each tapped tensor is
read once, with the gradient of each layer that reads it, and one gradient is written; an addition reads its second
operand, and its gradient once more. At the rate of a += s·b on arrays far beyond the caches; tensors that a cache
holds may be faster.
products as called: every such call of the pass, forward and backward, made again from the tensors that it had.

Each stands alone, and as the limit that it sets to the pass when the elementwise work follows it. All take turns within
each round; seconds are medians, "times as fast" is within rounds, with the least and the most; "distance" is the time
of fastscore's pass over that of the row.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastscore
from benchmarks import machine
from benchmarks.peers.contestants import BASELINE, CONTESTANTS, fastscore_pass
from benchmarks.peers.measure import Stopwatch
from benchmarks.peers.task import Task
from fastscore.fastpath.precision import PRECISIONS
from fastscore.modules.evaluation_copy import evaluation_copy

OURS = "fastscore, random"
AS_CALLED, PRODUCTS, ELEMENTWISE = "products as called", "products at the best rate", "elementwise at the bandwidth"
LIMITS = {f"limit: {AS_CALLED}, elementwise": (AS_CALLED, ELEMENTWISE),
          f"limit: {PRODUCTS}, elementwise": (PRODUCTS, ELEMENTWISE)}
PRODUCT = re.compile(r"^(?!.*reorder).*(convolution|mm$|linear(_pointwise)?$|attention)")
ADDITION = re.compile(r"^aten::add_?$")


class Calls(TorchDispatchMode):
    """Within it, keeps every call of an operator whose name matches `pattern`, with its arguments."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern
        self.calls: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if self.pattern.search(func.name().split(".")[0]):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        """Make the calls again, in their order."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


@dataclass(frozen=True)
class Work:
    """What a pass has to do: FLOPs of products, and elements that the rest reads and writes."""

    flops: int
    elements: int


def work(task: Task) -> Work:
    """Counted on a plain pass with frozen weights, whose graph begins at the first taps."""
    model, samples = evaluation_copy(task.model), len(task.images)
    plan = fastscore.score(task.model, [task.images[:1]], ignore=task.ignored, progress=False).plan
    read = {tap.layer: samples * torch.Size(tap.reads).numel() for tap in plan.taps}
    tapped: dict[tuple[int, torch.Size], list[Any]] = {}  # tensor -> itself, whether its gradient goes on, reads

    def look(layer: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            tapped.setdefault((x.data_ptr(), x.shape), [x, x.requires_grad]).append(read[layer])
            return (x if x.requires_grad else x.detach().requires_grad_(),)

        return before

    for layer in read:
        model.get_submodule(layer).register_forward_pre_hook(look(layer))
    # the counter knows attention as the matrix products that it is made of
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with Calls(ADDITION) as additions:
            output = model(task.images)
        output.sum().backward()
    elements = sum(max(reads) + sum(reads) + goes_on * x.numel() for x, goes_on, *reads in tapped.values())
    elements += sum(2 * args[0].numel() for _, args, _ in additions.calls
                    if isinstance(args[1], Tensor) and args[0].shape == args[1].shape)
    return Work(counter.get_total_flops(), elements)


def products(dtype: torch.dtype, side: int = 2048, channels: int = 256, size: int = 28
             ) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """name -> (FLOPs, a product of that many)."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    x = torch.randn(8, channels, size, size).to(dtype, memory_format=torch.channels_last)
    filters = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
    found = {"matrices": (2 * side**3, lambda: a @ b),
             "3x3 convolution": (2 * 9 * channels**2 * len(x) * size**2,
                                 lambda: torch.conv2d(x, filters, padding="same"))}
    if torch.backends.mkldnn.is_available():
        laid_out = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), side)
        found["matrices, laid out"] = (2 * side**3,
                                       lambda: torch.ops.mkldnn._linear_pointwise(a, laid_out, None, "none", [], ""))
    return found


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    with Stopwatch() as clock:
        function()
    return clock.seconds


def rounds(task: Task, precision: str, repeats: int, needed: Work) -> tuple[dict[str, list[float]], str]:
    """Seconds of each row in each round, and what the machine's rates were."""
    dtype = PRECISIONS[precision]
    passes = {BASELINE: CONTESTANTS[BASELINE](task), OURS: fastscore_pass(precision=precision)(task)}
    called = Calls(PRODUCT)
    passes[OURS](called)
    best, (a, b) = products(dtype), torch.ones(2, 2**26)
    taken: dict[str, list[float]] = {name: [] for name in (*passes, AS_CALLED, PRODUCTS, ELEMENTWISE)}
    rates: dict[str, list[float]] = {name: [] for name in (*best, "a += s·b")}
    for turn in range(-1, repeats):  # the first warms up
        figures = {}
        for name, run in passes.items():
            run(clock := Stopwatch())
            figures[name] = clock.seconds
        figures[AS_CALLED] = seconds(called.again)
        found = {name: flops / seconds(product) for name, (flops, product) in best.items()}
        figures[PRODUCTS] = needed.flops / max(found.values())
        found["a += s·b"] = 3 * a.nbytes / seconds(lambda: a.add_(b, alpha=0.5))
        figures[ELEMENTWISE] = needed.elements * dtype.itemsize / found["a += s·b"]
        if turn >= 0:
            for name, figure in figures.items():
                taken[name].append(figure)
            for name, rate in found.items():
                rates[name].append(rate / 1e9)
    for name, parts in LIMITS.items():
        taken[name] = [sum(each) for each in zip(*(taken[part] for part in parts), strict=True)]
    spoken = [f"{name} {statistics.median(rate):.0f}" for name, rate in rates.items()]
    return taken, f"GFLOP/s: {', '.join(spoken[:-1])}; GB/s: {spoken[-1]}"


def table(taken: Mapping[str, list[float]]) -> str:
    """A line for each row of `rounds`."""
    lines = [f"{'':<62}{'seconds':>9}   {'times as fast':<22}{'distance':>9}"]
    for name, figures in taken.items():
        ratios = [base / own for base, own in zip(taken[BASELINE], figures, strict=True)]
        distance = statistics.median(own / figure for own, figure in zip(taken[OURS], figures, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"{name:<62}{statistics.median(figures):>9.4f}   {spread:<22}"
                     + ("" if name == BASELINE else f"{distance:>9.2f}"))
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Measure and print a table for each model and precision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes.roofline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=tuple(PRECISIONS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: the rates are those of a CPU")
    machine.settle(arguments)
    print(machine.describe("cpu"), flush=True)
    for model in arguments.models:
        task = Task.random(model, arguments.batch, arguments.size, layout=arguments.layout)
        needed = work(task)
        for precision in arguments.precision:
            taken, rates = rounds(task, precision, arguments.repeats, needed)
            print(f"\n{model}, {precision}, batches of {arguments.batch}, {arguments.size}²: "
                  f"{needed.flops / 1e9:.3g} GFLOP, {needed.elements * PRECISIONS[precision].itemsize / 1e9:.2g} GB "
                  f"elementwise\n{rates}\n{table(taken)}", flush=True)


if __name__ == "__main__":
    main()
