"""What a trace computes, in forward passes; and that what it leaves out shows nothing else."""

import copy
import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import diffusers_models
import pytest
import torch
import torch.nn.functional as F
import transformers_models
from model_case import Case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastscore.graph import attention, head_numbers, heads_by_use
from fastscore.graph.tracing import trace
from fastscore.graph.trials import surgery_trial
from fastscore.graph.trials.plain_layers import holds_rest, is_product
from fastscore.graph.trials.row_gradients import rows_alone, rows_shown
from fastscore.graph.trials.trial_inputs import batch_of
from fastscore.modules.macs.counting import count
from fastscore.modules.macs.mac_formulas import formulas
from fastscore.modules.sample_axis import SampleAxis
from fastscore.modules.weights.experts import ExpertLinear


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
def test_a_trace_multiplies_less_than_in_eight_passes(build: Callable[[], nn.Module], x: Tensor, samples: int) -> None:
    """However many samples there are beside the example."""
    model = build().eval()
    with FlopCounterMode(display=False) as traced:
        found = trace(model, x, samples=torch.cat([x, torch.randn(samples - 1, *x.shape[1:])]))
    assert found.groups
    assert not found.samples.together
    assert traced.get_total_flops() < 8 * 2 * count(model, x).macs


FAMILIES = {f"transformers:{name}": 10 for name in (
    "LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration",
    "BertForSequenceClassification", "SwinForImageClassification", "Dinov2ForImageClassification",
    "MobileNetV2ForImageClassification")}
FAMILIES |= {"diffusers:UNet2DConditionModel": 10, "diffusers:SD3Transformer2DModel": 10}
FAMILIES |= {"transformers:RobertaForSequenceClassification": 21, "transformers:MixtralForCausalLM": 22}


def counting() -> FlopCounterMode:
    """With products of experts, and attention, that PyTorch's own formulas leave out."""
    return FlopCounterMode(display=False, custom_mapping=formulas())


@pytest.mark.parametrize("case", [case for case in (*transformers_models.cases(), *diffusers_models.cases())
                                  if case.name in FAMILIES], ids=lambda case: case.name)
def test_families_take_few_passes_however_many_samples_there_are(case: Case) -> None:
    """Also where no gradient comes to a layer, as to queries that SD3's last block makes of its text; more where code
    decides by its batch."""
    pytest.importorskip(case.library)
    torch.manual_seed(0)
    model, samples = case.make().eval(), case.inputs(8)
    x = batch_of(samples, 1)
    with counting() as once, torch.no_grad():
        case.forward(model, x)
    with counting() as traced:
        found = trace(model, x, case.forward, samples=samples)
    assert found.groups
    assert not found.samples.together
    assert traced.get_total_flops() < FAMILIES[case.name] * once.get_total_flops()


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
    assert costs[0] == costs[1] < 27


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
    costs = [cost_of(depth) for depth in (3, 6, 12)]
    assert len({runs for runs, _ in costs}) == 1
    (_, few), (_, more), (_, most) = costs
    assert most - more < 1.03 * 2 * (more - few)


