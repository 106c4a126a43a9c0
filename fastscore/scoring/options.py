"""What one call asks for, and every check of it: how to score, on how much, how to run, what to keep and share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Literal, TypeAlias

from torch import distributed

from fastscore.arguments import check_flag, check_number, check_whole
from fastscore.batches.checks import check_iterable
from fastscore.batches.devices import rank_and_size
from fastscore.fastpath.precision import PRECISIONS
from fastscore.graph.scored_units import Units, named
from fastscore.scoring.criteria import gradient_importance
from fastscore.scoring.scores import Origin
from fastscore.scoring.weights import WEIGHT_IMPORTANCES

Gradient: TypeAlias = Literal["loss", "random"]
Probes: TypeAlias = int | Literal["exact"]
Precision: TypeAlias = Literal["float32", "bfloat16"]

AUTO_LEAST = 32  # samples="auto" takes at least so many
AGREEMENT = (0.3, 0.95)  # and goes on until the halves agree on 95 % of the 30 % that each would prune
REDUCTION_SLOTS = 64  # fixed_order: as many processes may share the work


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept, so that it can be stopped at any moment and go on.

    path: the file; it is read at the start where it exists, and written whole again after a batch whenever that takes
    no more than a fiftieth of the time. only_when_stopped: neither read nor written, until an exception ends the run.
    tell: is told, in a line, where a run that was kept goes on.
    """

    path: str | PathLike[str]
    only_when_stopped: bool = False
    tell: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Sampling:
    """How much is measured. probes: random gradients for each sample. samples: where to stop; agreement: see "auto"."""

    probes: Probes = 1
    samples: int | Literal["auto"] | None = None
    agreement: tuple[float, float] = AGREEMENT

    def __post_init__(self) -> None:
        for name, value, word in (("probes", self.probes, "exact"), ("samples", self.samples, "auto")):
            if value == word or (value is None and name == "samples"):
                continue
            if not isinstance(value, str):
                check_whole(name, value, "8")
            if isinstance(value, str) or value < 1:  # type: ignore[operator]
                raise ValueError(f"{name}: {value!r}; it must be {word!r}, or 1 or more")
        pair = self.agreement if isinstance(self.agreement, (tuple, list)) else ()
        for number in pair:
            check_number("agreement", number, "0.3")
        if len(pair) != 2 or not (0 < pair[0] < 1 and 0 < pair[1] <= 1):
            raise ValueError(f"agreement: {self.agreement}; it is (fraction, share): the halves agree on that share of "
                             "the channels that each would prune, 0 < fraction < 1 and 0 < share <= 1")

    @property
    def limit(self) -> int | None:
        """The number of samples to stop after, where it is known beforehand."""
        return self.samples if isinstance(self.samples, int) else None


@dataclass(frozen=True)
class Execution:
    """How the passes are run. precision: None as the model is. compile: through torch.compile. progress: show a bar.
    graph: as CUDA graphs, or as they are, or whichever can be ("auto")."""

    precision: Precision | None = None
    compile: bool = False
    progress: bool = True
    graph: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"precision: {self.precision!r} is neither None nor "
                             f"{' nor '.join(map(repr, PRECISIONS))}")
        if not isinstance(self.graph, bool) and self.graph != "auto":
            raise ValueError(f"graph: {self.graph!r} is none of True, False and 'auto'")


@dataclass(frozen=True)
class Persistence:
    """Where a run is kept, who shares it, and whether the order of additions depends on how many they are."""

    resume: str | PathLike[str] | Checkpoint | None = None
    process_group: distributed.ProcessGroup | None = None
    fixed_order: bool = False

    def __post_init__(self) -> None:
        if self.fixed_order and self.size > REDUCTION_SLOTS:
            raise ValueError(f"fixed_order: it is for up to {REDUCTION_SLOTS} processes, and these are {self.size}")

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where the run is kept."""
        return self.resume if self.resume is None or isinstance(self.resume, Checkpoint) else Checkpoint(self.resume)

    @property
    def rank(self) -> int:
        """This process's number among those that share the work."""
        return rank_and_size(self.process_group)[0]

    @property
    def size(self) -> int:
        """How many processes share the work."""
        return rank_and_size(self.process_group)[1]

    @property
    def compared(self) -> bool:
        """Whether the run has to be told apart from others: from those kept before, or those in other processes."""
        return self.resume is not None or self.process_group is not None


