"""Numbers for each channel in buffers: they go with their channels."""

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_way
from networks import randomize
from oracles import untouched
from timm.layers import BlurPool2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fastscore
from fastscore.graph.cutting import channel_buffers
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import Costs


class Scale(nn.Module):
    """A buffer of one number for each channel, along the last dimension, and one for all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 1, channels) + 0.5)
        self.register_buffer("steps", torch.tensor(3))
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] -> the same."""
        return x * self.scale


def frozen(channels: int) -> FrozenBatchNorm2d:
    """With statistics far from their defaults."""
    norm = FrozenBatchNorm2d(channels)
    for name, buffer in norm.named_buffers():
        nn.init.uniform_(buffer, 0.5, 1.5) if name != "running_mean" else nn.init.normal_(buffer)
    return norm


def images(norm: type | None = None, inplace: bool = False, **options: bool) -> nn.Sequential:
    """A convolution, the normalisation, another of each."""
    make = frozen if norm is None else lambda channels: norm(channels, **options)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make(8), nn.ReLU(inplace), nn.Conv2d(8, 6, 3, stride=2),
                         make(6), nn.LeakyReLU(0.1, inplace), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


MODELS = {
    "FrozenBatchNorm2d": (images, (3, 9, 9)),
    "InstanceNorm2d": (lambda: images(nn.InstanceNorm2d, affine=True, track_running_stats=True), (3, 9, 9)),
    "InstanceNorm2d without affine": (lambda: images(nn.InstanceNorm2d, track_running_stats=True), (3, 9, 9)),
    "InstanceNorm2d that a layer writes to": (lambda: images(nn.InstanceNorm2d, inplace=True, affine=True), (3, 9, 9)),
    "a scale of tokens": (lambda: nn.Sequential(nn.Linear(4, 7), Scale(7), nn.GELU(), nn.Linear(7, 5), Scale(5),
                                                nn.Flatten(), nn.Linear(30, 2)), (6, 4)),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_buffers_go_with_their_channels(name: str) -> None:
    """The smaller model computes what the masked one does, whatever goes; and again, from a file."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.InstanceNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model, x = randomize(model).eval(), torch.randn(3, *shape, dtype=torch.float64)
    with untouched(model):
        graph = trace(model, x)
    assert [group.name for group in graph.groups] == ["0", "3"], dict(graph.skipped)
    scores = fastscore.score(model, [x], progress=False)
    for share in (0.8, 0.5, 0.2):
        pruned = fastscore.prune(model, scores, x, channels=share, compensate=False)
        with torch.no_grad(), fastscore.mask(model, scores, 1 - share, x, compensate=False):
            torch.testing.assert_close(pruned.model(x), model(x))
        widths = {layer: len(index) for (layer, side), index in pruned.removed_indices.items() if side == "outputs"}
        assert {"0", "1"} <= set(widths) or {"3", "4"} <= set(widths)
        for layer, gone in widths.items():
            before, after = model.get_submodule(layer), pruned.model.get_submodule(layer)
            for key, buffer in before.named_buffers():
                expected = buffer.numel() - gone * (buffer.numel() > 1)
                assert after.get_buffer(key).numel() == expected
            if hasattr(before, "num_features"):
                assert after.num_features == before.num_features - gone


class Anchored(nn.Module):
    """Convolutions with anti-aliasing pools between them, one of which says how many channels it has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), BlurPool2d(8), nn.Conv2d(8, 6, 3), nn.ReLU(),
                                 BlurPool2d(stride=1), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))


