"""MACs by hand: each kind of operation against its closed form, and what no formula knows by name."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from fastscore.modules.macs.counting import count
from fastscore.pruning.report import PruneReport

N, T, C = 2, 5, 6
X = torch.randn(N, T, C, generator=torch.Generator().manual_seed(0))


class Call(nn.Module):
    """A function as a model, with the layers that it uses."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def macs(function: Callable[..., Tensor], *layers: nn.Module, x: Tensor = X) -> int:
    found = count(Call(function, *layers).eval(), x)
    assert not found.uncounted
    return found.macs


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers(kind: type[nn.Module], gates: int, ways: int, layers: int) -> None:
    """Each step has gates x hidden x (what it reads + hidden) in each direction; layers above read both directions."""
    rnn = kind(C, 4, num_layers=layers, bidirectional=ways == 2, batch_first=True)
    reads = [C] + [4 * ways] * (layers - 1)
    assert macs(lambda x, rnn: rnn(x)[0], rnn) == T * ways * sum(gates * 4 * (read + 4) for read in reads)


def test_recurrent_layers_of_other_forms() -> None:
    projected = nn.LSTM(C, 4, proj_size=3, batch_first=True)
    assert macs(lambda x, rnn: rnn(x)[0], projected) == T * (4 * 4 * (C + 3) + 3 * 4)

    def packed(x: Tensor, rnn: nn.Module) -> Tensor:
        return rnn(nn.utils.rnn.pack_padded_sequence(x, [T, 3], batch_first=True))[0].data

    assert macs(packed, nn.LSTM(C, 4, batch_first=True)) == (T + 3) * 4 * 4 * (C + 4) // N
    assert macs(lambda x, cell: cell(x[:, 0])[0], nn.LSTMCell(C, 4)) == 4 * 4 * (C + 4)


def test_cudnn_sees_every_matrix_of_a_recurrent_layer_once_a_step() -> None:
    """On a GPU one operation is the whole of it: the formula is held against the layer's own on the CPU."""
    from fastscore.modules.macs.mac_formulas import FORMULAS

    for packed_rows in ((T, N), (T * N,)):
        shapes = [torch.Size(shape) for shape in ((16, C), (16, 4), (16,), (16,), (16, 4), (16, 4), (16,), (16,))]
        flops = FORMULAS["aten::_cudnn_rnn"](torch.Size((*packed_rows, C)), shapes, 4, None, torch.Size((2, N, 4)))
        assert flops == 2 * T * N * 16 * (C + 4 + 4 + 4)


ATTENTION = 2 * T * T * C  # q·k and weights·v, over all heads


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_modules_whatever_path_they_take(heads: int) -> None:
    class Own(nn.MultiheadAttention):
        pass

    for kind in (nn.MultiheadAttention, Own):
        attention = kind(C, heads, batch_first=True)
        for weights in (False, True):
            assert macs(lambda x, a, w=weights: a(x, x, x, need_weights=w)[0], attention) == \
                4 * T * C * C + ATTENTION
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, heads, 8, batch_first=True), 2,
                                    enable_nested_tensor=heads == 2)
    assert macs(lambda x, encoder: encoder(x), encoder) == 2 * (T * (4 * C * C + 2 * C * 8) + ATTENTION)


def test_the_fused_path_of_attention_is_as_it_was_afterwards() -> None:
    def fail(x: Tensor) -> Tensor:
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError("by itself")

    for before in (False, True):
        torch.backends.mha.set_fastpath_enabled(before)
        try:
            with pytest.raises(KeyError, match="by itself"):
                macs(fail)
            assert torch.backends.mha.get_fastpath_enabled() == before
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("length", [1, 7, 33, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_any_length(length: int, masked: bool) -> None:
    mask = torch.zeros(length, length) if masked else None

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None, :, :4], attn_mask=mask)

    assert macs(attend, x=torch.randn(N, length, C)) == length * length * (C + 4)


