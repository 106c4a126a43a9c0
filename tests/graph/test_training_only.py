"""Layers that run in training alone."""

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.kept import training_only
from fastscore.graph.tracing import trace


def _group(name: str, *readers: str) -> ChannelGroup:
    every = torch.arange(3)
    return ChannelGroup(name, 3, every, (Member(name, "producer", every, every),
                                         *(Member(reader, "consumer", every, every) for reader in readers)))


class Auxiliary(nn.Module):
    """A head that runs in training alone, dropout, and PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2))
        self.attention, self.drop, self.norm = nn.MultiheadAttention(4, 2), nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] -> [N, 2]."""
        x = self.drop(self.norm(self.body(x)))
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)


def test_layers_that_attention_never_calls_are_not_callable() -> None:
    """nn.MultiheadAttention reads the weights of its output projection."""
    assert training_only.callable_layers(Auxiliary()) == {"body", "head", "auxiliary.0"}


def test_containers_alone_take_the_way_of_training() -> None:
    """In the block; BatchNorm and dropout do not, and all is in evaluation mode afterwards."""
    model = Auxiliary().eval()
    x, called = torch.randn(3, 4), list[str]()
    model.auxiliary.register_forward_hook(lambda *_: called.append("auxiliary"))
    before = model.norm.running_mean.clone()
    with training_only.as_in_training(model):
        assert model.training
        assert not model.drop.training
        assert not model.norm.training
        first, second = model(x), model(x)
    assert called == ["auxiliary"] * 2
    assert torch.equal(first, second)
    assert torch.equal(model.norm.running_mean, before)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), model.head(model.norm(model.body(x))))


def test_readers_are_added_and_nothing_else() -> None:
    """Whatever inactive layers alone read is named; what a trace as in training loses, or finds first, changes
    nothing."""
    evaluated = ChannelGraph((_group("a", "head"), _group("lost", "head"), _group("less", "head", "other")),
                             {"b": "its channels are the output", "c": "ignored", "late": "mixed"}, {})
    trained = ChannelGraph((_group("a", "head", "auxiliary.0"), _group("b", "auxiliary.0"), _group("less", "head"),
                            _group("late", "head")), {"lost": "mixed", "auxiliary.0": "the output"}, {})
    found = training_only.merge(evaluated, trained, {"auxiliary.0"})
    assert {group.name: [member.layer for member in group.role("consumer")] for group in found.groups} == {
        "a": ["head", "auxiliary.0"], "lost": ["head"], "less": ["head", "other"]}
    assert found.skipped["b"] == "it is read by layers that run in training alone"
    assert found.skipped["c"] == "ignored"
    assert found.skipped["late"] == "mixed"
    assert found.skipped["auxiliary.0"] == "the output"


def test_layers_that_never_ran_are_named() -> None:
    """But for those of attention's heads, which are read without a call."""
    every = torch.arange(2)
    heads = ChannelGroup("attention", 2, every, (Member("attention", "heads", every, every),
                                                 Member("attention.out_proj", "consumer", every, every)))
    found = training_only.with_skip_reasons(ChannelGraph((heads,), {}, {}), {"idle", "attention.out_proj"})
    assert set(found.skipped) == {"idle"}
    assert "does not run on example_inputs" in found.skipped["idle"]


class TwoOutputs(Auxiliary):
    """Logits alone in evaluation, a pair in training, as GoogLeNet and Inception."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[N, 4] -> [N, 2]."""
        x = self.norm(self.body(x))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def test_code_that_expects_what_evaluation_gives() -> None:
    """forward= is the user's, and need not take what the model returns in training; heads that run there read still."""
    model, x = TwoOutputs().eval(), torch.randn(5, 4)

    def logits(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float()

    for forward in (call_model, logits):
        (group,) = trace(model, x, forward).groups
        assert (group.name, {member.layer for member in group.role("consumer")}) == ("body", {"head", "auxiliary.0"})


def test_the_reason_of_what_they_read_is_theirs() -> None:
    """score() runs models in evaluation mode; both ways out that the reason names are ways out."""
    torch.manual_seed(0)
    model, x = TwoOutputs(), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match=r"auxiliary.0 reads its channels, and runs in training alone: .*Scorer.*"
                                           "or take it out of the model"):
        fastscore.score(model.eval(), [x], progress=False)
    scorer = fastscore.Scorer(model.train(), x, gradient="loss", output=list)
    with scorer:
        sum(output.square().sum() for output in model(x)).backward()
    assert list(scorer.scores()) == ["body"]
    model.auxiliary = None
    assert list(fastscore.score(model.eval(), [x], progress=False)) == ["body"]


class Variational(nn.Module):
    """A VAE, which draws about its means where it is trained, and takes the means otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_variance = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.decoder, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x).relu()
        mean, log_variance = self.mean(x), self.log_variance(x)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.last(self.decoder(code).relu())


class WritesInTraining(Variational):
    """And counts what it has been trained on; as a whole it does not run so, for reasons of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            raise NotImplementedError
        return super().forward(x)


def test_channels_that_meet_others_in_training_alone_stay() -> None:
    """What is left trains, however much goes."""
    torch.manual_seed(0)
    model, x = Variational().eval(), torch.randn(3, 4)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["encoder", "decoder"]
    assert scores.skipped["mean"].startswith(
        "the model that prune() would return does not, in training, run with fewer channels there (Variational: ")
    small = fastscore.prune(model, scores, x, channels=0.4, scope="layer").model
    small.train()(x).sum().backward()
    scorer = fastscore.Scorer(model.train(), x)
    with scorer:
        model(x).square().sum().backward()
    assert list(scorer.scores()) == ["encoder", "decoder"]


def test_a_model_that_does_not_train_blames_no_channels() -> None:
    """And nothing of the user's model is written to by trying it."""
    model, x = WritesInTraining().eval(), torch.randn(3, 4)
    assert {"encoder", "mean", "decoder"} == set(fastscore.score(model, [x], progress=False))
    assert float(model.seen) == 0
