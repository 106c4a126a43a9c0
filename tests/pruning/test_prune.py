"""prune(): budgets on real graphs, and a report that is the truth."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from network_modules import Residual
from networks import NETWORKS, randomize
from oracles import params, untouched
from thin_members import THIN
from thinned import NIGHTLY
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.pruning.masking import at_consumers
from fastscore.recovery.compensation import removed_positions

RESIDUAL = NETWORKS["residual"]


def counted_macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    return counter.get_total_flops() // 2


def width(model: nn.Module, layer: str) -> int:
    module = model.get_submodule(layer)
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


@pytest.mark.parametrize("budget", [{"channels": 0.5}, {"params": 0.4}, {"macs": 0.5}, {"macs": 0.7, "params": 0.6},
                                    {"macs": 0.5, "scope": "layer"}, {"channels": 0.6, "round_to": 2},
                                    {"macs": 0.6, "floor": 0.5}])
@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "grouped", "flattening", "unet"])
def test_the_report_is_the_truth_and_the_budget_holds(name: str, budget: dict[str, float]) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(3)
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    with untouched(model):
        result = fastscore.prune(model, scores, x, **budget)
    report = result.report
    assert report.macs == (counted_macs(model, x), counted_macs(result.model, x))
    assert report.params == (params(model), params(result.model))
    assert report.channels == tuple(sum(width(m, group) for group in network.groups) for m in (model, result.model))
    for unit in ("channels", "params", "macs"):
        if unit in budget:
            before, after = getattr(report, unit)
            assert after <= budget[unit] * before * (1 + 1e-9)
    for row in report.groups:
        assert row.channels == (width(model, row.layer), width(result.model, row.layer))
        gone = result.removed.get(row.layer, torch.empty(0))
        assert row.channels[0] - row.channels[1] == len(gone) == len(set(gone.tolist()))
        assert row.channels[1] >= max(1, budget.get("floor", 0) * row.channels[0])
        if row.channels[1] != row.channels[0]:
            assert row.channels[1] % budget.get("round_to", 1) == 0
    assert result.model(x).shape == model(x).shape
    text = str(report)
    assert f"{report.macs[1]:,}" in text
    assert all(row.layer in text for row in report.groups)
    remains = text.splitlines()[len(report.groups) + 2]
    assert repr(result) == f"<PruneResult: {type(result.model).__name__}, <PruneReport: {remains}>>"
    assert all(f"<td>{row.layer}</td><td>{row.channels[0]:,}</td><td>{row.channels[1]:,}</td>" in result._repr_html_()
               for row in report.groups)
    assert result.to_pandas().equals(report.to_pandas())
    table = report.to_pandas()
    assert table.layer.tolist() == [row.layer for row in report.groups]
    assert list(zip(table.macs_before, table.macs_after, strict=True)) == [row.macs for row in report.groups]


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.77, 0.95, 1.0])
def test_channels_are_met_exactly_where_they_go_one_by_one(share: float) -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    report = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=share).report
    assert report.channels == (26, int(26 * share + 1e-9))


def test_many_zeros_are_not_over_pruned() -> None:
    """Most filters are dead, so most scores tie at zero; 30 % were to go, and 30 % go."""
    model, x = RESIDUAL.model(), RESIDUAL.inputs(3)
    for norm in ("stem.1", "block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2", "block2.shortcut.1"):
        layer = model.get_submodule(norm)
        nn.init.zeros_(layer.weight[: int(0.8 * len(layer.weight) + 1)])
        nn.init.zeros_(layer.bias[: int(0.8 * len(layer.weight) + 1)])
    scores = fastscore.score(model, [x], progress=False)
    assert sum(int((values == 0).sum()) for values in scores.values()) >= 0.8 * 26
    for scope in ("global", "layer"):
        report = fastscore.prune(model, scores, x, channels=0.7, scope=scope).report  # type: ignore[arg-type]
        assert report.channels == (26, 18)
        assert all(row.channels[1] >= 1 for row in report.groups)


def test_a_report_says_where_which_of_several_zeros_went_is_arbitrary() -> None:
    model = nn.Sequential(nn.Conv2d(2, 10, 1), nn.ReLU(), nn.Conv2d(10, 4, 1), nn.Flatten(), nn.Linear(4, 2)).eval()
    model[0].bias.data = torch.tensor([-100.0] * 6 + [1.0] * 4)  # dead, and alive
    x = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    scores = fastscore.score(model, [x], progress=False)
    assert int((scores["0"] == 0).sum()) == 6
    for left, said in ((14, None), (12, "of 6 channels whose importance is 0, 2 went, and which is arbitrary"),
                       (8, None), (7, None)):
        result = fastscore.prune(model, scores, x[:1], channels=left / 14, progress=False)
        note = result.report.notes.get("ties")
        assert (note is None) if said is None else said in note
        assert note is None or f"ties: {note}" in str(result.report)


def test_an_impossible_budget_still_leaves_one_channel_each() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=4 / 26)
    assert [row.channels[1] for row in result.report.groups] == [1] * 4
    assert result.model(x).isfinite().all()
    with untouched(model), pytest.raises(ValueError, match=r"^channels: 0.1 cannot be reached"):
        fastscore.prune(model, scores, x, channels=0.1)


class Halves(nn.Module):
    """Layers that make, or read, a half of the channels that a residual sum ties together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.cat([self.left(x), self.right(x)], 1)
        return self.head(x)


