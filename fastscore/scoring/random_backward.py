"""Label-free gradients for any criterion that reads `.grad`."""

from torch import Tensor

from fastscore import fingerprints
from fastscore.arguments import check_whole
from fastscore.batches.parts import Batch, first_input
from fastscore.default_device import keeps_own_on_cpu
from fastscore.scoring import gradients
from fastscore.wording import counted


@keeps_own_on_cpu
def random_backward(output: Tensor, inputs: Batch = None, *, seed: int = 0, probe: int = 0,
                    distribution: str = "normal", normalize: bool = True, center: bool = False,
                    retain_graph: bool = False) -> None:
    """In place of loss.backward(): send a random gradient back from `output`, adding to `.grad` as backward() does.

    No label is needed, and what reads `.grad` afterwards, Torch-Pruning's Taylor importance for one, needs no change:

        for images in batches:
            fastscore.random_backward(model(images), images)

    Gradients of parameters are sums over samples, here of one random draw each. Every sum of w·∂w is then a draw as
    well, of mean zero, whose square has the sum of the samples' squares for expectation; `fastscore.score` takes the
    square or absolute value of each sample's own, and is less noisy. Where it raises, no `.grad` has changed.

    Args:
        output: Floating-point, [N, ...]; all that follows N counts as classes.
        inputs: The batch, or a tensor [N, ...], by whose first tensor samples are told apart: the same content has the
            same gradient, that of fastscore.score, in every batch, order and epoch (so change `probe` or `seed` where a
            new one is wanted). None: told apart by the output itself, whose bits differ with the weights, with the
            device, and, by rounding, with the batch size; the gradients then do so too.
        seed, probe: Which gradient.
        distribution: "normal", "rademacher", "orthogonal" (probes 0, 1, ... of a sample are orthogonal) or "basis"
            (probe k is the unit vector of class k).
        normalize: Of length 1 for each sample.
        center: Without the all-ones direction, which a softmax does not see.
        retain_graph: For another probe from the same output.

    Raises:
        TypeError: The output is no floating-point tensor, or the inputs hold no tensor.
        ValueError: The output has no dimensions, the inputs are of another number of samples, or the gradient cannot be
            drawn.
        RuntimeError: The output does not require grad.

    Source: arXiv 2310.20203, section 3.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        shown = f"a {output.dtype} tensor" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"output: {shown}; a gradient starts from a floating-point tensor [N, ...], such as the logits")
    check_whole("seed", seed, "0")
    check_whole("probe", probe, "0")
    if output.dim() == 0:
        raise ValueError("output: it has no dimension, as a loss has; pass what the model returns, [N, ...]")
    if not output.requires_grad:
        raise RuntimeError("output: it does not require grad; run the model with gradients enabled and with parameters "
                           "that require them")
    told_apart = output if inputs is None else first_input(inputs)
    if told_apart.dim() == 0 or len(told_apart) != len(output):
        raise ValueError(f"inputs: the first tensor has shape {list(told_apart.shape)} where the output has "
                         f"{counted(len(output), 'row')}; pass the tensor that holds the samples, or None")
    ids = fingerprints.sample_ids(told_apart)
    gradient = gradients.random_gradient(output, ids, seed, probe, distribution, normalize, center)
    output.backward(gradient, retain_graph=retain_graph)
