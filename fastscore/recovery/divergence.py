"""How far a smaller network's outputs are from the dense one's, as decisions or as values: no labels needed."""

import functools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, distributed

from fastscore.batches.devices import wide, with_float64
from fastscore.wording import counted

Outputs: TypeAlias = Tensor | Mapping[str, Tensor]
Mixed = Literal["", "decision", "error", "both"]
_SHARES = {"": "agreement", "decision": "agreement", "error": "R²", "both": "agreement / R²"}
ALIKE = 0.99  # of the dense network's decisions: where so many are the same one, any network agrees
_MANY = 20  # samples that are hardly decided alike by chance


@dataclass(frozen=True)
class Divergence:
    """agreement: the share of decisions that are the dense network's. kl: the mean of KL(dense ‖ smaller) in nats.

    decisions: how many were compared; a token or pixel is one where outputs have several. outputs: of a network with
    several outputs, each by itself; agreement, and how many were compared, is then that of the output that agrees
    least (where that has no decisions, of those that have), and kl the sum of all. commonest: the share of the
    decision that the dense network makes most often. by_error: of outputs that are no decisions: kl is the squared
    error as a share of the dense output's variance, agreement is 1 - that, R², and decisions is 0. rows: of such, how
    many samples (tokens, pixels) there were. mixed: where some outputs are judged by their error and some are not, what
    `agreement` is of: "decision" or "error"; empty elsewhere.
    """

    agreement: float
    kl: float
    decisions: int
    outputs: Mapping[str, "Divergence"] = field(default_factory=dict)
    commonest: float = 0.0
    by_error: bool = False
    mixed: Mixed = ""
    rows: int = 0

    def __str__(self) -> str:
        return figures(self.agreement, self.kl, self.by_error, self.mixed) + \
            each_of({name: (each.agreement, each.kl) for name, each in self.outputs.items()})

    @property
    def one_sided(self) -> str:
        """What is said where decisions are nearly all alike, or values too few to vary as others do; else empty."""
        said = ""
        for name, one in (self.outputs or {"": self}).items():
            which = f" ({name})" if name else ""
            if one.commonest >= ALIKE and one.decisions > 1:
                said += (f"; the dense network decides alike on {one.commonest:.1%} of these samples{which}, so that "
                         "agreement says nothing")
            elif one.by_error and one.rows < _MANY:
                said += f"; the variance is that of {counted(one.rows, 'sample')} alone{which}"
        return said


def of_one_kind(found: Divergence, samples: int) -> str:
    """What is warned of where the dense network decides alike on many samples; empty elsewhere."""
    if found.outputs or found.commonest < ALIKE or not _MANY <= found.decisions == samples:
        return ""
    return (f"the dense network decides alike on {found.commonest:.1%} of the {samples:,} samples that judge repairs; "
            "where they are all of a kind, as the first of a sorted data set are, scores and repairs are for that kind "
            "alone: give samples of every kind that it meets")


def names(by_error: bool, mixed: Mixed = "") -> tuple[str, str]:
    """What `agreement` and `kl` are called. mixed: as in Divergence, or of several."""
    return ("R²", "error") if by_error else (_SHARES[mixed], "KL + error" if mixed else "KL")


def mixed_of(kinds: Iterable[Mixed]) -> Mixed:
    """What the agreements of several networks are of."""
    found = set(kinds)
    return found.pop() if len(found) == 1 else "both" if found else ""


def figures(agreement: float, kl: float, by_error: bool, mixed: Mixed = "") -> str:
    """Both, under their names."""
    one, other = names(by_error, mixed)
    return f"{one} {agreement:.1%}, {other} {kl:.3g}"


def each_of(outputs: Mapping[str, tuple[float, float]]) -> str:
    """What each of several outputs has: name -> (agreement, KL)."""
    rows = "; ".join(f"{name} {agreement:.1%}, {kl:.3g}" for name, (agreement, kl) in outputs.items())
    return f" ({rows})" if rows else ""


def judged_by(decisions: int, samples: str, mixed: Mixed = "", bounded: bool = False) -> str:
    """What a share of decisions about some samples rests on; of fewer than 100, by how much it may be off, too, unless
    a bound of its own is told beside it."""
    if not decisions or mixed == "error":
        return f"judged by the squared error, as a share of the dense outputs' variance, on samples that {samples}"
    values, share = (" or, where an output of values is further off, by its R²,", "share of decisions") \
        if mixed == "both" else ("", "share")
    few = "" if bounded or decisions >= 100 else \
        f": the true {share} may be up to {math.ceil(100 * most_off(decisions))} points off (95 % confidence)"
    return f"judged by {counted(decisions, 'decision')}{values} about samples that {samples}{few}"


