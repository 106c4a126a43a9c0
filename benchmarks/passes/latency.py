"""`python -m benchmarks.passes.latency`: what a budget in measured time costs in channels and MACs, and how
long the search takes.

A row per network, budget and ranking: the share that was measured, with its uncertainty; the shares of MACs and
channels that remain; the models that were built and timed; the seconds that all of it took, and those of the processor,
to which an idle machine comes near.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
import torchvision
from torch import Tensor, nn

import fastscore
from benchmarks import machine
from fastscore.pruning.budgets.clocks import Clock

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
SHARES = (0.8, 0.6, 0.4)
RANKINGS: dict[str, dict[str, Any]] = {
    "global": {}, "round_to auto": {"round_to": "auto"}, "cost-aware": {"cost_aware": True},
    "isomorphic": {"scope": "isomorphic"}, "isomorphic, auto": {"scope": "isomorphic", "round_to": "auto"}}
HEAD = f"{'network':<14}{'ranking':<18}{'asked':>7}{'measured':>10}{'±':>7}{'MACs':>8}{'channels':>10}{'tried':>7}" \
       f"{'seconds':>9}{'processor':>11}"


def rows(name: str, model: nn.Module, x: Tensor, shares: Sequence[float] = SHARES,
         rankings: Sequence[str] | None = None, clock: Clock = "torch") -> Iterator[str]:
    """The rows of one network, by the magnitude of its weights; a budget out of reach says so in its row."""
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    for ranking in RANKINGS if rankings is None else rankings:
        options = RANKINGS[ranking]
        for share in shares:
            start, busy = time.perf_counter(), time.process_time()
            try:
                report = fastscore.prune(model, scores, x, latency=share, clock=clock, **options).report
            except ValueError as error:
                yield f"{name:<14}{ranking:<18}{share:>7.0%}  {error}"
                continue
            (chosen,) = (tried for tried in report.candidates if tried.chosen)
            yield (f"{name:<14}{ranking:<18}{share:>7.0%}{chosen.timing.share:>10.1%}{chosen.timing.uncertainty:>7.1%}"
                   f"{chosen.macs:>8.1%}{chosen.channels:>10.1%}{len(report.candidates):>7}"
                   f"{time.perf_counter() - start:>9.1f}{time.process_time() - busy:>11.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=224, help="of the square images (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="torchvision's names")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE",
                        help="of the time, to remain")
    parser.add_argument("--rankings", nargs="+", choices=tuple(RANKINGS), default=tuple(RANKINGS))
    parser.add_argument("--clock", choices=get_args(Clock), default="torch", help="what runs the networks")
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    machine.settle(arguments)
    print(f"{machine.describe(arguments.device)}; one image of {arguments.size}x{arguments.size}, "
          f"timed by {arguments.clock}\n{HEAD}")
    for name in arguments.networks:
        torch.manual_seed(0)
        layout = getattr(torch, arguments.layout.replace("contiguous", "contiguous_format"))
        model = getattr(torchvision.models, name)().eval().to(arguments.device, memory_format=layout)
        x = torch.randn(1, 3, arguments.size, arguments.size, device=arguments.device)
        for row in rows(name, model, x.contiguous(memory_format=layout), arguments.shares,
                        arguments.rankings, arguments.clock):
            print(row, flush=True)


if __name__ == "__main__":
    main()
