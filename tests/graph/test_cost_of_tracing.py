"""What a trace computes, in forward passes; and that what it leaves out shows nothing else.

Of ten families; FASTSCORE_NIGHTLY=1 takes more.
"""

import cProfile
import pstats
from collections.abc import Callable, Mapping
from typing import Any

import diffusers_models
import pytest
import torch
import torch.nn.functional as F
import transformers_models
from model_case import Case
from thinned import NIGHTLY
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastscore.graph.heads import attention, head_numbers, heads_by_use
from fastscore.graph.tracing import trace
from fastscore.graph.trials import known_samples, surgery_trial
from fastscore.graph.trials.trial_inputs import batch_of
from fastscore.modules.macs.counting import count
from fastscore.modules.macs.mac_formulas import formulas
from fastscore.modules.sample_axis import SampleAxis
from fastscore.modules.weights import own_layers


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here stand for large ones, whose layers take longer than to find that they need not run."""
    for floor in ("_LEAST", "_EACH"):
        monkeypatch.setattr(known_samples, floor, 0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.inner, self.outer, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        return self.head((y + self.outer(self.inner(y).relu())).mean((2, 3)))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


@pytest.mark.parametrize(("build", "x"), [(Residual, torch.ones(1, 3, 16, 16)), (encoder, torch.randn(1, 5, 8))])
@pytest.mark.parametrize("samples", [1, 8])
def test_a_trace_multiplies_less_than_in_six_passes(build: Callable[[], nn.Module], x: Tensor, samples: int) -> None:
    """However many samples there are beside the example."""
    model = build().eval()
    with FlopCounterMode(display=False) as traced:
        found = trace(model, x, samples=torch.cat([x, torch.randn(samples - 1, *x.shape[1:])]))
    assert found.groups
    assert not found.samples.together
    assert traced.get_total_flops() < 6 * 2 * count(model, x).macs


FAMILIES = {f"transformers:{name}": 10.0 for name in (
    "LlamaForCausalLM", "BertForSequenceClassification", "SwinForImageClassification")}
FAMILIES |= {"diffusers:SD3Transformer2DModel": 10.0}
if NIGHTLY:
    FAMILIES |= {f"transformers:{name}": 10.0 for name in (
        "T5ForConditionalGeneration", "Dinov2ForImageClassification", "MobileNetV2ForImageClassification",
        "WhisperForConditionalGeneration", "MixtralForCausalLM")}
    FAMILIES |= {"diffusers:UNet2DConditionModel": 6.0}
# of one sample: whose code decides by its batch, or reads weights itself; of classes of their own, with parameters met
# in training, outputs that are written to, grouped convolutions, groups that are refused
OF_ONE = {f"transformers:{name}": passes for name, passes in {
    "RobertaForSequenceClassification": 6.4, "MixtralForCausalLM": 7.3, "MambaForCausalLM": 6.0,
    "FalconForCausalLM": 9.3, "Swinv2ForImageClassification": 9.2, "GptOssForCausalLM": 9.8}.items()}
if NIGHTLY:
    OF_ONE |= {f"transformers:{name}": passes for name, passes in {
        "MPNetForSequenceClassification": 9.2, "SegformerForSemanticSegmentation": 7.6,
        "Wav2Vec2ForSequenceClassification": 9.7}.items()}


def counting() -> FlopCounterMode:
    """With products of experts, and attention, that PyTorch's own formulas leave out."""
    return FlopCounterMode(display=False, custom_mapping=formulas())


def passes(case: Case, size: int) -> float:
    """What a trace multiplies, in forward passes of one sample."""
    pytest.importorskip(case.library)
    torch.manual_seed(0)
    model, samples = case.make().eval(), batch_of(case.inputs(8), size)
    x = batch_of(samples, 1)
    with counting() as once, torch.no_grad():
        case.forward(model, x)
    with counting() as traced:
        found = trace(model, x, case.forward, samples=samples)
    assert found.groups
    assert not found.samples.together
    return traced.get_total_flops() / once.get_total_flops()


