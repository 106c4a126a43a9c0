"""Fingerprints change with what they are of, and with nothing else."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastscore.fingerprints import digest_of, run_fingerprint


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    assert set(one) == set(other)
    return {name for name in one if one[name] != other[name]}


def a_little(model: nn.Sequential) -> None:
    model[0].weight.data[1, 2, 0, 0] = torch.nextafter(model[0].weight.data[1, 2, 0, 0], torch.tensor(9.0))


def a_buffer(model: nn.Sequential) -> None:
    model[1].running_var[3] += 1


def a_name(model: nn.Sequential) -> None:
    model._modules["last"] = model._modules.pop("3")


CHANGES: dict[str, tuple[Callable[[nn.Sequential], Any], set[str]]] = {
    "nothing": (lambda model: None, set()),
    "training mode": (lambda model: model.train(not model.training), set()),
    "frozen": (lambda model: model.requires_grad_(False), set()),
    "memory format": (lambda model: model.to(memory_format=torch.channels_last), set()),
    "hooks": (lambda model: model[0].register_forward_hook(lambda *args: None), set()),
    "one bit of a weight": (a_little, {"weights"}),
    "a buffer": (a_buffer, {"weights"}),
    "dtype": (lambda model: model.double(), {"weights"}),
    "another activation": (lambda model: model.__setitem__(2, nn.ReLU6()), {"model"}),
    "an argument": (lambda model: setattr(model[1], "eps", 1e-4), {"model"}),
    "a stride": (lambda model: setattr(model[0], "stride", (2, 2)), {"model"}),
    "a name": (a_name, {"model", "weights"}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_makes_another_model(change: str) -> None:
    act, named = CHANGES[change]
    before, model = run_fingerprint(build(), {}), build()
    act(model)
    assert differing(before, run_fingerprint(model, {})) == named


def test_what_makes_another_way_of_scoring() -> None:
    def mine(output: Tensor, batch: Any) -> Tensor:
        return output.sum()

    origin, options = {"importance": "taylor-sq", "seed": 0}, {"probes": 1, "loss": None, "ignored": ["a"]}
    known = run_fingerprint(build(), origin, **options)
    assert json.loads(json.dumps(known)) == known, "it is kept as JSON"
    assert differing(known, run_fingerprint(build(), {**origin, "seed": 1}, **options)) == {"seed"}
    for name, value in (("probes", "exact"), ("loss", mine), ("loss", nn.MSELoss()), ("ignored", ["a", "b"])):
        assert differing(known, run_fingerprint(build(), origin, **{**options, name: value})) == {name}
    named = run_fingerprint(build(), origin, **{**options, "loss": mine})
    assert named["loss"].endswith("mine"), "a function counts by its name, the same in every process"
    assert named == run_fingerprint(build(), origin, **{**options, "loss": mine})


def test_digests_are_a_chain_over_what_batches_hold() -> None:
    x, y = torch.arange(24.0).reshape(2, 3, 2, 2), torch.tensor([1, 0])
    digest = digest_of("", (x, y))
    assert digest == digest_of("", [x.clone(), y.clone()]) == digest_of("", {"x": x, "y": y})
    assert digest == digest_of("", (x.to(memory_format=torch.channels_last), y, "no tensor"))
    others = [digest_of("", (x, 1 - y)), digest_of("", (x.double(), y)), digest_of("", (x.flatten(1), y)),
              digest_of("", (y, x)), digest_of("", (x.flip(0), y)), digest_of("", x), digest_of(digest, (x, y)),
              digest_of("", (x, y, torch.tensor(0.5)))]
    assert len({digest, *others}) == len(others) + 1
    one, other = digest_of(digest_of("", x), y), digest_of(digest_of("", y), x)
    assert one != other, "the order counts"


def test_a_copy_is_the_same() -> None:
    model = build()
    assert run_fingerprint(copy.deepcopy(model), {}) == run_fingerprint(model, {})