LAYERS = [
    (nn.Linear(5, 3), (3, 4, 5)),
    (nn.Conv1d(4, 3, 3, stride=2), (3, 4, 12)),
    (nn.Conv2d(4, 3, (3, 2), stride=(2, 3), padding=(2, 0), dilation=(2, 1)), (3, 4, 13, 11)),
    (nn.Conv2d(4, 1, 2, stride=3), (3, 4, 10, 9)),
    (nn.Conv3d(2, 3, 2, padding=1), (3, 2, 4, 3, 5)),
    (nn.Conv2d(4, 4, 3, groups=2), (3, 4, 5, 5)),
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


def test_attentions_that_are_built_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, one = [], attention.difference
    monkeypatch.setattr(attention, "difference", lambda module, *args: tried.append(module) or one(module, *args))
    blocks = [Block() for _ in range(4)]
    blocks[2].num_heads = 1  # says so, and has two
    found = trace(nn.Sequential(*blocks, nn.Linear(8, 3)).eval(), torch.randn(1, 5, 8))
    assert len(tried) <= 2
    assert {group.name for group in found.groups if any(group.role("heads"))} == {
        f"{number}.q_proj" for number in (0, 1, 3)}


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


def cut(layer: Any, ins: Tensor, outs: Tensor) -> Any:
    small = copy.deepcopy(layer)
    small.weight = nn.Parameter(layer.weight[outs][:, ins].clone())
    small.bias = nn.Parameter(layer.bias[outs].clone())
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    for name, kept in zip(names, (ins, outs), strict=True):
        setattr(small, name, len(kept))
    return small


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 2)])
def test_a_smaller_layer_holds_the_rest_or_is_run(layer: Any) -> None:
    gone_in, gone_out = torch.tensor([0, 3]), torch.tensor([2])
    ins, outs = torch.tensor([1, 2, 4]), torch.tensor([0, 1, 3])
    small = cut(layer, ins, outs)
    assert holds_rest(small, layer, gone_in, gone_out)
    assert not holds_rest(small, layer, torch.tensor([0, 2]), gone_out)
    assert not holds_rest(small, layer, gone_in, torch.tensor([1]))
    assert not holds_rest(small, layer, gone_in, None)
    small.bias.data += 1
    assert not holds_rest(small, layer, gone_in, gone_out)
    small = cut(layer, ins, outs)
    small.own = 1
    assert not holds_rest(small, layer, gone_in, gone_out)

    class Own(type(layer)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    small, layer = cut(layer, ins, outs), copy.deepcopy(layer)
    small.__class__ = layer.__class__ = Own
    assert not holds_rest(small, layer, gone_in, gone_out)


def test_fewer_channels_of_experts_hold_the_rest() -> None:
    def experts(weight: Tensor, bias: Tensor) -> ExpertLinear:
        return ExpertLinear(nn.ParameterDict({"up": weight, "up_bias": bias}), "up", "up_bias")

    weight, bias = torch.randn(2, 4, 5), torch.randn(2, 4)
    gone_in, gone_out = torch.tensor([0, 3]), torch.tensor([2])
    ins, outs = torch.tensor([1, 2, 4]), torch.tensor([0, 1, 3])
    whole, small = experts(weight, bias), experts(weight[:, outs][:, :, ins], bias[:, outs])
    assert holds_rest(small, whole, gone_in, gone_out)
    assert not holds_rest(small, whole, torch.tensor([0, 2]), gone_out)
    assert not holds_rest(small, whole, gone_in, torch.tensor([1]))


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_linear_makes_is_the_product_that_it_holds_or_more(bias: bool) -> None:
    layer, x = nn.Linear(24, 16, bias=bias), torch.randn(3, 5, 24)
    made = layer(x)
    assert is_product(layer, x, made)
    for row in ((0, 0, 0), (2, 4, 15)):
        other = made.clone()
        other[row] += 1e-3 * made.abs().max()
        assert not is_product(layer, x, other)
    assert not is_product(layer, x, made.roll(1, -1))
    assert not is_product(layer, x, made.half())
    assert not is_product(layer, x, made[:2])
    gone_in, gone_out, ins, outs = torch.tensor([0, 3]), torch.tensor([2]), [1, 2, *range(4, 24)], [0, 1, *range(3, 16)]
    narrow = x[..., ins]
    rest = F.linear(narrow, layer.weight[outs][:, ins], layer.bias[outs] if bias else None)
    assert is_product(layer, narrow, rest, gone_in, gone_out)
    assert not is_product(layer, narrow, 1.001 * rest, gone_in, gone_out)


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
    assert traced.get_total_flops() < 12 * 2 * count(model, x).macs


class Narrow(nn.Module):
    """Runs with as many channels inside as it was made with, where `fixed`."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.up, self.down, self.fixed = nn.Linear(8, 12), nn.Linear(12, 8), fixed

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        return x + self.down(y.view(-1, 12) if self.fixed else y)


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
