"""The plan of a fast pass: where taps stand, what they read, in which precision; and that it measures the same."""

import os
from pathlib import Path

import oracles
import pytest
import torch
import torch.nn.functional as F
from network_modules import Head
from networks import NETWORKS, randomize
from oracles import untouched
from scipy.stats import spearmanr
from test_folding import assert_scored_as_it_is, inputs
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.fastpath import prepare
from fastscore.fastpath.observation import observe
from fastscore.fastpath.plan import Plan
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.scoring.tap_points import tap_points
from fastscore.taps.measures import SUMS
from fastscore.taps.taps import Taps


def rank_correlation(one: fastscore.Scores, other: fastscore.Scores) -> float:
    """Spearman's, over all channels of all layers."""
    values = [torch.cat([scores[layer] for layer in one]) for scores in (one, other)]
    return float(spearmanr(*(each.numpy() for each in values)).statistic)


def tap(plan: Plan, layer: str):
    return next(tap for tap in plan.taps if tap.layer == layer)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_bytes_are_those_of_what_the_layers_take(name: str) -> None:
    """Twice, activation and gradient, but for what a stride of a 1x1 convolution leaves out."""
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(2)
    plan = fastscore.score(model, [x], progress=False).plan
    taken: dict[str, Tensor] = {}
    for found in plan.taps:
        layer = model.get_submodule(found.layer)
        layer.register_forward_pre_hook(lambda module, args, name=found.layer: taken.update({name: args[0][:1]}))
    model(x)
    for found in plan.taps:
        layer = model.get_submodule(found.layer)
        stride = layer.stride if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) else (1, 1)
        read = taken[found.layer][..., ::stride[0], ::stride[1]] if stride != (1, 1) else taken[found.layer]
        assert found.reads == read.shape[1:]
        assert found.bytes == 2 * 8 * read.numel()
        assert f"{found.layer} " in str(plan)
    assert f"{len(plan.taps)} taps" in str(plan)
    assert repr(plan) == f"<Plan: {str(plan).splitlines()[0]}>"
    assert all(f"<td>{found.layer}</td>" in plan._repr_html_() for found in plan.taps)


@pytest.mark.parametrize("options", [{}, {"importance": "taylor-abs"}, {"reduction": "element"}, {"ablation": "mean"}])
def test_strided_convolutions_of_one_position_are_read_where_they_read(options: dict[str, str]) -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(5)
    plan = fastscore.score(model, [x], progress=False, **options).plan
    height = x.shape[2] if options.get("ablation") == "mean" else x.shape[2] // 2
    assert tap(plan, "block2.shortcut.0").reads == (6, height, height)
    v = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = oracles.sums_of_each_sample(Scorer(model, x, importance="taylor", gradient="random"), model, x, v)
    torch.testing.assert_close(found["stem.0"], oracles.sums(model, network.groups["stem.0"], x, v))


