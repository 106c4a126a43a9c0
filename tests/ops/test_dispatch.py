"""The ops as PyTorch sees them: schemas, fakes, compile, export, autograd, bad arguments, loading."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from started import environment
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastscore import ops
from fastscore.ops import library
from fastscore.taps.measures import POWERS, SUMS

A = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(5)
CALLS = {
    "channel_sums": (A, A.cos(), 1),
    "channel_dot": (A, A.cos().to(memory_format=torch.channels_last), -3),
    "channel_powers": (A.double(), A.double().cos(), 3),
    "random_gradient": (IDS, 10, -7, 1, "rademacher", False),
    "normalize_gradient": (A.to(memory_format=torch.channels_last), 1e-3),
}


def tensors(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op, requires_grad):
    args = [x.detach().clone().requires_grad_() if requires_grad and isinstance(x, Tensor) and x.is_floating_point()
            else x for x in CALLS[op]]
    torch.library.opcheck(getattr(torch.ops.fastscore, op).default, args)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(op, dynamic):
    torch._dynamo.reset()
    eager = getattr(ops, op)
    compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(tensors(compiled(*CALLS[op])), tensors(eager(*CALLS[op])), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_compiles_whole_with_inductor_for_any_batch_size():
    torch._dynamo.reset()

    def scores(a: Tensor, g: Tensor, ids: Tensor) -> Tensor:
        random = ops.random_gradient(ids, g.shape[1], 0, normalize=False)
        return ops.channel_dot(a.relu(), g).abs() + ops.normalize_gradient(random)[0]

    compiled = torch.compile(scores, fullgraph=True, dynamic=True)
    for batch in (3, 4, 9):
        args = (torch.randn(batch, 6, 5, 4), torch.randn(batch, 6, 5, 4), torch.arange(batch))
        torch.testing.assert_close(compiled(*args), scores(*args))


def test_exports():
    class Score(nn.Module):
        def forward(self, a: Tensor, g: Tensor) -> Tensor:
            return ops.channel_sums(a, g)[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Score(), (A, A.cos()), dynamic_shapes=({0: batch}, {0: batch}))
    assert any(node.target is torch.ops.fastscore.channel_sums.default for node in program.graph.nodes)
    a, g = torch.randn(7, 6, 5, 4), torch.randn(7, 6, 5, 4)
    assert torch.equal(program.module()(a, g), ops.channel_dot(a, g))


def test_results_never_require_grad():
    a = A.clone().requires_grad_()
    for out in (*ops.channel_sums(a, a * 2), *ops.channel_powers(a, a * 2), *ops.normalize_gradient(a)):
        assert not out.requires_grad
        assert out.grad_fn is None


FLOATING = {"channel_sums": 2, "channel_dot": 2, "channel_powers": 2, "normalize_gradient": 1, "clamp_backward": 2}


def by_one(op: str, place: int) -> Callable[[Tensor], Tensor]:
    """The sum of all that `op` makes, as a function of its floating argument `place`."""
    def function(x: Tensor) -> Tensor:
        args = [x if k == place else A.cos() for k in range(FLOATING[op])]
        more = (None, -0.5, 0.5) if op == "clamp_backward" else ()
        return torch.stack([out.sum() for out in tensors(getattr(ops, op)(*args, *more))]).sum()

    return function


@pytest.mark.parametrize(("op", "place"), [(op, place) for op, many in FLOATING.items() for place in range(many)])
def test_where_a_derivative_would_be_taken_for_0_an_error_says_so(op, place):
    function, plain = by_one(op, place), by_one(op, place)(A)
    message = rf"fastscore::{op}_? has no derivative, and (a|g|y) is differentiated .* call the op on .\.detach\(\)"
    transforms = [torch.func.grad(function), torch.func.jacrev(function),
                  lambda x: torch.func.jvp(function, (x,), (x,)), lambda x: torch.func.vjp(function, x)]
    if op != "clamp_backward":  # in place, which vmap refuses by itself
        transforms += [torch.func.jacfwd(function), torch.func.hessian(function),
                       lambda x: torch.vmap(torch.func.grad(function))(x[None])]
    for transform in transforms:
        with pytest.raises(RuntimeError, match=message):
            transform(A)
    with forward_ad.dual_level():
        assert torch.equal(function(A), plain)  # of constants there is none to take
        with pytest.raises(RuntimeError, match=message):
            function(forward_ad.make_dual(A, A))
        assert torch.equal(function(forward_ad.make_dual(A, A).detach()), plain)
    slope = torch.func.grad(lambda x: x.sum() + function(x.detach()))  # the way out that the error names
    assert torch.equal(slope(A), torch.ones_like(A))
    assert torch.equal(torch.func.grad(lambda s: s * function(A))(torch.ones(())), plain)


def test_a_plain_call_goes_past_the_python_of_autograd():
    """As it is most of what a small call takes; so is a check that every kernel makes again."""
    called: list[str] = []
    leaf = A.clone().requires_grad_()

    def note(frame, event, _):
        if event == "call":
            called.append(frame.f_code.co_name)

    for call in (lambda: ops.channel_dot(leaf, A), lambda: ops.normalize_gradient(leaf),
                 lambda: SUMS.compute(leaf, A, 1), lambda: POWERS.compute(leaf, A, 1)):
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    assert "plain_call" in called
    assert not {"kernel", "check_pair"} & set(called)
    called.clear()
    forward_ad.enter_dual_level()
    try:
        sys.setprofile(note)
        ops.channel_dot(leaf, A)
    finally:
        sys.setprofile(None)
        forward_ad.exit_dual_level()
    assert {"kernel", "check_pair"} <= set(called)


def test_random_gradients_are_constants_of_every_transform():
    def function(x: Tensor) -> Tensor:
        return (x * ops.random_gradient(IDS, 4, 0)).sum()

    want = ops.random_gradient(IDS, 4, 0)
    x = torch.ones(5, 4)
    assert torch.equal(torch.func.grad(function)(x), want)
    assert torch.equal(torch.func.jacfwd(function)(x), want)


def test_vmap_is_a_loop():
    batch = torch.stack([A, A.sin()])
    for op in ("channel_dot", "normalize_gradient"):
        function = (lambda a: ops.channel_dot(a, A)) if op == "channel_dot" else \
            (lambda a: ops.normalize_gradient(a)[0])
        assert torch.equal(torch.vmap(function)(batch), torch.stack([function(a) for a in batch]))


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    x = torch.complex(A, -A).conj().imag
    assert x.is_neg()
    assert torch.equal(ops.channel_sums(x, A)[1], ops.channel_sums(x.resolve_neg(), A)[1])


def test_runs_inside_a_backward_pass():
    seen = []

    class Tap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            seen.append(ops.channel_dot(ctx.saved_tensors[0], g))
            return g

    x = A.clone().requires_grad_()
    Tap.apply(x).sum().backward()  # a gradient of stride 0 everywhere
    torch.testing.assert_close(seen, [A.sum((2, 3))])


ERRORS = {
    "shapes": (lambda: ops.channel_dot(A, A[:2]), ValueError, r"a \[3, 6, 5, 4\] and g \[2, 6, 5, 4\] differ in shape"),
    "dtypes": (lambda: ops.channel_sums(A, A.double()), TypeError, r"g\.to\(a\.dtype\)"),
    "devices": (lambda: ops.channel_powers(A, A.to("meta")), ValueError, r"a is on cpu and g is on meta"),
    "integers": (lambda: ops.channel_dot(A.int(), A.int()), TypeError, r"a has dtype torch.int32.*float32, bfloat16"),
    "vector": (lambda: ops.channel_dot(A[0, 0, 0], A[0, 0, 0]), ValueError, r"a has 1 dimension.*unsqueeze"),
    "samples": (lambda: ops.channel_dot(A, A, 0), ValueError, r"channel_dim is 0.*1 to 3 or -3 to -1"),
    "samples from the end": (lambda: ops.channel_dot(A, A, -4), ValueError, r"channel_dim is -4"),
    "dimension": (lambda: ops.channel_dot(A, A, 4), ValueError, r"channel_dim is 4"),
    "ids": (lambda: ops.random_gradient(IDS.int(), 3, 0), TypeError, r"sample_ids.*int64 \[N\].*to\(torch.int64\)"),
    "ids in 2-D": (lambda: ops.random_gradient(IDS[None], 3, 0), TypeError, r"sample_ids"),
    "classes": (lambda: ops.random_gradient(IDS, -1, 0), ValueError, r"classes is -1"),
    "seed": (lambda: ops.random_gradient(IDS, 3, 2**63), ValueError, r"seed is \d+.*int64"),
    "probe": (lambda: ops.random_gradient(IDS, 3, 0, 2**32), ValueError, r"probe is \d+.*2\*\*32 - 1"),
    "negative probe": (lambda: ops.random_gradient(IDS, 3, 0, -1), ValueError, r"probe is -1"),
    "distribution": (lambda: ops.random_gradient(IDS, 3, 0, 0, "uniform"), ValueError, r"'uniform'.*'rademacher'"),
    "gradient dtype": (lambda: ops.normalize_gradient(IDS), TypeError, r"g has dtype torch.int64"),
    "scalar": (lambda: ops.normalize_gradient(A.sum()), ValueError, r"g\[None\]"),
    "eps": (lambda: ops.normalize_gradient(A, -1.0), ValueError, r"eps is -1.0"),
    "eps nan": (lambda: ops.normalize_gradient(A, float("nan")), ValueError, r"eps is nan"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_the_way_out(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


RAW = torch.ops.fastscore
RAW_ERRORS = {
    "shapes": (lambda: RAW.channel_dot(A, A[:, :, 1:]), r"a and g differ in shape; g is the gradient of a"),
    "dtypes": (lambda: RAW.channel_dot(A, A.double()), r"a and g differ in dtype; .* g\.to\(a\.dtype\)"),
    "dimension": (lambda: RAW.channel_dot(A, A, 0), r"channel_dim has to name a dimension other than 0"),
    "vector": (lambda: RAW.channel_dot(A[0, 0, 0], A[0, 0, 0]), r"a has 1 dimensions, .* 2 to 64; reshape it"),
    "integers": (lambda: RAW.channel_dot(A.int(), A.int()), r"unsupported dtype; convert to float32, bfloat16, "),
    "ids": (lambda: RAW.random_gradient(IDS.int(), 3, 0), r"int64 \[N\]; use sample_ids\.to\(torch\.int64\)\.flatten"),
    "classes": (lambda: RAW.random_gradient(IDS, -3, 0), r"classes is -3, but has to be 0 to 2\*\*34"),
    "probe": (lambda: RAW.random_gradient(IDS, 3, 0, -1), r"probe is -1, but has to be .* number probes from 0"),
    "distribution": (lambda: RAW.random_gradient(IDS, 3, 0, 0, "uniform"), r"'uniform', but .* 'rademacher'"),
    "scalar": (lambda: RAW.normalize_gradient(A.sum()), r"g has 0 dimensions, .* 1 to 64; reshape it"),
    "gradient": (lambda: RAW.normalize_gradient(IDS), r"unsupported dtype; convert to float32"),
}


@pytest.mark.parametrize("name", RAW_ERRORS)
def test_the_native_ops_check_what_memory_safety_needs(name):
    call, message = RAW_ERRORS[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_a_missing_library_says_how_to_get_one(tmp_path):
    with pytest.raises(ImportError, match=r"_C.*is not in .*pip install"):
        library.load(tmp_path)


def test_a_broken_library_says_why(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"does not load into torch .*: .*(ELF|header|file too short).*rebuild"):
        library.load(tmp_path)


def test_importing_without_the_library_fails(tmp_path):
    package = Path(library.__file__).resolve().parents[1]
    shutil.copytree(package, tmp_path / "fastscore", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    run = subprocess.run([sys.executable, "-c", "import fastscore.ops"], cwd=tmp_path, capture_output=True, text=True,
                         check=False, env=environment())
    assert run.returncode == 1
    assert "ImportError: fastscore's native library (_C) is not in" in run.stderr
