"""`python -m benchmarks.passes.tracing`: how long it takes to find what can go, beside a forward pass of one sample.

forward: the median of passes without gradients, in evaluation mode. trace: of a fresh model each time, the least. over
ten: what is left of the trace after ten such passes, the constant that docs/speed.md states. passes: the trace in
passes, by the clock; multiplied: by what is multiplied in one and the other, which is no matter of the machine. calls:
how often the model's own code ran, on batches of whatever size.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from fastscore.batches.calls import call_model
from fastscore.graph.scored_units import Units
from fastscore.graph.tracing import trace
from fastscore.graph.trials.trial_inputs import batch_of
from fastscore.integrations import transformers as hugging_face
from fastscore.modules.macs.mac_formulas import formulas

DEPTH = 36  # of the decoder
IMAGES = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_t",
          "vit_b_16")


def decoder(depth: int = DEPTH) -> nn.Module:
    """A Llama of small width."""
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=32))


def networks(size: int) -> Iterator[tuple[str, Callable[[], nn.Module], Any, Any]]:
    """(name, builds it, a batch of one sample, what calls the model)"""
    yield f"Llama, {DEPTH} layers", decoder, {"input_ids": torch.arange(8)[None]}, hugging_face.forward
    for name in IMAGES:
        yield name, lambda name=name: torchvision.models.get_model(name, weights=None), \
            torch.randn(1, 3, size, size), call_model


def measure(build: Callable[[], nn.Module], batch: Any, forward: Any, units: Units = "groups", repeats: int = 3,
            samples: int = 1) -> Mapping[str, float]:
    """Seconds of a pass and of a trace, what the trace takes over ten passes, calls of the model in it, and how many
    passes multiply as much."""
    traces, passes, calls = [], [], 0
    first = batch_of(batch, samples)  # which begins with the example

    def counted(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(model, batch)

    for _ in range(repeats):
        model = build().eval()
        with torch.no_grad():
            for _ in range(4):
                began = time.perf_counter()
                forward(model, batch)
                passes.append(time.perf_counter() - began)
        calls, began = 0, time.perf_counter()
        trace(model, batch, counted, first, units)
        traces.append(time.perf_counter() - began)
    once = statistics.median(passes)
    model = build().eval()
    with FlopCounterMode(display=False, custom_mapping=formulas()) as pass_, torch.no_grad():
        forward(model, batch)
    with FlopCounterMode(display=False, custom_mapping=formulas()) as all_of_it:
        trace(model, batch, forward, first, units)
    return {"forward": once, "trace": min(traces), "over ten": min(traces) - 10 * once, "calls": calls,
            "multiplied": all_of_it.get_total_flops() / pass_.get_total_flops()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.add_arguments(parser)
    parser.add_argument("--size", type=int, default=224, help="of an image (default: %(default)s)")
    parser.add_argument("--units", choices=get_args(Units), default="groups", help="what is looked for")
    parser.add_argument("--samples", type=int, default=1, help="of the first batch of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="networks whose name holds this")
    arguments = parser.parse_args()
    machine.settle(arguments)
    print(machine.describe("cpu"))
    print(f"{'':20} {'forward':>9} {'trace':>9} {'over ten':>10} {'passes':>7} {'multiplied':>11} {'calls':>6}")
    for name, build, batch, forward in networks(arguments.size):
        if arguments.only in name:
            row = measure(build, batch, forward, arguments.units, arguments.repeats, arguments.samples)
            print(f"{name:20} {row['forward']:>8.3f}s {row['trace']:>8.2f}s {row['over ten']:>9.2f}s "
                  f"{row['trace'] / row['forward']:>7.0f} {row['multiplied']:>11.1f} {row['calls']:>6.0f}", flush=True)


if __name__ == "__main__":
    main()
