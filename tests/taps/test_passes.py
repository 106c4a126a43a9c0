"""Forward passes and what backward passes bring to their outputs, on graphs of a few operations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastscore.modules.sample_axis import SampleAxis
from fastscore.taps.passes import BackwardPasses, ForwardPass, Tapped, pass_of


def tapped(watched: BackwardPasses, paused: Callable[[], bool] = lambda: False, outputs: int = 1
           ) -> tuple[ForwardPass, list[Tensor], Tensor]:
    """A pass with one gate, watched at `outputs` outputs that are its gate's double, and an input that is no gate."""
    done, gate = ForwardPass(((), {})), torch.ones(3, requires_grad=True)
    x = torch.full((3,), 2.0, requires_grad=True)
    done.gates.append(Tapped("layer", gate, SampleAxis()))
    made = [2 * gate + x for _ in range(outputs)]
    watched.watch_outputs(done, made, paused)
    return done, made, x


def test_the_gradient_of_a_loss_comes_back_to_the_output_and_the_gate() -> None:
    watched = BackwardPasses()
    done, (output,), _ = tapped(watched)
    assert done.rows() == []
    (output * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert watched.finished == [done]
    assert watched.running == []
    assert done.output_gradients[0].tolist() == [1, 2, 3]
    ((layer, sums, _),) = done.rows()
    assert (layer, sums.tolist()) == ("layer", [2, 4, 6])


def test_losses_sent_back_one_after_the_other_add_up_and_count_once() -> None:
    watched = BackwardPasses()
    done, (output,), _ = tapped(watched)
    output.sum().backward(retain_graph=True)
    (3 * output).sum().backward()
    assert watched.finished == [done]
    assert done.output_gradients[0].tolist() == [4, 4, 4]
    assert done.rows()[0].gate.tolist() == [8, 8, 8]


def test_each_output_has_the_gradient_that_came_back_to_it() -> None:
    watched = BackwardPasses()
    done, (first, second, unused), _ = tapped(watched, outputs=3)
    (first.sum() + 5 * second.sum()).backward()
    assert {number: gradient.tolist() for number, gradient in done.output_gradients.items()} == \
        {0: [1, 1, 1], 1: [5, 5, 5]}
    assert unused.grad_fn is not None


def test_autograd_grad_is_no_training_step() -> None:
    watched = BackwardPasses()
    done, (output,), x = tapped(watched)
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert (watched.finished, watched.running, done.output_gradients) == ([], [], {})
    before = done.grad_versions()
    output.sum().backward()
    assert watched.finished == [done]
    assert done.grad_versions() != before == [None]


def test_a_second_gradient_at_a_gate_is_a_new_version() -> None:
    done, (output,), _ = tapped(BackwardPasses())
    output.sum().backward(retain_graph=True)
    once = done.grad_versions()
    output.sum().backward()
    assert done.grad_versions() != once


def test_nothing_is_noted_while_paused() -> None:
    watched, paused = BackwardPasses(), [True]
    done, (output,), _ = tapped(watched, lambda: paused[0])
    output.sum().backward(retain_graph=True)
    assert (watched.finished, done.output_gradients) == ([], {})
    paused[0] = False
    output.sum().backward()
    assert watched.finished == [done]
    assert done.output_gradients[0].tolist() == [1, 1, 1]


def test_a_backward_pass_that_fails_finishes_nothing() -> None:
    def fail(gradient: Tensor) -> None:
        raise ZeroDivisionError

    watched = BackwardPasses()
    done, (output,), x = tapped(watched)
    x.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    assert watched.finished == []
    assert done.output_gradients == {}


def test_an_output_handed_out_in_another_dtype_is_heard_in_its_own() -> None:
    """As wrappers for mixed precision do, while the model computes its own loss from the original."""
    watched, done, gate = BackwardPasses(), ForwardPass(((), {})), torch.ones(3, requires_grad=True)
    done.gates.append(Tapped("layer", gate, SampleAxis()))
    own = 2 * gate
    watched.watch_outputs(done, [own.double()], lambda: False)
    (7 * own).sum().backward()
    assert done.output_gradients[0].tolist() == [7, 7, 7]
    assert done.output_gradients[0].dtype == torch.float32


def test_an_output_without_gradients_is_not_watched() -> None:
    watched, done = BackwardPasses(), ForwardPass(((), {}))
    watched.watch_outputs(done, [torch.ones(3)], lambda: False)
    assert watched.finished == []


def test_padding_is_what_the_mask_among_the_inputs_says() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    valid = ForwardPass(((torch.ones(2, 3, 4),), {"attention_mask": mask})).valid
    assert valid is not None
    assert torch.equal(valid, mask.bool())
    assert ForwardPass(((torch.ones(2, 3),), {"attention_mask": torch.ones(2, 3)})).valid is None
    assert ForwardPass(((torch.ones(2, 3),), {})).valid is None


def owners_within_a_backward_pass(layer: str, current: ForwardPass, running: list[ForwardPass]) -> ForwardPass | None:
    found: list[ForwardPass | None] = []
    x = torch.ones(1, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda gradient: found.append(pass_of(layer, current, running)))
    y.sum().backward()
    return found[0]


def test_which_pass_a_layer_that_runs_again_belongs_to() -> None:
    current, one, other = (ForwardPass(((), {})) for _ in range(3))
    one.deferred_layers.add("again")
    assert pass_of("again", current, [one]) is current, "no backward pass runs"
    assert pass_of("again", None, [one]) is None
    assert owners_within_a_backward_pass("again", current, [other, one]) is one
    assert owners_within_a_backward_pass("first", current, [other, one]) is None, "it has its gate already"
    assert owners_within_a_backward_pass("again", current, []) is None
    other.deferred_layers.add("again")
    with pytest.raises(RuntimeError, match=r"^again: it runs again for a backward pass that covers 2 forward passes"):
        owners_within_a_backward_pass("again", current, [other, one])
