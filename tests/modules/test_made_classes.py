"""Modules whose classes were made of others', which were made, too."""

import copy
import io

import torch
from torch import Tensor, nn

from fastscore.modules import returned_part, written_numbers
from fastscore.modules.attention import handed, own_width


class Attention(nn.Module):
    """Asks for the width of what it reads, has a number in its code, and takes a bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(32, 3 * 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[samples, positions, 32] of as much, and of [samples, 4, 1, positions]."""
        n, positions, width = x.shape
        q, k, v = self.qkv(x).view(n, positions, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT + bias).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, positions, width))


def test_a_class_made_of_a_made_one_is_copied_and_pickled() -> None:
    module = Attention()
    made = own_width.with_own_width(Attention)
    assert made is not None
    module.__class__ = made
    handed.narrow_biases(module, torch.tensor([1]), 4, ("bias",))
    module.num_heads = 3
    module.qkv, module.proj = nn.Linear(32, 3 * 24), nn.Linear(24, 32)
    returned_part.narrow(module, returned_part.attribute(-1, 32), torch.tensor([0, 5]))
    given = torch.randn(2, 5, 32), torch.randn(2, 4, 1, 5)
    _check_copies(module, module(*given), given)
    assert module(*given).shape == (2, 5, 30)
    assert type(Attention()) is Attention


class Numbers(nn.Module):
    """As wide as its code says; a bias for each head is added."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 32)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[samples, 4, 8] of [samples, 6], and of [4, 1, 8]."""
        return self.layer(x).view(-1, 4, 8) + bias.flatten(1)


def test_numbers_go_before_and_after_what_else_a_module_is_handed() -> None:
    given = torch.randn(5, 6), torch.randn(4, 1, 8)

    def less(module: nn.Module) -> None:
        written_numbers.take_off(module, "forward#4", 1)

    def narrowed(module: nn.Module) -> None:
        handed.narrow_biases(module, torch.tensor([1]), 4, ("bias",))

    outputs = []
    for changes in ((less, narrowed), (narrowed, less)):
        module = Numbers()
        for change in changes:
            change(module)
        module.layer = nn.Linear(6, 24)
        nn.init.constant_(module.layer.weight, 0.5)
        nn.init.zeros_(module.layer.bias)
        outputs.append(module(*given))
        _check_copies(module, outputs[-1], given)
    expected = (given[0].sum(1) / 2)[:, None, None] + given[1][[0, 2, 3], 0]
    torch.testing.assert_close(outputs, [expected, expected])


def _check_copies(module: nn.Module, expected: Tensor, given: tuple[Tensor, ...]) -> None:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for again in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(again(*given), expected)
        assert type(again) is type(module)
