"""Optimizers after pruning: their state is sliced, and training goes on as if what was removed had never been."""

import copy
from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, Network
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.pruning.masking import at_consumers
from fastscore.pruning.result import PruneResult
from fastscore.recovery.compensation import removed_positions

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, betas=(0.8, 0.9), weight_decay=0.1, foreach=False),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.01, initial_accumulator_value=0.1),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x).flatten(1).tanh()
        (output * torch.linspace(-1, 1, output.shape[1], dtype=output.dtype)).mean().backward()
        optimizer.step()


def pruned(network: Network, optimizer: str = "sgd", share: float = 0.6, **options: object) -> \
        tuple[nn.Module, torch.optim.Optimizer, PruneResult, Tensor]:
    """A model in evaluation mode, its optimizer after three steps, and what pruning made of it."""
    model, x = network.traced(), network.inputs(3)
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, made, x)
    scores = fastscore.score(model, [x], progress=False)
    return model, made, fastscore.prune(model, scores, x, channels=share, **options), x  # type: ignore[arg-type]


def kept(network: Network, result: PruneResult, layer: str, old: Tensor) -> Tensor:
    """Oracle for plain layers: rows and columns of a weight [out, in, ...] that stay, by the hand-written groups."""
    rows, columns = (torch.ones(size, dtype=torch.bool) for size in (*old.shape, 0)[:2])
    for name, group in network.groups.items():
        gone = result.removed.get(name, torch.empty(0, dtype=torch.int64)).tolist()
        if layer in group.producers:
            rows[gone] = False
        if layer in group.edges and old.dim() > 1:
            columns[[p for channel in gone for p in group.edges[layer][channel]]] = False
    return old[rows] if old.dim() == 1 else old[rows][:, columns]


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["plain", "flattening", "dense", "unet"])
def test_state_is_sliced(name: str, optimizer: str) -> None:
    network = NETWORKS[name]
    model, old, result, _ = pruned(network, optimizer)
    before = copy.deepcopy(old.state_dict())
    new = fastscore.rebuild_optimizer(old, model, result)
    assert type(new) is type(old)
    assert {**new.param_groups[0], "params": 0} == {**old.param_groups[0], "params": 0}
    assert [id(p) for group in new.param_groups for p in group["params"]] == [id(p) for p in result.model.parameters()]
    checked = 0
    for key, parameter in model.named_parameters():
        layer = key.rpartition(".")[0]
        if isinstance(model.get_submodule(layer), (nn.Conv2d, nn.Linear)):
            states = old.state[parameter], new.state[result.model.get_parameter(key)]
            assert states[0].keys() == states[1].keys()
            for entry, value in states[0].items():
                expected = kept(network, result, layer, value) if value.shape == parameter.shape else value
                assert torch.equal(states[1][entry], expected)
                checked += value.shape == parameter.shape
    assert checked >= 4
    after = old.state_dict()  # as it was
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(value, before["state"][index][key]) for index, state in after["state"].items()
               for key, value in state.items())


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["plain", "dense", "mobile", "grouped", "unet", "tokens", "signal"])
def test_training_goes_on_as_on_the_dense_model_with_a_mask(name: str, optimizer: str) -> None:
    """What is left gets the same gradients in both, so it takes the same steps; the outputs tell."""
    network = NETWORKS[name]
    model, old, result, x = pruned(network, optimizer, compensate=False)
    new = fastscore.rebuild_optimizer(old, model, result)
    groups = trace(model, x).groups
    list(at_consumers(model, removed_positions(groups, result.removed), {}))
    forgetful = copy.deepcopy(result.model)
    train(model, old, x)
    train(result.model, new, x)
    train(forgetful, OPTIMIZERS[optimizer](forgetful.parameters()), x)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-7, atol=1e-9)
        assert (forgetful(x) - model(x)).abs().max() > 1e-6