class Decoder(nn.Module):
    """Up-sampling between layers."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 3, stride=2, padding=1), up
        self.smooth, self.head = nn.Conv2d(6, 5, 3, padding=1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.silu(self.down(x)))
        y = F.relu(self.smooth(x))
        return self.head(self.beside(x, y))

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Shared(Decoder):
    """Something else reads what was up-sampled, too."""

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x[:, :5].exp()


def decoder(up: nn.Module, shared: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return randomize((Shared if shared else Decoder)(up)).double().eval()


@pytest.mark.parametrize("options", [{}, {"importance": "taylor-abs"}, {"ablation": "mean"}])
def test_a_tap_stands_before_an_up_sampling_that_repeats_values(options: dict[str, str]) -> None:
    model, x = decoder(nn.Upsample(scale_factor=2)), inputs(4, 3, 8, 8)
    with untouched(model):
        fast = fastscore.score(model, [x], progress=False, **options)
    found = tap(fast.plan, "smooth")
    assert (found.reads, found.note) == ((6, 4, 4), "before up")
    scorer = Scorer(model, x, gradient="random", **options)
    with scorer:
        scorer.probe(model(x))
    plain = scorer.scores()
    for layer in plain:
        torch.testing.assert_close(fast[layer], plain[layer], rtol=1e-5, atol=0)
        assert plain[layer].count_nonzero() == len(plain[layer])
    torch.testing.assert_close(fast.means["smooth"], plain.means["smooth"])


@pytest.mark.parametrize(("up", "options"), [
    (nn.Upsample(scale_factor=2, mode="bilinear"), {}),  # the mean of what it puts out is another one
    (nn.Upsample(size=(7, 7)), {}),  # repeats some values once more than others
    (nn.Upsample(scale_factor=2), {"reduction": "element"})])  # no power of a sum is the sum of powers
def test_a_tap_stays_behind_an_up_sampling_where_that_measures_something_else(up: nn.Module, options: dict[str, str]
                                                                              ) -> None:
    model, x = decoder(up), inputs(4, 3, 8, 8)
    fast = fastscore.score(model, [x], progress=False, **options)
    assert tap(fast.plan, "smooth").note == ""
    scorer = Scorer(model, x, gradient="random", **options)
    with scorer:
        scorer.probe(model(x))
    torch.testing.assert_close(fast["down"], scorer.scores()["down"], rtol=1e-5, atol=0)


def test_a_tap_stays_where_something_else_reads_what_was_up_sampled() -> None:
    class Head2(nn.Module):
        """Reads through the tap and past it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.up = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)
            self.one, self.two, self.head = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 5, 1), Head(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(F.silu(self.first(x)))
            return self.head(F.relu(self.one(x)) + F.relu(self.two(x)))

    torch.manual_seed(0)
    scores = assert_scored_as_it_is(Head2().double(), inputs(4, 3, 8, 8))
    assert {tap.note for tap in scores.plan.taps} == {""}


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "mlp", "unet"])
def test_bfloat16_ranks_nearly_as_float32_does(name: str) -> None:
    """With the same random gradients: samples are told apart before anything is rounded."""
    network = NETWORKS[name]
    model, x = network.traced(dtype=torch.float32), network.inputs(32).float()
    exact = fastscore.score(model, x.split(8), progress=False)
    with untouched(model):
        rounded = fastscore.score(model, x.split(8), precision="bfloat16", progress=False)
    assert rounded.plan.precision.startswith("bfloat16")
    assert all(tap.bytes == 2 * 2 * torch.Size(tap.reads).numel() for tap in rounded.plan.taps)
    for layer in exact:
        assert float((exact[layer] - rounded[layer]).abs().max()) < 0.15 * float(exact[layer].max()), layer
    assert rank_correlation(exact, rounded) > 0.98
    assert exact.origin == rounded.origin
    assert exact.merge(rounded).passes == 64


def test_the_loss_is_computed_in_float32_from_a_model_in_bfloat16() -> None:
    network = NETWORKS["residual"]
    model, x, y = network.traced(dtype=torch.float32), network.inputs(8).float(), torch.arange(8) % 4
    seen: list[torch.dtype] = []

    def loss(output: Tensor, batch: object) -> Tensor:
        seen.append(output.dtype)
        return F.cross_entropy(output, y)

    exact = fastscore.score(model, [(x, y)], gradient="loss", progress=False)
    rounded = fastscore.score(model, [(x, y)], gradient="loss", loss=loss, precision="bfloat16", progress=False)
    assert seen == [torch.float32]
    assert rank_correlation(exact, rounded) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_is_float32_whatever_the_model_is_in(dtype: torch.dtype) -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(dtype=dtype), network.inputs(8).to(dtype)
    loss = {"gradient": "loss", "loss": lambda output, batch: output.square().sum(), "progress": False}
    with untouched(model):
        scores = fastscore.score(model, [x], precision="float32", **loss)
    assert scores.plan.precision == "float32"
    wide = fastscore.score(model.double(), [x.double()], **loss)
    for layer in scores:
        torch.testing.assert_close(scores[layer], wide[layer], rtol=1e-4, atol=1e-5 * float(wide[layer].max()))


