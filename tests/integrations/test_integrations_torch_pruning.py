"""Torch-Pruning's pruners, run for real, remove what fastscore ranks lowest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore import Scores
from fastscore.integrations.torch_pruning import Importance


def scored(model: nn.Module, x: Tensor, **options: Any) -> Scores:
    return fastscore.score(model, [x], progress=False, **options)


def groups_of(model: nn.Module, x: Tensor) -> tuple[Any, list[Any]]:
    graph = tp.DependencyGraph().build_dependency(model, x)
    return graph, list(graph.get_all_groups())


def root_of(graph: Any, group: Any) -> str:
    return graph._module2name[group[0].dep.target.module]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_group_rooted_at_any_of_its_producers_has_the_scores_of_its_channels(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs()
    scores = scored(model, x)
    graph, _ = groups_of(model, x)
    importance = Importance(scores)
    for group, spec in network.groups.items():
        for producer in spec.producers:
            layer = model.get_submodule(producer)
            rooted = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels,
                                             list(range(spec.channels)))
            torch.testing.assert_close(importance(rooted), scores[group])


def test_a_group_rooted_at_an_input_has_the_scores_of_the_channels_it_reads() -> None:
    """A Linear behind a flattened convolution reads each channel at 16 places."""
    model, x = NETWORKS["flattening"].traced(), NETWORKS["flattening"].inputs()
    scores = scored(model, x)
    graph, _ = groups_of(model, x)
    for index in (list(range(64)), [0, 16, 17, 63], [5]):
        group = graph.get_pruning_group(model[4], tp.prune_linear_in_channels, index)
        torch.testing.assert_close(Importance(scores)(group), scores["0"][torch.tensor(group[0].idxs) // 16])


def test_roots_that_are_unknown_are_passed_over() -> None:
    """Torch-Pruning gives None as root where it cannot tell: keys and values shared by several queries."""
    model, x = NETWORKS["mlp"].traced(), NETWORKS["mlp"].inputs()
    scores = scored(model, x)
    graph, _ = groups_of(model, x)
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(8)))
    (consumer,) = (item for item in group if item.dep.target.module is model[3])
    consumer.root_idxs = [None] * 8
    torch.testing.assert_close(Importance(scores)(group), scores["0"])
    group[0].root_idxs = [*range(7), None]
    torch.testing.assert_close(Importance(scores)(group), scores["0"])


class Added(nn.Module):
    """One convolution's channels are added to those of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)
        self.last = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).mean((2, 3))


def test_a_group_takes_its_scores_from_all_that_make_its_channels_or_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(6, 3, 4, 4)
    scores = scored(model, x)
    assert set(scores) == {"a", "b"}
    graph, _ = groups_of(model, x)
    group = graph.get_pruning_group(model.c, tp.prune_conv_out_channels, list(range(5)))
    torch.testing.assert_close(Importance(scores)(group), torch.cat([scores["a"], scores["b"]]))
    assert Importance(scored(model, x, ignore="a"))(group) is None


def basic(**options: Any) -> Callable[..., Any]:
    return lambda model, x, importance, steps: tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.5, iterative_steps=steps, ignored_layers=last_layers(model), **options)


def last_layers(model: nn.Module) -> list[nn.Module]:
    return [[module for module in model.modules() if isinstance(module, nn.Linear)][-1]]


def growing(model: nn.Module, x: Tensor, importance: Importance, steps: int) -> Any:
    pruner = tp.pruner.GrowingRegPruner(model, x, importance, pruning_ratio=0.5, iterative_steps=steps,
                                        ignored_layers=last_layers(model))
    return Regularised(pruner, model, x)


def group_norm(model: nn.Module, x: Tensor, importance: Importance, steps: int) -> Any:
    pruner = tp.pruner.GroupNormPruner(model, x, importance, pruning_ratio=0.5, iterative_steps=steps,
                                       ignored_layers=last_layers(model), global_pruning=True)
    return Regularised(pruner, model, x)


class Regularised:
    """A pruner of sparse training: every step comes after one of its training."""

    def __init__(self, pruner: Any, model: nn.Module, x: Tensor) -> None:
        self.pruner, self.model, self.x = pruner, model, x
        self.DG = pruner.DG

    def step(self, interactive: bool) -> Any:
        self.pruner.update_regularizer()
        self.model(self.x).sum().backward()
        if hasattr(self.pruner, "update_reg"):
            self.pruner.update_reg()
        self.pruner.regularize(self.model)
        self.model.zero_grad()
        return self.pruner.step(interactive=interactive)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2,
                                       num_classes=5)


def transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12,
                                                mlp_dim=20, num_classes=5)


MODELS = {"residual": (NETWORKS["residual"].build, (3, 8, 8)), "densenet": (densenet, (3, 32, 32)),
          "transformer": (transformer, (3, 16, 16))}
