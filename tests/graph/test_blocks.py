"""Residual branches that go whole: found, scored by one gate each, chosen with channels under one budget, removed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from oracles import untouched
from torch import Tensor, nn
from torchvision.models import VisionTransformer, convnext, efficientnet, mobilenetv2, resnet, swin_transformer

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.modules.zero_branch import ZeroBranch
from fastscore.pruning.budgets.costs import total_macs

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 20,
         "max_position_embeddings": 16}


class Steps(nn.Module):
    """Branches that add, under a scale of their own; one that multiplies; and one whose input is another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.one, self.two, self.times, self.other = (
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(4))
        self.scale = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.embed(x), self.embed(x.flip(1))
        x = x + self.one(x)
        x = x + self.scale * self.two(x)
        x = x * self.times(x)
        return self.head((x + self.other(y)).tanh())


def _images(*blocks: nn.Module, width: int = 8, last: bool = False) -> nn.Module:
    """Blocks of images of 8 channels between a stem and a head; last: on [N, H, W, C]."""
    turn = [Turn()] if last else []
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *turn, *blocks, *turn,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


class Turn(nn.Module):
    """[N, C, H, W] -> [N, H, W, C], and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if x.shape[1] == 8 else x.movedim(-1, 1)


def _resnet() -> tuple[nn.Module, list[str]]:
    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    return _images(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 12, 2, down), resnet.Bottleneck(12, 3),
                   timm.models.resnet.Bottleneck(12, 3), width=12), ["3", "4", "5", "6"]


def _mobile() -> tuple[nn.Module, list[str]]:
    config = efficientnet.MBConvConfig(2, 3, 1, 8, 8, 1)
    se = timm.layers.SqueezeExcite
    return _images(mobilenetv2.InvertedResidual(8, 8, 1, 2), mobilenetv2.InvertedResidual(8, 8, 2, 2),
                   efficientnet.MBConv(config, 0.0, nn.BatchNorm2d),
                   timm.models._efficientnet_blocks.InvertedResidual(8, 8, exp_ratio=2.0, se_layer=se),
                   convnext.CNBlock(8, 0.5, 0.0), timm.models.convnext.ConvNeXtBlock(8),
                   transformers.models.convnext.modeling_convnext.ConvNextLayer(transformers.ConvNextConfig(), 8)
                   ), ["3.conv", "5.block", "6", "7.block", "8", "9"]


def _swin() -> tuple[nn.Module, list[str]]:
    sizes: dict[str, Any] = {"dim": 8, "num_heads": 2, "window_size": [4, 4], "shift_size": [2, 2], "mlp_ratio": 2.0}
    return _images(swin_transformer.SwinTransformerBlock(**sizes), swin_transformer.SwinTransformerBlockV2(**sizes),
                   last=True), [f"{i}.{part}" for i in (4, 5) for part in ("attn", "mlp")]


IMAGES = {"ResNet": _resnet, "MobileNet, ConvNeXt": _mobile, "Swin": _swin}


def _run(model: nn.Module, batch: Any) -> Tensor:
    return forward(model, batch) if isinstance(batch, dict) else model(batch)


def _case(name: str) -> tuple[nn.Module, Any, list[str]]:
    """(model in float64, batch, its branches)"""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "steps":
            model, batch, found = Steps(), torch.randn(3, 4, 5, generator=generator).double(), ["one", "two"]
        elif name == "ViT":
            model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
                                                  num_classes=3, mlp_ratio=2, init_values=0.5)
            batch = torch.randn(3, 3, 16, 16, generator=generator).double()
            found = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
        elif name in IMAGES:
            model, found = IMAGES[name]()
            batch = torch.randn(3, 3, 8, 8, generator=generator).double()
        elif name == "BERT":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES | {
                "num_hidden_layers": 2}))
            batch = {"input_ids": torch.randint(0, 20, (3, 5), generator=generator)}
            found = ["bert.encoder.layer.0", "bert.encoder.layer.1.attention", "bert.encoder.layer.1"]
        else:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8))
            batch = {"input_ids": torch.randint(0, 20, (3, 5), generator=generator)}
            # the cache of a decoder is as long as the keys of its first layer
            found = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")][1:]
        model = model.double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, batch, found


CASES = ("steps", "ViT", "Qwen3", "BERT", *IMAGES)


def _last(model: nn.Module, branch: str, batch: Any) -> str:
    """The module whose output is what a branch adds."""
    group = next(group for group in trace(model, batch, _run, units="blocks").blocks if group.name == branch)
    return next(group.role("branch")).layer


def _gated(model: nn.Module, branch: str, batch: Any, gate: Tensor) -> Tensor:
    last, model = _last(model, branch, batch), copy.deepcopy(model)

    def multiply(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = first * gate.view(-1, *[1] * (first.dim() - 1))
        return (first, *output[1:]) if isinstance(output, tuple) else first

    model.get_submodule(last).register_forward_hook(multiply)
    return _run(model, batch)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_gate(name: str) -> None:
    model, batch, found = _case(name)
    with untouched(model):
        graph = trace(model, batch, _run, units="blocks")
        assert [group.name for group in graph.blocks] == found
        with torch.no_grad():
            z = _run(model, batch)
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
        scores = fastscore.score(model, [batch], units="blocks", gradient="loss", normalize=False, forward=_run,
                                 loss=lambda output, _: (output * v).sum(), progress=False)
        assert not set(found) & set(fastscore.score(model, [batch], forward=_run, progress=False))
    told_apart = {group.name for group in (*graph.groups, *graph.blocks)} - scores.skipped.keys()
    assert set(scores) == told_apart >= set(found)
    for branch in found:
        gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
        (s,) = torch.autograd.grad((_gated(model, branch, batch, gate) * v).sum(), gate)
        torch.testing.assert_close(scores[branch].double(), s.square().mean()[None], rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("name", CASES)
def test_branches_go_with_channels_under_one_budget(name: str, tmp_path: Path) -> None:
    model, batch, found = _case(name)
    scores = fastscore.score(model, [batch], units="blocks", forward=_run, progress=False)
    scores = replace(scores, totals={group: total * (1e-6 if group in found else 1)  # so that some go
                                     for group, total in scores.totals.items()})
    with untouched(model):
        for unit, share in (("macs", 0.6), ("params", 0.7)):
            result = fastscore.prune(model, scores, batch, forward=_run, compensate=False, **{unit: share})
            before, after = getattr(result.report, unit)
            assert share * before >= after
            assert sum(p.numel() for p in result.model.parameters()) == result.report.params[1]
            assert total_macs(result.model, batch, _run) == result.report.macs[1]
        gone = [branch for branch in result.removed if branch in found]
        assert gone
        lowest = min(found, key=lambda branch: float(scores[branch]))
        scores_of_one = replace(scores, totals={lowest: scores.totals[lowest]})
        single = fastscore.prune(model, scores_of_one, batch, forward=_run, params=0.99)
        assert list(single.removed) == [lowest]
        with torch.no_grad():
            want, got = _gated(model, lowest, batch, torch.zeros(3).double()), _run(single.model, batch)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            with fastscore.mask(model, scores_of_one, 0.99, batch, forward=_run):
                torch.testing.assert_close(_run(model, batch), want, rtol=1e-10, atol=1e-12)
    assert isinstance(single.model.get_submodule(_last(model, lowest, batch)), ZeroBranch)
    small = result.model
    with torch.no_grad():
        output = _run(small, batch)
    args, kwargs = ((), {**batch, "use_cache": False}) if isinstance(batch, dict) else ((batch,), {})
    exported = torch.export.export(small, args, kwargs).module()(*args, **kwargs)
    torch.testing.assert_close(exported if isinstance(exported, Tensor) else exported.logits, output)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(_case(name)[0], tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(_run(loaded, batch), output)
    optimizer = fastscore.rebuild_optimizer(torch.optim.SGD(model.parameters(), 1e-3), model, result)
    first = _run(small, batch).square().mean()
    first.backward()
    optimizer.step()
    assert _run(small, batch).square().mean() < first
    again = fastscore.score(small, [batch], units="blocks", forward=_run, progress=False)
    assert not set(gone) & set(again)


def _down(strided: int) -> nn.Module:
    """Blocks that change the size: torchvision's, timm's whose shortcut pools first, and one whose shortcut is larger
    than the branch, which is then none; strided: of the first."""
    down = nn.Sequential(nn.Conv2d(8, 12, 1, strided, bias=False), nn.BatchNorm2d(12))
    pool = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(12, 16, 1))
    large = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1))
    return _images(resnet.BasicBlock(8, 12, strided, down),
                   timm.models.resnet.Bottleneck(12, 4, 2, pool, attn_layer=timm.layers.SEModule),
                   resnet.BasicBlock(16, 16, 2, large), width=16)


@pytest.mark.parametrize("strided", [1, 2])
def test_where_a_shortcut_changes_the_shape_the_branch_goes_and_it_stays(strided: int, tmp_path: Path) -> None:
    """Zeros are of as many channels as it makes, also once these go, at once or later, and of images of any size."""
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _down(strided).double().eval()
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    model, x = build(), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    found = [name for name in scores if len(scores[name]) == 1]
    assert found == ["3", "4"]
    first = replace(scores, totals={name: scores.totals[name] * 1e-9 if name in found else scores.totals[name]
                                    for name in scores})
    result = fastscore.prune(model, first, x, channels=0.7, cost_aware=False, compensate=False, progress=False)
    assert set(found) < set(result.removed)
    assert not {"3.downsample.0", "4.downsample.1"} & {name for name, side in result.removed_indices if side == "block"}
    assert sum(p.numel() for p in result.model.parameters()) == result.report.params[1]
    assert total_macs(result.model, x) == result.report.macs[1]
    again = fastscore.score(result.model, [x], units="blocks", progress=False)
    twice = fastscore.prune(result.model, again, x, channels=0.7, compensate=False, progress=False)
    assert any(member.startswith("3.downsample") for member, _ in twice.removed_indices)
    for size in (16, 17, 23):
        y = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)).double()
        with torch.no_grad():
            with fastscore.mask(model, first, 0.3, x, compensate=False) as masked:
                assert {name: index.tolist() for name, index in masked.items()} == {
                    name: index.tolist() for name, index in result.removed.items()}
                torch.testing.assert_close(result.model(y), model(y), rtol=1e-10, atol=1e-12)
            with fastscore.mask(result.model, again, 0.3, x, compensate=False):
                torch.testing.assert_close(twice.model(y), result.model(y), rtol=1e-10, atol=1e-12)
    fastscore.save_pruned(twice, tmp_path / "twice.safetensors")
    loaded = fastscore.load_pruned(build(), tmp_path / "twice.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), twice.model(x))
        exported = torch.export.export(twice.model, (x,)).module()
        torch.testing.assert_close(exported(x), twice.model(x))


def test_a_branch_and_its_heads_have_names_of_their_own() -> None:
    """The heads of nn.MultiheadAttention are called as the module is, which is a branch."""
    torch.manual_seed(0)
    model, x = VisionTransformer(8, 4, 1, 3, 12, 8, num_classes=4).eval(), torch.randn(3, 3, 8, 8)
    nn.init.normal_(model.heads.head.weight)
    attention = "encoder.layers.encoder_layer_0.self_attention"
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    assert (len(scores[attention]), len(scores[f"{attention} (whole)"])) == (12, 1)
    for name in (attention, f"{attention} (whole)"):
        least = replace(scores, totals={other: total * (other != name) for other, total in scores.totals.items()})
        result = fastscore.prune(model, least, x, channels=0.8, compensate=False)
        assert name in result.removed
        with torch.no_grad(), fastscore.mask(model, least, 0.2, x, compensate=False):
            torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("last", [False, True])
def test_a_branch_that_holds_a_group_norm_is_masked(last: bool) -> None:
    """Also one that ends in it; with channels beside it that go, and without."""
    torch.manual_seed(0)
    branch = _Residual(nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 8, 1),
                       *[nn.GroupNorm(2, 8)] * last)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), branch, nn.Conv2d(8, 4, 1)).double().eval()
    x = torch.randn(3, 3, 6, 6).double()
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    whole = next(name for name in scores if len(scores[name]) == 1)
    first = replace(scores, totals={name: total * (1e-9 if name == whole else 1)
                                    for name, total in scores.totals.items()})
    found = []
    for share in (0.3, 0.6):
        gone = fastscore.prune(model, first, x, channels=1 - share, compensate=False, progress=False)
        with torch.no_grad(), fastscore.mask(model, first, share, x, compensate=False) as masked:
            assert set(masked) == set(gone.removed)
            torch.testing.assert_close(model(x), gone.model(x), rtol=1e-10, atol=1e-12)
        found.append(set(masked))
    assert found == [{whole}, {whole, "0"}]


class _Residual(nn.Sequential):
    """Its modules run one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _left(model: nn.Module) -> dict[str, int]:
    """What there still is of the channels of a stem and two blocks, and of the blocks."""
    made = {name: model.get_submodule(name) for name in ("0", "3.conv1", "4.conv1")}
    return {name: layer.out_channels if isinstance(layer, nn.Conv2d) else 0 for name, layer in made.items()} | {
        name: int(isinstance(model.get_submodule(f"{name}.conv2"), nn.Conv2d)) for name in ("3", "4")}