def of(families: Mapping[str, float]) -> list[Case]:
    return [case for case in (*transformers_models.cases(), *diffusers_models.cases()) if case.name in families]


@pytest.mark.parametrize("case", of(FAMILIES), ids=lambda case: case.name)
def test_families_take_few_passes_however_many_samples_there_are(case: Case) -> None:
    """Also where no gradient comes to a layer, as to queries that SD3's last block makes of its text."""
    assert passes(case, 8) < FAMILIES[case.name]


@pytest.mark.parametrize("case", of(OF_ONE), ids=lambda case: case.name)
def test_families_take_few_passes_of_a_batch_of_one_sample(case: Case) -> None:
    assert passes(case, 1) < OF_ONE[case.name]


def test_what_a_trace_multiplies_does_not_grow_with_the_batch_where_code_decides_by_it_either() -> None:
    """A position that counts the tokens before it is told from the tokens, so that more is tried."""
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.places, self.head = nn.Embedding(9, 6), nn.Embedding(9, 6), nn.Linear(6, 3)
            self.inner = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(tokens) + self.places((tokens != 0).cumsum(1))).mean(1))

    costs = []
    for samples in (4, 32):
        model, tokens = Counts().eval(), torch.arange(4 * samples).view(samples, 4) % 9
        with FlopCounterMode(display=False) as traced:
            assert not trace(model, tokens[:1], samples=tokens).samples.together
        costs.append(traced.get_total_flops() / (2 * count(model, tokens[:1]).macs))
    assert costs[0] == costs[1] < 12


class Block(nn.Module):
    """Attention, of layers whose names are known, and two layers, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.num_heads = nn.LayerNorm(8), 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.cat([half.relu() for half in self.up(x).chunk(2, -1)], -1))


def cost_of(depth: int) -> tuple[int, int]:
    """Runs of a model of so many blocks while it is traced, and functions called."""
    torch.manual_seed(0)
    model, runs = nn.Sequential(*(Block() for _ in range(depth))).eval(), 0

    def forward(model: nn.Module, x: Tensor) -> Any:
        nonlocal runs
        runs += 1
        return model(x)

    with cProfile.Profile() as profile:
        found = trace(model, torch.randn(1, 5, 8), forward, units=("blocks", "heads_and_dims"))
    assert len(found.groups) == len(found.blocks) + 1 == 2 * depth
    return runs, sum(calls for _, calls, *_ in pstats.Stats(profile).stats.values())


def test_a_deeper_model_takes_as_many_runs_and_each_block_as_much_as_the_first() -> None:
    cost_of(1)  # source files are read once
    costs = [cost_of(depth) for depth in (2, 4, 8)]
    assert {runs for runs, _ in costs} == {19}
    (_, few), (_, more), (_, most) = costs
    assert most - more < 1.03 * 2 * (more - few)


def test_attentions_that_are_built_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, one = [], attention.difference
    monkeypatch.setattr(attention, "difference", lambda module, *args, **kwargs: tried.append(module) or
                        one(module, *args, **kwargs))
    blocks = [Block() for _ in range(4)]
    blocks[2].num_heads = 1  # says so, and has two
    found = trace(nn.Sequential(*blocks, nn.Linear(8, 3)).eval(), torch.randn(1, 5, 8))
    assert len(tried) <= 2
    assert {group.name for group in found.groups if any(group.role("heads"))} == {
        f"{number}.q_proj" for number in (0, 1, 3)}


class Turned(nn.Linear):
    """Multiplies by the weight as it turns it, which makes no product of activations."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Numbered(nn.Module):
    """A layer of its own class in a block that holds its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.up, self.down = number, Turned(8, 12), Turned(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.unflatten(-1, (2, 4)).flatten(-2)).unflatten(-1, (3, 4)).relu().flatten(-2))


def test_layers_that_turn_their_weights_are_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_by_use, "find", lambda module, *args: pytest.fail(type(module).__name__))
    model = nn.Sequential(*(Numbered(number) for number in range(3)), nn.Linear(8, 3)).eval()
    found = trace(model, torch.randn(1, 5, 8))
    assert all("a view divides" in found.skipped[f"{number}.up"] for number in range(3))


def test_layers_of_a_class_of_its_own_take_few_passes_more() -> None:
    model = nn.Sequential(Turned(32, 48), nn.ReLU(), Turned(48, 48), nn.ReLU(), nn.Linear(48, 3)).eval()
    x = torch.randn(1, 64, 32)
    with FlopCounterMode(display=False) as traced:
        found = trace(model, x)
    assert [group.name for group in found.groups] == ["0", "2"]
    assert traced.get_total_flops() < 10 * 2 * count(model, x).macs


class Safe(nn.Conv3d):
    """PyTorch's, by way of code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.numel() < 10 ** 9 else torch.cat([super().forward(part) for part in x])