@functools.lru_cache(1024)
def least_share(successes: int, trials: int, confidence: float) -> float:
    """The lower end of Clopper and Pearson's one-sided interval for the probability of a success."""
    if successes == 0:
        return 0.0
    count = torch.arange(successes, trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(count + 1) - torch.lgamma(trials - count + 1)
    low, high = 0.0, 1.0
    for _ in range(60):  # the probability of as many successes or more grows with p
        p = (low + high) / 2
        tail = float((ways + count * math.log(p) + (trials - count) * math.log1p(-p)).logsumexp(0).exp())
        low, high = (p, high) if tail < 1 - confidence else (low, p)
    return low


@functools.lru_cache(128)
def most_off(decisions: int) -> float:
    """How far a share of so many decisions is from the end of its two-sided 95 % interval (Clopper, Pearson 1934), at
    most: whatever the share is, and up as down, as the interval of the other share is this one mirrored."""
    return max(agreed / decisions - least_share(agreed, decisions, 0.975) for agreed in range(decisions + 1))


def divergence(dense: Iterable[Outputs], smaller: Iterable[Outputs],
               process_group: distributed.ProcessGroup | None = None, errors: Collection[str] = ()) -> Divergence:
    """Compare what two networks return for the same batches, batch by batch.

    dense, smaller: logits [N, K], [N, T, K], or [N, K, H, W] (and with any other number of sizes behind the K), or
    several by name. A single logit stands for two classes, as with a sigmoid. Not finite in the smaller one's: no
    agreement, infinite KL. errors: the names of those that are no decisions but values, judged by their error. Raises
    ValueError where there is nothing to compare, or shapes differ, FloatingPointError where the dense network's are not
    finite; and what a network raises, of which the other processes raise a RuntimeError, or FloatingPointError.
    """
    sums: dict[str, _Decided | _Erred] = {}
    failed: Exception | None = None
    try:
        for all_expected, all_got in zip(dense, smaller, strict=True):
            expected_ones, got_ones = _by_name(all_expected), _by_name(all_got)
            if expected_ones.keys() != got_ones.keys():
                raise ValueError(f"outputs: the dense network returns {', '.join(expected_ones)} and the smaller one "
                                 f"{', '.join(got_ones)}: give a forward= that returns the same of both")
            for name, expected in expected_ones.items():
                _add(sums, name, _compared(expected, got_ones[name], _Erred if name in errors else _Decided))
    except Exception as error:  # of the models' code, on the batches of this process
        if process_group is None:
            raise
        failed = error
    if process_group is not None:  # a process may have had no batch, and know of no output
        gathered: list[Any] = [None] * process_group.size()
        own = sums if failed is None else (isinstance(failed, FloatingPointError), f"{type(failed).__name__}: {failed}")
        distributed.all_gather_object(gathered, own, process_group)
        if failed is not None:
            raise failed
        for rank, (not_finite, why) in ((rank, each) for rank, each in enumerate(gathered) if isinstance(each, tuple)):
            raise (FloatingPointError if not_finite else RuntimeError)(f"in process {rank}, {why}")
        sums = {}
        for name, row in (pair for each in gathered for pair in each.items()):
            _add(sums, name, row)
    if not sums or any(not row.count for row in sums.values()):
        raise ValueError("held_out: the batches that judge hold no sample; give some that do, or leave held_out= out")
    for name, row in sums.items():
        row.samples.check(name, alone=len(sums) == 1)
    found = {name: row.divergence for name, row in sums.items()}
    least = min(found.values(), key=lambda each: each.agreement)
    if len(found) == 1:
        return least
    decisions = least.decisions or max(each.decisions for each in found.values())
    kinds = {each.by_error for each in found.values()}
    mixed: Mixed = "" if len(kinds) == 1 else "error" if least.by_error else "decision"
    return Divergence(least.agreement, sum(each.kl for each in found.values()), decisions, found,
                      by_error=kinds == {True}, mixed=mixed)


@dataclass
class _Samples:
    """How many there are, and of how many the dense network's output is not finite."""

    count: int
    broken: int

    @classmethod
    def of(cls, expected: Tensor) -> "_Samples":
        return cls(len(expected), int((~torch.isfinite(expected)).flatten(1).any(1).sum()) if expected.dim() > 1 else
                   int((~torch.isfinite(expected)).sum()))

    def merged(self, other: "_Samples") -> "_Samples":
        return _Samples(self.count + other.count, self.broken + other.broken)

    def check(self, name: str, alone: bool) -> None:
        """Raise FloatingPointError where one is not finite. alone: whether it is the only output."""
        if self.broken:
            others = "" if alone else ", or name the other outputs, which alone are judged then, in outputs="
            raise FloatingPointError(
                f"outputs{name}: the dense network returns NaN or infinity there for {self.broken:,} of "
                f"{counted(self.count, 'sample')} to judge by, from which nothing has a distance: leave those samples "
                f"out of the batches, or let forward= return finite ones (torch.nan_to_num of masked logits){others}")


@dataclass
class _Decided:
    """Of decisions, [n, K]: how many agree, the sum of KL divergences, and how often the dense network makes each."""

    samples: _Samples
    agreed: float
    kl: float
    made: Tensor

    @classmethod
    def of(cls, samples: _Samples, expected: Tensor, got: Tensor, eps: float) -> "_Decided":
        p, q = (torch.cat([torch.zeros_like(x), x], -1) if x.shape[-1] == 1 else x for x in (expected, got))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        finite = torch.isfinite(q).all(-1)
        kl = torch.where(finite, (log_p.exp() * (log_p - log_q)).sum(-1), torch.inf)
        agreed = (p.argmax(-1) == q.argmax(-1)) & finite
        return cls(samples, float(agreed.sum()), float(kl.sum()),
                   torch.bincount(p.argmax(-1), minlength=p.shape[-1]).cpu())

    @property
    def count(self) -> int:
        return int(self.made.sum())

    def merged(self, other: "_Decided") -> "_Decided":
        return _Decided(self.samples.merged(other.samples), self.agreed + other.agreed, self.kl + other.kl,
                        self.made + other.made)

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.agreed / self.count, max(self.kl / self.count, 0.0), self.count,
                          commonest=float(self.made.max()) / self.count)


