"""Parameters that the code of a module reads itself go with the channels that they meet."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import whole_way
from timm.models.metaformer import Scale
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.norms.channel_norms import norm_of


class Block(nn.Module):
    """A ConvNeXt's block with a BatchNorm: its layer scale meets the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.up, self.down = nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 1)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.down(torch.relu(self.up(self.norm(self.depthwise(x)))))


class ConvNet(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4), nn.Sequential(Block(8), Block(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Patches(nn.Module):
    """Patches, a class token, positions and an affine for each residual branch, as ResMLP has them, without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.zeros(8))
        self.gains = nn.Parameter(torch.ones(2, 8))
        self.scalar = nn.Parameter(torch.ones(1))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed[:, :17]
        branch = self.down(torch.relu(self.up(torch.addcmul(self.beta, self.alpha, x)))) * self.scalar
        return self.head((x * self.gains[0] + branch * self.gains[1])[:, 0])


class Scales(nn.Module):
    """timm's own, which keeps the shape by which it meets an image, or tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.images, self.tokens, self.head = Scale(8), Scale(8, use_nchw=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.images(x) + self.down(torch.relu(self.up(x)))
        return self.head(self.tokens(x.flatten(2).mean(-1)))


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Tables(nn.Module):
    """Positions of which rows are picked, of parameters, and of embeddings that are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.positions, self.steps = nn.Embedding(20, 8), nn.Embedding(4, 8)
        self.rows, self.planes = nn.Parameter(torch.randn(20, 8)), nn.Parameter(torch.randn(2, 8, 20))
        self.register_buffer("places", torch.arange(16).flip(0) // 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.positions.weight[None, :x.shape[1]] + self.steps.weight[self.places % 4]
        x = x + self.rows[self.places]
        x = x + self.rows.index_select(0, self.places) * F.embedding(self.places + 4, self.rows)
        return self.head((x + self.planes[1, :, self.places].T).relu().mean(1))


class Resized(nn.Module):
    """Positions of a grid of 3 by 3, which code makes one of 4 by 4 of: by a matrix, as Siglip2 does, and by others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.positions = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5), nn.Embedding(9, 8)
        self.beside, self.above = nn.Embedding(9, 8), nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        near = (1 - (torch.linspace(0, 2, 4)[:, None] - torch.arange(3)).abs()).clamp(min=0).to(x)
        weights = (near[:, None, :, None] * near[None, :, None, :]).flatten(2).flatten(0, 1)
        grid = self.positions.weight.reshape(3, 3, -1)
        x = x + weights.expand(len(x), -1, -1) @ grid.reshape(-1, grid.shape[-1])
        x = x + torch.bmm(weights.expand(len(x), -1, -1), (self.beside.weight * 2).expand(len(x), -1, -1))
        return self.head((x * ((self.above + 1).mT @ weights.mT).mT).relu().mean(1))


@pytest.mark.parametrize(("build", "groups", "cut"), [
    (Resized, ["embed"], {"positions.weight": (9, 4), "beside.weight": (9, 4), "above": (9, 4)}),
    (Tables, ["embed"], {"positions.weight": (20, 4), "steps.weight": (4, 4), "rows": (20, 4), "planes": (2, 4, 20)}),
    (ConvNet, ["stem", "blocks.0.up", "blocks.1.up"],
     {"blocks.0.layer_scale": (4, 1, 1), "blocks.1.layer_scale": (4, 1, 1)}),
    (Patches, ["embed", "up"], {"cls_token": (1, 1, 4), "pos_embed": (1, 17, 4), "alpha": (1, 1, 4), "beta": (4,),
                                "gains": (2, 4), "scalar": (1,)}),
    (Scales, ["stem", "up"], {"images.scale": (4,), "tokens.scale": (4,)})])
def test_whole_way(build: type[nn.Module], groups: list[str], cut: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    result = whole_way.check(build, IMAGES, groups, tmp_path)
    parameters = dict(result.model.named_parameters())
    assert {name: tuple(parameters[name].shape) for name in cut} == cut


def test_layer_scales_that_hardly_show_are_followed_all_the_same() -> None:
    graph = trace(ConvNet().eval(), IMAGES.float())
    assert [group.name for group in graph.groups] == ["stem", "blocks.0.up", "blocks.1.up"]
    assert not {"blocks.0.layer_scale", "blocks.1.layer_scale"} & set(graph.skipped)


class Mixed(nn.Module):
    """What is computed from its parameter is multiplied as a matrix: each of its rows reads all channels."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.ones(8))
        if shared:
            self.other = nn.Module()
            self.other.gain = self.gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x) * self.gain
        return self.down(x if hasattr(self, "other") else x @ self.matrix.tanh())


@pytest.mark.parametrize(("shared", "reason"), [(False, "matrix"), (True, "gain is shared with another module")])
def test_others_are_kept_with_a_reason(shared: bool, reason: str) -> None:
    graph = trace(Mixed(shared).eval(), torch.randn(3, 6))
    assert not graph.groups
    assert reason in graph.skipped["up"]


def test_a_parameter_can_be_ignored_by_its_name() -> None:
    model = ConvNet().eval()
    graph = trace(model, IMAGES.float())
    for ignore in ("blocks.0.layer_scale", "blocks.0", "*.layer_scale"):
        left = graph.without(model, [ignore])
        assert "stem" not in {group.name for group in left.groups}
        assert left.skipped["stem"].startswith("ignored with")


class Normalised(nn.Module):
    """By the length of a parameter, or by a statistic of all activations at once."""

    def __init__(self, statistic: Callable[[Tensor], Tensor], of_parameter: bool) -> None:
        super().__init__()
        self.statistic, self.of_parameter = statistic, of_parameter
        self.up, self.down, self.gain = nn.Linear(6, 8), nn.Linear(8, 5), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x * self.gain / self.statistic(self.gain if self.of_parameter else x))


@pytest.mark.parametrize("of_parameter", [True, False])
@pytest.mark.parametrize("statistic", [torch.norm, torch.std, torch.amax])
def test_statistics_of_everything_run_over_channels(statistic: Callable[[Tensor], Tensor], of_parameter: bool) -> None:
    graph = trace(Normalised(statistic, of_parameter).eval(), torch.randn(3, 6))
    assert not graph.groups
    assert "runs over all its channels" in graph.skipped["up"]


class ReadElsewhere(nn.Module):
    """One number, made of a parameter or buffer that is cut with the channels, meets all of them."""

    def __init__(self, number: Callable[["ReadElsewhere"], Tensor]) -> None:
        super().__init__()
        self.number = number
        self.up, self.norm, self.down = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        self.gain, self.scale = nn.Parameter(torch.randn(8)), nn.PReLU(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)
        with torch.no_grad():
            self.scale.weight.copy_(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 5, H, W]."""
        return self.down(self.scale(self.norm(self.up(x))) * self.gain[:, None, None] * self.number(self))


@pytest.mark.parametrize("number", [
    lambda net: (net.gain[:, None] * net.gain[None, :])[0][:, None, None], lambda net: net.norm.running_mean[0],
    lambda net: net.norm.weight[-1] + net.norm.bias[-1], lambda net: net.scale.weight.max(),
    lambda net: net.up.bias[0], lambda net: net.up.weight.abs().max(), lambda net: net.down.weight.abs().max(),
    lambda net: net.gain.detach().abs().median(), lambda net: 1 + 1e-4 * net.norm.weight[0],
    lambda net: 1 + 1e-4 * net.norm.running_mean[0]],
    ids=["products", "a running mean", "a last entry", "the largest slope", "a bias", "the largest weight made with",
         "the largest weight read with", "a median", "a little of a weight", "a little of a mean"])
def test_what_is_cut_and_read_elsewhere_is_kept(number: Callable[[ReadElsewhere], Tensor]) -> None:
    """A value at a fixed entry, or of all entries, reaches channels that stay, whichever goes."""
    for seed in range(2):  # each has the largest somewhere else
        torch.manual_seed(seed)
        model, x = ReadElsewhere(number).eval(), torch.randn(2, 3, 4, 4)
        assert trace(model, x).groups == ()
    del model.number
    model.number = lambda net: torch.ones(())
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["up"]


class Scaled(nn.Module):
    """A LayerNorm whose output is multiplied by a tensor that is neither parameter nor buffer."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.eps, self.scale = nn.Parameter(torch.ones(8)), 1e-3, scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., 8] -> the same."""
        return nn.functional.layer_norm(x, (8,), self.weight, None, self.eps) * self.scale


def test_norms_of_one_class_are_told_apart_by_the_tensors_that_they_hold() -> None:
    """Whichever comes first."""
    plain, scaled = Scaled(torch.ones(())), Scaled(torch.arange(8.0))
    for norm, known in ((plain, True), (scaled, False), (plain, True)):
        assert (norm_of(norm) is not None) == known


@pytest.mark.parametrize("affine", [True, False])
def test_fresh_batchnorms_leave_the_traced_copy_alive(affine: bool) -> None:
    """With the statistics that they begin with, and without biases, or with biases of many numbers."""
    torch.manual_seed(0)
    layers = [layer for width in (3, 8, 8, 8) for layer in (
        nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=affine), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    assert len(fastscore.score(model, [torch.randn(4, 3, 12, 12)], progress=False)) == 4
