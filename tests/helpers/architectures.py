"""Models that people use, each taken from scores to a step of training: a row for each, of what came of it."""

import copy
import os
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from model_case import Case
from networks import randomize
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.outputs import checked_forward
from fastscore.batches.parts import Batch, map_tensors, tensors_of
from fastscore.graph.tracing import trace
from fastscore.modules.attention.multihead_attention import replace_attention
from fastscore.modules.hooks import input_of, put_on, with_input
from fastscore.modules.inspection import channel_dim
from fastscore.modules.norms.channel_norm import ResponseNorm
from fastscore.modules.norms.channel_norms import norm_of
from fastscore.modules.norms.gated_norms import GatedNorm, gated_norm_of
from fastscore.modules.weights import held_weights
from fastscore.pruning.masking import at_consumers, at_group_norms
from fastscore.recovery.compensation import removed_positions

BUDGETS = (0.7, 0.85, 0.95)  # of the MACs that remain: the first that can be reached
HEADINGS = ("model", "input", "MACs", "outputs can go", "shrink", "scores", "pruned to", "= masked", "exported",
            "trained", "kept (share of the MACs)")


@dataclass(frozen=True)
class Row:
    """A line of the table; what was not come to is "–".

    macs: of layers with weights, one sample. outputs, shrink: shares of them, see fastscore.scoring.coverage. scores:
    groups whose scores are what gates on them say, of those that have scores, and why there are none. pruned: share of
    all MACs that remains. masked: whether the smaller model computes what the masked one does.
    """

    name: str
    input: str
    macs: float = 0.0
    outputs: float = 0.0
    shrink: float = 0.0
    scores: str = "–"
    pruned: str = "–"
    masked: str = "–"
    exported: str = "–"
    trained: str = "–"
    kept: str = ""

    def __str__(self) -> str:
        shares = ("–", "–", "–") if not self.macs else (f"{self.macs / 1e6:.3g} M", f"{self.outputs:.0%}",
                                                        f"{self.shrink:.0%}")
        return "| " + " | ".join((self.name.partition(":")[2] or self.name, self.input, *shares, self.scores,
                                  self.pruned, self.masked, self.exported, self.trained, self.kept)) + " |"


class Called(nn.Module):
    """A model that is called as a Case says."""

    def __init__(self, model: nn.Module, call: Forward) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, batch: Batch) -> Tensor:
        return self._call(self.model, batch)


def prepared(case: Case) -> tuple[nn.Module, Batch]:
    """The model in evaluation mode with statistics that keep the signal alive down to its last layer, and 2 samples."""
    torch.manual_seed(0)
    model = case.make().float()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for name, parameter in randomize(model).named_parameters():
        if "layer_scale" in name or "gamma" in name or name.endswith((".ls1", ".ls2")):  # near zero, as all behind them
            nn.init.uniform_(parameter, 0.5, 1.5)
        if not parameter.any():  # a head that starts at zero says nothing of what is before it
            nn.init.normal_(parameter, 0, 0.1)
        if name.endswith("bias"):  # or ReLUs at the output are dead
            nn.init.uniform_(parameter, 0.0, 0.1)
    batchnorms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in batchnorms]
    x = case.inputs(2)
    model.eval()
    for module in batchnorms:
        module.train().momentum = 1.0
    with torch.no_grad():
        case.forward(model, case.inputs(4))
    for module, momentum in zip(batchnorms, momenta, strict=True):
        module.momentum = momentum
    return model.eval(), x


def row(case: Case) -> Row:
    """What becomes of a model; where a step fails, the row says how, and ends there."""
    found = Row(case.name, case.input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in _steps(case):
            try:
                found = replace(found, **step())
            except Exception as error:
                if os.environ.get("FASTSCORE_RAISE"):
                    raise
                return replace(found, kept=f"{type(error).__name__}: {one_line(str(error))}")
    return found


def _steps(case: Case) -> Iterator[Callable[[], dict[str, Any]]]:
    """One after another, each giving fields of the row."""
    model, x = prepared(case)
    call = checked_forward(case.forward)  # the tensor in a mapping of outputs
    scores = result = None
    example = first(x) if case.forward is call_model else x  # what score() traces the model with

    def scored() -> dict[str, Any]:
        nonlocal scores
        scores = fastscore.score(model, [x], forward=case.forward, progress=False)
        assert all(values.isfinite().all() for values in scores.values())
        cover = scores.coverage
        kept: Counter[str] = Counter()
        for layer, share in cover.kept.items():
            kept[in_short(cover.reasons[layer])] += share
        return {"macs": cover.macs, "outputs": cover.outputs, "shrink": cover.shrink, "scores": str(len(scores)),
                "kept": "; ".join(f"{share:.0%} {reason}" for reason, share in kept.most_common(4) if share >= 0.005)}

    def compared() -> dict[str, Any]:
        right, wrong = as_gates_say(model, x, example, call)
        if wrong:  # of random weights some are chaotic in float32
            twice = [map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)
                     for batch in (x, example)]
            right, wrong = as_gates_say(copy.deepcopy(model).double(), *twice, call)
        return {"scores": f"{right} of {len(scores)} exact" + (f"; wrong: {', '.join(wrong)}" if wrong else "")}

    def pruned() -> dict[str, Any]:
        nonlocal result
        for budget in BUDGETS:
            try:
                result = fastscore.prune(model, scores, example, macs=budget, forward=case.forward, compensate=False)
                break
            except ValueError as error:
                if "cannot be reached" not in str(error) or budget == BUDGETS[-1]:
                    raise
        before, after = result.report.macs
        assert after / before <= budget, (before, after)  # of integers, 0.7 * 184320 is less than 129024
        return {"pruned": f"{after / before:.2f}"}

    yield scored
    yield compared
    yield pruned
    yield lambda: {"masked": as_masked(model, result.model, result.removed, x, example, call)}
    yield lambda: {"exported": exported(model, result.model, x, call)}
    yield lambda: {"trained": trained(result.model, x, case.forward)}