class Spectrum(nn.Module):
    """A Fourier transform, which PyTorch has not in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x).abs()


def test_a_layer_that_cannot_run_in_a_precision_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(Spectrum()), nn.Conv2d(6, 4, 1), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    with untouched(model), pytest.raises(ValueError, match=r"^precision: 1\.0 \(Spectrum\) does not run in bfloat16.*"
                                                           r"precision=None$"):
        fastscore.score(model, [x], precision="bfloat16", progress=False)
    with untouched(model), pytest.raises(ValueError, match=r"^precision: 'float8' is neither None nor"):
        fastscore.score(model, [x], precision="float8", progress=False)


def test_a_processor_without_bfloat16_says_that_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    network = NETWORKS["mlp"]
    model, x = network.traced(dtype=torch.float32), [network.inputs().float()]
    assert "slower" in str(fastscore.score(model, x, precision="bfloat16", progress=False).plan)
    assert "slower" not in str(fastscore.score(model, x, progress=False).plan)


def test_a_plan_stays_with_the_scores_and_out_of_files(tmp_path: Path) -> None:
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs()
    scores = fastscore.score(model, [x], progress=False)
    scores.save(tmp_path / "s.safetensors")
    assert fastscore.Scores.load(tmp_path / "s.safetensors").plan is None
    assert scores.merge(scores).plan == scores.plan
    assert fastscore.score(model, [x], importance="magnitude-l2", progress=False).plan is None


@pytest.mark.skipif(os.name == "nt", reason="torch.compile wants a C++ compiler that Windows does not bring")
def test_a_compiled_pass_has_the_same_scores() -> None:
    """Two probes, and a batch of another size, which runs as it is."""
    network = NETWORKS["inplace"]
    model, x = network.traced(dtype=torch.float32), network.inputs(10).float()
    plain = fastscore.score(model, x.split(4), probes=2, progress=False)
    with untouched(model):
        compiled = fastscore.score(model, x.split(4), probes=2, compile=True, progress=False)
    assert compiled.plan.compiled
    assert ", compiled" in str(compiled.plan)
    for layer in plain:
        torch.testing.assert_close(compiled[layer], plain[layer], rtol=1e-4, atol=1e-5 * float(plain[layer].max()))


def test_layers_that_run_twice_are_not_compiled() -> None:
    network = NETWORKS["plain"]
    with pytest.raises(ValueError, match=r"^compile: .* runs 2 times in a pass.*compile=False"):
        fastscore.score(network.traced(), [network.inputs()], compile=True, progress=False,
                        forward=lambda model, batch: model(batch) + model(batch.flip(3)))


@pytest.mark.parametrize("name", ["residual", "mobile", "unet"])
def test_observing_changes_nothing(name: str) -> None:
    """Neither the copy nor where its taps stand; what could be moved is said."""
    network = NETWORKS[name]
    model, x = evaluation_copy(network.model()), network.inputs(2)
    graph = trace(model, x)
    taps = Taps(model, tap_points(model, graph.groups), SUMS)
    points, generator = dict(taps.points), torch.get_rng_state()
    modules = [(module, dict(vars(module))) for module in model.modules()]
    with untouched(model):
        seen = observe(model, taps, x, lambda model, batch: model(batch))
    assert taps.points == points
    assert taps.current is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(dict(vars(module)) == before for module, before in modules)
    assert set(seen.shapes) == set(points)
    assert torch.equal(seen.output, model(x))


def test_stages_come_in_the_order_that_the_readme_gives() -> None:
    readme = (Path(prepare.__file__).parent / "README.md").read_text()
    rows = [line.split("|")[1].strip() for line in readme.splitlines() if line.startswith("| ")][1:]
    stages = [stage.__name__.lstrip("_").replace("_", " ") for stage in prepare.STAGES]
    assert [row.replace(" ", "_") for row in rows] == [stage.replace(" ", "_") for stage in stages]


class Scaled(nn.Module):
    """What a BatchNorm does in evaluation mode, by sums and products."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.shift = norm.bias.detach() - norm.running_mean * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same."""
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


class Tokens(nn.Module):
    """A convolution over space and time, whose normalised output is read as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv3d(3, 8, 2), nn.Conv3d(8, 6, 1), nn.BatchNorm3d(6)
        self.last, self.up, self.head = nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, T, H, W] -> [N, L, 3]."""
        x = self.norm(self.two(self.one(x).relu()).relu()).flatten(2).transpose(1, 2)
        return self.head(self.up(self.last(x)).relu())


def test_gradients_of_a_single_sample_through_a_batchnorm() -> None:
    """PyTorch's own are wrong on a CPU, of one sample whose channels come last in the gradient alone."""
    torch.manual_seed(0)
    model = randomize(Tokens()).double().eval()
    x = torch.randn(1, 3, 4, 4, 3, dtype=torch.float64)
    scores = [fastscore.score(model, [x], importance="molchanov-group", gradient="loss", normalize=False,
                              loss=lambda output, batch: output.square().sum(), progress=False)]
    model.norm = Scaled(model.norm)
    scores.append(fastscore.score(model, [x], importance="molchanov-group", gradient="loss", normalize=False,
                                  loss=lambda output, batch: output.square().sum(), progress=False))
    torch.testing.assert_close(scores[0]["one"], scores[1]["one"])