def test_filters_of_anti_aliasing_pools_go_with_their_channels(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pool = whole_way.check(Anchored, x, ["net.0", "net.3"], tmp_path).model.net[2]
    assert (pool.channels, tuple(pool.filt.shape)) == (4, (4, 1, 3, 3))


class Blurred(nn.Module):
    """The published anti-aliasing pool, which holds its padding; it says how many channels there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.width, self.pad = channels, nn.ReflectionPad2d(1)
        self.register_buffer("filt", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).repeat(channels, 1, 1, 1) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(self.pad(x), self.filt, stride=2, groups=self.width)


def test_a_pool_that_holds_its_padding(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pool = whole_way.check(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Blurred(8), nn.Conv2d(8, 4, 1)), x,
                           ["0"], tmp_path).model[2]
    assert (pool.width, tuple(pool.filt.shape)) == (4, (4, 1, 3, 3))


class Looked(nn.Module):
    """Rows that are scaled where they are looked up, to a length over all channels, and for good."""

    def __init__(self, norm_type: float = 2.0, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(20, 12, max_norm=1.0, norm_type=norm_type), nn.Embedding(6, 12)
        self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 20 if tied else 4)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.places(torch.arange(x.shape[1]))
        return self.head((h + self.body(h.relu())).relu()).mean(1)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_rows_that_no_example_looked_up_are_scaled_over_all_channels(norm_type: float) -> None:
    torch.manual_seed(0)
    model, seen = Looked(norm_type).double().eval(), torch.randint(0, 5, (4, 6))
    with untouched(model):
        scores = fastscore.score(model, [seen], progress=False)
        result = fastscore.prune(model, scores, seen, channels=0.5, scope="layer", compensate=False)
    assert result.model.embed.weight.shape == (20, 6)
    unseen = torch.randint(5, 20, (4, 6))
    with torch.no_grad(), fastscore.mask(model, scores, result, seen, compensate=False):
        torch.testing.assert_close(result.model(unseen), model(unseen))


def test_a_head_that_reads_rows_before_they_are_scaled_keeps_them() -> None:
    graph = trace(Looked(tied=True).eval(), torch.randint(0, 20, (4, 6)))
    assert "scales rows of its weight when it runs (max_norm)" in graph.skipped["embed"]


def test_only_modules_with_one_number_for_each_channel_have_a_width() -> None:
    """Or a filter; and none that Torch-Pruning knows, that holds parameters or modules, or whose buffers differ."""
    def holding(*shapes: tuple[int, ...]) -> nn.Module:
        module = nn.Module()
        for number, shape in enumerate(shapes):
            module.register_buffer(str(number), torch.zeros(shape))
        return module

    assert channel_buffers.width(FrozenBatchNorm2d(5)) == 5
    assert channel_buffers.width(holding((4,), (1, 4, 1, 1), ())) == 4
    assert channel_buffers.width(holding((3, 1, 5, 5))) == 3
    for other in (holding(), holding(()), holding((4,), (5,)), holding((3, 2, 5, 5)), holding((4,), (2, 4)),
                  nn.BatchNorm2d(4), nn.Sequential(FrozenBatchNorm2d(4)), nn.Identity(), nn.Conv2d(1, 2, 3)):
        assert channel_buffers.width(other) is None
    learned = holding((4,))
    learned.weight = nn.Parameter(torch.zeros(4))
    assert channel_buffers.width(learned) is None


def test_a_table_along_another_dimension_is_no_table_of_channels() -> None:
    """Of as many numbers: a scale for each of seven tokens, and seven channels."""
    model = nn.Sequential(nn.Linear(4, 7), nn.Unflatten(2, (7, 1)), Tokens(7), nn.Flatten(2), nn.GELU(),
                          nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 2))
    graph = trace(model, torch.randn(2, 7, 4))
    assert [group.name for group in graph.groups] == ["5"]
    assert "0" in graph.skipped


class Tokens(nn.Module):
    """A number for each token of [N, T, C, 1]."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(tokens, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C, 1] -> the same."""
        return x * self.scale


def test_a_module_that_is_called_twice_is_left_alone() -> None:
    """By the trial: it could lose but one set of channels."""
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.norm = frozen(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.b(self.norm(self.a(x)).relu())).relu())

    model, x = Twice(), torch.randn(2, 3, 4, 4)
    graph = trace(model, x)
    assert not graph.groups
    assert all("norm (FrozenBatchNorm2d)" in graph.skipped[layer] for layer in "ab")


class Held(nn.Module):
    """[N, 5, 4] -> [N, 3]; a table that the model itself holds meets the first layer's eight channels as `meet` says.
    """

    def __init__(self, shape: tuple[int, ...], meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.meet = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3), meet
        self.register_buffer("table", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.meet(self.a(x), self.table).relu()).relu()).mean(1)


