"""Gradients of rows alone, which leave the products out, show the rows that a layer's own do."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastscore.graph.trials.row_gradients import likely_numbers, rows_alone, rows_shown
from fastscore.modules.weights.experts import ExpertLinear

LAYERS = [
    (nn.Linear(5, 3), (3, 4, 5)),
    (nn.Conv1d(4, 3, 3, stride=2), (3, 4, 12)),
    (nn.Conv2d(4, 3, (3, 2), stride=(2, 3), padding=(2, 0), dilation=(2, 1)), (3, 4, 13, 11)),
    (nn.Conv2d(4, 1, 2, stride=3), (3, 4, 10, 9)),
    (nn.Conv3d(2, 3, 2, padding=1), (3, 2, 4, 3, 5)),
    (nn.Conv2d(4, 6, 3, 2, groups=2), (3, 4, 6, 5)),
    (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, padding="same"), (3, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 3, 2, stride=2), (3, 4, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_gradients_of_rows_alone_reach_the_rows_that_the_layer_s_own_do(layer: nn.Module, shape: tuple[int, ...]
                                                                        ) -> None:
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    dim = -1 if isinstance(layer, nn.Linear) else 1
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(layer(x).select(dim, 0).shape) < 0.2
    for picked in (rows, torch.zeros_like(rows), torch.ones_like(rows)):
        own, = torch.autograd.grad(y := layer(x), x, torch.randn_like(y) * picked.unsqueeze(dim))
        with rows_alone(layer):
            made = layer(x)
        other, = torch.autograd.grad(made, x, torch.randn_like(made) * picked.unsqueeze(dim))
        assert torch.equal(made, y)
        assert torch.equal((own != 0).any(dim), (other != 0).any(dim))
        assert "forward" not in vars(layer)


def test_rows_alone_give_other_values_where_none_are_asked_for() -> None:
    """Of which the gradients reach the same rows; and those of experts, whichever experts they choose."""
    linear, expert = nn.Linear(5, 7).double().requires_grad_(False), torch.tensor([1, 0, 2, 1])
    experts = ExpertLinear(nn.ParameterDict({"up": torch.randn(2, 7, 5, dtype=torch.float64)}), "up", "")
    experts.requires_grad_(False)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for layer, besides in ((linear, ()), (experts, (expert,))):
        for values in (True, False):
            own, gradients = layer(x, *besides), list[Tensor]()
            with rows_alone(layer, values):
                made = layer(x, *besides)
            assert torch.equal(made, own) is values
            assert torch.equal((made != 0).any(1), (own != 0).any(1))
            for rows in torch.eye(4, dtype=torch.float64):
                gradients = [torch.autograd.grad(y, x, rows[:, None].expand_as(y), retain_graph=True)[0]
                             for y in (own, made)]
                assert torch.equal(*((g != 0).any(1) for g in gradients))


def test_rows_that_are_shown_are_those_that_gradients_show() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum()

    x = torch.randn(2, 3, 5, requires_grad=True)
    with torch.no_grad():
        x[:, :, 2], x[:, 1] = 0, 0
    for kind, is_like in ((nn.Linear, True), (Own, True), (Other, False)):
        layer = kind(5, 7)
        tensors = [x, layer.weight, layer.bias]
        own, picked = layer(x), (torch.rand(2, 3, 7) < 0.3) & (torch.arange(7) != 4)
        with rows_shown(layer):
            made = layer(x)
        assert torch.equal(made, own)
        for g, expected in zip(*(torch.autograd.grad(y, tensors, picked.float()) for y in (made, own)), strict=True):
            assert torch.equal(g, expected) is not is_like
            for dim in range(g.dim()):
                shown, real = (each.movedim(dim, 0).reshape(len(each.movedim(dim, 0)), -1).any(1)
                               for each in (g, expected))
                assert torch.equal(shown, real)


def test_gradients_of_rows_alone_that_meet_do_not_cancel_out() -> None:
    """As those that layers send to one row, each as large as the others, also a layer that is called twice."""
    first, second = nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 5).requires_grad_(False)
    x = torch.randn(1, 5, requires_grad=True)
    with rows_alone(nn.ModuleList([first, second])):
        made = [first(x) - second(x), first(x) - 2 * first(2 * x)]
    for y in made:
        assert torch.autograd.grad(y, x, torch.ones_like(y))[0].abs().min() > 0.01


def test_what_a_convolution_reads_may_not_be_written_to_in_runs_for_rows_alone_either() -> None:
    layer = nn.Conv2d(2, 3, 1).requires_grad_(False)
    x = torch.randn(1, 2, 3, 3, requires_grad=True) * 1
    with rows_alone(layer):
        y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class WithMean(Turned):
    """Whose gradient reaches all rows, though what it makes is a product."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0, keepdim=True)
        return super().forward(x + (mean - mean.detach()))


@pytest.mark.parametrize(("kind", "reached"), [(Turned, 1), (WithMean, 3)])
def test_layers_that_multiply_by_code_of_their_own_send_back_what_reaches_the_same_rows(kind: type[nn.Linear],
                                                                                        reached: int) -> None:
    layer, x = kind(4, 5).requires_grad_(False), torch.randn(3, 4, requires_grad=True) * 1
    with FlopCounterMode(display=False) as counter:
        with rows_alone(nn.Sequential(layer)):
            made = layer(x)
        before = counter.get_total_flops()
        g, = torch.autograd.grad(made[0].sum(), x)
    assert torch.equal(made, layer(x))
    assert int((g != 0).any(1).sum()) == reached
    assert (counter.get_total_flops() - before < 100) is (reached == 1)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 3, groups=2)])
def test_likely_numbers_show_widths_that_do_not_fit(layer: nn.Module) -> None:
    x, dim = (torch.randn(3, 4), 1) if isinstance(layer, nn.Linear) else (torch.randn(3, 4, 6, 5), 1)
    with torch.no_grad(), likely_numbers(nn.Sequential(layer)):
        made = layer(x)
        assert not torch.equal(made, expected := type(layer).forward(layer, x))
        assert made.shape == expected.shape
        with pytest.raises(RuntimeError):
            layer(x.narrow(dim, 0, 2))
        layer.weight = nn.Parameter(layer.weight[:, :1])
        with pytest.raises(RuntimeError):
            layer(x)
