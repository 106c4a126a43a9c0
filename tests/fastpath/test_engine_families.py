"""Every torchvision classification family: the fast pass has the scores of hooks on the model as it is.

A thin member of each family here, but of those that test_fusion.py tries. FASTSCORE_NIGHTLY=1 adds these, and every
model that torchvision lists, at its own width.
"""

import pytest
import torch
import torchvision
from networks import randomize
from thin_members import PACKED, THIN
from thinned import NIGHTLY
from torch import Tensor, nn

import fastscore
from fastscore import Scorer, Scores


def assert_fast_is_plain(model: nn.Module, x: Tensor) -> None:
    """1e-6 of each channel's score, and the order with it. In float64: in float32 they agree to 1e-4, but for a ReLU or
    a maximum that rounding tips over now and then."""
    model, x = model.double(), x.double()
    scorer = Scorer(model, x[:1], gradient="random")
    with scorer:
        scorer.probe(model(x))
    plain: Scores = scorer.scores()
    fast = fastscore.score(model, [x], progress=False)
    assert list(fast) == list(plain)
    for layer in plain:
        rounding = 1e-6 * plain[layer] + 1e-9 * plain[layer].max()
        assert bool(((fast[layer] - plain[layer]).abs() <= rounding).all()), layer
        order = plain[layer].argsort()
        assert bool((fast[layer][order].diff() >= -2 * rounding[order][1:]).all()), layer
    assert {tap.layer for tap in fast.plan.taps} == set(fast.means)


@pytest.mark.parametrize("family", [family for family in THIN if NIGHTLY or family not in PACKED])
def test_the_fast_pass_of_a_thin_member_has_the_plain_scores(family: str) -> None:
    build, size = THIN[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomize(build()).eval()
        assert_fast_is_plain(model, torch.randn(4, 3, size, size))


if NIGHTLY:
    @pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
    def test_the_fast_pass_of_every_model_has_the_plain_scores(name: str) -> None:
        size = {"inception_v3": 96}.get(name, 224 if name.startswith(("vit", "maxvit")) else 64)
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torchvision.models.get_model(name, num_classes=10, **extra).eval()
            assert_fast_is_plain(model, torch.randn(2, 3, size, size))
