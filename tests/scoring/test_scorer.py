"""Scorer: drop-in totals, and what they can be added to."""

import copy
import io
from pathlib import Path

import oracles
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from loops import assert_same
from network_modules import Residual
from networks import NETWORKS, randomize
from torch import Tensor, nn

import fastscore
from fastscore import Scorer

RESIDUAL = NETWORKS["residual"]


def labels(samples: int) -> Tensor:
    return torch.arange(samples) % 4


@pytest.mark.parametrize(("importance", "reduction"), [
    ("taylor", "sum"), ("taylor-abs", "sum"), ("taylor-sq", "sum"), ("taylor-abs", "element"),
    ("taylor-sq", "element")])
@pytest.mark.parametrize("name", ["residual", "flattening", "unet", "tokens"])
def test_dividing_by_the_length_is_sending_back_the_unit_gradient(name: str, importance: str, reduction: str) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(6)
    divided = Scorer(model, x, importance=importance, reduction=reduction)
    sent = Scorer(model, x, importance=importance, reduction=reduction, gradient="random")
    with divided:
        output = model(x)
        (1000 * output.pow(3).sum() / len(x)).backward()
    v = output.detach().square()
    with sent:
        sent.propagate(model(x), v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1)))
    for group in network.groups:
        torch.testing.assert_close(divided.state_dict()["totals"][group], sent.state_dict()["totals"][group],
                                   rtol=1e-10, atol=0)


def test_a_sample_without_a_gradient_counts_and_adds_nothing() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(6)
    some, whole = Scorer(model, x, importance="taylor-sq"), Scorer(model, x[:4], importance="taylor-sq")
    with some:
        model(x)[:4].square().sum().backward()
    with whole:
        model(x[:4]).square().sum().backward()
    assert some.scores().samples == 6
    for layer in whole.scores():
        torch.testing.assert_close(some.scores()[layer], whole.scores()[layer] * 4 / 6)


@pytest.mark.parametrize("normalize", [True, False])
def test_drop_in_is_score_with_the_loss_gradient(normalize: bool) -> None:
    model, x, y = RESIDUAL.traced(), RESIDUAL.inputs(12), labels(12)
    scorer = Scorer(model, x, importance="taylor-sq", normalize=normalize)
    with scorer:
        for images, classes in zip(x.split(4), y.split(4), strict=True):
            F.cross_entropy(model(images), classes).backward()
    whole = fastscore.score(model, zip(x.split(4), y.split(4), strict=True), gradient="loss", normalize=normalize,
                            progress=False)
    assert_same(scorer.scores(), whole)


def test_drop_in_probes_are_score_with_random_gradients() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(12)
    scorer = Scorer(model, x, gradient="random", seed=3)
    with scorer:
        for images in x.split(5):
            output = model(images)
            scorer.probe(output)
            scorer.probe(output)
            output.sum().backward()  # of the loop's own, not measured
    scores = scorer.scores()
    assert (scores.samples, scores.passes) == (12, 24)
    assert_same(scores, fastscore.score(model, [x], probes=2, seed=3, progress=False))


def test_loss_scale_and_accumulation_cancel() -> None:
    """Of AMP's loss scale and of gradients accumulated over steps, a normalised score knows nothing."""
    model, x, y = RESIDUAL.traced(), RESIDUAL.inputs(8), labels(8)
    plain, scaled = Scorer(model, x), Scorer(model, x)
    with plain:
        F.cross_entropy(model(x), y).backward()
    with scaled:
        for images, classes in zip(x.split(2), y.split(2), strict=True):
            (65536.0 * F.cross_entropy(model(images), classes) / 4).backward()
    assert_same(scaled.scores(), plain.scores())


def test_autocast() -> None:
    torch.manual_seed(0)
    model = randomize(Residual()).eval()
    x, y = RESIDUAL.inputs(16).float(), labels(16)
    found = []
    for enabled in (False, True):
        scorer = Scorer(model, x)
        with scorer, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x).float(), y)
        with scorer:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
        found.append(scorer.scores())
    assert found[1].samples == 16
    assert_same(found[1], found[0], 0.1)


def test_scores_can_be_read_in_the_middle_and_go_on() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(8)
    scorer = Scorer(model, x)
    with scorer:
        model(x[:4]).square().sum().backward()
        early = scorer.scores()
        model(x[4:]).square().sum().backward()
        whole = scorer.scores()
    assert (early.samples, whole.samples) == (4, 8)
    once = Scorer(model, x)
    with once:
        model(x).square().sum().backward()
    assert_same(whole, once.scores())
    half = Scorer(model, x)
    with half:
        model(x[:4]).square().sum().backward()
    assert_same(early, half.scores())  # and did not change as the scorer went on


