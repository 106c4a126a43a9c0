"""One run of distill(): steps, looks at held-out samples, the file it is kept in."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastscore.arguments import in_users_code
from fastscore.batches.devices import rank_and_size
from fastscore.batches.parts import Batch
from fastscore.modules.inspection import device_of
from fastscore.modules.refused_batches import naming_argument
from fastscore.modules.wrappers import unwrapped
from fastscore.progress import Bar
from fastscore.recovery.decisions import Decisions
from fastscore.recovery.divergence import Mixed, divergence, judged_by, mixed_of, names, rows
from fastscore.recovery.features import FeatureMaps
from fastscore.recovery.loss_targets import TargetsChecked
from fastscore.recovery.optimizers import schedule
from fastscore.recovery.training_batches import Position, TrainingBatches, on_device
from fastscore.scoring.run_file import RunFile
from fastscore.tables import Table
from fastscore.wording import counted

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FORM = "fastscore-distillation-2"
_STRIDE = 1_000_003  # between the seeds of two steps


@dataclass(frozen=True)
class Look:
    """What held-out samples said after `step` steps.

    loss: the mean over the training steps since the look before (0 at the first). agreement, kl: of the smaller
    network's decisions with the dense one's; NaN where a loss of the user's own judges. judged: what decides, the KL
    or that loss. decisions: how many agreement and kl rest on; 0 where a loss of the user's own judges. by_error and
    mixed: as in fastscore.recovery.divergence.Divergence. outputs: what of them is compared.
    """

    step: int
    loss: float
    agreement: float
    kl: float
    judged: float
    decisions: int = 0
    by_error: bool = False
    outputs: str = ""
    mixed: Mixed = ""


@dataclass(frozen=True, repr=False)
class DistillationReport(Table):
    """What distill() did. best: the look whose weights the smaller network has. steps: done, of `planned`."""

    looks: tuple[Look, ...]
    best: Look
    steps: int
    planned: int

    def __str__(self) -> str:
        mixed = mixed_of(look.mixed for look in self.looks)
        own, (agreement, kl) = math.isnan(self.best.kl), names(self.best.by_error, mixed)
        wide = max(9, len(agreement))
        lines = [f"{'steps':>7} {'training loss':>14} " + ("held-out loss" if own else f"{agreement:>9} {kl:>8}")]
        for look in self.looks:
            said = f"{look.judged:>13.4g}" if own else f"{look.agreement:>{wide}.1%} {look.kl:>{max(8, len(kl))}.3g}"
            loss = f"{look.loss:.4g}" if look.step else "-"
            lines.append(f"{look.step:>7} {loss:>14} {said}{'  best' if look.step == self.best.step else ''}")
        return "\n".join(lines + self._remarks[1:])

    def records(self) -> list[dict[str, Any]]:
        """A row for each look."""
        return [asdict(look) for look in self.looks]

    @property
    def _remarks(self) -> list[str]:
        early = f"stopped after {self.steps} of {counted(self.planned, 'step')}: held-out samples saw nothing better"
        decisions = self.best.decisions  # not known of a run that an older version began
        return [f"best after {self.best.step} of {counted(self.steps, 'step')}",
                *([judged_by(decisions, "it is not trained on", self.best.mixed)]
                  if decisions or self.best.by_error else []),
                *([f"outputs: {self.best.outputs}"] if self.best.outputs else []),
                *["nothing better than the start was found: the weights are as they were"] * (self.best.step == 0),
                *[early] * (self.steps < self.planned)]


class Objective:
    """What is minimised, and what judges: of several outputs, the sum over all. judging: says which are judged by their
    error, and are trained by it."""

    def __init__(self, own: Loss | None, temperature: float, maps: FeatureMaps, feature_weight: float,
                 judging: Decisions | None = None) -> None:
        self.own, self.temperature, self.maps, self.feature_weight = own, temperature, maps, feature_weight
        self.judging, self._checked = judging, False

    def __call__(self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._of(got[name], expected[name], name in self.errors) for name in expected]).sum()

    @property
    def errors(self) -> Collection[str]:
        """The outputs that are judged by their error."""
        return () if self.judging is None else self.judging.errors

    def _of(self, got: Tensor, expected: Tensor, by_error: bool) -> Tensor:
        if self.own is not None:
            with in_users_code(f"loss: called as loss(smaller's output, dense output), both {list(expected.shape)}"), \
                    nullcontext() if self._checked else TargetsChecked():
                value = self.own(got, expected)
            self._checked = True  # by what judges before the first step
            if not isinstance(value, Tensor) or value.numel() != 1:
                shown = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss: it returned {shown}, where a scalar tensor is meant: its .mean(), say")
            if torch.is_grad_enabled() and not value.requires_grad:
                raise ValueError("loss: no gradient goes from what it returned to the smaller network's output, its "
                                 "first argument: leave .detach(), .item() and no_grad out, and compute it from that")
            return value.reshape(())
        if by_error:
            wanted, got = rows(expected), rows(got)
            return (got - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean().clamp(min=1e-12)
        p, q = (log_softmax(output / self.temperature) for output in (expected, got))
        return self.temperature ** 2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


class DistillationRun:
    """A smaller network on its way to the dense one."""

    def __init__(self, dense: nn.Module, network: nn.Module, objective: Objective,
                 call: Callable[[nn.Module, Batch], Mapping[str, Tensor]], data: TrainingBatches,
                 group: distributed.ProcessGroup | None, precision: str | None, optimizer: torch.optim.Optimizer,
                 seed: int, clip: float | None) -> None:
        self._dense, self._network, self._smaller, self.objective = dense, network, unwrapped(network), objective
        self._call, self._data, self._judges, self._group = call, data, data.judges(), group
        self._rank, self._size = rank_and_size(group)
        self._optimizer, self._seed, self._clip, self.step = optimizer, seed, clip, 0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._device, self._precision = device_of(self._smaller), precision
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "float16")
        self._position, self._looks, self._best = Position(), list[Look](), dict[str, Tensor]()
        self._file: RunFile | None = None
        self._norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self._smaller.modules())

    def to(self, steps: int, looks: int, patience: int | None, warmup: float, bar: Bar) -> DistillationReport:
        """Go on to `steps`, or until nothing gets better; the best weights are then in the network."""
        if not self._looks:
            self._look(0.0)
        when = {math.ceil(steps * number / looks) for number in range(1, looks + 1)}
        total = torch.zeros((), device=self._device)
        stream = self._data(self._position, 2 if self._norms else 1)
        while self.step < steps and not self._settled(patience):
            batch, position = next(stream)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * schedule(self.step, steps, warmup)
            total += self._train_on(batch, position)
            self._position, self.step = position, self.step + 1
            bar.update()
            if self.step in when:
                since = self.step - self._looks[-1].step
                self._look(float(self._sum(total)) / since / self._size)
                total.zero_()
                bar.set_postfix_str(f"held out: {self._looks[-1].judged:.3g}, best {self.best.judged:.3g}")
        self._smaller.load_state_dict(self._best)
        return DistillationReport(tuple(self._looks), self.best, self.step, steps)

    @property
    def best(self) -> Look:
        """The look that was best so far."""
        return min(self._looks, key=lambda look: look.judged)

    def _settled(self, patience: int | None) -> bool:
        """Whether `patience` looks in a row have found nothing better than an earlier one; the start does not count,
        since the first steps, at a high rate, may be worse than it and the last ones better."""
        judged = [look.judged for look in self._looks[1:]]
        return patience is not None and len(judged) > patience and min(judged[-patience:]) >= min(judged[:-patience])

    def _train_on(self, batch: Batch, position: Position) -> Tensor:
        """One step; the loss."""
        torch.manual_seed(self._seed + _STRIDE * (self.step * self._size + self._rank + 1))
        with self.objective.maps, self._autocast():
            got, expected = self._outputs(self._network.train(), batch, "batches")
            loss = self.objective(got, expected)
            if self.objective.maps.layers:
                loss = loss + self.objective.feature_weight * self.objective.maps.distance()
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._group is not None and self._network is self._smaller:
            self._average_gradients(_samples(got))
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._smaller.parameters(), self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def _outputs(self, smaller: nn.Module, batch: Batch, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the smaller and the dense network return, by name; of tokens, those that are no padding. name: of the
        argument that the batch is of."""
        with torch.no_grad():
            batch = on_device(batch, device_of(self._dense))
            with naming_argument(f"{name}: the model cannot take its batches", self._dense, self._call, batch):
                expected = {name: output.to(self._device) for name, output in self._call(self._dense, batch).items()}
        batch = on_device(batch, self._device)
        with naming_argument("smaller: it cannot take what the dense network takes", smaller, self._call, batch):
            got = dict(self._call(smaller, batch))
        shapes = [{name: list(output.shape) for name, output in outputs.items()} for outputs in (got, expected)]
        if shapes[0] != shapes[1]:
            returned = [each[""] if each.keys() == {""} else each for each in shapes]
            raise ValueError(f"smaller: it returns {returned[0]} where the dense network returns {returned[1]}: give a "
                             "forward= that returns the same of both")
        return got, expected

    def _autocast(self) -> Any:
        if self._precision is None:
            return nullcontext()
        return torch.autocast(self._device.type, PRECISIONS[self._precision])

    def _average_gradients(self, samples: int) -> None:
        """As if all processes' samples had been one batch."""
        gradients = [parameter.grad for parameter in self._smaller.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients]) * samples
        flat = self._sum(torch.cat([flat, flat.new_tensor([samples])]))
        flat = flat[:-1] / flat[-1]
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.reshape(gradient.shape))

    def _sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self._group is not None:
            distributed.all_reduce(value := value.clone(), group=self._group)
        return value

    def _look(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: {loss} by step {self.step}; an lr below {max(self._rates):g} may help, or "
                                     "another precision; unless the batches hold NaN or infinity")
        for buffer in self._smaller.buffers():  # statistics, which every process has of its own batches
            if buffer.is_floating_point() and self._group is not None:
                buffer.copy_(self._sum(buffer) / self._size)
        self._looks.append(self._judge(loss))
        if self.best is self._looks[-1]:
            self._best = {name: value.detach().clone() for name, value in self._smaller.state_dict().items()}
        self._save()

    @torch.no_grad()
    def _judge(self, loss: float) -> Look:
        self._smaller.eval()
        pairs = (self._outputs(self._smaller, batch, self._data.judges_name) for batch in self._judges)
        if self.objective.own is None:
            got, expected = itertools.tee(pairs)
            found = divergence((pair[1] for pair in expected), (pair[0] for pair in got), self._group,
                               self.objective.errors)
            return Look(self.step, loss, found.agreement, found.kl, found.kl, found.decisions, found.by_error,
                        f"{self.objective.judging or ''}{found.one_sided}", found.mixed)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for got_one, expected_one in pairs:
            sums += torch.tensor([float(self.objective(got_one, expected_one)) * _samples(got_one), _samples(got_one)])
        sums = self._sum(sums)
        judged = float(sums[0] / sums[1])
        return Look(self.step, loss, math.nan, math.nan, math.inf if math.isnan(judged) else judged)  # NaN loses

    def keep_in(self, path: str | PathLike[str], same: Mapping[str, Any]) -> None:
        """Go on from the file at `path` where there is one, and write it from now on; the first process does both."""
        self._file = RunFile(path, FORM, "file of distill(resume=)", same)
        found: list[Any] = [None]
        if self._rank == 0:
            try:
                found = [self._file.load()]
            except (ValueError, OSError) as error:  # which every process raises
                found = [error]
        if self._group is not None:
            distributed.broadcast_object_list(found, group_src=0, group=self._group)
        if isinstance(found[0], Exception):
            raise found[0]
        if found[0] is not None:
            self._restore(found[0])

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self._position = state["step"], Position(**state["position"])
        read: list[dict[str, Any]] = [{key: math.nan if value is None else value for key, value in look.items()}
                                      for look in state["looks"]]
        self._looks = [Look(**look) for look in read]
        self._best = state["best"]
        self._smaller.load_state_dict(state["smaller"])
        self._optimizer.load_state_dict({
            "state": {int(number): value for number, value in state["optimizer"].items()},
            "param_groups": self._optimizer.state_dict()["param_groups"]})
        self._scaler.load_state_dict(state["scaler"])

    def _save(self) -> None:
        if self._file is None or self._rank:
            return
        looks = [{key: None if value != value else value for key, value in asdict(look).items()}  # NaN is not JSON
                 for look in self._looks]
        self._file.save({
            "step": self.step, "position": asdict(self._position), "looks": looks,
            "best": self._best, "smaller": self._smaller.state_dict(), "scaler": self._scaler.state_dict(),
            "optimizer": {str(number): value for number, value in self._optimizer.state_dict()["state"].items()}})


def _samples(outputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(outputs.values())))


def log_softmax(output: Tensor) -> Tensor:
    """Log-probabilities [decisions, K], float32 or wider, of logits [N, K], [N, T, K] or [N, K, H, W]; one logit alone
    stands for two classes."""
    x = rows(output)
    return (torch.cat([torch.zeros_like(x), x], 1) if x.shape[1] == 1 else x).log_softmax(1)
