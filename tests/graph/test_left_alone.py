"""Whatever holds weights is in a group or has a reason, in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thin_members import THIN
from torch import Tensor, nn

from fastscore.graph.tracing import trace


class Experts(nn.Module):
    """A mixture whose experts are one parameter, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.weights = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 8] -> the same."""
        return torch.einsum("nte,ntc,ecd->ntd", self.router(x).softmax(-1), x, self.weights)


class Conv1D(nn.Module):
    """A Linear in all but name, with its weight the other way round, as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C']."""
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Recurrent(nn.LSTM):
    """Whose code nobody knows."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """As an LSTM's."""
        return super().forward(x, hx)


class Model(nn.Module):
    """Some of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.experts, self.own, self.norm = Experts(), Conv1D(8, 8), nn.LayerNorm(8)
        self.recurrent = Recurrent(8, 8, batch_first=True)
        self.up, self.down, self.unused = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, 5] -> [N, 5, 8]."""
        x = self.norm(self.own(self.experts(self.words(tokens) + self.places)))
        return self.down(self.up(self.recurrent(x)[0]).relu())


def test_everything_is_in_a_group_or_named() -> None:
    """Each with what it is; norms go with the layers before them, biases with their weights."""
    graph = trace(Model(), torch.randint(0, 11, (2, 5)))
    assert [group.name for group in graph.groups] == ["experts.weights", "up"]
    reasons = {"words": "a product with other activations (BmmBackward0)",
               "places": "the code of Model reads its places [1, 5, 8]",
               "own": "its channels pass through recurrent (Recurrent), which cannot lose channels yet",
               "recurrent": "a recurrent layer (Recurrent), which cannot lose channels yet: its class has a forward of "
                            "its own",
               "unused": "it does not run on example_inputs", "down": "its channels are the model's output",
               "experts.router": ""}
    assert set(graph.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in graph.skipped[name]
    assert not any("\n" in reason for reason in graph.skipped.values())


@pytest.mark.parametrize("family", ["vit", "convnext", "swin", "resnet", "googlenet"])
def test_no_weight_of_torchvisions_models_is_forgotten(family: str) -> None:
    """Every parameter of two or more dimensions belongs to a member of a group, or is named, or its module is."""
    build, size = THIN[family]
    model = build().eval()
    graph = trace(model, torch.randn(1, 3, size, size))
    members = {member.layer for group in graph.groups for member in group.members}
    known = members | set(graph.skipped)
    assert not [parameter for parameter, value in model.named_parameters()
                if value.dim() > 1 and not {parameter, parameter.rpartition(".")[0]} & known]


def test_layers_that_go_with_others_say_so() -> None:
    """A residual stream that is the model's output: all its producers are named, not the first alone."""
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    skipped = trace(Residual(), torch.randn(2, 4)).skipped
    assert skipped["one"] == "its channels are the model's output"
    assert skipped["two"] in ("its channels go with those of one", "its channels are the model's output")


def test_an_obstacle_is_named_without_its_settings() -> None:
    """The name and the kind of a module, not all it prints."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((3, 6)), nn.Linear(6, 2))
    assert trace(model, torch.randn(2, 3, 4)).skipped["0"] == \
        "its channels pass through 1 (LayerNorm), which cannot lose channels yet"


def test_a_sum_over_all_channels_that_is_returned_leaves_the_others_be() -> None:
    """Its result has fewer dimensions than the channels stood at."""
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x).relu()
            return self.head(self.two(y).relu().mean((2, 3))) + y.sum((1, 2, 3))[:, None]

    graph = trace(Summed(), torch.randn(2, 3, 8, 8))
    assert [group.name for group in graph.groups] == ["two"]
    assert graph.skipped["one"].startswith("an operation runs over all its channels (Sum")


def test_vectors_that_are_cut_to_a_length_only_where_they_are_longer() -> None:
    """torch.renorm, of which a batch of short ones shows nothing."""
    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(torch.renorm(self.one(x), 2, 0, 100.0)).relu())

    graph = trace(Renormed(), torch.randn(2, 3))
    assert graph.skipped["one"] == "an operation runs over all its channels (RenormBackward0)"
    assert [group.name for group in graph.groups] == ["two"]


def test_a_fourier_transform_mixes_the_dimensions_that_it_runs_over() -> None:
    """All channels, as FNet's; or places of an image, of which each channel has its own."""
    class Fourier(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.one, self.head, self.dim = nn.Linear(3, 6), nn.Linear(6, 2), dim

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.fft(self.one(x), dim=self.dim).abs())

    over_channels, over_places = (trace(Fourier(dim), torch.randn(2, 5, 3)) for dim in (-1, 1))
    assert over_channels.skipped["one"] == "an operation runs over all its channels (FftR2CBackward0)"
    assert [group.name for group in over_places.groups] == ["one"]


class ByHand(nn.Module):
    """Attention of one head, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.last = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.last(self.o(weights @ self.v(x)).relu())


def test_a_product_of_activations_is_to_blame_not_the_softmax_after_it() -> None:
    graph = trace(ByHand(), torch.randn(2, 5, 8))
    assert [group.name for group in graph.groups] == ["v", "o"]
    assert graph.skipped["q"] == "a product with other activations (BmmBackward0) sums over its channels, where " \
                                 "nothing can be measured"
    assert graph.skipped["k"] == "its channels go with those of q"


def test_layers_under_vmap_have_the_reason() -> None:
    """Of the output they are not independent."""
    class PerRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.last = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.three(torch.vmap(lambda row: self.two(self.one(row).relu()))(x)).relu())

    graph = trace(PerRow(), torch.randn(3, 4))
    assert [group.name for group in graph.groups] == ["three"]
    assert all(graph.skipped[layer].startswith("it runs under torch.func (vmap, say)") for layer in ("one", "two"))


def test_parameters_in_a_list_are_named_one_by_one() -> None:
    """The module that holds the list is what reads them."""
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(6, 4), torch.randn(5, 6)])
            self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one((x @ self.weights[0].t().tanh()).relu() @ self.weights[1].t().tanh()).relu())

    skipped = trace(Listed(), torch.randn(3, 4)).skipped
    assert {name: reason for name, reason in skipped.items() if name != "two"} == {
        f"weights.{place}": f"the code of Listed computes what it multiplies by from its weights.{place} {shape}, in "
                            "each pass"
        for place, shape in enumerate(([6, 4], [5, 6]))}


def test_complex_weights_say_so() -> None:
    """And what is real goes."""
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(4, 4, dtype=torch.complex64) for _ in range(2))
            self.three, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.three(self.two(self.one(torch.complex(x, x)).tanh()).abs()).relu())

    graph = trace(Complex(), torch.randn(3, 4))
    assert [group.name for group in graph.groups] == ["three"]
    assert [graph.skipped[name] for name in ("one", "two")] == \
        ["its weight is of torch.complex64, of which no gradient is taken"] * 2


def test_an_output_that_others_read_is_an_output() -> None:
    """As the last hidden state is, of which a pooler makes something else."""
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.pool = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6)
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.embed(x)
            x = self.norm(x + self.down(self.up(x).relu()))
            return {"last_hidden_state": x, "pooler_output": self.pool(x[:, 0]).tanh()}

    graph = trace(Pooled(), torch.randn(2, 3, 4), lambda model, batch: model(batch)["last_hidden_state"])
    assert [group.name for group in graph.groups] == ["up"]
    assert graph.skipped["embed"] == "its channels are the model's output"
    assert graph.skipped["down"] in ("its channels go with those of embed", "its channels are the model's output")


class Biased(nn.Module):
    """What a table is made of, in the way of a case, is added to all channels; a parameter is there for nothing."""

    def __init__(self, made: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.table, self.made = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(5, 3), made
        self.token = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu() + self.made(self)[torch.arange(x.shape[1])].mean(-1, keepdim=True))


def _without_gradient(model: Biased) -> Tensor:
    with torch.no_grad():
        return model.table.weight.t()[:, :]


@pytest.mark.parametrize(("made", "reason"), [
    *((made, "the code of Biased reads its weight, and does not call it, where no gradient comes back "
             "(torch.no_grad(), or detach())")
      for made in (_without_gradient, lambda model: model.table.weight.detach().t())),
    (lambda model: torch.ones_like(model.table.weight).t(),
     "it does not run on example_inputs: if it reads channels that are removed, it will not fit them")])
def test_a_layer_that_code_reads_where_no_gradient_comes_back(made: Callable[[Any], Tensor], reason: str) -> None:
    """It has the reason; what takes no more than its shape does not read it."""
    graph = trace(Biased(made).eval(), torch.randn(2, 3, 4))
    assert [group.name for group in graph.groups] == ["one"]
    assert graph.skipped["table"] == reason


def test_a_parameter_that_no_code_reads() -> None:
    skipped = trace(Biased(lambda model: model.table.weight.t()).eval(), torch.randn(2, 3, 4)).skipped
    assert skipped["token"] == "no code reads its token [1, 6] on example_inputs: if that meets channels that are " \
                               "removed, it will not fit them"