@dataclass
class _Erred:
    """Of values, [n, K]: the sum of squared errors; how many there are, the mean and the scatter of the dense ones, and
    the rounding of their type, as a share."""

    samples: _Samples
    error: float
    count: int
    mean: Tensor
    scatter: Tensor
    eps: float

    @classmethod
    def of(cls, samples: _Samples, expected: Tensor, got: Tensor, eps: float) -> "_Erred":
        mean = expected.sum(0) / max(len(expected), 1)
        error = float((got - expected).square().sum())
        return cls(samples, error if math.isfinite(error) else math.inf, len(expected), mean.cpu(),
                   (expected - mean).square().sum(0).cpu(), eps)

    def merged(self, other: "_Erred") -> "_Erred":
        count, shift = self.count + other.count, other.mean - self.mean
        between = shift.square() * (self.count * other.count / max(count, 1))
        return _Erred(self.samples.merged(other.samples), self.error + other.error, count,
                      self.mean + shift * (other.count / max(count, 1)), self.scatter + other.scatter + between,
                      max(self.eps, other.eps))

    @property
    def divergence(self) -> Divergence:
        """Values that do not vary, or by rounding alone, are compared by the square of their mean."""
        varies = self.scatter > self.count * (self.eps * self.mean).square()
        scale = float(self.scatter[varies].sum()) or self.count * float(self.mean.square().sum())
        share = self.error / scale if scale else math.inf if self.error else 0.0
        return Divergence(1 - share, share, 0, by_error=True, rows=self.count)


def _add(sums: dict[str, Any], name: str, row: Any) -> None:
    sums[name] = sums[name].merged(row) if name in sums else row


def _by_name(outputs: Outputs) -> Mapping[str, Tensor]:
    return {"": outputs} if isinstance(outputs, Tensor) else outputs


def _compared(expected: Tensor, got: Tensor, kind: type[_Decided] | type[_Erred]) -> "_Decided | _Erred":
    if expected.shape != got.shape:
        raise ValueError(f"outputs: the dense network returns {list(expected.shape)} and the smaller one "
                         f"{list(got.shape)}: give a forward= that returns the same of both")
    return kind.of(_Samples.of(expected), _rows(expected), _rows(got.to(expected.device)),
                   torch.finfo(expected.dtype).eps)


def _rows(output: Tensor) -> Tensor:
    return rows(with_float64(output.detach()).double())


def rows(output: Tensor) -> Tensor:
    """[decisions, K], float32 or wider, of [N], [N, K], [N, T, K] or [N, K, H, W]."""
    x = wide(output)
    x = x[:, None] if x.dim() == 1 else x.movedim(1, -1) if x.dim() > 3 else x
    return x.flatten(0, -2)