def test_a_layer_that_makes_a_part_of_the_channels_keeps_one() -> None:
    """However little that part matters: the channels of `right` matter least."""
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(2, 3, 4, 4)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["stem"]
    scores = dataclasses.replace(scores, totals={"stem": torch.arange(8.0, 0, -1, dtype=torch.float64)})
    for share in (0.5, 0.375, 0.25):
        pruned = fastscore.prune(model, scores, x, channels=share, compensate=False).model
        assert (pruned.stem.out_channels, pruned.right.out_channels) == (8 * share, 1)
        assert pruned(x).shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"channels: 0\.2 cannot be reached: .* 0\.25 of the channels remain"):
        fastscore.prune(model, scores, x, channels=0.2)


def test_a_report_says_that_biases_which_were_there_take_what_channels_gave() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(16, 6)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5)
    assert not torch.equal(result.model[2].bias, model[2].bias)
    assert not result.new_biases
    assert "removed channels: what they gave on average is in biases" in str(result.report)


def test_a_report_says_where_no_bias_takes_what_channels_gave() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32)).eval()
    batch = {"input_ids": torch.randint(40, (4, 8))}
    scores = fastscore.score(model, [batch], units="experts", forward=forward, progress=False)
    result = fastscore.prune(model, scores, batch, params=0.7, forward=forward)
    assert not result.new_biases
    assert "removed channels: read as zero (no bias can take what they gave on average)" in str(result.report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_stay_as_wide_as_their_product_takes_them(dtype: torch.dtype) -> None:
    """PyTorch's product of all experts at once takes rows of multiples of 16 bytes alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=30, num_local_experts=4, num_experts_per_tok=2)).to(dtype).eval()
    batch = {"input_ids": torch.randint(0, 30, (2, 5))}
    scores = fastscore.score(model, [batch], forward=forward, progress=False)
    for share in (0.9, 0.8):
        pruned = fastscore.prune(model, scores, batch, macs=share, forward=forward, compensate=False).model
        experts = pruned.model.layers[0].mlp.experts
        width = experts.down_proj.shape[-1]
        assert width < 32
        assert width * dtype.itemsize % 16 == 0
        assert experts.gate_up_proj.shape[1] == 2 * width
        assert forward(pruned, batch).isfinite().all()


def test_ignored_layers_keep_their_width() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    for ignore in (["stem.0"], "stem*", [model.stem[0]], [model.stem]):
        result = fastscore.prune(model, scores, x, params=0.5, ignore=ignore)
        assert width(result.model, "stem.0") == 6
        assert "stem.0" not in result.removed
        assert "ignored" in result.report.skipped["stem.0"]
    with untouched(model), pytest.raises(ValueError, match=r"^ignore: 'stem\.7' matches no layer.*stem\.0"):
        fastscore.prune(model, scores, x, params=0.5, ignore=["stem.7"])


def test_layers_without_a_score_are_left_alone() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], ignore=["block2.conv1"], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5)
    assert width(result.model, "block2.conv1") == 8
    assert "block2.conv1" in result.report.skipped


def test_in_place() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    apart = fastscore.prune(model, scores, x, macs=0.5)
    result = fastscore.prune(model, scores, x, macs=0.5, inplace=True)
    assert result.model is model
    assert torch.equal(model(x), apart.model(x))
    assert result.report == apart.report


def test_a_model_that_does_not_run_itself_is_said_to() -> None:
    """As mixtures of experts in float64, which multiply experts at once. No layer is named, as to ignore it would not
    help."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4)).double().eval()
    batch = {"input_ids": torch.randint(0, 20, (2, 4))}
    with pytest.raises(RuntimeError, match="Double"):
        model(**batch)
    scores = fastscore.score(model, [batch], forward=forward, progress=False)
    with untouched(model), pytest.raises(RuntimeError, match=r"Double.*\) by itself, with all its channels, too: give"):
        fastscore.prune(model, scores, batch, channels=0.5, compensate=False, forward=forward)


def test_prune_again_needs_new_scores_and_goes_on() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    once = fastscore.prune(model, scores, x, macs=0.7).model
    with untouched(once), pytest.raises(ValueError, match=r"^scores: .*pruned\?"):
        fastscore.prune(once, scores, x, macs=0.7)
    twice = fastscore.prune(once, fastscore.score(once, [x], progress=False), x, macs=0.7)
    assert twice.report.macs[1] / counted_macs(once, x) <= 0.7


def test_pruning_by_score_hurts_less_than_pruning_at_random() -> None:
    """Not proof of quality, but a sign that low means unimportant: the output changes less."""
    torch.manual_seed(0)
    model = randomize(Residual()).eval()
    x = RESIDUAL.inputs(64).float()
    with torch.no_grad():
        dense = model(x)
        errors = {}
        for importance in ("taylor-sq", "random"):
            scores = fastscore.score(model, [x], importance=importance, probes=8 if importance == "taylor-sq" else 1,
                                     progress=False)
            with fastscore.mask(model, scores, 0.3, x):
                errors[importance] = float((model(x) - dense).square().mean())
    assert errors["taylor-sq"] < errors["random"]


@pytest.mark.parametrize("family", ["densenet", "resnext", "efficientnet", "convnext", "mobilenet v3",
                                    *(["vgg", "mnasnet", "regnet"] if NIGHTLY else [])])
def test_thin_members_of_families(family: str) -> None:
    """Of which tests/guarantees/test_architectures.py takes a whole one with FASTSCORE_NIGHTLY=1 alone."""
    torch.manual_seed(0)
    model = randomize(THIN[family][0]()).train()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # which start near zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(torch.randn(8, 3, 32, 32))  # the statistics of a batch keep the signal alive down to the last layer
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        result = fastscore.prune(model, scores, x[:1], macs=0.6, compensate=False)
    assert 0.4 < result.report.macs[1] / result.report.macs[0] <= 0.6
    # consumers of the larger model that read the removed channels as zero compute what the smaller one does
    graph = trace(model, x[:1])
    handles = list(at_consumers(model, removed_positions(graph.groups, result.removed), {}))
    with torch.no_grad():
        masked = model(x)
        torch.testing.assert_close(result.model(x), masked, rtol=1e-3, atol=1e-4 * float(masked.abs().max()))
        for handle in handles:
            handle.remove()
        assert (model(x) - masked).abs().max() > 1e-3 * masked.abs().max()


class Spectra(nn.Module):
    """Whose channels lie among the samples while each is made a spectrum by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv1d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        spectra = torch.stft(x.flatten(0, 1), 8, window=torch.ones(8).to(x), return_complex=True).abs()
        return self.head(self.two(spectra.view(*x.shape[:2], *spectra.shape[1:])).relu().mean((2, 3)))


def test_scores_from_a_file_go_with_an_example_of_several_samples(tmp_path: Path) -> None:
    """score() traces with one sample; another process prunes with a batch, in which code is followed less far."""
    torch.manual_seed(0)
    model, x = Spectra().double().eval(), torch.randn(3, 1, 32, dtype=torch.float64)
    fastscore.score(model, [x], progress=False).save(tmp_path / "scores")
    model, scores = copy.deepcopy(model), fastscore.Scores.load(tmp_path / "scores")
    assert "one" in scores
    result = fastscore.prune(model, scores, x, channels=0.6, compensate=False, progress=False)
    gone = result.removed["one"]
    with torch.no_grad():
        for closed in (model.one.weight, model.one.bias):
            closed[gone] = 0
        fewer = {name: parameter.clone() for name, parameter in model.named_parameters()}
        fewer["head.weight"][:, result.removed.get("two", [])] = 0
        torch.testing.assert_close(result.model(x), torch.func.functional_call(model, fewer, (x,)))
