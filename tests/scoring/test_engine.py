"""score(): one call, whatever the batches look like."""

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from oracles import untouched
from thinned import thinned
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastscore
from fastscore import Scores, progress


def assert_same(one: Scores, other: Scores, tolerance: float = 2e-5) -> None:
    """Equal to float32 rounding, for each channel, in units of the layer's largest."""
    assert list(one) == list(other)
    for layer in one:
        assert float((one[layer] - other[layer]).abs().max()) <= tolerance * float(one[layer].max()), layer


@pytest.mark.parametrize("options", [{"importance": "taylor-sq"}, {"importance": "taylor-abs", "probes": 2},
                                     {"importance": "taylor-sq", "reduction": "element", "normalize": False}])
@pytest.mark.parametrize("name", ["residual", "dense"])
def test_batch_size_and_order_do_not_matter(name: str, options: dict[str, object]) -> None:
    network = NETWORKS[name]
    model, x = network.traced(dtype=torch.float32), network.inputs(64).float()
    shuffled = x[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    whole = fastscore.score(model, [x], progress=False, **options)
    for batches in (x.split(1), x.split(7), shuffled.split(7), reversed(x.split(16))):
        assert_same(whole, fastscore.score(model, batches, progress=False, **options))
    again = fastscore.score(model, [x], progress=False, **options)
    assert all(torch.equal(whole[layer], again[layer]) for layer in whole)
    other = fastscore.score(model, [x], progress=False, seed=1, **options)
    assert not all(torch.allclose(whole[layer], other[layer], rtol=1e-3) for layer in whole)


def test_the_shape_of_a_batch_does_not_matter() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(6)
    y = torch.arange(6) % 4
    plain = fastscore.score(model, [x], progress=False)
    channels_last = x.to(memory_format=torch.channels_last)
    for batches in ([(x,)], [(x, y)], [[x, y]], [{"x": x}], iter([x]), (part for part in x.split(2)), [channels_last],
                    DataLoader(TensorDataset(x, y), batch_size=4)):
        assert_same(plain, fastscore.score(model, batches, progress=False))
    named = fastscore.score(model, [{"image": x, "scale": torch.tensor(1.0), "table": torch.ones(9)}], progress=False,
                            forward=lambda model, batch: model(batch["image"] * batch["scale"]))
    assert_same(plain, named)


def test_tensors_of_a_batch_that_are_not_per_sample_pass_through() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = NETWORKS["residual"].model()

        def forward(self, x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
            return self.net(x * scale * table[8])

    x = NETWORKS["residual"].inputs(6)
    model = Scaled()
    whole = fastscore.score(model, [{"x": x, "scale": torch.tensor(1.5), "table": torch.arange(9.0)}], progress=False)
    parts = [{"x": part, "scale": torch.tensor(1.5), "table": torch.arange(9.0)} for part in x.split(2)]
    assert_same(whole, fastscore.score(model, parts, progress=False))


def test_samples_is_where_it_stops() -> None:
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs(12)
    drawn = []

    def loader():
        for part in x.split(5):
            drawn.append(len(part))
            yield part, torch.zeros(len(part))

    scores = fastscore.score(model, loader(), samples=7, progress=False)
    assert scores.samples == 7
    assert drawn == [5, 5]
    assert_same(scores, fastscore.score(model, [x[:7]], progress=False))
    assert fastscore.score(model, [x], samples=100, progress=False).samples == 12
    assert fastscore.score(model, [x], samples=12, progress=False, probes=3).passes == 36


def test_evaluation_mode_and_nothing_else_is_scored() -> None:
    """A model left in training mode, frozen, or half trained, has the scores of the model in evaluation mode."""
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(6)
    plain = fastscore.score(model, [x], progress=False)
    for change in (model.train, lambda: model.requires_grad_(False), lambda: model.stem.requires_grad_(True)):
        change()
        assert_same(plain, fastscore.score(model, [x], progress=False))
    with torch.no_grad():
        assert_same(plain, fastscore.score(model, [x], progress=False))
    with torch.inference_mode():
        assert_same(plain, fastscore.score(model, [x], progress=False))
        assert_same(plain, fastscore.score(model, [network.inputs(6)], progress=False))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_score_leaves_no_trace(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.traced().train(), network.inputs(6)
    model.eval()
    model(x).square().sum().backward()
    model.train()
    loader = DataLoader(TensorDataset(x), batch_size=2, shuffle=True)
    with untouched(model):
        fastscore.score(model, loader, progress=False)


@pytest.mark.parametrize(("name", "dtype"), thinned(["residual", "mobile", "mlp", "unet"],
                                                    [torch.bfloat16, torch.float16]))
def test_half_precision_ranks_as_float32_does(name: str, dtype: torch.dtype) -> None:
    network = NETWORKS[name]
    model, x = network.traced(dtype=torch.float32), network.inputs(32).float()
    exact = fastscore.score(model, [x], progress=False)
    half = fastscore.score(model.to(dtype), [x.to(dtype)], gradient="random", progress=False)
    for layer in exact:  # the samples' ids differ, so the random gradients do
        assert half[layer].isfinite().all()
    loss = {"gradient": "loss", "loss": lambda output, batch: output.float().square().sum()}
    exact = fastscore.score(model.float(), [x], progress=False, **loss)
    half = fastscore.score(model.to(dtype), [x.to(dtype)], progress=False, **loss)
    assert_same(exact, half, 0.15)


def test_cross_entropy_is_the_loss_that_stands_in() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(6)
    y = torch.arange(6) % 4
    default = fastscore.score(model, [(x, y)], gradient="loss", progress=False)
    own = fastscore.score(model, [(x, y)], gradient="loss", progress=False,
                          loss=lambda output, batch: F.cross_entropy(output, batch[1]))
    assert_same(default, own)
    labelled = fastscore.score(model, [{"x": x, "labels": y}], gradient="loss", progress=False,
                               forward=lambda model, batch: model(batch["x"]))
    assert_same(default, labelled)


def test_a_normalised_loss_gradient_does_not_depend_on_batch_size_or_scale() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(12)
    y = torch.arange(12) % 4
    whole = fastscore.score(model, [(x, y)], gradient="loss", progress=False)
    parts = fastscore.score(model, zip(x.split(5), y.split(5), strict=True), gradient="loss", progress=False)
    assert_same(whole, parts)
    scaled = fastscore.score(model, [(x, y)], gradient="loss", progress=False,
                             loss=lambda output, batch: 1e4 * F.cross_entropy(output, batch[1], reduction="sum"))
    assert_same(whole, scaled)


def test_ignored_layers_have_no_score_and_the_others_keep_theirs() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(6)
    plain = fastscore.score(model, [x], progress=False)
    for ignore in (["stem.0"], "stem", [model.stem[0]], [model.block1.bn2]):
        scores = fastscore.score(model, [x], ignore=ignore, progress=False)
        assert set(scores) == set(plain) - {"stem.0"}
        assert "stem.0" in scores.skipped
        for layer in scores:
            torch.testing.assert_close(scores[layer], plain[layer])


def test_forward_may_call_the_model_more_than_once() -> None:
    """v·(f(a) + f(b)): both calls' channels count."""
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs(4)
    loss = {"gradient": "loss", "loss": lambda output, batch: output.sum(), "normalize": False, "importance": "taylor",
            "progress": False}
    twice = fastscore.score(model, [x], forward=lambda model, batch: model(batch) + 3 * model(batch.flip(3)), **loss)
    a = fastscore.score(model, [x], **loss).totals
    b = fastscore.score(model, [x.flip(3)], **loss).totals
    for layer in twice:
        torch.testing.assert_close(twice.totals[layer], a[layer] + 3 * b[layer])


def test_progress_goes_to_stderr_and_can_be_silenced(capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    network = NETWORKS["plain"]
    fastscore.score(network.model(), [network.inputs()], progress=False)
    assert capsys.readouterr() == ("", "")
    fastscore.score(network.model(), [network.inputs()])
    assert "4 samples" in capsys.readouterr().err
