"""Convolutions that PyTorch computes wrong in bfloat16 on processors with AMX: who scores with them is told so."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from fastscore.fastpath.precision import wrong_convolutions


class Column(nn.Sequential):
    """Images [N, 3, height, 3]: a convolution at a stride makes a column of them."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())


@pytest.mark.parametrize(("precision", "height", "amx"), [("bfloat16", 9, True), ("bfloat16", 3, True),
                                                          (None, 9, True), ("bfloat16", 9, False)])
def test_convolutions_that_pytorch_gets_wrong_are_named(precision: str | None, height: int, amx: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN does, in bfloat16 on AMX: each that may be is tried."""
    def conv2d(x: Tensor, *args: object) -> Tensor:
        made = F.conv2d(x, *args)
        return made * float("nan") if x.dtype == torch.bfloat16 and made.shape[-1] == 1 else made

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("fastscore.fastpath.precision.F", SimpleNamespace(conv2d=conv2d))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fastscore.score(Column(), [torch.randn(4, 3, height, 3)], precision=precision, progress=False)
    said = [str(each.message) for each in warned if "computes 0 wrong in bfloat16" in str(each.message)]
    assert len(said) == (precision == "bfloat16" and height > 3 and amx)


@pytest.mark.parametrize("shape", [((5, 5), (1, 3), (2, 0), (12, 6)), ((3, 3), (2, 2), (1, 1), (2, 2)),
                                   ((3, 3), (1, 1), (1, 1), (6, 6)), ((5, 3), (1, 3), (2, 2), (10, 1))], ids=str)
def test_what_is_named_is_wrong(shape: tuple[tuple[int, int], ...]) -> None:
    """Where the processor has AMX."""
    kernel, stride, padding, size = shape
    layer, x = nn.Conv2d(64, 16, kernel, stride, padding), torch.randn(4, 64, *size).bfloat16()
    with torch.no_grad():
        right = layer(x.float())
        off = ((layer.bfloat16()(x).float() - right).abs() / right.abs().max()).max()
    named = wrong_convolutions(nn.Sequential(layer), {"0": (4, 64, *size)}, torch.bfloat16)
    assert bool(named) or float(off) < 0.05
    assert not named or torch.cpu._is_amx_tile_supported()