PRUNERS = {"local": basic(), "global": basic(global_pruning=True), "isomorphic": basic(
    global_pruning=True, isomorphic=True), "growing": growing, "group norm": group_norm}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().eval()
    if name == "transformer":
        nn.init.normal_(model.heads.head.weight)  # torchvision starts from zero, which sends no gradient back
    return model, torch.randn(6, *shape)


# GroupNormPruner takes the root of an importance without asking whether there is one
RUNS = [(name, pruner) for name in MODELS for pruner in PRUNERS if (name, pruner) != ("transformer", "group norm")]


@pytest.mark.parametrize(("name", "pruner"), RUNS)
def test_every_step_removes_the_lowest_of_each_group(name: str, pruner: str) -> None:
    model, x = built(name)
    made: list[Scores] = []

    def make() -> Scores:
        made.append(scored(model, x))
        return made[-1]

    running = PRUNERS[pruner](model, x[:1], Importance(make), 2)
    removed = 0
    for step in range(2):
        for group in running.step(interactive=True):
            scores = made[-1]
            owners = {graph_name for item in group if (graph_name := running.DG._module2name.get(
                item.dep.target.module)) in scores and running.DG.is_out_channel_pruning_fn(item.dep.handler)}
            for owner in owners:
                gone = sorted({index for item in group for index in item.idxs
                               if running.DG._module2name.get(item.dep.target.module) == owner
                               and running.DG.is_out_channel_pruning_fn(item.dep.handler)})
                order = [channel for layer, channel, _ in scores.ranking() if layer == owner]
                assert gone == sorted(order[:len(gone)]), owner
                removed += len(gone)
            group.prune()
        assert len(made) == step + 1  # scored once for each step
        with torch.no_grad():
            assert torch.isfinite(model(x)).all()
    assert removed > 0


def test_scores_that_are_stale_after_a_step_are_refused_before_anything_changes() -> None:
    model, x = built("residual")
    pruner = PRUNERS["local"](model, x[:1], Importance(scored(model, x)), 2)
    pruner.step()
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^scores: .*pruned since: .*Importance\(lambda"):
        pruner.step()
    assert before == {name: parameter.shape for name, parameter in model.named_parameters()}


def test_scores_of_another_model_or_of_other_units_are_refused() -> None:
    model, x = built("residual")
    other, inputs = NETWORKS["plain"].traced(), NETWORKS["plain"].inputs()
    for scores, message in ((scored(other, inputs), "know a layer 0, and the pruner's model has none"),
                            (scored(model, x, units="norms"), "units=.norms.")):
        for make in (scores, lambda scores=scores: scores):
            pruner = PRUNERS["global"](built("residual")[0], x[:1], Importance(make), 1)
            with pytest.raises(ValueError, match=f"^scores: .*{message}"):
                pruner.step()


def test_groups_without_a_score_are_left_alone() -> None:
    model, x = built("residual")
    scores = scored(model, x, ignore=["block1.conv1"])  # which reads those of the stem
    graph, groups = groups_of(model, x[:1])
    found = {root_of(graph, group): Importance(scores)(group) for group in groups}
    assert [root for root, values in found.items() if values is None] == ["head.fc", "stem.0", "block1.conv1"]


class Attention(nn.Module):
    """Four heads of two channels; a residual stream around them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 8), Attention(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(x)).mean(1))


def test_attention_heads_go_by_their_scores() -> None:
    """Torch-Pruning roots their group at the input of the output projection."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(6, 5, 6)
    scores = scored(model, x)
    lowest = scores["attention.q_proj"].reshape(4, 2)[:, 0].argsort()[:2]
    attention = model.attention
    before = {name: getattr(attention, name).weight.detach().clone() for name in ("q_proj", "k_proj", "v_proj")}
    pruner = tp.pruner.BasePruner(
        model, x, Importance(scores), pruning_ratio=0.5, head_pruning_ratio=0.5, prune_num_heads=True,
        prune_head_dims=False, ignored_layers=[model.embed, model.head],
        num_heads={attention.q_proj: 4, attention.k_proj: 4, attention.v_proj: 4})
    pruner.step()
    kept = torch.tensor([row for row in range(8) if row // 2 not in lowest])
    for name, weight in before.items():
        assert torch.equal(getattr(attention, name).weight, weight[kept]), name
    assert attention.o_proj.in_features == 4
    assert torch.isfinite(model(x)).all()


class Partly(nn.Module):
    """A convolution of whose outputs a part goes, where something runs over the others."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.rest = 6, 4
        self.first, self.last = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        part, rest = self.first(x).split([self.part, self.rest], 1)
        return self.last(torch.cat([part.relu(), rest.softmax(1)], 1))


def test_a_layer_with_scores_of_a_part_of_its_outputs_is_left_alone() -> None:
    model, x = Partly().eval(), torch.randn(2, 3, 4, 4)
    scores = scored(model, x)
    assert {layer: len(values) for layer, values in scores.items()} == {"first": 6}
    graph = tp.DependencyGraph().build_dependency(model, x)
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, list(range(10)))
    assert Importance(scores)(group) is None