@pytest.mark.parametrize("budget", [{"channels": 0.8}, {"channels": 0.5}, {"macs": 0.4}])
def test_of_a_block_that_went_no_channel_remains(budget: dict[str, float]) -> None:
    torch.manual_seed(0)
    model, x = _images(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8)).eval(), torch.randn(3, 3, 8, 8)
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    scores = replace(scores, totals={name: total * (1e-9 if name == "4" else 1)
                                     for name, total in scores.totals.items()})
    with pytest.raises(ValueError, match=r'^scope: .*use scope="global"'):
        fastscore.prune(model, scores, x, scope="layer", **budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^scope: "), fastscore.mask(model, scores, 0.3, x, scope="layer"):
        pass
    result = fastscore.prune(model, scores, x, **budget)  # type: ignore[arg-type]
    report, left, dense = result.report, _left(result.model), _left(model)
    assert left["4.conv1"] == left["4"] == 0
    assert {row.layer: row.channels for row in report.groups} == {name: (dense[name], left[name]) for name in dense}
    assert report.channels == (sum(dense.values()), sum(left.values()))
    assert sum(left.values()) <= budget.get("channels", 1.0) * sum(dense.values())
    assert budget != {"channels": 0.8} or sum(left.values()) == 17  # of 26, nothing but the block had to go: 8 + 1
    assert f"{report.channels[1] / report.channels[0]:.1%} of the channels" in report.kept_notes["remains"]
    assert "channels left" not in str(report)


def test_steps_count_what_remains_without_a_block() -> None:
    torch.manual_seed(0)
    model, x = _images(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8)).eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        model[4].bn2.weight.mul_(1e-6)
    result = fastscore.prune_iteratively(model, [x], steps=2, channels=0.4, units="blocks", progress=False)
    assert result.report.channels == (sum(_left(model).values()), sum(_left(result.model).values()))
    assert 0.3 < result.report.channels[1] / result.report.channels[0] <= 0.4