def origin_of(importance: str, gradient: Gradient, normalize: bool, probes: Probes, *, reduction: str, seed: int,
              distribution: str, units: Units, ablation: str, layerwise: str, center: bool,
              sample_dims: int) -> Origin:
    """The Origin of a call of score(): importances that read weights alone have no gradient, and probes="exact" takes
    the basis."""
    _check_flags(normalize, center)
    units = named(units)
    if importance in WEIGHT_IMPORTANCES and (reduction, ablation) == ("sum", "zero"):
        return Origin(importance, reduction, "none", False, seed, "none", "", units, ablation, layerwise, center,
                      sample_dims)
    distribution = "basis" if probes == "exact" else distribution
    return Origin(importance, reduction, gradient, normalize, seed, distribution, "", units, ablation, layerwise,
                  center, sample_dims)


def _check_flags(normalize: bool, center: bool) -> None:
    """Raise TypeError for "no", which is true."""
    check_flag("normalize", normalize)
    check_flag("center", center)


def check(batches: object, origin: Origin, sampling: Sampling, execution: Execution, persistence: Persistence) -> None:
    """Raise TypeError where `batches` are none, ValueError where two options of score() contradict each other."""
    check_iterable(batches, "batches")
    check_whole("seed", origin.seed, "0")
    probes, by_token, exact = sampling.probes, origin.sample_dims == 2, sampling.probes == "exact"
    kept = {"resume": persistence.resume is not None, "process_group": persistence.process_group is not None,
            "fixed_order": persistence.fixed_order}
    _refuse(
        (by_token and exact, 'probes: "exact" sends the same gradient from all tokens at once, which then cannot be '
         "told apart; use a number of probes"),
        (by_token and execution.compile, "compile: it makes room for a batch's examples, not for their tokens "
         "(sample_dims=2); use compile=False"),
        (origin.gradient == "loss" and probes != 1,
         f'probes: {probes}, but a loss has one gradient; use gradient="random" for more'),
        (origin.distribution == "basis" and not exact,
         'distribution: "basis" takes one probe for each output: use probes="exact"'),
        (exact and origin.importance != "taylor-sq",
         f'probes: "exact" is the mean square over all outputs, and {origin.importance} is no mean square: use '
         'importance="taylor-sq", or a number of probes'),
        *((used and origin.gradient == "none",
           f"{name}: {origin.importance} reads the weights alone, in no time; leave it out")
          for name, used in kept.items()),
        *((kept[name] and sampling.samples == "auto",
           f'{name}: samples="auto" looks after each batch at all that was measured, which processes that share the '
           "work do not know; give a number of samples") for name in ("process_group", "fixed_order")))


def check_loop(origin: Origin) -> None:
    """Raise ValueError where a training loop's own gradients do not tell what `origin` asks for."""
    row = gradient_importance(origin.importance, origin.reduction, origin.ablation)
    _check_flags(origin.normalize, origin.center)
    divided = origin.gradient == "loss" and origin.normalize
    _refuse(
        (row.filters and divided, f"normalize: {origin.importance!r} reads the weight gradients of whole batches, "
         "where samples cannot be told apart: use normalize=False, or fastscore.score, which scales the loss's "
         "gradient itself"),
        (origin.sample_dims > 1 and divided, f"normalize: with sample_dims={origin.sample_dims} what reaches one token "
         "comes from all of them, and cannot be divided by the length of one's gradient: use normalize=False, or "
         "fastscore.score, which scales the loss's gradient itself"))


def check_of_loss(options: Mapping[str, object]) -> None:
    """Raise ValueError where options of Scorer ask for another gradient than that of the loop's own loss."""
    if options.get("gradient", "loss") != "loss":
        raise ValueError(f"gradient: {options['gradient']!r}, where the training step's own backward passes are read: "
                         'use gradient="loss"')


def _refuse(*rows: tuple[bool, str]) -> None:
    for holds, message in rows:
        if holds:
            raise ValueError(message)
