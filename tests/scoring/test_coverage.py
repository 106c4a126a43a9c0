"""The share of a network that can go: by hand on small networks, and by cutting on all of them."""

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore import Scores
from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.macs.counting import count

N, T = 3, 5


def covered(model: nn.Module, x: Tensor, **options: object) -> tuple[float, float, float, dict[str, float]]:
    """(MACs, those whose outputs can go, those that shrink, layer whose outputs stay -> its MACs)."""
    coverage = fastscore.score(model, [x], progress=False, **options).coverage
    macs = coverage.macs
    return (macs, round(coverage.outputs * macs, 6), round(coverage.shrink * macs, 6),
            {layer: round(share * macs, 6) for layer, share in coverage.kept.items()})


def test_layers_by_hand() -> None:
    """The last layer's inputs go, and what meets a LayerNorm over channels does."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.LayerNorm(10), nn.Linear(10, 7), nn.ReLU(),
                          nn.Linear(7, 2))
    x = torch.randn(N, 6)
    own = {"0": 6 * 8, "2": 8 * 10, "4": 10 * 7, "6": 7 * 2}
    every = sum(own.values())
    assert covered(model, x) == (every, every - own["6"], every, {"6": own["6"]})
    assert covered(model, x, ignore=["4"]) == (every, own["0"], own["0"] + own["2"],
                                               {"2": own["2"], "4": own["4"], "6": own["6"]})
    for options in ({"importance": "magnitude-l2"}, {"importance": "molchanov-group"}):
        assert covered(model, x, **options) == covered(model, x)


def test_convolutions_by_hand() -> None:
    """A depthwise convolution loses what the layer before it loses; strides and groups count."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1, groups=4),
                          nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 2))
    own = {"0": 3 * 4 * 9 * 64, "2": 4 * 9 * 16, "3": 4 * 6 * 16, "5": 3 * 6 * 9 * 4, "7": 24 * 2}
    every = sum(own.values())
    assert covered(model, torch.randn(N, 3, 8, 8)) == (every, every - own["7"], every, {"7": own["7"]})