@pytest.mark.parametrize("gradient", ["loss", "random"])
def test_state_dict_goes_on_where_it_stopped(gradient: str) -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(8)

    def run(scorer: Scorer, images: Tensor) -> None:
        with scorer:
            output = model(images)
            scorer.probe(output) if gradient == "random" else output.square().sum().backward()

    whole, first, second = (Scorer(model, x, gradient=gradient) for _ in range(3))
    for part in x.split(4):
        run(whole, part)
    run(first, x[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, x[4:])
    assert_same(second.scores(), whole.scores(), 0)
    assert second.scores().samples == 8


def test_state_of_another_scorer_is_refused() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    state = Scorer(model, x).state_dict()
    for other in (Scorer(model, x, seed=1), Scorer(model, x, importance="taylor"), Scorer(model, x, normalize=False),
                  Scorer(NETWORKS["plain"].traced(), NETWORKS["plain"].inputs())):
        with pytest.raises(ValueError, match=r"^state: "):
            other.load_state_dict(state)


def test_merging_halves_is_the_whole() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(9)
    for importance in ("taylor", "taylor-abs", "taylor-sq"):
        one, other, whole = (fastscore.score(model, [part], importance=importance, gradient="loss", progress=False,
                                             loss=lambda output, batch: output.square().sum())
                             for part in (x[:3], x[3:], x))
        merged = one.merge(other)
        assert (merged.samples, merged.passes) == (9, 9)
        assert_same(merged, whole)
        assert_same(other.merge(one), whole)


def test_all_reduce_adds_processes_up(tmp_path: Path) -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(4)
    scorer = Scorer(model, x)
    with scorer:
        model(x).square().sum().backward()
    before = scorer.scores()
    state = scorer.state_dict()
    kept = copy.deepcopy(state)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        scorer.all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert_same(scorer.scores(), before, 0)
    assert scorer.scores().samples == 4
    assert all(torch.equal(state["totals"][group], kept["totals"][group]) for group in kept["totals"])


def test_per_sample_sums_of_two_scorers_at_once() -> None:
    """Two scorers on one model do not disturb one another."""
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    one, other = Scorer(model, x, importance="taylor"), Scorer(model, x, gradient="random")
    with one, other:
        output = model(x)
        other.probe(output)
        output.square().sum().backward()
    alone, probed = Scorer(model, x, importance="taylor"), Scorer(model, x, gradient="random")
    with alone:
        model(x).square().sum().backward()
    with probed:
        probed.probe(model(x))
    assert_same(one.scores(), alone.scores(), 1e-12)
    assert_same(other.scores(), probed.scores(), 1e-12)


class Wrapped(nn.Module):
    """Returns a dict, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RESIDUAL.model()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": logits.mean(), "logits": logits, "classes": logits.argmax(1)}


def test_the_only_tensor_in_what_a_model_returns_is_its_output() -> None:
    model, x = Wrapped(), RESIDUAL.inputs()
    for gradient in ("random", "loss"):
        wrapped, plain = Scorer(model, x, gradient=gradient), Scorer(model.net, x, gradient=gradient)
        with wrapped, plain:
            returned = model(x)
            if gradient == "random":
                wrapped.probe(returned)
                plain.probe(model.net(x))
            else:
                returned["logits"].square().sum().backward()
        for layer in plain.scores():
            torch.testing.assert_close(wrapped.scores()[f"net.{layer}"], plain.scores()[layer])


def test_gradients_of_the_users_own_in_between_change_nothing() -> None:
    """A gradient penalty, an adversarial step: autograd.grad before backward() must not count for the length."""
    model, x = RESIDUAL.traced(), RESIDUAL.inputs().requires_grad_()
    scorer, plain = (Scorer(model, x.detach(), importance="taylor-abs") for _ in range(2))
    with scorer:
        loss = model(x).square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(slope.square().sum(), x, retain_graph=True)
        loss.backward()
    with plain:
        model(x).square().sum().backward()
    assert_same(scorer.scores(), plain.scores(), 1e-12)


def test_the_oracle_on_a_scorer_that_has_seen_more() -> None:
    """Totals are Σ over samples and probes, nothing else."""
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(5)
    scorer = Scorer(model, x, importance="taylor", gradient="random")
    v = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    with scorer:
        output = model(x)
        for gradient in v:
            scorer.propagate(output, gradient)
    for group, spec in RESIDUAL.groups.items():
        exact = sum(oracles.sums(model, spec, x, gradient).sum(0) for gradient in v)
        torch.testing.assert_close(scorer.state_dict()["totals"][group].sum(0), exact, rtol=1e-10, atol=1e-12)
    assert scorer.state_dict()["counts"] == {"even": 8, "odd": 7, "samples": 5, "zero_gradients": 0, "left_out": 0}


def test_attach_gives_the_scorer() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    scorer = Scorer(model, x)
    with scorer as entered:
        assert entered is scorer
    assert scorer.attach() is scorer
    model(x).square().sum().backward()
    scorer.detach()
    assert scorer.scores().samples == len(x)
