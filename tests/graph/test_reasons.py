"""What is kept is kept for a reason that is true, and what is beside it goes."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

import fastscore
from fastscore.graph.tracing import trace


class Chain(nn.Module):
    """Five Linears, which a case calls in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.last = (nn.Linear(6, 6) for _ in range(5))


class Autoencoder(Chain):
    """Encodes by layers, and decodes by their weights."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        decoded = F.linear(F.linear(h, self.b.weight.t()).relu(), self.a.weight.t())
        return self.last(self.d(self.c(decoded).relu()).relu())


class Fourier(Chain):
    """Mixes all that there is by a Fourier transform, as FNet does, of which it takes the real part."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + torch.fft.fft2(x).real
        return self.last(self.d((x + self.b(self.c(x).relu())).relu()).relu())


def test_a_transform_over_channels_is_no_view() -> None:
    graph = trace(Fourier().double().eval(), torch.randn(3, 4, 6).double())
    assert [group.name for group in graph.groups] == ["c", "d"]
    assert graph.skipped["a"] == "an operation runs over all its channels (FftC2CBackward0)"


class Detached(Chain):
    """A layer reads what no gradient comes back from, beside one that reads what it does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.last(self.d((self.b(x.detach()) + self.c(x)).relu()).relu())


class OnlyDetached(Chain):
    """And with nothing beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.d(self.c(self.b(self.a(x).relu().detach()).relu()).relu()).relu())


class WithoutGradients(Chain):
    """The first layers run under torch.no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.b(self.a(x).relu())
        return self.last(self.d(self.c(x).relu()).relu())


class Inference(WithoutGradients):
    """Or under torch.inference_mode."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.b(self.a(x).relu())
        return self.last(self.d(self.c(x.clone()).relu()).relu())


class FixedPoint(Chain):
    """Iterates without gradients, and once with them."""

    def forward(self, x: Tensor) -> Tensor:
        z, x = torch.zeros_like(x), self.a(x)
        with torch.no_grad():
            for _ in range(2):
                z = (x + self.c(self.b(z).relu())).tanh()
        return self.last(self.d((x + self.c(self.b(z).relu())).tanh()).relu())


class FromZero(Chain):
    """Iterates from zeros, with gradients."""

    def forward(self, x: Tensor) -> Tensor:
        z, x = torch.zeros_like(x), self.a(x)
        for _ in range(2):
            z = (x + self.c(self.b(z).relu())).tanh()
        return self.last(self.d(z).relu())


class NeverCalled(Chain):
    """A layer that only holds a weight: a call would add its bias."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.a(x).relu(), self.b.weight)
        return self.last(self.d(self.c(x.relu()).relu()).relu())


class Chosen(Chain):
    """A layer decides which rows are read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        rows = x[:, None] * torch.arange(1.0, 4).to(x)[None, :, None]
        best = self.c(self.b(rows).relu())[..., 0].argmax(1)
        return self.last(self.d(rows[torch.arange(len(x)), best]).relu())


class Unasked(Chain):
    """Layers, with a normalisation between them, that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        self.c(self.norm(self.b(x)))
        return self.last(self.d(x).relu())


class Together(Chain):
    """An operation of several tensors, a parameter of one number for each channel among them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(self.a(x)[:, None], self.rows[None], self.rows[None])[:, 0] + self.b(x)
        return self.last(self.d(self.c(x).relu()).relu())


