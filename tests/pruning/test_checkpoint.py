"""Pruned models in files: what comes back is what was saved, made from a dense model that knows nothing of it."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from networks import NETWORKS, Network, randomize
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.pruning.saved import recipes


def pruned(network: Network, times: int = 1, **options: object) -> tuple[nn.Module, Tensor]:
    model, x = network.traced(), network.inputs(3)
    for _ in range(times):
        scores = fastscore.score(model, [x], progress=False)
        model = fastscore.prune(model, scores, x, macs=0.7, **options).model  # type: ignore[arg-type]
    return model, x


def assert_same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])
    assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]
    assert repr(one) == repr(other)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_from_a_fresh_model(name: str, tmp_path: Path) -> None:
    """Pruned once and twice, with and without new biases; the loaded one can be pruned on, too."""
    for times, options in ((1, {}), (2, {"compensate": True})):
        model, x = pruned(NETWORKS[name], times, **options)
        fastscore.save_pruned(model, tmp_path / "p")
        fresh = NETWORKS[name].model(seed=5)
        with untouched(fresh):
            loaded = fastscore.load_pruned(fresh, tmp_path / "p")
        assert_same(loaded, model, x)
        assert recipes.get(loaded) == recipes.get(model)


def test_steps_add_up_in_the_dense_models_numbering(tmp_path: Path) -> None:
    """Oracle: weights that say which channel they were."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.arange(10))
    x = torch.randn(5, 4, dtype=torch.float64)
    for share in (0.8, 0.75, 0.5):
        scores = fastscore.score(model, [x], importance="random", seed=int(100 * share), progress=False)
        model = fastscore.prune(model, scores, x, channels=share).model
    left = model[0].bias.long().tolist()
    assert len(left) == 3
    gone = sorted(set(range(10)) - set(left))
    recipe = recipes.get(model)
    assert recipe is not None
    assert recipe["removed"] == {"0": {"outputs": gone}, "2": {"inputs": gone}}


def test_after_fine_tuning_in_half_precision_and_from_copies(tmp_path: Path) -> None:
    network = NETWORKS["residual"]
    model, x = pruned(network)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for _ in range(2):  # BatchNorm statistics move as well
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
        each.eval().to(torch.bfloat16)
        fastscore.save_pruned(each, tmp_path / "p")
        loaded = fastscore.load_pruned(network.model, tmp_path / "p")
        assert_same(loaded, each, x.to(torch.bfloat16))


def test_modes_flags_and_layout_are_those_of_the_model_built(tmp_path: Path) -> None:
    network = NETWORKS["residual"]
    model, x = pruned(network)
    fastscore.save_pruned(model, tmp_path / "p")

    def build() -> nn.Module:
        dense = network.model().to(memory_format=torch.channels_last).train()
        dense.block1.requires_grad_(False)
        return dense

    loaded = fastscore.load_pruned(build, tmp_path / "p")
    assert loaded.training
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == \
        {f"block1.{name}" for name, _ in loaded.block1.named_parameters()}
    assert loaded.block1.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loaded.eval()(x), model(x))  # another layout: other sums


def test_a_result_and_a_model_pruned_in_place(tmp_path: Path) -> None:
    network = NETWORKS["mobile"]
    model, x = network.traced(), network.inputs(3)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, macs=0.6, inplace=True)
    fastscore.save_pruned(result, tmp_path / "p")
    assert_same(fastscore.load_pruned(network.model(), tmp_path / "p"), model, x)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.hidden, self.out, self.again = (
                nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
            self.again.weight = self.out.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.out(self.hidden(self.enter(x).relu()).relu()).relu())

    model, x = Tied(), torch.randn(3, 4)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.9)
    assert "enter" in result.removed
    fastscore.save_pruned(result, tmp_path / "p")
    loaded = fastscore.load_pruned(Tied, tmp_path / "p")
    assert_same(loaded, result.model, x)
    assert loaded.out.weight is loaded.again.weight