def first(x: Batch, number: int = 0) -> Batch:
    """One sample of a batch."""
    return map_tensors(lambda tensor: tensor[number:number + 1], x)


def as_gates_say(model: nn.Module, x: Batch, example: Batch, forward: Forward) -> tuple[int, list[str]]:
    """(groups whose scores are the derivatives by gates where the channels are read, each sample by itself, those whose
    are not).

    A linear function of the output with fixed random weights is the loss. example: what score() traces the model with.
    """
    with torch.no_grad():
        weights = torch.randn_like(forward(model, x))
    scores = fastscore.score(model, [x], forward=forward, gradient="loss", normalize=False, progress=False,
                             loss=lambda output, batch: (output * weights).sum())
    gates = {group.name: (group, torch.ones(group.channels, dtype=weights.dtype, requires_grad=True))
             for group in trace(model, example, forward).groups if group.name in scores}
    read: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # layer -> (positions of its input, their gates)
    for group, gate in gates.values():
        for edge in group.edges:
            read[edge.layer].append((edge.index, gate[edge.channel]))
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    with ExitStack() as attached:
        attached.enter_context(put_on((*held_weights.replace(model, read), *replace_attention(model, read))))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                attached.enter_context(module.register_forward_hook(_mended))
        for name, positions in read.items():
            attached.enter_context(_gated(model.get_submodule(name), positions))
        for number in range(2):
            output = forward(model, first(x, number))
            if output.shape[1:] != weights.shape[1:]:  # each sample alone is shorter: beside the other it is padded
                output = forward(model, x)[number:number + 1]
            found = torch.autograd.grad((output * weights[number:number + 1]).sum(),
                                        [gate for _, gate in gates.values()], allow_unused=True, retain_graph=True)
            for (group, gate), s in zip(gates.values(), found, strict=True):
                s = torch.zeros_like(gate) if s is None else s
                units = torch.zeros(int(group.unit.max()) + 1, dtype=s.dtype).index_add(0, group.unit, s)
                total[group.name] = total[group.name] + units[group.unit].square().float() / 2
    largest = max((float(value.max()) for value in total.values()), default=0.0) ** 0.5
    wrong = [name for name, value in total.items()
             if not torch.allclose(scores[name].sqrt(), value.sqrt(), rtol=0,
                                   atol=5e-3 * float(value.max()) ** 0.5 + 1e-4 * largest)]
    return len(total) - len(wrong), wrong


def _mended(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """PyTorch's BatchNorm, on a CPU, sends back a wrong gradient of a single sample whose channels come last in the
    gradient alone, as those of tokens do (seen in 2.14.1)."""
    if len(output) == 1 and output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())