class OneBias(Chain):
    """Two layers with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.d(self.c(self.b(self.a(x).relu()).relu()).relu()).relu())


_HEAD = {"last": "its channels are the model's output"}
_TOGETHER = "the code of Together takes its channels together with its rows, which cannot lose channels yet"
_CUT_OFF = "{0} reads its channels where no gradient comes back (detach(), a choice by them, or an operation that " \
           "has none, as those of quantized layers)"
_OFF = "it runs under torch.no_grad(), where nothing can be measured"
CASES: Mapping[type[Chain], tuple[list[str], dict[str, str]]] = {
    Autoencoder: (["a", "b", "c", "d"], {"weight_of_a": "a is called as well on what no layer makes (the model's "
                                                        "input, a constant, or what detach() gives)"}),
    Chosen: (["a", "d"], {"c": _CUT_OFF.format("d"), "b": _CUT_OFF.format("c")}),
    Unasked: (["a", "d"], dict.fromkeys("bc", "the output does not depend on it")),
    Together: (["c", "d"], {"a": _TOGETHER, "b": _TOGETHER,
                            "rows": "the code of Together reads its rows [4, 6], which meets no channels that can go"}),
    Detached: (["b", "d"], {"a": _CUT_OFF.format("b")}),
    OnlyDetached: (["b", "c", "d"], {"a": _CUT_OFF.format("b")}),
    WithoutGradients: (["c", "d"], {"a": _OFF, "b": _OFF}),
    Inference: (["c", "d"], {"a": _OFF, "b": _OFF}),
    FixedPoint: (["d"], {"a": "b reads its channels where no gradient comes back (torch.no_grad())",
                         "b": "c runs under torch.no_grad() as well, where nothing can be measured",
                         "c": "its channels go with others that are kept"}),
    FromZero: (["b", "d"], {"a": "b is called as well on what no layer makes (the model's input, a constant, or what "
                                 "detach() gives)", "c": "its channels go with others that are kept"}),
    OneBias: (["c", "d"], {name: f"{name} shares its bias with another layer" for name in "ab"}),
    NeverCalled: (["c", "d"], {"a": "the tracer cannot follow its channels to c: linear in the code of "
                                  "NeverCalled mixes or moves them",
                               "b": "the code of NeverCalled reads its weight, and does not call it"}),
}


@pytest.mark.parametrize("build", CASES)
def test_the_reason_is_true_and_the_rest_goes(build: type[Chain]) -> None:
    """The smaller model computes what the masked one does."""
    groups, reasons = CASES[build]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    graph = trace(model, x)
    assert ([group.name for group in graph.groups], graph.skipped) == (groups, reasons | _HEAD)
    scores = fastscore.score(model, [x], progress=False)
    for share in (0.4, 0.8):
        small = fastscore.prune(model, scores, x, channels=share, scope="layer", compensate=False).model
        with torch.no_grad(), fastscore.mask(model, scores, 1 - share, x, scope="layer", compensate=False):
            torch.testing.assert_close(small(x), model(x))
    repaired = fastscore.prune(model, scores, x, channels=0.6, calibration=[x, -x, 2 * x, x + 1], repair="linear")
    assert repaired.report.repairs


class Embeddings(nn.Module):
    """One that goes nowhere, one that is not called, one without gradients, one whose weight the model's code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread, self.idle, self.off, self.held, self.places = (nn.Embedding(9, 6) for _ in range(6))
        self.a, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x)
        with torch.no_grad():
            off = self.off(x)
        x = self.read(x) + self.places(x.flip(0)) + off
        return self.last(self.a(x).relu()).mean(1) + self.held.weight.sum()


def test_embeddings_that_do_not_go_say_why() -> None:
    graph = trace(Embeddings().eval(), torch.tensor([[1, 5, 2], [3, 0, 7]]))
    skipped = dict(graph.skipped)
    assert "RuntimeError" in skipped.pop("read")  # what is made without gradients stays as wide
    assert ([group.name for group in graph.groups], skipped) == (["a"], {
        "places": "its channels go with others that are kept",
        "unread": "the output does not depend on it", "idle": "the output does not depend on it", "off": _OFF,
        "held": "the code of Embeddings reads its weight, and does not call it", **_HEAD})