def test_through_torch_compile(tmp_path: Path) -> None:
    model, x = pruned(NETWORKS["mlp"])
    fastscore.save_pruned(torch.compile(model, backend="eager"), tmp_path / "p")
    assert_same(fastscore.load_pruned(NETWORKS["mlp"].model, tmp_path / "p"), model, x)


def assert_loaded_into(build: Callable[[], nn.Module], file: Path) -> None:
    """What is pruned of one such model is loaded into another, which stays as it is, and into one that is built."""
    x, model, fresh = torch.randn(3, 4), build(), build()
    small = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.6).model
    fastscore.save_pruned(small, file)
    with untouched(fresh):
        assert_same(fastscore.load_pruned(fresh, file), small, x)
    assert_same(fastscore.load_pruned(build, file), small, x)


WRAPPERS = {"DataParallel": nn.DataParallel, "torch.compile": lambda model: torch.compile(model, backend="eager"),
            "torch.compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager")}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_into_a_wrapped_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """The smaller one has nothing around it, as what prune() returns."""
    assert_loaded_into(lambda: wrap(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))), tmp_path / "p")


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_into_a_model_with_weight_norm(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Of either kind, that has not run: its weights have a history until it does."""
    assert_loaded_into(lambda: nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), norm(nn.Linear(6, 5)), nn.ReLU(),
                                             nn.Linear(5, 2)), tmp_path / "p")


class Adjacent(nn.Module):
    """Mixes six places by a sparse matrix, and has complex factors."""

    def __init__(self, layout: torch.layout, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        near = torch.eye(6, dtype=torch.double) + (torch.rand(6, 6) > 0.5)
        self.register_buffer("near", near.to_sparse(layout=layout))
        self.one, self.two, self.head = (nn.Linear(*widths).double() for widths in ((5, 8), (8, 6), (6, 2)))
        self.factor = nn.Parameter(torch.randn(6, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two):
            x = layer(x).movedim(0, 1)
            x = torch.sparse.mm(self.near, x.flatten(1)).view_as(x).movedim(0, 1).relu()
        return (self.head(x.mean(1))[..., None] * self.factor).abs().flatten(1)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_and_complex_tensors(layout: torch.layout, tmp_path: Path) -> None:
    model, x = Adjacent(layout, 0).eval(), torch.randn(3, 6, 5, dtype=torch.double)
    scores = fastscore.score(model, [x], resume=tmp_path / "run", progress=False)
    assert list(scores) == ["one", "two"]
    small = fastscore.prune(model, scores, x, channels=0.6).model
    fastscore.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(lambda: Adjacent(layout, 1).eval(), tmp_path / "small.safetensors")
    assert loaded.near.layout is layout
    assert torch.equal(loaded.near.to_dense(), model.near.to_dense())
    assert torch.equal(loaded.factor, model.factor)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
    model.near = model.near * 2  # which a run that goes on would not notice in its weights alone
    with pytest.raises(ValueError, match="run"):
        fastscore.score(model, [x], resume=tmp_path / "run", progress=False)


def test_a_dense_model_built_otherwise_is_refused(tmp_path: Path) -> None:
    model, _ = pruned(NETWORKS["residual"])
    fastscore.save_pruned(model, tmp_path / "p")
    other = NETWORKS["residual"].traced()
    other.block1.conv1.stride = (2, 2)
    with untouched(other), pytest.raises(ValueError, match=r"p: it was pruned from another model: block1\.conv1 was .*"
                                                           r"stride=\(1, 1\).* and is .*stride=\(2, 2\)"):
        fastscore.load_pruned(other, tmp_path / "p")
    with untouched(model), pytest.raises(ValueError, match="build the dense model as it was before"):
        fastscore.load_pruned(model, tmp_path / "p")
    with pytest.raises(ValueError, match=r"the model itself was Residual\(\) and is Sequential\(\)"):
        fastscore.load_pruned(NETWORKS["plain"].model(), tmp_path / "p")


def test_a_model_changed_after_pruning_is_refused(tmp_path: Path) -> None:
    model, _ = pruned(NETWORKS["residual"])
    model.head.fc = nn.Linear(model.head.fc.in_features, 9).double()
    fastscore.save_pruned(model, tmp_path / "p")
    with pytest.raises(ValueError, match=r"head\.fc\.weight is \[9, \d\] in the file and \[4, \d\] in the model"):
        fastscore.load_pruned(NETWORKS["residual"].model(), tmp_path / "p")


def test_what_prune_did_not_make_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Residual has no recipe"):
        fastscore.save_pruned(NETWORKS["residual"].model(), tmp_path / "p")
    assert not list(tmp_path.iterdir())
    model, _ = pruned(NETWORKS["mlp"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastscore.save_pruned(model, tmp_path / "nowhere" / "p")


@pytest.mark.parametrize(("name", "way"), [("p.pth", "torch.save"), ("p.pt", "torch.save"), ("p.BIN", "torch.save"),
                                           ("p.onnx", "fastscore.save"), ("p.pt2", "fastscore.save")])
def test_a_name_by_which_another_would_read_it_is_refused(name: str, way: str, tmp_path: Path) -> None:
    """The ways out work: another name, and what the error says of this one."""
    model, x = pruned(NETWORKS["mlp"])
    with pytest.raises(ValueError, match=rf"path: .*{re.escape(name)}: .* p\.safetensors; or {way}\(") as caught:
        fastscore.save_pruned(model, tmp_path / name)
    assert not list(tmp_path.iterdir())
    said = re.search(r"safetensors; or (.*\))(?:$|,)", str(caught.value))
    assert said is not None
    if name != "p.onnx":
        eval(said[1], {"torch": torch, "fastscore": fastscore, "model": model, "result": model, "example_inputs": x})
        assert (tmp_path / name).stat().st_size
    fastscore.save_pruned(model, tmp_path / "p.safetensors")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, x = pruned(NETWORKS["mlp"])
    path = tmp_path / "p"
    with pytest.raises(FileNotFoundError, match="p: there is no such pruned model"):
        fastscore.load_pruned(NETWORKS["mlp"].model, path)
    fastscore.score(NETWORKS["mlp"].traced(), [x], progress=False).save(path)
    with pytest.raises(ValueError, match="p: not a fastscore pruned model"):
        fastscore.load_pruned(NETWORKS["mlp"].model, path)
    fastscore.save_pruned(model, path)
    contents = bytearray(path.read_bytes())
    dense = NETWORKS["mlp"].traced()
    noticed = 0
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(contents), (150,), generator=generator).tolist():
        contents[place] ^= 1 << place % 8
        path.write_bytes(contents)
        contents[place] ^= 1 << place % 8
        try:
            loaded = fastscore.load_pruned(dense, path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            noticed += 1
        else:
            assert_same(loaded, model, x)
    assert noticed > 145
    for size in range(0, len(contents), len(contents) // 40):
        path.write_bytes(contents[:size])
        with pytest.raises(ValueError, match="p: "):
            fastscore.load_pruned(dense, path)


def test_a_real_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(torchvision.models.mobilenet_v3_small(num_classes=10)).eval()
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
        model = fastscore.prune(model, scores, x[:1], params=0.7).model
    fastscore.save_pruned(model, tmp_path / "p")
    assert_same(fastscore.load_pruned(torchvision.models.mobilenet_v3_small(num_classes=10).eval(), tmp_path / "p"),
                model, x)


def test_attention_pruned_while_it_is_tapped(tmp_path: Path) -> None:
    """PyTorch's attention is replaced as long as a scorer is attached; the file knows the model as it is without."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(12, 4, batch_first=True), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].tanh().mean(1))

    model, x = Attending().eval(), torch.randn(2, 5, 12)
    scorer = fastscore.Scorer(model, x)
    with scorer:
        model(x).square().sum().backward()
        result = fastscore.prune(model, scorer.scores(), x, channels=0.5)
    fastscore.save_pruned(result, tmp_path / "p")
    loaded = fastscore.load_pruned(lambda: Attending().eval(), tmp_path / "p")
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_a_file_in_the_place_of_the_model_is_told() -> None:
    with pytest.raises(TypeError, match="model: str; give the dense model, or a function that builds it, and then the"):
        fastscore.load_pruned("p", NETWORKS["mlp"].model)