def _gated(layer: nn.Module, gates: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Gates on what a layer reads; on what statistics read, of a normalisation over channels."""
    norm, dim = gated_norm_of(layer) or norm_of(layer), channel_dim(layer)

    def gated(x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[dim] = -1
        for index, gate in gates:
            x = x * torch.ones(x.shape[dim], dtype=gate.dtype).index_put((index,), gate).view(shape)
        return x

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return with_input(args, kwargs, gated(input_of(args, kwargs)))

    def instead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        if isinstance(norm, GatedNorm):  # what it makes of a channel is taken out again
            args, kwargs = with_input(args, kwargs, gated(x))
            return type(layer).forward(layer, *args, **kwargs) / gated(torch.ones_like(x))
        weight, bias = (None if value is None else value.flatten().view(-1, *[1] * (-1 - norm.dim))
                        for value in map(layer._parameters.get, (norm.gain, norm.shift)))
        if isinstance(norm, ResponseNorm):  # of which the mean over channels reads gates
            norms, gated_norms = (torch.linalg.vector_norm(value, dim=(-3, -2) if norm.dim == -1 else (-2, -1),
                                                           keepdim=True) for value in (x, gated(x)))
            scaled = x * norms / (gated_norms.mean(norm.dim, keepdim=True) + norm.eps)
            y = x + (scaled if weight is None else scaled * weight)
        else:
            centered, scale = norm.statistics(gated(x), x.shape[dim])
            y = (x - (gated(x) - centered)) * scale
            y = y if weight is None else y * (weight + norm.offset)
        y = y if bias is None else y + bias
        for part in layer.children():  # activations
            y = part(y)
        return y

    return layer.register_forward_pre_hook(before, with_kwargs=True) if norm is None else \
        layer.register_forward_hook(instead, with_kwargs=True)


def as_masked(model: nn.Module, pruned: nn.Module, removed: dict[str, Tensor], x: Batch, example: Batch,
              forward: Forward) -> str:
    """Whether the larger model, where consumers read removed channels as zero, computes what the smaller one does."""
    groups = trace(model, example, forward).groups
    with torch.no_grad():
        dense = forward(model, x)
        with put_on((*at_consumers(model, removed_positions(groups, removed), {}),
                     *at_group_norms(model, groups, removed))):
            masked = forward(model, x)
        smaller = forward(pruned.eval(), x)
    assert smaller.shape == dense.shape
    assert (dense - masked).abs().max() > 1e-4 * masked.abs().max(), "nothing was masked"
    error = float((smaller - masked).abs().max() / masked.abs().max())
    assert error < 1e-3, f"the smaller model differs from the masked one by {error:.2g} of the largest value"
    return "yes"


def exported(dense: nn.Module, model: nn.Module, x: Batch, forward: Forward) -> str:
    """Through torch.export, and the same after it."""
    called = Called(model, forward).eval()
    with torch.no_grad():
        try:
            program = torch.export.export(called, (x,)).module()
        except Exception as error:
            try:
                torch.export.export(Called(dense, forward).eval(), (x,))
            except Exception:
                return "nor is the dense one"
            return f"no: {type(error).__name__}: {one_line(str(error))[:60]}"
        here, there = called(x), program(x)
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4 * float(here.abs().max()))
    return "yes"


def trained(model: nn.Module, x: Batch, forward: Forward) -> str:
    """A step in training mode, auxiliary outputs and all, after which most of the weights that were reached differ.

    Each weight goes by the sign of its gradient: behind many layers of random weights, some gradients are so small that
    what SGD adds is rounded away.
    """
    model = model.train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Rprop(model.parameters())
    outputs = [output.float() for output in tensors_of(forward(model, x))]
    loss = sum(((output - torch.randn_like(output)).square().mean() for output in outputs), torch.zeros(()))
    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached
    assert all(model.get_parameter(name).grad.isfinite().all() for name in reached)
    optimizer.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])]
    assert len(moved) > 0.5 * len(reached), f"{len(moved)} of {len(reached)} weights moved"
    return "yes"


_IN_SHORT = (
    (r"are the model's output", "the output"),
    (r"pass through \S+ \((\w+)\)", r"through \1"),
    (r"an operation runs over all its channels", "an operation over all channels"),
    (r"takes its channels together with", "through Parameter"),
    (r"a view divides", "a view divides it"),
    (r"cut at (places|positions)", "cut at fixed places"),
    (r"spreads one of them", "one of them meets all others"),
    (r"tracer cannot follow", "mixed or moved"),
    (r"removed together", "all tied together"),
    (r"shares its weight", "shares a weight"),
    (r"parametrization", "a computed weight"),
    (r"does not run on", "not reached"),
    (r"the code of \w+ reads .* in training alone", "meets a parameter in training alone"),
    (r"and runs in training alone", "an auxiliary head reads it"),
    (r"training alone", "an auxiliary head"),
    (r"no gradient (came|comes)", "no gradient comes back"),
    (r"grouped|fixed sets", "grouped"),
    (r"the code of (\w+) reads", r"\1's own code reads it"),
    (r"its channels go with", "goes with others"),
    (r"^(\w+) does not run", r"\1 does not run smaller"),
    (r"does not run with fewer channels there \(\S+ \((\w+)\)", r"\1 does not run smaller"),
    (r"does not compute the same|computes something else", "another result when smaller"),
)


def in_short(reason: str) -> str:
    """A reason in a few words."""
    for pattern, words in _IN_SHORT:
        if match := re.search(pattern, reason):
            return match.expand(words)
    text = one_line(re.sub(r"\b\w+(\.\w+)+\b", "…", reason))
    short = textwrap.shorten(text, 80, placeholder="")
    return text if short == text else short.rstrip(" (…:,") + " …"


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]