class NormAndActivation(nn.LayerNorm):
    """Of images, as timm has them: the activation writes to a view, and what comes of it is added."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y.tanh() + self.act(y)


class Gated(nn.Module):
    """A gate on what comes of such a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.narrow, self.gate, self.last = (
            nn.Conv2d(3, 6, 1), NormAndActivation(6), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.last(x * self.gate(self.narrow(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def test_the_last_operation_of_a_module_does_not_tell_where_its_channels_lie() -> None:
    graph = trace(Gated().eval(), torch.randn(1, 3, 6, 6))
    passes = "its channels pass through norm (NormAndActivation), which cannot lose channels yet"
    assert ([group.name for group in graph.groups], graph.skipped) == (
        ["narrow"], {"stem": "F.layer_norm runs over all its channels: a normalisation is followed where a module does "
                             "it, and then at most activations (nn.LayerNorm, or one of your own, with "
                             "no parameters but a weight and a bias for each channel)",
                     "gate": passes, "last": "its channels are the model's output"})


def test_a_model_that_runs_without_gradients_says_so() -> None:
    """Of none of its layers is it true that the output does not depend on it."""
    class Off(Chain):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x).relu()).relu())

    with pytest.raises(ValueError, match=r"no channel that can be scored\n(.*\n)*  a: it runs under torch.no_grad"):
        fastscore.score(Off(), [torch.randn(3, 6)], progress=False)


def test_a_model_that_is_prepared_for_quantization_has_a_way_out() -> None:
    """Its ranges follow what comes, in evaluation mode, too: a smaller model would have others than the masked one."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(8, 4)

    def prepared(model: nn.Module, how: Any = quantization.default_qat_qconfig) -> nn.Module:
        model.qconfig = how
        model = quantization.prepare_qat(model.train())
        model(x)
        return model.eval()

    assert trace(prepared(copy.deepcopy(model)), x).skipped["0"] == \
        "FakeQuantize goes on changing the range of the weight of 0: prune the model before it is prepared for " \
        "quantization (prepare_qat)"
    by_channel = prepared(copy.deepcopy(model), quantization.get_default_qat_qconfig("x86"))
    assert "goes on changing the range of the weight of 0: prune" in trace(by_channel, x).skipped["0"]
    assert "has a range for each channel of the weight of 0: prune the model before it is prepared" in \
        trace(by_channel.apply(quantization.disable_observer), x).skipped["0"]
    activations = nn.Sequential(model[0], quantization.FakeQuantize(), *copy.deepcopy(model[1:])).eval()
    assert trace(activations, x).skipped["0"] == "FakeQuantize at 1 goes on changing its range with what it reads: " \
        "prune the model before it is prepared for quantization (prepare_qat)"
    settled = prepared(copy.deepcopy(model)).apply(quantization.disable_observer)
    fastscore.prune(settled, fastscore.score(settled, [x], progress=False), x, channels=0.6)  # smaller = masked
    small = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.6).model
    assert prepared(small)(x).shape == (8, 2)


def test_a_model_that_takes_gradients_of_its_own_is_left_alone_or_scored_without() -> None:
    """An energy, whose gradient is the output: of what its layers gave before there is none. By what it is taken of,
    channels go, and the gradients of the smaller model are those of the masked one."""
    class Force(Chain):
        def energy(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x).tanh()).tanh())

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    with pytest.raises(ValueError, match=r"no channel that can be scored\n(.*\n)*  a: the model's code takes "
                                         r"gradients of its own, .*lambda model, batch: model.energy\(batch\)"):
        fastscore.score(Force(), [torch.randn(3, 6)], progress=False)
    model, x = Force().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    options: dict[str, Any] = {"forward": lambda model, batch: model.energy(batch)}
    scores = fastscore.score(model, [x], progress=False, **options)
    assert list(scores) == ["a", "b"]
    small = fastscore.prune(model, scores, x, channels=0.5, compensate=False, **options).model
    with fastscore.mask(model, scores, 0.5, x, compensate=False, **options):
        torch.testing.assert_close(small(x), model(x))


def test_a_single_channel_has_to_stay() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid(), nn.Linear(1, 5))
    assert trace(model, torch.randn(2, 10)).skipped["2"] == "it is one channel, which has to stay"
