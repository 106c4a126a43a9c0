"""What remains where residual branches went, and branches that stay."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from residual_networks import SIZES, case, of_images
from torch import Tensor, nn
from torchvision.models import resnet

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.modules.zero_branch import ZeroBranch


def _left(model: nn.Module) -> dict[str, int]:
    """What there still is of the channels of a stem and two blocks, and of the blocks."""
    made = {name: model.get_submodule(name) for name in ("0", "3.conv1", "4.conv1")}
    return {name: layer.out_channels if isinstance(layer, nn.Conv2d) else 0 for name, layer in made.items()} | {
        name: int(isinstance(model.get_submodule(f"{name}.conv2"), nn.Conv2d)) for name in ("3", "4")}


@pytest.mark.parametrize("budget", [{"channels": 0.8}, {"channels": 0.5}, {"macs": 0.4}])
def test_of_a_block_that_went_no_channel_remains(budget: dict[str, float]) -> None:
    torch.manual_seed(0)
    model, x = of_images(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8)).eval(), torch.randn(3, 3, 8, 8)
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
    model, x = of_images(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8)).eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        model[4].bn2.weight.mul_(1e-6)
    result = fastscore.prune_iteratively(model, [x], steps=2, channels=0.4, units="blocks", progress=False)
    assert result.report.channels == (sum(_left(model).values()), sum(_left(result.model).values()))
    assert 0.3 < result.report.channels[1] / result.report.channels[0] <= 0.4


def test_generation_with_and_without_a_cache_is_the_same() -> None:
    """Without channels of the stream, heads and branches."""
    model, batch, _ = case("Qwen3")
    model = model.float()
    scores = fastscore.score(model, [batch], units="blocks", forward=forward, progress=False)
    small = fastscore.prune(model, scores, batch, forward=forward, macs=0.6).model
    assert small.model.embed_tokens.embedding_dim < SIZES["hidden_size"] or any(
        isinstance(module, ZeroBranch) for module in small.modules())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = [small.generate(batch["input_ids"], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)


def test_what_is_ignored_within_a_branch_keeps_it() -> None:
    model, batch, _ = case("steps")
    scores = fastscore.score(model, [batch], units="blocks", ignore=["two.1"], progress=False)
    assert "one" in scores
    assert "ignored" in scores.skipped["two"]


@pytest.mark.parametrize(("options", "said"), [({"importance": "magnitude-l2"}, "blocks"),
                                               ({"ablation": "mean"}, "ablation")])
def test_importances_that_say_nothing_of_a_branch(options: dict[str, str], said: str) -> None:
    model, batch, _ = case("steps")
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


class Kept(nn.Module):
    """A branch for each reason to stay, and one that goes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bent, self.norm = nn.Linear(5, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        self.goes, self.twice, self.one, self.inner, self.told = (
            nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))
        self.source, self.cross = nn.Linear(5, 8), _Cross()
        self.inner[0].weight = self.one[0].weight

    def forward(self, x: Tensor) -> Tensor:
        memory, x = self.source(x), self.embed(x)
        x = x + self.goes(x)
        x = x + self.bent(x).relu()
        x = x + self.norm(x)
        x = x + self.twice(x)
        x = x + 0.5 * self.twice(x)
        x = x + self.one(x) + self.inner(x).flip(-1)
        x = x + self.cross(memory, x)
        x = x + self.told(x) / self.told[0].in_features
        return self.head(x)


def test_each_branch_that_stays_says_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Kept().eval(), torch.randn(2, 4, 5)
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    assert [name for name in scores if len(scores[name]) == 1] == ["goes"]
    ending = " (whole branch)"
    kept = {name.removesuffix(ending): why for name, why in scores.skipped.items() if name.endswith(ending)}
    assert kept == {
        "bent": "what it returns goes through Relu in the code around it before it is added",
        "norm": "its modules hold no weights but those of normalisations",
        "twice": "it runs 2 times",
        "one": "other modules hold weights of it, too",
        "inner": "what it returns goes through Flip in the code around it before it is added",
        "cross": "its modules read more than the stream that it is added to",
        "told": "Kept does not run without it (TypeError: 'ZeroBranch' object is not subscriptable)"}
    scores.save(tmp_path / "s.safetensors")
    again = fastscore.Scores.load(tmp_path / "s.safetensors")
    for name, why in kept.items():
        assert str(again).count(f"{name}{ending}: kept ({why})") == 1
    assert not [name for name in fastscore.score(model, [x], progress=False).skipped if name.endswith(ending)]
    result = fastscore.prune(model, scores, x, channels=0.9)
    assert {name: result.report.skipped[f"{name}{ending}"] for name in kept} == kept