class OfTuples(nn.Module):
    """A convolution whose settings are tuples."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel, kernel)), \
            (1, 1, 1), (kernel // 2,) * 3

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight, None, self.stride, self.padding)


@pytest.mark.parametrize(("kind", "most"), [(Safe, 0), (OfTuples, 2)])
def test_convolutions_of_a_class_of_its_own_are_tried_once(kind: Callable[[int, int, int], nn.Module], most: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """However many copies there are; those that PyTorch's own code runs not at all."""
    tried, convolution = [], own_layers._convolution
    monkeypatch.setattr(own_layers, "_convolution", lambda *args: tried.append(args) or convolution(*args))
    model = nn.Sequential(kind(3, 5, 1), kind(5, 5, 1), nn.ReLU(), kind(5, 5, 1), kind(5, 5, 1), nn.Flatten(),
                          nn.Linear(40, 3)).eval()
    assert [group.name for group in trace(model, torch.randn(1, 3, 2, 2, 2)).groups] == ["0", "1", "3", "4"]
    assert len(tried) == most


WIDTH = 12


class Narrow(nn.Module):
    """Runs with as many channels inside as it was made with, where `fixed`."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.up, self.down, self.fixed = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8), fixed

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        return x + self.down(y.view(-1, WIDTH) if self.fixed else y)


def test_a_group_that_does_not_go_is_looked_for_first_where_the_model_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, one = [], surgery_trial._try
    monkeypatch.setattr(surgery_trial, "_try", lambda recording, groups: tried.append(len(groups)) or one(
        recording, groups))
    found = trace(nn.Sequential(*(Narrow(number == 5) for number in range(8)), nn.Linear(8, 3)), torch.randn(2, 8))
    assert [size for size in tried if size > 2] == [9, 8, 7]  # the stream is as wide as what the model reads
    assert "shape '[-1, 12]'" in found.skipped["5.up"]
    assert len(found.groups) == 7


def test_modules_that_differ_by_their_number_are_built_alike() -> None:
    blocks = [Numbered(number) for number in range(3)]
    numbers = head_numbers.numbering(blocks)
    assert numbers == {("", "layer_idx")}
    assert len({head_numbers.built(block, numbers) for block in blocks}) == 1
    assert len({head_numbers.built(block) for block in blocks}) == 3
    assert not head_numbers.numbering([Numbered(0), Numbered(4)])


class OneOtherwise(nn.Module):
    """Has no dimension of samples where there is one."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(6, 8), nn.Linear(8, 3), gain

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.squeeze(0) if len(x) == 1 else x).relu() * self.gain
        return self.second(y).view(len(x), -1, 3)


@pytest.mark.parametrize("gain", [1.0, 1e-30])
def test_what_the_quick_way_leaves_open_is_told_by_the_other(gain: float) -> None:
    found = trace(OneOtherwise(gain).eval(), torch.randn(1, 5, 6))
    assert found.samples.calls["second"] == (SampleAxis(0, 1, 1),)
