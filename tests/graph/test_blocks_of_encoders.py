"""Branches of nn.TransformerEncoderLayer, which reads its layers in one fused kernel rather than calls them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.modules.zero_branch import ZeroBranch


class Encoder(nn.Module):
    """Tokens, of which 0 is padding, to three classes."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.1, "gelu", batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        made = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return self.head(made.masked_fill(padding[..., None], 0).sum(1))


def _without(model: Encoder, block: int, last: str, ids: Tensor) -> Tensor:
    """What comes out where a dropout, the last of a branch, makes zeros; its hook keeps the fused kernel away."""
    handle = model.encoder.layers[block].get_submodule(last).register_forward_hook(lambda *call: 0 * call[2])
    with torch.no_grad():
        output = model(ids)
    handle.remove()
    return output


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_each_goes_whole(norm_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Encoder(norm_first).double().eval(), torch.randint(1, 20, (3, 6))
    ids[0, 4:] = 0
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with untouched(model):
        scores = fastscore.score(model, [ids], units="blocks", progress=False)
    branches = {f"encoder.layers.{i}{part}": (i, last) for i in range(2)
                for part, last in ((".self_attn (whole)", "dropout1"), ("", "dropout2"))}
    assert [name for name in scores if len(scores[name]) == 1] == list(branches)
    for name, where in branches.items():
        alone = replace(scores, totals={name: scores.totals[name]})
        result = fastscore.prune(model, alone, ids, params=0.999, compensate=False)
        assert list(result.removed) == [name]
        assert any(isinstance(module, ZeroBranch) for module in result.model.modules())
        want = _without(model, *where, ids)
        for grad in (False, True):  # without gradients PyTorch takes its fused kernels
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(result.model(ids), want, rtol=1e-9, atol=1e-11)
        fastscore.save_pruned(result, tmp_path / "small.safetensors")
        loaded = fastscore.load_pruned(lambda: Encoder(norm_first), tmp_path / "small.safetensors").eval()
        with torch.no_grad():
            assert torch.equal(loaded(ids), result.model(ids))
    result.model.train()(ids).sum().backward()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_they_go_with_heads_and_channels() -> None:
    torch.manual_seed(0)
    model, ids = Encoder().double().eval(), torch.randint(1, 20, (4, 6))
    ids[0, 4:] = 0
    scores = fastscore.score(model, [ids], units="blocks", progress=False)
    cheap = replace(scores, totals={name: total * (1e-6 if name in ("encoder.layers.0.self_attn (whole)",
                                                                   "encoder.layers.1") else 1)
                                    for name, total in scores.totals.items()})
    result = fastscore.prune(model, cheap, ids, params=0.5, compensate=False)
    assert {"encoder.layers.0.self_attn (whole)", "encoder.layers.1"} < set(result.removed)
    with torch.no_grad(), fastscore.mask(model, cheap, result, ids, compensate=False):
        want = model(ids)
    with torch.no_grad():
        torch.testing.assert_close(result.model(ids), want, rtol=1e-9, atol=1e-11)
    program = torch.export.export(result.model, (ids,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(ids.repeat(3, 1)), want.repeat(3, 1), rtol=1e-9, atol=1e-11)
