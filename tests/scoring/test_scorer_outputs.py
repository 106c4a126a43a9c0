"""Drop-in scores of models with several outputs and losses, each against brute force in float64."""

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from loops import RESIDUAL, assert_exact, assert_same, brute_force
from networks import Group, straight
from torch import Tensor, nn

import fastscore
from fastscore import Scorer


class TwoHeads(nn.Module):
    """A main and an auxiliary head, as GoogLeNet and the segmentation networks have."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.net, self.shape = RESIDUAL.model(), shape
        self.aux = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Any:
        features = self.net.block1(self.net.stem(x))
        main, aux = self.net.head(self.net.block2(features)), self.aux(features.mean((2, 3)))
        if self.shape == "one tensor":
            return torch.cat([main, aux], 1)
        return {"dict": {"main": main, "aux": aux, "hidden": features}, "tuple": (main, aux)}[self.shape]


def two_heads(shape: str) -> TwoHeads:
    torch.manual_seed(3)
    return TwoHeads(shape)


def losses(main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(len(main)) % 3
    return F.cross_entropy(main, y), 0.4 * F.cross_entropy(aux, y)


def two_heads_exact(x: Tensor) -> dict[str, Tensor]:
    """Both outputs as one long one, whose gradient is of length 1 for each sample."""
    model = two_heads("one tensor")
    z = model(x).detach().requires_grad_()
    (v,) = torch.autograd.grad(sum(losses(z[:, :4], z[:, 4:])), z)
    exact = {}
    for name, group in RESIDUAL.groups.items():
        edges = {f"net.{layer}": at for layer, at in group.edges.items()}
        if name == "stem.0":
            edges["aux"] = straight(6)
        s = oracles.sums(model, Group(group.channels, edges), x, v) / v.norm(dim=1, keepdim=True)
        exact[f"net.{name}"] = s.square().mean(0)
    return exact


PICK: dict[str, Callable[[Any], list[Tensor]]] = {
    "dict": lambda returned: [returned["main"], returned["aux"]], "tuple": lambda returned: list(returned)}


@pytest.mark.parametrize("way", ["sum", "one after the other", "one backward call"])
@pytest.mark.parametrize("shape", ["dict", "tuple"])
def test_several_outputs_and_losses_are_one_long_output(shape: str, way: str) -> None:
    model, x = two_heads(shape), RESIDUAL.inputs(6)
    scorer = Scorer(model, x, output=PICK[shape])
    with scorer:
        main, aux = losses(*PICK[shape](model(x)))
        if way == "sum":
            (main + aux).backward()
        elif way == "one backward call":
            torch.autograd.backward([main, aux])
        else:
            main.backward(retain_graph=True)
            aux.backward()
    assert_exact(scorer.scores(), two_heads_exact(x))


def test_one_of_several_outputs() -> None:
    """Of what the other head reads as well, what is asked for alone counts; that head loses channels, too."""
    model, x = two_heads("dict"), RESIDUAL.inputs(6)
    scorer = Scorer(model, x, output=lambda returned: returned["main"])
    with scorer:
        model(x)["main"].square().sum().backward()
    scores, exact = scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum())
    assert_exact(scores, exact, "net.")
    small = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False,
                            forward=lambda model, batch: model(batch)["main"]).model
    assert small.aux.in_features == small.net.stem[0].out_channels < model.aux.in_features


@pytest.mark.parametrize("shape", ["dict", "tuple"])
def test_a_probe_of_several_outputs_is_one_of_all_of_them(shape: str) -> None:
    model, joined, x = two_heads(shape), two_heads("one tensor"), RESIDUAL.inputs(6)
    scorer = Scorer(model, x, output=PICK[shape], gradient="random")
    plain = Scorer(joined, x, gradient="random")
    with scorer, plain:
        scorer.probe(model(x))
        plain.probe(joined(x))
    assert_same(scorer.scores(), plain.scores())


def test_an_output_that_cannot_be_told_is_refused() -> None:
    model, x = two_heads("dict"), RESIDUAL.inputs(6)
    with oracles.untouched(model):
        with pytest.raises(TypeError, match=r"returns dict with \['main'\] \[6, 4\], \['aux'\].*output=lambda"):
            Scorer(model, x)
        with pytest.raises(TypeError, match=r"output=lambda"):
            Scorer(model, x, output=lambda returned: returned["main"].argmax(1))
        with pytest.raises(ValueError, match=r"output: its tensors have 6, 3 rows"):
            Scorer(model, x, output=lambda returned: [returned["main"], returned["aux"][:3]])


class WithLoss(nn.Module):
    """Computes its own loss, and hands out a copy of its output in another precision, as wrappers for autocast do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RESIDUAL.model()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": logits.square().sum(), "logits": logits.float()}


def test_a_loss_from_inside_the_model_beside_a_copy_of_its_output() -> None:
    model, x = WithLoss(), RESIDUAL.inputs(6)
    scorer = Scorer(model, x)
    with scorer:
        model(x)["loss"].backward()
    assert_exact(scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum()), "net.")
