"""A copy is what copy.deepcopy() makes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastscore.modules.copying import deepcopy


class Holds(nn.Module):
    """Parts that know of each other, and values of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.again = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.same = self.again
        self.others, self.settings = [self.norm, self], {"a": [1], "of": self.again}
        self.first, self.empty = self.norm.running_mean[:2], {}
        self.shared = self.empty
        self.pairs, self.numbers = {"one": self.others, "sizes": (1, [2])}, {1, 2}
        self.pairs["itself"] = self.pairs
        self.register_forward_hook(hook)


def hook(*args: object) -> None:
    pass


class OfItsOwn(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return nn.Identity()


class LeavesOut(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "note"}


class Restores(nn.Linear):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "restored": len(state)})


class Slots(nn.Linear):
    __slots__ = ("kept",)


def test_a_copy_holds_what_copy_deepcopy_makes() -> None:
    model = nn.Sequential(Holds(), nn.ReLU(), nn.Conv1d(3, 2, 1))
    made, expected = deepcopy(model, {}), copy.deepcopy(model)
    for one, other, own in zip(made.modules(), expected.modules(), model.modules(), strict=True):
        assert one is not own
        assert type(one) is type(other)
        assert {name: type(value) for name, value in vars(one).items()} == \
            {name: type(value) for name, value in vars(other).items()}
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in made.state_dict().items())
    held: Any = made[0]
    assert held.same is held.again
    assert held.others[0] is held.norm
    assert held.others[1] is held
    assert held.settings["of"] is held.again
    assert held.pairs["one"] is held.others
    assert held.pairs["itself"] is held.pairs
    assert held.pairs["sizes"][1] is not model[0].pairs["sizes"][1]
    assert held.numbers == {1, 2}
    assert held.numbers is not model[0].numbers
    assert held.shared is held.empty is not model[0].empty
    assert held.first.untyped_storage().data_ptr() == held.norm.running_mean.untyped_storage().data_ptr()
    assert list(held._forward_hooks.values()) == [hook]
    held._forward_hooks.clear()
    held.norm._parameters.clear()
    assert model[0]._forward_hooks
    assert model[0].norm._parameters


def test_what_the_memo_has_stands_for_its_part() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    other = nn.Identity()
    made = deepcopy(model, {id(model[0]): other, id(model[1]): other})
    assert list(made) == [other, other]


@pytest.mark.parametrize("kind", [OfItsOwn, LeavesOut, Restores, Slots])
def test_a_module_with_ways_of_its_own_is_copied_in_its_way(kind: Any) -> None:
    layer = kind(2, 2)
    layer.note = 1
    if kind is Slots:
        layer.kept = 2
    made, expected = deepcopy(nn.Sequential(layer), {})[0], copy.deepcopy(layer)
    assert type(made) is type(expected)
    assert vars(made).keys() == vars(expected).keys()
    assert getattr(made, "kept", None) == getattr(expected, "kept", None)


def test_buffers_that_share_memory_share_it_in_the_copy_and_their_gradients_stay() -> None:
    model, whole = nn.Module(), torch.arange(6.0)
    for name, buffer in {"part": whole[2:4], "whole": whole, "turned": whole.view(2, 3).T, "same": whole}.items():
        model.register_buffer(name, buffer)
    model.register_buffer("learned", torch.ones(2, requires_grad=True))
    made: Any = deepcopy(model, {})
    made.whole.zero_()
    assert not any(bool(made.get_buffer(name).any()) for name in ("part", "whole", "turned", "same"))
    assert made.same is made.whole
    assert made.turned.stride() == (1, 3)
    assert made.learned.requires_grad
    assert torch.equal(whole, torch.arange(6.0))