def test_generation_with_and_without_a_cache_is_the_same() -> None:
    """Without channels of the stream, heads and branches."""
    model, batch, _ = _case("Qwen3")
    model = model.float()
    scores = fastscore.score(model, [batch], units="blocks", forward=forward, progress=False)
    small = fastscore.prune(model, scores, batch, forward=forward, macs=0.6).model
    assert small.model.embed_tokens.embedding_dim < SIZES["hidden_size"] or any(
        isinstance(module, ZeroBranch) for module in small.modules())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = [small.generate(batch["input_ids"], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)


def test_what_is_ignored_within_a_branch_keeps_it() -> None:
    model, batch, _ = _case("steps")
    scores = fastscore.score(model, [batch], units="blocks", ignore=["two.1"], progress=False)
    assert "one" in scores
    assert "ignored" in scores.skipped["two"]


@pytest.mark.parametrize(("options", "said"), [({"importance": "magnitude-l2"}, "blocks"),
                                               ({"ablation": "mean"}, "ablation")])
def test_importances_that_say_nothing_of_a_branch(options: dict[str, str], said: str) -> None:
    model, batch, _ = _case("steps")
    with pytest.raises(ValueError, match=rf"^units: .*{said}"):
        fastscore.score(model, [batch], units="blocks", progress=False, **options)


class Crossed(nn.Module):
    """Attention to a memory, which its module takes first, or second."""

    def __init__(self, memory_first: bool) -> None:
        super().__init__()
        self.embed, self.source, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.cross, self.memory_first = _Cross(), memory_first

    def forward(self, x: Tensor) -> Tensor:
        memory, x = self.source(x), self.embed(x)
        return self.head(x + (self.cross(memory, x) if self.memory_first else self.cross(x, memory)))


class _Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out((self.query(x) @ self.key(memory).mT).softmax(-1) @ self.query(memory))


@pytest.mark.parametrize(("memory_first", "found"), [(False, ["cross"]), (True, [])])
def test_zeros_are_as_long_as_the_stream_and_not_as_a_memory(memory_first: bool, found: list[str]) -> None:
    graph = trace(Crossed(memory_first).eval(), torch.randn(2, 4, 5), units="blocks")
    assert [group.name for group in graph.blocks] == found


class Deep(nn.Module):
    """Sixteen branches, of which the code reads one elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(16))
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.branches[5][0].in_features
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def test_one_that_stays_is_found_by_halves() -> None:
    runs = 0

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return model(batch)

    model, x = Deep().eval(), torch.randn(2, 4)
    trace(model, x, run)
    plain, runs = runs, 0
    found = trace(model, x, run, units="blocks").blocks
    assert [group.name for group in found] == [f"branches.{i}" for i in range(16) if i != 5]
    assert runs - plain < 2 * 16
