"""What `ignore` does, and that every message that speaks of it leads on: its advice, taken by the letter, goes through.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore.pruning.budgets.latency import search_steps

RESIDUAL, ATTENTION = NETWORKS["residual"], nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


def out_of_reach(**options: Any) -> Callable[..., Any]:
    model, x = RESIDUAL.model(), RESIDUAL.inputs()
    scores = fastscore.score(model, [x], progress=False)
    return lambda **changed: fastscore.prune(model, scores, x, **{**options, **changed})


def too_slow(share: float) -> Callable[..., Any]:
    return lambda latency=share: search_steps([4.0, 3.0, 2.0, 1.0], 0, latency, lambda steps, _: 1 - 0.1111 * steps)


def flattened() -> Callable[..., Any]:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 8, 1),
                          nn.Flatten(), nn.Linear(8 * 60 * 60, 2))
    x = torch.randn(1, 1, 60, 60)
    return lambda **options: fastscore.score(model, [x], ablation="mean", progress=False, **options)


def without_means() -> Callable[..., Any]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 3), nn.Conv2d(24, 4, 3)), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[2:] *= 1e-3  # these go first
    scores = fastscore.score(model, [x], progress=False)
    scores = replace(scores, means={"2": scores.means["2"]})
    return lambda **options: fastscore.prune(model, scores, x, channels=0.8, compensate=True, **options)


def no_such_layer() -> Callable[..., Any]:
    model, x = RESIDUAL.model(), RESIDUAL.inputs()
    return lambda ignore=("block1.conv9",): fastscore.score(model, [x], ignore=ignore, progress=False)


def named(message: str) -> dict[str, Any]:
    """ignore=[...], as a message has it."""
    (found,) = re.findall(r"ignore=(\[[^\]]*\])", message)
    return {"ignore": ast.literal_eval(found)}


def asked_for(budget: str) -> Callable[[str], dict[str, Any]]:
    def advice(message: str) -> dict[str, Any]:
        (share,) = re.findall(r"gone, ([\d.e-]+) of the", message)
        return {budget: float(share)}

    return advice


def suggested(message: str) -> dict[str, Any]:
    (names,) = re.findall(r"did you mean ([^?]*)\?", message)
    return {"ignore": [ast.literal_eval(name) for name in names.split(", ")[:1]]}


FEWER = "ignore fewer layers"
MESSAGES: dict[str, tuple[str, Callable[[], Callable[..., Any]], Callable[[str], dict[str, Any]]]] = {
    # what says "ignore" in it, how to get there, what the message says to do
    "channels": (FEWER, lambda: out_of_reach(channels=0.01), asked_for("channels")),
    "params": (FEWER, lambda: out_of_reach(params=0.001), asked_for("params")),
    "macs": (FEWER, lambda: out_of_reach(macs=0.001), asked_for("macs")),
    "a floor": (FEWER, lambda: out_of_reach(channels=0.4, floor=0.7), lambda message: {"floor": 0.0}),
    "ignored": (FEWER, lambda: out_of_reach(macs=0.4, ignore=["stem", "block1"]), lambda message: {"ignore": []}),
    "everything": ("it leaves no channel that can go", lambda: out_of_reach(macs=0.8, ignore=["*"]),
                   lambda message: {"ignore": []}),
    "latency": (FEWER, lambda: too_slow(0.1), asked_for("latency")),
    "too many products": ('leave it out with ignore=["', flattened, named),
    "no means": ("or leave out what makes them: ignore=", without_means, named),
    "no such layer": ("matches no layer of", no_such_layer, suggested),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_way_out_that_a_message_names_is_one(name: str) -> None:
    fragment, setup, advice = MESSAGES[name]
    attempt = setup()
    with pytest.raises((ValueError, RuntimeError), match=re.escape(fragment)) as raised:
        attempt()
    attempt(**advice(str(raised.value)))


def test_no_other_message_speaks_of_it() -> None:
    """Every string of the library that says "ignore", but for docstrings and the help of the command line."""
    found = set()
    for path in Path(fastscore.__file__).parent.rglob("*.py"):
        text = path.read_text()
        nodes = list(ast.walk(ast.parse(text))) if "ignore" in text else []
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation \
                    and re.search(r"\bignore\b[^\"']", node.value) and "--ignore" not in node.value:
                found.add(node.value)
    fragments = {fragment for fragment, _, _ in MESSAGES.values()}
    # save_pretrained's, which tests/integrations/test_plain_transformers.py follows to a folder that loads; and what is
    # said of NaN, which test_bad_numbers.py follows
    elsewhere = {"beside what is there, ignore=[", "keep that width: prune with ignore=[",
                 "channels that do not meet this layer go with ignore="}
    told = {text for text in found if not any(fragment in text for fragment in fragments | elsewhere)}
    assert told == {"ignore: "}  # the beginning of "no such layer"
    assert all(any(fragment in text for text in found) for fragment in fragments - {"matches no layer of"})


def test_what_is_ignored_stays_as_it_is() -> None:
    """Be it a producer, a consumer, what stands between, or what holds them: no weight in it loses anything."""
    torch.manual_seed(0)
    encoder, tokens = nn.Sequential(nn.Linear(5, 8), ATTENTION, nn.Linear(8, 3)).eval(), torch.randn(2, 4, 5)
    for model, x in ((RESIDUAL.model(), RESIDUAL.inputs()), (encoder, tokens)):
        scores = fastscore.score(model, [x], progress=False)
        free = fastscore.prune(model, scores, x, channels=0.6).removed_indices
        touched = {layer for layer, _ in free}
        assert {side for _, side in free} >= {"inputs", "outputs"}
        for name, module in model.named_modules():
            if not name or len(list(module.parameters())) == len(list(model.parameters())):
                continue
            if model is encoder and name == "1":  # which holds all that can go
                with pytest.raises(ValueError, match="leaves no channel that can go"):
                    fastscore.prune(model, scores, x, channels=0.6, ignore=[name])
                continue
            small = fastscore.prune(model, scores, x, channels=0.6, ignore=[name]).model
            for key, before in module.named_parameters():
                assert small.get_submodule(name).get_parameter(key).shape == before.shape, (name, key)
            assert {key for key, _ in module.named_parameters()} == \
                {key for key, _ in small.get_submodule(name).named_parameters()}
        for layer in touched:
            assert set(fastscore.score(model, [x], ignore=[layer], progress=False)) < set(scores), layer


class Decodes(nn.Module):
    """By the weight that it encodes by; what multiplies by it the second time has a name once the model was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.code, self.last = nn.Linear(3, 6), nn.Linear(6, 8, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.code(self.first(x).relu()).relu() @ self.code.weight).relu())


def test_names_that_only_a_trace_finds_are_taken_before_one() -> None:
    """And kinds of things that are meant for none are refused before it, an iterator is read once."""
    x = torch.randn(4, 3)
    scores = fastscore.score(Decodes().eval(), [x], progress=False)
    assert set(scores) == {"code", "first"}
    with pytest.raises(ValueError, match="ignored with weight_of_code"):
        fastscore.score(Decodes().eval(), [x], progress=False, ignore=iter(["weight_of_code"]))
    with pytest.raises(TypeError, match="ignore: 3, where names"):
        fastscore.score(Decodes().eval(), [x], progress=False, ignore=3)
    with pytest.raises(ValueError, match="ignore: 'weight_of_cod' matches no layer of Decodes; did you mean"):
        fastscore.score(Decodes().eval(), [x], progress=False, ignore="weight_of_cod")
    with pytest.raises(ValueError, match="ignored with weight_of_code"):
        fastscore.prune_iteratively(Decodes().eval(), [x], steps=1, channels=0.5, ignore="weight_of_code")
    with pytest.raises(TypeError, match="ignore: 3, where names"):
        fastscore.prune_iteratively(Decodes().eval(), [x], steps=1, channels=0.5, ignore=3)