def written_to(h: Tensor, table: Tensor) -> Tensor:
    table.mul_(1.0)
    return h * table


HELD: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], int | str]] = {
    # shape of the table, how it meets the channels, the dimension that loses them or why none can go
    "positions": ((1, 10, 8), lambda h, table: h + table[:, :h.shape[1]], 2),
    "a scale": ((8,), lambda h, table: h * table, 0),
    "expanded": ((8,), lambda h, table: h * table[None, None].expand(len(h), h.shape[1], -1), 0),
    "twice over": ((4,), lambda h, table: h * torch.cat([table, table]), 0),
    "one for each token": ((5, 1), lambda h, table: h + table, -1),
    "rows that are picked": ((10, 8), lambda h, table: h + table[torch.arange(h.shape[1])], 1),
    "a projection": ((8, 8), lambda h, table: h @ table, "the tracer cannot follow its channels to b"),
    "written to": ((8,), written_to, r"does not run with fewer channels there \(Held: RuntimeError: The size"),
}


@pytest.mark.parametrize("name", HELD)
def test_tables_that_a_model_holds_lose_channels_or_keep_them_with_the_reason(name: str, tmp_path: Path) -> None:
    shape, meet, expected = HELD[name]
    torch.manual_seed(0)
    model, x = Held(shape, meet).double().eval(), torch.randn(3, 5, 4, dtype=torch.float64)
    with untouched(model) if name != "written to" else nullcontext():
        graph, scores = trace(model, x), fastscore.score(model, [x], progress=False)
    assert set(scores) == ({"b"} if isinstance(expected, str) else {"a", "b"})
    if isinstance(expected, str):
        assert re.search(expected, graph.skipped["a"])
    dense = Costs(model, graph.groups, x)
    for share in (0.7, 0.4):
        pruned = fastscore.prune(model, scores, x, channels=share, compensate=False)
        small: Any = pruned.model
        with torch.no_grad(), fastscore.mask(model, scores, 1 - share, x, compensate=False):
            torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)
        assert not isinstance(small.table, nn.Parameter)
        if isinstance(expected, int) and expected >= 0:
            assert small.table.shape[expected] == shape[expected] * small.a.out_features // 8
        else:
            assert small.table.shape == shape
        for group, channels in pruned.removed.items():
            dense.remove(group, channels.tolist())
        assert dense.totals["params"] == sum(parameter.numel() for parameter in small.parameters())
        for group, channels in pruned.removed.items():
            dense.restore(group, channels.tolist())
    fastscore.save_pruned(pruned, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(lambda: Held(shape, meet).double(), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(x), small(x))


class Chooses(nn.Module):
    """A buffer of a whole number, or a choice, for each channel."""

    def __init__(self, table: Tensor, meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.meet = meet
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.meet(x, self.table.view(1, -1, 1, 1))


@pytest.mark.parametrize(("table", "meet"), [
    (torch.arange(8), lambda x, t: x * t),
    (torch.arange(8).int(), lambda x, t: x + t),
    (torch.arange(8) > 3, lambda x, t: x.masked_fill(t, 0)),
    (torch.arange(8) > 3, lambda x, t: torch.where(t, x, x.sigmoid())),
], ids=["int64", "int32", "mask", "choice"])
def test_whole_numbers_and_choices_go_with_their_channels(table: Tensor, meet: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Chooses(table, meet), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["0"]
    small = fastscore.prune(model, scores, x, channels=0.5, compensate=False).model
    assert len(small[1].table) == 4
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, compensate=False):
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3), nn.Linear(4, 6), nn.BatchNorm1d(6),
                                   nn.LayerNorm(6), FrozenBatchNorm2d(6)])
def test_positions_may_be_a_tensor(layer: nn.Module) -> None:
    small, other = copy.deepcopy(layer), copy.deepcopy(layer)
    surgeon = channel_buffers.surgeon(layer)
    assert isinstance(surgeon, channel_buffers.TAKE_TENSORS)
    for each, gone in ((small, [0, 4]), (other, torch.tensor([0, 4]))):
        surgeon.prune_out_channels(each, gone)
    assert surgeon.get_out_channels(small) == surgeon.get_out_channels(other) == 4
    assert small.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in small.state_dict().items())
