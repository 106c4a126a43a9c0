"""Triton kernels where users meet them: behind the ops, chosen by the dispatcher."""

import pytest
import torch

from fastscore import ops
from fastscore.ops import backends, reference

A, G = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3)
ARGUMENTS = {
    "channel_sums": (A, G, 1),
    "channel_dot": (A, G, -1),
    "channel_powers": (A, G, 1),
    "random_gradient": (IDS, 10, 5),
    "normalize_gradient": (G, 1e-9),
    "clamp_backward_": (A, G.clone(), G.cos(), -0.5, 0.5),
}
FUNCTIONS = [op for op in ARGUMENTS if op != "clamp_backward_"]


@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op):
    with ops.use_backend("triton"):
        torch.library.opcheck(getattr(torch.ops.fastscore, op).default, ARGUMENTS[op])


def test_clamp_backward_runs_the_triton_kernel(loads):
    with ops.use_backend("triton"):
        got = ops.clamp_backward(A, G, None, -0.5, 0.5)
    assert loads.bytes == 2 * A.nbytes
    torch.testing.assert_close(got, reference.clamp_backward(A, G, None, -0.5, 0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_the_op_runs_the_triton_kernel(op, loads):
    with ops.use_backend("triton"):
        got = getattr(ops, op)(*ARGUMENTS[op])
    assert loads.bytes > 0
    torch.testing.assert_close(got, getattr(reference, op)(*ARGUMENTS[op]), rtol=1e-6, atol=1e-6)

    loads.bytes = 0
    getattr(ops, op)(*ARGUMENTS[op])
    assert loads.bytes == 0


def test_the_choice_is_shown():
    with ops.use_backend("triton"):
        assert {row.name: row.serves for row in backends.backends()}["triton"] == "cpu, cuda"


def test_arguments_are_checked_without_the_python_face():
    with ops.use_backend("triton"):
        with pytest.raises(ValueError, match=r"a .* and g .* differ in shape"):
            torch.ops.fastscore.channel_dot(A, G[:1])
        with pytest.raises(TypeError, match=r"g has dtype torch.int64, which no kernel takes"):
            torch.ops.fastscore.normalize_gradient(IDS)
        with pytest.raises(ValueError, match=r"distribution is 'uniform'"):
            torch.ops.fastscore.random_gradient(IDS, 10, 5, 0, "uniform")
