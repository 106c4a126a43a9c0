"""The mask, surgery, and what zeroing a channel where it is made would do instead."""

import re
from dataclasses import replace

import oracles
import pytest
import torch
from networks import NETWORKS, randomize
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.tracing import trace


def magnitudes(model: nn.Module, x: Tensor) -> fastscore.Scores:
    return fastscore.score(model, [x], importance="magnitude-l2", progress=False)


@pytest.mark.parametrize("fraction", [0.3, 0.6])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_mask_and_surgery_and_the_oracle_agree(name: str, fraction: float) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(5)
    scores = magnitudes(model, x)
    with untouched(model):
        with torch.no_grad(), fastscore.mask(model, scores, fraction, x) as removed:
            masked = model(x)
        result = fastscore.prune(model, scores, x, channels=1 - fraction)
        dense = model(x)
    gone = {group: index.tolist() for group, index in removed.items()}
    assert gone
    assert gone == {group: index.tolist() for group, index in result.removed.items()}
    exact = oracles.masked(network, model, gone, x)
    torch.testing.assert_close(masked, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.model(x), exact, rtol=1e-10, atol=1e-12)
    assert (dense - exact).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "residual", "mobile"])
def test_a_constant_leaks_where_a_channel_is_zeroed_before_its_bias(name: str) -> None:
    """Filters set to zero leave the bias, or BatchNorm's shift, to the consumers: not what surgery computes."""
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(5)
    gone = {group: [0] for group in network.groups}
    exact = oracles.masked(network, model, gone, x)
    pruned = remove_channels(network.model(), trace(model, x).groups,
                             {group: torch.tensor(index) for group, index in gone.items()})
    torch.testing.assert_close(pruned(x), exact, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for group in gone:
            for producer in network.groups[group].producers:
                model.get_submodule(producer).weight[0] = 0
        assert (model(x) - exact).abs().max() > 1e-3


def test_nothing_leaks_without_bias_and_shift() -> None:
    """Then zero filters, the mask and surgery are one."""
    network = NETWORKS["residual"]
    model, x = network.model(), network.inputs(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.running_mean)
    gone = {group: [1] for group in network.groups}
    exact = oracles.masked(network, model, gone, x)
    with torch.no_grad():
        for group in gone:
            for producer in network.groups[group].producers:
                model.get_submodule(producer).weight[1] = 0
        torch.testing.assert_close(model(x), exact, rtol=1e-10, atol=1e-12)


def test_group_norm_is_pruned_with_the_statistics_of_what_remains() -> None:
    """And so is the mask: the mean and variance are those of fewer channels."""
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(),
                                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))).double()
    x = NETWORKS["plain"].inputs(5)
    group = trace(model, x).groups[0]
    assert group.unit.tolist() == [0, 1, 2, 3] * 2  # the groups of the norm stay equally wide
    with torch.no_grad():
        kept = [c for c in range(8) if c not in (1, 5)]
        y = model[0](x)[:, kept]
        y = torch.nn.functional.group_norm(y, 2, model[1].weight[kept], model[1].bias[kept]).relu()
        y = torch.nn.functional.conv2d(y, model[3].weight[:, kept], model[3].bias)
        exact = model[4:](y)
        totals = {"0": torch.tensor([2.0, 1, 2, 2] * 2), "3": torch.full((5,), 9.0)}
        with fastscore.mask(model, replace(magnitudes(model, x), totals=totals), 2 / 13, x) as removed:
            assert removed["0"].tolist() == [1, 5]
            torch.testing.assert_close(model(x), exact, rtol=1e-10, atol=1e-12)
    pruned = remove_channels(model, (group,), {"0": torch.tensor([1, 5])})
    torch.testing.assert_close(pruned(x), exact, rtol=1e-10, atol=1e-12)


def test_the_mask_is_there_in_training_too_and_for_the_gradient() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced().train(), network.inputs(5)
    with fastscore.mask(model, magnitudes(model, x), 0.4, x) as removed:
        model(x).square().sum().backward()
    for group, channels in removed.items():
        for layer, positions in network.groups[group].edges.items():
            gradient = model.get_submodule(layer).weight.grad
            index = [p for c in channels.tolist() for p in positions[c]]
            assert not gradient[:, index].any()
    assert any(parameter.grad.any() for parameter in model.parameters())


def test_a_fraction_of_zero_masks_nothing() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(5)
    dense = model(x)
    with fastscore.mask(model, magnitudes(model, x), 0.0, x) as removed:
        assert not removed
        assert torch.equal(model(x), dense)


def test_masks_go_with_the_block_whatever_happens() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(5)
    scores = magnitudes(model, x)
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with untouched(model), pytest.raises(type(error)) as caught, fastscore.mask(model, scores, 0.3, x):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_that_is_none(fraction: float) -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(5)
    scores = magnitudes(model, x)
    with untouched(model), pytest.raises(ValueError, match=r"^fraction: "), fastscore.mask(model, scores, fraction, x):
        pass


def test_a_fraction_out_of_reach() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(5)
    scores = magnitudes(model, x)
    with untouched(model), pytest.raises(ValueError, match=r"^fraction: 0\.99 cannot be reached") as caught, \
            fastscore.mask(model, scores, 0.99, x):
        pass
    assert "ask for less" in str(caught.value)
    assert "floor" not in str(caught.value)  # which mask does not have
    remain = float(re.search(r"be, (\S+) of all channels remain", str(caught.value))[1])  # type: ignore[index]
    with fastscore.mask(model, scores, 1 - remain, x) as removed:
        assert sum(map(len, removed.values())) == sum(len(each) - 1 for each in scores.values())