class Biased(nn.Module):
    """Activations times each other, to which weights are added: a bias by distance, as T5's and LayoutLM v3's."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.near, self.attend = nn.Parameter(torch.randn(T, T)), attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.near.repeat(len(x), 1, 1))


@pytest.mark.parametrize(("attend", "want", "weights"), [
    (lambda x, bias: F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=bias[:, None]), 2 * T * T * C, {}),
    (lambda x, bias: torch.baddbmm(bias, x, x.mT), T * T * C, {}),
    (lambda x, bias: torch.baddbmm(x, bias, x), T * T * C, {"near": T * T * C})], ids=["attention", "sum", "factor"])
def test_weights_that_are_added_to_products_are_no_factors(attend: Callable[[Tensor, Tensor], Tensor], want: int,
                                                           weights: dict[str, int]) -> None:
    counted = count(Biased(attend), torch.randn(N, T, C))
    assert (counted.macs, dict(counted.weights)) == (want, weights)


def test_attention_with_shared_keys() -> None:
    q, k = torch.randn(N, 8, T, 4), torch.randn(N, 2, T, 4)
    assert macs(lambda x: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)) == 8 * 2 * T * T * 4


EXPERTS = torch.randn(3, C, 4)
PRODUCTS = {
    "matmul": (lambda x: x.mT @ x, C * C * T),
    "einsum": (lambda x: torch.einsum("bnc,bmc->bnm", x, x), T * T * C),
    "experts": (lambda x: torch.bmm(x.repeat_interleave(3, 0), EXPERTS.repeat(N, 1, 1)), 3 * T * C * 4),
    "grouped experts": (lambda x: torch._grouped_mm(
        torch.randn(8, 16).bfloat16(), torch.randn(3, 16, 24).bfloat16(),
        offs=torch.tensor([3, 3, 8], dtype=torch.int32)), 8 * 16 * 24 // N),
    "matrix x vector": (lambda x: x[0] @ x[1, 0], T * C // N),
    "matrix x vector, added": (lambda x: torch.addmv(x[0, :, 0], x[0], x[1, 0]), T * C // N),
    "vector x vector": (lambda x: x[0, 0] @ x[1, 0], C // N),
    "sum of products": (lambda x: torch.addbmm(torch.zeros(T, T), x, x.mT), T * T * C),
    "distances": (lambda x: torch.cdist(x, x[:, :3]), T * 3 * C),
    "sparse": (lambda x: torch.sparse.mm(torch.eye(T).to_sparse(), x[0]), T * C // N),
    "sparse rows": (lambda x: torch.eye(T).to_sparse_csr() @ x[0], T * C // N),
    "functional convolution": (lambda x: F.conv1d(x.mT, torch.ones(4, C, 3), padding=1), T * C * 4 * 3),
    "functional grouped convolution": (lambda x: F.conv1d(x.mT, torch.ones(C, 2, 3), groups=3), (T - 2) * C * 2 * 3),
    "functional transposed convolution": (lambda x: F.conv_transpose1d(x.mT, torch.ones(C, 4, 3)), T * C * 4 * 3),
    "time first convolution": (lambda x: torch.conv_tbc(x, torch.ones(3, C, 4), torch.zeros(4), 1), T * C * 4 * 3),
    "functional linear": (lambda x: F.linear(x, torch.ones(4, C)), T * C * 4),
    "elementwise": (lambda x: x * x + x.sum(1, keepdim=True).softmax(-1), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    function, want = PRODUCTS[name]
    assert macs(function) == want


def test_bilinear_has_one_for_each_weight_and_row() -> None:
    assert macs(lambda x, layer: layer(x, x[..., :4]), nn.Bilinear(C, 4, 3)) == T * C * 4 * 3


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2)])
def test_deformable_convolution(groups: int, stride: int) -> None:
    ops = pytest.importorskip("torchvision.ops")
    offsets = nn.Conv2d(4, 18, 3, stride, 1)
    layer = ops.DeformConv2d(4, 8, 3, stride, 1, groups=groups)
    positions = math.ceil(6 / stride) ** 2
    assert macs(lambda x, layer, offsets: layer(x, offsets(x)), layer, offsets, x=torch.randn(N, 4, 6, 6)) == \
        positions * 9 * (4 * 18 + 4 // groups * 8)


def test_what_no_formula_knows_is_named_with_its_place_and_in_the_report() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    model = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C), Spectrum())
    found = count(model, X[:, 0])
    assert (found.macs, dict(found.uncounted)) == (2 * 8 * C, {"aten::_fft_r2c": "3"})
    scores = fastscore.score(model, [X[:, 0]], progress=False)
    report = fastscore.prune(model, scores, X[:, 0], macs=0.6).report
    assert dict(report.uncounted) == {"aten::_fft_r2c": "3"}
    assert "MACs: without those of aten::_fft_r2c, which no formula counts, in 3" in str(report).splitlines()
    plain = fastscore.prune(model[:3], fastscore.score(model[:3], [X[:, 0]], progress=False), X[:, 0], macs=0.6).report
    assert not plain.uncounted
    assert "no formula" not in str(plain)


def test_reports_of_before_are_read() -> None:
    data = {"groups": [], "channels": (1, 1), "macs": (1, 1), "params": (1, 1), "skipped": {}, "candidates": []}
    assert PruneReport.of(data).uncounted == {}
    assert PruneReport.of({**data, "uncounted": {"a::b": "c"}}).uncounted == {"a::b": "c"}


@torch.library.custom_op("fastscore_tests::product", mutates_args=())
def product(x: Tensor) -> Tensor:
    return x @ x.mT


def test_operations_of_others_are_named() -> None:
    model = Call(lambda x, layer: layer(torch.ops.fastscore_tests.product(x)), nn.Linear(T, 3))
    found = count(model, X)
    assert (found.macs, dict(found.uncounted)) == (T * T * 3, {"fastscore_tests::product": "the model itself"})