class Block(nn.Module):
    """Projections that it holds itself, a tied embedding, and products of activations, which are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.codes = nn.Embedding(7, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 6]
        x = self.down(self.up(x).relu()) @ (self.mix / self.mix.norm())  # a computed weight
        chosen = self.experts[x.sum((1, 2)).long() % 3]  # one for each sample: gathered by what is in it
        y = torch.bmm(x, chosen)
        y = (y @ y.mT).softmax(-1) @ y
        return F.linear(y, self.codes.weight)


def test_parameters_that_code_reads_by_hand() -> None:
    own = {"up": T * 6 * 9, "down": T * 9 * 6, "mix": T * 6 * 4, "experts": T * 4 * 5, "codes": T * 5 * 7}
    block, x = Block(), torch.randn(N, T, 6)
    counted = count(block.eval(), x)
    assert counted.weights == own
    assert counted.macs == sum(own.values()) + 2 * T * T * 5
    scores = fastscore.score(block, [x], progress=False)
    every = sum(own.values())
    kept = {name: pytest.approx(own[name] / every) for name in ("down", "mix", "experts", "codes")}
    assert (scores.coverage.macs, scores.coverage.kept) == (every, kept)
    assert list(scores.coverage.kept) == ["down", "codes", "mix", "experts"]
    assert scores.coverage.outputs == pytest.approx(own["up"] / every)
    assert scores.coverage.shrink == pytest.approx((own["up"] + own["down"]) / every)
    assert scores.coverage.reasons["mix"] == scores.skipped["mix"]
    assert "from its experts [3, 4, 5]" in scores.coverage.reasons["experts"]


@pytest.mark.parametrize("wide", [6, 4])  # with projections of their own for keys and values, too
def test_attention_by_hand(wide: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, kdim=wide, vdim=wide, batch_first=True)
            self.read = nn.Linear(6, wide)

        def forward(self, x: Tensor) -> Tensor:
            y = x if wide == 6 else x[..., :wide]
            return self.read(self.attention(x, y, y, need_weights=False)[0])

    projections = T * 6 * (6 + 2 * wide)
    total, outputs, shrink, kept = covered(Attention(), torch.randn(N, T, 6))
    assert total == projections + T * 6 * 6 + T * 6 * wide
    assert outputs == projections + T * 6 * 6  # heads go, and so do channels between out_proj and what reads it
    assert shrink == total
    assert set(kept) == {"read"}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_covered_is_what_surgery_makes_smaller(name: str) -> None:
    """Every group loses a unit: layers with fewer rows have outputs that go, those with fewer weights shrink."""
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs()
    scores = fastscore.score(model, [x], progress=False)
    groups = [group for group in trace(model, x[:1]).groups if group.name in scores]
    cut = remove_channels(evaluation_copy(model), groups, {
        group.name: (group.unit == group.unit[0]).nonzero()[:, 0] for group in groups})
    macs = count(evaluation_copy(model), x).weights
    shapes = {layer: (model.get_submodule(layer).weight.shape, cut.get_submodule(layer).weight.shape) for layer in macs}
    rows = {layer: 1 if getattr(model.get_submodule(layer), "transposed", False) else 0 for layer in macs}
    outputs = {layer for layer, (before, after) in shapes.items() if after[rows[layer]] < before[rows[layer]]}
    shrink = {layer for layer, (before, after) in shapes.items() if after != before}
    coverage = scores.coverage
    assert coverage.macs == sum(macs.values())
    assert coverage.outputs == pytest.approx(sum(macs[layer] for layer in outputs) / coverage.macs)
    assert coverage.shrink == pytest.approx(sum(macs[layer] for layer in shrink) / coverage.macs)
    assert set(coverage.kept) == set(macs) - outputs
    assert set(coverage.reasons.values()) <= set(scores.skipped.values())


def test_it_is_printed_and_kept_in_files(tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 2))
    x = torch.randn(N, 6)
    scores = fastscore.score(model, [x], progress=False)
    lines = str(scores).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("coverage: "))
    assert lines[at] == ("coverage: 75.0% of 240 MACs (of layers with weights) are of layers whose outputs can go, "
                         "100.0% of layers that shrink at all")
    assert lines[at + 1] == "  outputs that stay: 25.0% 2 (its channels are the model's output)"
    assert "coverage: 75.0%" in scores._repr_html_()
    scores.save(f"{tmp_path}/s.safetensors")
    assert Scores.load(f"{tmp_path}/s.safetensors").coverage == scores.coverage
    assert scores.merge(scores).coverage == scores.coverage
    scorer = fastscore.Scorer(model, x)
    with scorer:
        model(x).sum().backward()
    assert scorer.scores().coverage == scores.coverage


def test_reasons_that_differ_in_numbers_are_told_once() -> None:
    class Blocks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = x + block(x)
            return x

    blocks = (nn.Sequential(nn.LayerNorm((5, 8)), nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(4))
    model = nn.Sequential(nn.Linear(6, 8), Blocks(*blocks), nn.Linear(8, 2))
    said = fastscore.score(model, [torch.randn(N, 5, 6)], progress=False).coverage.lines()
    assert len(said) <= 4
    assert sum("LayerNorm" in line for line in said) == 1


def test_none_for_channels_that_no_surgery_can_take_out() -> None:
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs()
    assert fastscore.score(model, [x], units="norms", progress=False).coverage is None


def test_what_no_formula_knows_is_named() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), Spectrum())
    coverage = fastscore.score(model, [torch.randn(N, 6)], progress=False).coverage
    assert dict(coverage.uncounted) == {"aten::_fft_r2c": "3"}
    assert coverage.lines()[-1] == "  not counted: aten::_fft_r2c, in 3"


def test_every_layer_of_a_group_that_is_left_out_is_named() -> None:
    """In the scores, too, and each with the reason of its group."""
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(2)
    stream = next(group for group in trace(model, x).groups if len(list(group.role("producer"))) > 1)
    scores = fastscore.score(model, [x], ignore=[stream.name], progress=False)
    others = {member.layer for member in stream.role("producer")} - {stream.name}
    assert others
    assert {scores.skipped[layer] for layer in others} == {f"its channels go with those of {stream.name}"}
    assert {scores.coverage.reasons[layer] for layer in {*others, stream.name}} == {"ignored"}