def test_ignore_scope_and_forward() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(5)
    scores = magnitudes(model, x)
    with fastscore.mask(model, scores, 0.4, {"images": x}, ignore=["stem"], scope="layer",
                        forward=lambda model, batch: model(batch["images"])) as removed:
        assert set(removed) == set(network.groups) - {"stem.0"}
        for group, index in removed.items():
            assert abs(len(index) / network.groups[group].channels - 0.4) < 0.2


# The outputs of BatchNorms

NORMALIZED = ["plain", "residual", "inplace", "dense", "mobile", "grouped", "squeeze-excite", "mlp"]


class Set(nn.Module):
    """A BatchNorm some of whose output channels are set to a value."""

    def __init__(self, norm: nn.Module, index: Tensor, value: Tensor) -> None:
        super().__init__()
        self.norm, self.index, self.value = norm, index, value

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).clone()
        for c, value in zip(self.index.tolist(), self.value.tolist(), strict=True):
            y[:, c] = value
        return y


def norm_outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """BatchNorm -> [C], the mean of its output over samples and positions."""
    means: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(
        lambda module, args, output, name=name: means.update({name: output.transpose(0, 1).flatten(1).mean(1)}))
        for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return means


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("fraction", [0.5, 0.7])
@pytest.mark.parametrize("name", NORMALIZED)
def test_norm_gates_are_set_to_zero_or_to_their_means(name: str, fraction: float, compensate: bool) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(5)
    means = norm_outputs(model, x)
    scores = fastscore.score(model, [x], units="norms", progress=False)
    assert set(scores) == set(means)
    with untouched(model), torch.no_grad(), \
            fastscore.mask(model, scores, fraction, x, compensate=compensate) as removed:
        masked = model(x)
    total = sum(map(len, means.values()))
    assert sum(map(len, removed.values())) == -int(-fraction * total // 1)
    for norm, index in removed.items():
        lowest = scores[norm].argsort(stable=True)[:len(index)]
        assert sorted(lowest.tolist()) == index.tolist()
    dense = model(x)
    for norm, index in removed.items():
        value = means[norm][index] if compensate else torch.zeros(len(index))
        model.set_submodule(norm, Set(model.get_submodule(norm), index, value))
    torch.testing.assert_close(masked, model(x), rtol=1e-12, atol=1e-12)
    assert (masked - dense).abs().max() > 1e-6


def test_norm_gates_pass_no_gradient() -> None:
    model, x = NETWORKS["inplace"].traced(), NETWORKS["inplace"].inputs(5)
    scores = fastscore.score(model, [x], units="norms", progress=False)
    with fastscore.mask(model, scores, 0.4, x, compensate=True) as removed:
        model(x).square().sum().backward()
    for norm, index in removed.items():
        layer = model.get_submodule(norm)
        assert not layer.weight.grad[index].any()
        assert not layer.bias.grad[index].any()
    assert any(module.weight.grad.any() for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_norm_gates_are_ignored_by_name() -> None:
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(5)
    scores = fastscore.score(model, [x], units="norms", progress=False)
    with fastscore.mask(model, scores, 0.4, x, ignore=["block1", "stem.0"]) as removed:
        assert set(removed) == {"block2.bn1", "block2.bn2", "block2.shortcut.1"}


@pytest.mark.parametrize("inplace", [False, True])
def test_norm_gates_are_masked_and_not_pruned(inplace: bool) -> None:
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(5)
    scores = fastscore.score(model, [x], units="norms", progress=False)
    with untouched(model), pytest.raises(ValueError, match=r'^scores: .*units="norms".*units="groups"'):
        fastscore.prune(model, scores, x, channels=0.5, inplace=inplace)


def test_norm_gates_without_means_are_not_compensated() -> None:
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(5)
    scores = fastscore.score(model, [x], units="norms", importance="bn-scale", progress=False)
    with untouched(model), pytest.raises(ValueError, match=r"^compensate: .*'bn-scale'"), \
            fastscore.mask(model, scores, 0.3, x, compensate=True):
        pass
    with torch.no_grad(), fastscore.mask(model, scores, 0.3, x) as removed:
        assert sum(map(len, removed.values())) == -int(-0.3 * sum(map(len, scores.values())) // 1)


def test_padding_is_told_to_an_encoder_that_nests_tensors() -> None:
    """As it does without gradients, in evaluation mode; the encoder is what it was afterwards."""
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)

        def forward(self, x: Tensor) -> Tensor:
            padding = x[..., 0] == 0
            return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)[:, :3]

    torch.manual_seed(0)
    model, x = Padded().double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    x[0, 3:] = x[1, 4:] = 0
    scores = magnitudes(model, x)
    ffn = {"ignore": ["*.self_attn"], "compensate": False}
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, **ffn):
        masked = model(x)
    assert model.encoder.use_nested_tensor
    small = fastscore.prune(model, scores, x, channels=0.5, **ffn).model
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked)
        assert (model(x) - masked).abs().max() > 0.01


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.5}])
def test_the_channels_of_a_result_whatever_its_budget(budget: dict[str, float]) -> None:
    model, x = NETWORKS["mobile"].traced().double().eval(), NETWORKS["mobile"].inputs().double()
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, progress=False, **budget)  # type: ignore[arg-type]
    with untouched(model), torch.no_grad():
        with fastscore.mask(model, scores, result, x) as masked:
            found = model(x)
        torch.testing.assert_close(found, result.model(x))
        assert {name: index.tolist() for name, index in masked.items()} == \
            {name: index.tolist() for name, index in result.removed.items()}
        other = fastscore.score(result.model, [x], progress=False)
        with pytest.raises(ValueError, match="the result is of another model"), \
                fastscore.mask(result.model, other, result, x):
            pass
