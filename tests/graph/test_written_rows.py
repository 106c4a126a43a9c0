"""Rows that code writes into others: image tokens among those of text, mask tokens, rows added up. The layers that make
both go together, scored as brute force has them, in float64; and what is pruned computes what is masked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastscore import Scorer, prune

X, IMAGES = torch.randn(4, 7, 5).double(), torch.randn(4, 2, 6).double()
MASK = torch.zeros(4, 7, dtype=torch.bool)
MASK[:, [1, 4]] = True
PLACES = torch.tensor([1, 4])
Write = Callable[[Tensor, Tensor, Tensor], Tensor]  # (rows [N, T, C], others [N, 2, C], a token [C]) -> rows


def at_mask(rows: Tensor, others: Tensor, token: Tensor) -> Tensor:
    rows = rows.clone()
    rows[MASK[: len(rows)]] = others.flatten(0, 1)
    return rows


def at_slice(rows: Tensor, others: Tensor, token: Tensor) -> Tensor:
    rows = rows.clone()
    rows[:, 1:3] = others
    return rows


def token_at_place(rows: Tensor, others: Tensor, token: Tensor) -> Tensor:
    rows = rows.clone()
    rows[:, 0] = token
    return rows


def places(others: Tensor) -> Tensor:
    return PLACES[None, :, None].expand_as(others)


WAYS: dict[str, Write] = {
    "masked_scatter": lambda rows, others, token: rows.masked_scatter(MASK[: len(rows), :, None], others),
    "at a mask": at_mask,
    "at a slice": at_slice,
    "index_copy": lambda rows, others, token: rows.index_copy(1, PLACES, others),
    "index_add": lambda rows, others, token: rows.index_add(1, PLACES, others),
    "scatter": lambda rows, others, token: rows.scatter(1, places(others), others),
    "scatter_add_": lambda rows, others, token: rows.clone().scatter_add_(1, places(others), others),
    "where, others": lambda rows, others, token: torch.where(MASK[: len(rows), :, None], others[:, :1], rows),
    "where, a token": lambda rows, others, token: torch.where(MASK[: len(rows), :, None], token, rows),
    "a token at a place": token_at_place}


class Net(nn.Module):
    """Text and images, of which `write` makes one sequence."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.text, self.image, self.token = nn.Linear(5, 8), nn.Linear(6, 8), nn.Parameter(torch.randn(8))
        self.inner, self.last, self.write = nn.Linear(8, 9), nn.Linear(9, 3), write

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows = self.write(self.text(batch[0]), self.image(batch[1]), self.token)
        return self.last(self.inner(rows).relu()).mean(1)


def call(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    made: Tensor = model(batch)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_both_layers_go_together(way: str) -> None:
    torch.manual_seed(0)
    model, batch = Net(WAYS[way]).double(), (X, IMAGES)
    scorer = Scorer(model, batch, forward=call)
    with scorer:
        model(batch).square().sum().backward()
    model.zero_grad()
    scores = scorer.scores()
    for layer, reader in {"text": "inner", "inner": "last"}.items():
        gate = torch.ones(4, 1, model.get_submodule(reader).in_features, dtype=torch.float64, requires_grad=True)
        handle = model.get_submodule(reader).register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        output = model(batch)
        handle.remove()
        v = 2 * output.detach()
        exact = (torch.autograd.grad(output, gate, v)[0][:, 0] / v.norm(dim=1, keepdim=True)).square().mean(0)
        torch.testing.assert_close(scores[layer].double(), exact, rtol=1e-6, atol=0)
    small = prune(model, scores, batch, channels=0.6, scope="layer", forward=call, progress=False).model
    assert small.text.out_features == small.inner.in_features == 5
    assert (small.token if "token" in way else small.image.weight).shape[0] == 5