@pytest.mark.parametrize("name", list(NETWORKS))
def test_state_lies_where_its_parameters_lie(name: str) -> None:
    """State that holds a parameter's own values holds those of the smaller one afterwards, whatever surgery did."""
    model, x = NETWORKS[name].traced(), NETWORKS[name].inputs(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for share in (0.8, 0.7):
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
        result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=share,
                                 compensate=False)
        optimizer, model = fastscore.rebuild_optimizer(optimizer, model, result), result.model
        assert len(optimizer.state) == len(list(model.parameters()))
        assert all(torch.equal(optimizer.state[p]["momentum_buffer"], p) for p in model.parameters())


def test_groups_settings_and_other_parameters_stay() -> None:
    model, x = NETWORKS["plain"].traced(), NETWORKS["plain"].inputs(3)
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    old = torch.optim.SGD([{"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.1, "weight_decay": 0.5},
                           {"params": [*(p for p in model.parameters() if p.dim() == 1), other], "lr": 0.2}],
                          lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(old, 1, 0.5)
    other.grad = torch.full_like(other, 2)
    old.step()
    scheduler.step()
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.5)
    new = fastscore.rebuild_optimizer(old, model, result)
    assert [(group["lr"], group["weight_decay"], group["initial_lr"]) for group in new.param_groups] == \
        [(0.05, 0.5, 0.1), (0.1, 0, 0.2)]
    assert any(parameter is other for parameter in new.param_groups[1]["params"])
    assert torch.equal(new.state[other]["momentum_buffer"], old.state[other]["momentum_buffer"])
    again = torch.optim.lr_scheduler.StepLR(new, 1, 0.5)  # the scheduler goes on from its state
    again.load_state_dict(scheduler.state_dict())
    new.step()
    again.step()
    assert [group["lr"] for group in new.param_groups] == [0.025, 0.05]


def test_a_new_bias_joins_the_group_of_its_weight() -> None:
    model, old, result, x = pruned(NETWORKS["residual"], "adam", compensate=True)
    added = {name for name, _ in result.model.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert added
    new = fastscore.rebuild_optimizer(old, model, result)
    assert {id(p) for p in new.param_groups[0]["params"]} == {id(p) for p in result.model.parameters()}
    assert not any(result.model.get_parameter(name) in new.state for name in added)
    before = {name: result.model.get_parameter(name).detach().clone() for name in added}
    train(result.model, new, x, 1)
    assert all(not torch.equal(before[name], result.model.get_parameter(name)) for name in added)


def test_an_optimizer_that_has_not_stepped_and_frozen_parameters() -> None:
    model, x = NETWORKS["plain"].traced(), NETWORKS["plain"].inputs(3)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.5)
    old = torch.optim.Adam([p for name, p in model.named_parameters() if name.startswith("8")], 0.1)
    new = fastscore.rebuild_optimizer(old, model, result)
    assert [id(p) for p in new.param_groups[0]["params"]] == [id(p) for p in result.model[8].parameters()]
    assert not new.state
    train(result.model, new, x, 1)


def test_what_cannot_be_rebuilt() -> None:
    model, old, result, x = pruned(NETWORKS["plain"])
    stranger, _, other, _ = pruned(NETWORKS["mlp"])
    with pytest.raises(ValueError, match=r"^optimizer: it holds none of the model's parameters"):
        fastscore.rebuild_optimizer(old, stranger, other)
    with pytest.raises(ValueError, match=r"^result: it is not what pruning the model gave"):
        fastscore.rebuild_optimizer(old, model, replace(result, model=other.model))
    lbfgs = torch.optim.LBFGS(model.parameters())
    lbfgs.step(lambda: model(x).square().sum())
    with pytest.raises(ValueError, match=r"^optimizer: LBFGS"):
        fastscore.rebuild_optimizer(lbfgs, model, result)
    factored = torch.optim.Adafactor(model.parameters())
    train(model, factored, x, 1)
    with pytest.raises(ValueError, match=r"^optimizer: its state 'row_var' has shape .* make a new optimizer"):
        fastscore.rebuild_optimizer(factored, model, result)

    class Strange(torch.optim.SGD):
        def __init__(self, parameters: object, lr: float, needed: object) -> None:
            super().__init__(parameters, lr)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"^optimizer: Strange cannot be built .*needed"):
        fastscore.rebuild_optimizer(Strange(model.parameters(), 0.1, None), model, result)
