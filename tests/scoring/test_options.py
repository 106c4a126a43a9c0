"""What a call asks for: every check stands in fastscore.scoring.options, and says what to do instead."""

from typing import Any

import pytest
import torch

from fastscore.scoring.options import (
    Checkpoint,
    Execution,
    Persistence,
    Sampling,
    check,
    check_loop,
    origin_of,
)
from fastscore.scoring.scores import Origin

BATCHES = [torch.zeros(1)]


def origin(**changes: Any) -> Origin:
    arguments: dict[str, Any] = {
        "importance": "taylor-sq", "gradient": "random", "normalize": True, "probes": 1, "reduction": "sum", "seed": 0,
        "distribution": "normal", "units": "groups", "ablation": "zero", "layerwise": "none", "center": False,
        "sample_dims": 1}
    return origin_of(**{**arguments, **changes})


@pytest.mark.parametrize(("kind", "options", "message"), [
    (Sampling, {"probes": 0}, "^probes: 0; it must be 'exact', or 1 or more"),
    (Sampling, {"probes": "all"}, "^probes: 'all'"), (Sampling, {"samples": -1}, "^samples: -1; it must be 'auto'"),
    (Sampling, {"samples": "some"}, "^samples: 'some'"), (Sampling, {"agreement": (0.3, 1.1)}, "^agreement: "),
    (Execution, {"precision": "float8"}, "^precision: 'float8' is neither None nor 'float32' nor 'bfloat16'"),
    (origin, {"sample_dims": 3}, "^sample_dims: 3; it is 1"), (origin, {"gradient": "none"}, "^gradient: 'none'"),
    (origin, {"layerwise": "max"}, "^layerwise: 'max' is none of none, l2, mean")])
def test_what_makes_no_sense_by_itself(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("options", [
    (Sampling,), (Sampling, "exact", "auto", (0.5, 1)), (Execution, "bfloat16", True), (Persistence, "file"),
    (Persistence, Checkpoint("file", only_when_stopped=True), None, True)])
def test_what_makes_sense(options: tuple[Any, ...]) -> None:
    kind, *values = options
    assert kind(*values) == kind(*values)


def test_importances_that_read_weights_have_no_gradient() -> None:
    for changes in ({}, {"gradient": "loss"}, {"normalize": False}, {"distribution": "rademacher"}):
        made = origin(importance="magnitude-l2", **changes)
        assert (made.gradient, made.normalize, made.distribution) == ("none", False, "none")
    assert origin(probes="exact").distribution == "basis"
    assert origin(probes=2, distribution="orthogonal").distribution == "orthogonal"


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    # (origin, sampling, execution, persistence, message)
    ({"sample_dims": 2, "probes": "exact"}, {"probes": "exact"}, {}, {}, "^probes: \"exact\" sends the same gradient"),
    ({"sample_dims": 2}, {}, {"compile": True}, {}, "^compile: .*sample_dims=2"),
    ({"gradient": "loss"}, {"probes": 2}, {}, {}, "^probes: 2, but a loss has one gradient"),
    ({"distribution": "basis"}, {}, {}, {}, "^distribution: \"basis\" takes one probe"),
    ({"importance": "taylor-abs", "probes": "exact"}, {"probes": "exact"}, {}, {}, "^probes: .* taylor-abs is no mean"),
    ({"importance": "bn-scale"}, {}, {}, {"resume": "file"}, "^resume: bn-scale reads the weights alone"),
    ({"importance": "bn-scale"}, {}, {}, {"fixed_order": True}, "^fixed_order: bn-scale reads the weights alone"),
    ({}, {"samples": "auto"}, {}, {"fixed_order": True}, "^fixed_order: samples=\"auto\" looks after each batch"),
]


@pytest.mark.parametrize(("origin_", "sampling", "execution", "persistence", "message"), CONTRADICTIONS)
def test_what_makes_no_sense_together(origin_: dict[str, Any], sampling: dict[str, Any], execution: dict[str, Any],
                                      persistence: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(BATCHES, origin(**origin_), Sampling(**sampling), Execution(**execution), Persistence(**persistence))


def test_what_makes_sense_together() -> None:
    check(BATCHES, origin(), Sampling(samples="auto"), Execution(), Persistence(resume="file"))
    check(iter(BATCHES), origin(probes="exact"), Sampling("exact"), Execution(compile=True), Persistence())
    check(BATCHES, origin(importance="random"), Sampling(), Execution(), Persistence())
    for batches in (BATCHES[0], {"x": BATCHES[0]}, 3):
        with pytest.raises(TypeError, match=r"^batches: .*\[batch\]"):
            check(batches, origin(), Sampling(), Execution(), Persistence())


def test_what_a_loop_does_not_tell() -> None:
    check_loop(origin(gradient="loss"))
    check_loop(origin(gradient="loss", importance="molchanov-group", normalize=False))
    check_loop(origin(importance="molchanov-group"))
    for changes, message in (({"importance": "molchanov-group"}, "^normalize: 'molchanov-group' reads"),
                             ({"sample_dims": 2}, "^normalize: with sample_dims=2")):
        with pytest.raises(ValueError, match=message):
            check_loop(origin(gradient="loss", **changes))
    with pytest.raises(ValueError, match=r"^importance: 'bn-scale' reads weights, no gradient"):
        Origin("bn-scale", "sum", "loss", True, 0, "normal", "")


def test_where_a_run_is_kept() -> None:
    assert Persistence().checkpoint is None
    assert not Persistence(fixed_order=True).compared
    kept = Persistence("file")
    assert (kept.checkpoint, kept.compared, kept.rank, kept.size) == (Checkpoint("file"), True, 0, 1)
    stopped = Checkpoint("file", only_when_stopped=True)
    assert Persistence(stopped).checkpoint is stopped
