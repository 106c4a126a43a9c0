"""Groups whose channels can go from an evaluation copy, and not from the model that prune() returns."""

import re

import pytest
import torch
import transformers
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.modules import evaluation_copy

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class KeepsWidth(nn.Module):
    """Its width stands on the instance, and is forgotten on the way into evaluation mode by whoever makes the copy that
    is measured (below): the code of the model that is returned compares it with what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: int | None = 8

    def forward(self, x: Tensor) -> Tensor:
        assert self.expected in (None, x.shape[1]), f"{x.shape[1]} channels, and not {self.expected}"
        return x.tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.keeps, self.second = nn.Linear(5, 8), KeepsWidth(), nn.Linear(8, 6)
        self.third = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.keeps(self.first(x))).relu())


@pytest.fixture
def other_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation copy replaces what the model that is returned has, as it does with attention."""
    from fastscore.graph import tracing
    from fastscore.graph.trials import surgery_trial

    own = evaluation_copy.evaluation_copy

    def replacing(model: nn.Module) -> nn.Module:
        made = own(model)
        for module in made.modules():
            if isinstance(module, KeepsWidth):
                module.expected = None
        return made

    for module in (tracing, surgery_trial):
        monkeypatch.setattr(module, "evaluation_copy", replacing)


@pytest.mark.usefixtures("other_copy")
def test_what_the_evaluation_copy_hides_is_found() -> None:
    torch.manual_seed(0)
    model = Net().double()
    with untouched(model):
        graph = trace(model, X)
        assert [group.name for group in graph.groups] == ["second"]
        assert re.search(r"^the model that prune\(\) would return does not run with fewer channels there "
                         r"\(keeps \(KeepsWidth\): AssertionError: \d channels, and not 8\)$", graph.skipped["first"])
        scores = fastscore.score(model, [X], progress=False)
        assert list(scores) == ["second"]
        assert "keeps (KeepsWidth)" in str(scores)
        small = fastscore.prune(model, scores, X, channels=0.5).model
    assert small(X).shape == (3, 4)


def test_a_model_goes_on_running_with_its_cache() -> None:
    """Of a state that is as wide as its config says, which it makes where it keeps one alone."""
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=16)).eval()
    batch = {"input_ids": torch.randint(0, 30, (3, 5), generator=torch.Generator().manual_seed(0))}
    scores = fastscore.score(model, [batch], forward=forward, progress=False)
    assert any(re.search("would return does not, with a cache, run .*must match the existing size", why)
               for why in scores.skipped.values())
    result = fastscore.prune(model, scores, batch, macs=0.8, forward=forward, compensate=False)
    torch.testing.assert_close(result.model(**batch).logits, result.model(**batch, use_cache=False).logits)
    tokens = batch["input_ids"][:2]
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    text = result.model.generate(tokens, **options)
    with fastscore.mask(model, scores, result, batch, forward=forward, compensate=False):
        assert torch.equal(text, model.generate(tokens, **options))
