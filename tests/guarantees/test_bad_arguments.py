"""Arguments that are wrong, and scores of another model: named, before anything changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from refusals import RESIDUAL, X, refused, score, scored, trained
from torch import Tensor, nn

import fastscore


@pytest.mark.parametrize(("call", "argument"), [
    *((lambda m, s, name=name, value=value: fastscore.prune(m, s, X, **{name: value}), name)
      for name in ("macs", "params", "channels", "latency", "agreement", "kl") for value in ("half", [0.5], True, {})),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, round_to=[8]), "round_to"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, floor="low"), "floor"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, ignore=3), "ignore"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, forward="forward"), "forward"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, calibration="x"), "calibration"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, measured="yes"), "measured"),
    *((lambda m, s, x=x: fastscore.prune(m, s, x, macs=0.5), "example_inputs")
      for x in ("x", None, 3, (2, 3, 8, 8), X.numpy())),
    (lambda m, s: fastscore.mask(m, s, 0.3, "x").__enter__(), "example_inputs"),
    (lambda m, s: fastscore.mask(m, s, "x", X).__enter__(), "fraction"),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs="half", steps=2, progress=False), "macs"),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs=0.5, steps="two", progress=False), "steps"),
    *((lambda m, s, name=name, value=value: fastscore.prune(m, s, X, macs=0.5, **{name: value}), name)
      for name, value in (("round_to", 2.5), ("compensate", "mean"), ("cost_aware", "yes"), ("inplace", "no"))),
    (lambda m, s: fastscore.prune_iteratively(m, 5, macs=0.5, steps=2, progress=False), "batches"),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs=0.5, steps=1, finetune=3, progress=False), "finetune"),
    (lambda m, s: fastscore.curve(m, s, [X], macs=0.7, progress=False), "macs"),
    *((lambda m, s, value=value: fastscore.curve(m, s, [X, -X], macs=(0.7,), repair=None, progress=False,
                                                 evaluate=lambda model: value), r"evaluate\(model\)")
      for value in (None, {"top1": 0.7})),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs=0.5, steps=1, finetune=lambda model: trained(),
                                              progress=False), "finetune"),
    (lambda m, s: fastscore.compare(m, [X], ["taylor-sq"], macs=0.7, progress=False), "macs"),
    (lambda m, s: fastscore.Scorer(m, 3), "example_inputs"),
    (lambda m, s: fastscore.Scorer(m, X, output=3), "output"),
    (lambda m, s: s.overlap("x"), "fraction"),
    *((lambda m, s, name=name, value=value: score(m, **{name: value}), name)
      for name, value in (("probes", 2.5), ("probes", None), ("samples", 2.5), ("seed", 1.5), ("seed", "x"),
                          ("normalize", "no"), ("center", "no"))),
    (lambda m, s: fastscore.Scorer(m, X, normalize="no"), "normalize"),
    (lambda m, s: score(m, gradient="loss", loss=3), "loss"),
    *((lambda m, s, name=name: fastscore.distill(m, m, [X], progress=False, **{"steps": 1, name: "x"}), name)
      for name in ("steps", "temperature", "feature_weight", "warmup", "clip", "looks", "patience", "loss")),
    (lambda m, s: score(m, "x"), "batches"),
    *((lambda m, s, name=name, value=value: fastscore.distill(m, RESIDUAL.model(), [X], **{"steps": 1, name: value}),
       name) for name, value in (("seed", "x"), ("seed", None), ("loss", nn.MSELoss), ("features", None),
                                 ("features", 3), ("forward", "x"), ("optimizer", lambda parameters: 3))),
    (lambda m, s: fastscore.recalibrate(m, [X], forward="x"), "forward"),
    *((lambda m, s, act=act: act(m, s, "group"), "process_group") for act in (
        lambda m, s, group: score(m, process_group=group),
        lambda m, s, group: fastscore.recalibrate(m, [X], process_group=group),
        lambda m, s, group: fastscore.distill(m, RESIDUAL.model(), [X], process_group=group),
        lambda m, s, group: fastscore.prune(m, s, X, macs=0.6, calibration=[X, -X], process_group=group))),
    (lambda m, s: score(m, resume=3), "resume"),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs=0.6, steps=1, resume=3), "resume"),
    (lambda m, s: fastscore.distill(m, RESIDUAL.model(), [X, -X, X + 1, X - 1], resume=3), "resume"),
    *((lambda m, s, path=path: fastscore.load_pruned(RESIDUAL.model, path), "path") for path in (3, None, RESIDUAL)),
    (lambda m, s: fastscore.save_pruned("small.safetensors", m), "path"),
    (lambda m, s: fastscore.save(m, X, 3), "path"),
    (lambda m, s: fastscore.curve(m, s, [X], (0.7,), evaluate="x"), "evaluate"),
    (lambda m, s: fastscore.compare(m, [X], ["random"], (0.7,), evaluate=3), "evaluate"),
    *((lambda m, s, of=of: fastscore.compare(m, [X], of(s), (0.7,)), "importances")
      for of in (lambda s: None, lambda s: {"mine": 3}, lambda s: s)),
    (lambda m, s: fastscore.random_backward(torch.ones(2, 3, requires_grad=True), seed="x"), "seed"),
])
def test_another_type_than_is_meant(call: Callable[..., Any], argument: str) -> None:
    model = trained()
    scores = scored()
    with untouched(model), pytest.raises(TypeError, match=f"^{argument}: .* meant"):
        call(model, scores)


@pytest.mark.parametrize(("options", "message"), [
    ({"importance": "taylr"}, "^importance: 'taylr' is none of"), ({"gradient": "none"}, "^gradient: 'none'"),
    ({"reduction": "max"}, "^reduction: 'max'"), ({"probes": 0}, "^probes: 0"), ({"samples": 0}, "^samples: 0"),
    ({"gradient": "loss", "probes": 2}, "^probes: 2"), ({"distribution": "cauchy"}, "^distribution: 'cauchy' is none"),
    ({"seed": 2**64}, "seed is"), ({"agreement": 0.9}, r"^agreement: 0.9; it is \(fraction, share\)"),
    ({"graph": "x"}, "^graph: 'x' is none of True, False and 'auto'")])
def test_arguments_of_score(options: dict[str, Any], message: str) -> None:
    model = trained()
    refused(ValueError, message, model, lambda: score(model, **options))


@pytest.mark.parametrize(("options", "message"), [
    ({}, "^prune: name a budget"), ({"macs": 0.0}, r"^macs: 0.0 is outside \(0, 1\]"), ({"macs": 1.5}, "^macs: 1.5"),
    ({"params": -0.5}, "^params: -0.5"), ({"channels": math.nan}, "^channels: nan"),
    ({"macs": 0.5, "round_to": 0}, "round_to"),
    ({"macs": 0.5, "floor": 1.5}, "floor"), ({"macs": 0.5, "floor": math.nan}, "floor"),
    ({"macs": 0.5, "scope": "local"}, "^scope: 'local'"), ({"macs": 0.001}, "^macs: 0.001 cannot be reached"),
    ({"macs": 0.5, "held_out": [X]}, "^held_out: agreement= and kl= are judged by it"),
    ({"params": 0.3, "floor": 0.9}, "^params: 0.3 cannot be reached"),
    ({"channels": 0.5, "round_to": 64}, "^channels: 0.5 cannot be reached")])
@pytest.mark.parametrize("inplace", [False, True])
def test_arguments_of_prune(options: dict[str, Any], message: str, inplace: bool) -> None:
    model = trained()
    scores = scored()
    refused(ValueError, message, model, lambda: fastscore.prune(model, scores, X, inplace=inplace, **options))


def test_ridges_that_are_none() -> None:
    model = trained()
    result = fastscore.prune(model, score(model), X, macs=0.5)
    for ridges in (0.1, (), (-1.0,), "0.1"):
        refused(ValueError, r"^ridges: .*give one or more, none below 0", model,
                lambda ridges=ridges: fastscore.reconstruct(model, result, [X], ridges=ridges, progress=False))


@pytest.mark.parametrize("option", ["mac", "calibration", "inplace"])
def test_options_of_curve_and_compare_that_there_are_none_of(option: str) -> None:
    """Told by the function that was called; what these give to prune() themselves is none of theirs."""
    model = trained()
    scores = scored()
    given: dict[str, Any] = {option: True, "progress": False}
    refused(TypeError, f"^curve: '{option}' is none of its options", model,
            lambda: fastscore.curve(model, scores, [X], [0.5], **given))
    refused(TypeError, f"^compare: '{option}' is none of its options", model,
            lambda: fastscore.compare(model, [X], ["taylor-sq"], **given))


def test_what_is_no_result_and_no_scores() -> None:
    model = trained()
    scores = scored()
    result = fastscore.prune(model, scores, X, macs=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(TypeError, "^result: .*not its model alone", model,
            lambda: fastscore.rebuild_optimizer(optimizer, model, result.model))
    refused(TypeError, "^optimizer: int", model, lambda: fastscore.rebuild_optimizer(3, model, result))
    refused(TypeError, "^other: int", model, lambda: scores.merge(3))
    refused(TypeError, "^scores: NoneType; give what fastscore.score returned", model,
            lambda: fastscore.mask(model, None, 0.3, X).__enter__())
    refused(TypeError, r"^path: PruneResult, .*holds the smaller model already, as its \.model", model,
            lambda: fastscore.load_pruned(model, result))
    refused(TypeError, r"^path: PruneResult, .*; the model comes first: save_pruned\(result, path\)", model,
            lambda: fastscore.save_pruned("small.safetensors", result))
    refused(TypeError, r"^model: PruneResult, which comes second, .*distill\(dense, result, batches\)", model,
            lambda: fastscore.distill(result, model, [X]))
    refused(TypeError, "^smaller: Scores, where a torch.nn.Module is meant$", model,
            lambda: fastscore.distill(model, scores, [X]))
    refused(TypeError, "^importances: 'budget' for 'mine' is none of the options of fastscore.score$", model,
            lambda: fastscore.compare(model, [X], {"mine": {"budget": 1}}))
    refused(ValueError, "^example_inputs: the model cannot take them: of torch.float64 .*stem.0 .Conv2d.: ", model,
            lambda: fastscore.save(model, X[:, :1], "small.pt2"))
    refused(ValueError, "^optimizer: it trains none of the parameters that it was given", model,
            lambda: fastscore.distill(model, result, [X], optimizer=lambda parameters: optimizer))


def test_scores_of_another_model() -> None:
    model = trained()
    other = {
        "another network": (score(NETWORKS["dense"].traced()), "another model, .*conv0"),
        "wider": (score(nn.Sequential(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 4, 3)).double(), [X]), "another model"),
        "before it was pruned": (score(fastscore.prune(RESIDUAL.traced(), score(RESIDUAL.traced()), X, macs=0.5).model),
                                 r"has \d channels and the scores know \d.*pruned\?"),
        "connected differently": (score(NETWORKS["inplace"].model(), ignore=["block2"]), ""),
    }
    rewired = RESIDUAL.model()
    rewired.block1.shortcut = nn.Conv2d(6, 6, 1).double()
    other["rewired"] = (score(rewired), "another model|connected differently")
    for name, (scores, message) in other.items():
        if name == "connected differently":  # the same channels in the same places, computed in place: the same model
            assert fastscore.prune(model, scores, X, macs=0.9).report.macs[1] > 0
            continue
        for act in (lambda scores=scores: fastscore.prune(model, scores, X, macs=0.5),
                    lambda scores=scores: fastscore.prune(model, scores, X, macs=0.5, inplace=True),
                    lambda scores=scores: fastscore.mask(model, scores, 0.3, X).__enter__()):
            refused(ValueError, f"^scores: .*({message})", model, act)


def test_scores_of_channels_that_are_kept_now() -> None:
    """The same model, called so that a layer's channels cannot go: told so, and no word of another model."""
    model = trained()
    scores = scored()
    layer = next(iter(scores))

    def all_needed(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return output + model.get_submodule(layer)(x).mean() if layer in dict(model.named_modules()) else output

    refused(ValueError, rf"^scores: they know channels of {layer}, which cannot go from this model on these", model,
            lambda: fastscore.prune(model, scores, X, macs=0.5, forward=all_needed))
