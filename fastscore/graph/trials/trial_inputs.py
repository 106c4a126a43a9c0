"""What a model is tried on: batches of a few samples, other masks, weights that let gradients pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastscore.batches.parts import Batch, first_tensor, map_tensors, tensors_of
from fastscore.graph.routing import other_answers


def batch_of(example: Batch, size: int) -> Batch:
    """A batch of `size` samples: those of the example, then others like them."""
    tensor = first_tensor(example)
    count = len(tensor) if tensor is not None and tensor.dim() else 0
    generator = torch.Generator().manual_seed(size)

    def take(x: Tensor) -> Tensor:
        if not count or not x.dim() or len(x) != count:
            return x
        taken = x[torch.arange(size, device=x.device) % count]
        taken = torch.where(taken.isnan(), 0, taken) if taken.is_floating_point() else taken
        if size > count and x.numel():
            taken[count:] = _varied(taken[count:], generator)
        return taken

    return map_tensors(take, example)


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Values like those of x, so that what is routed by content is not routed alike in every sample."""
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator).to(x)
        spread = x.float().std().nan_to_num(0).to(x)
        return x + noise * spread
    if x.dtype == torch.bool or x.is_complex():
        return x
    low, high = int(x.min()), int(x.max())
    return torch.randint(low, high + 1, x.shape, generator=generator).to(x)


def otherwise(batch: Batch, times: int, decides: bool, picks: bool) -> Iterator[tuple[list[Batch], int | None]]:
    """(batches of which the first that a model runs on will do, the seed of other decisions there): with other masks
    and integers `times` times; and with samples that end early, where these are others, or the code decides anything.
    Nothing where there are no masks, and the code neither decides nor picks rows by integers.
    """
    masked = [other_masks(batch, seed) for seed in range(times)]
    decides |= any(hold_other_values(batch, other) for other in masked)
    for seed, other in enumerate(masked if decides or picks else ()):
        yield [other_integers(other, seed), other], seed  # some code runs on no other integers
    if decides:
        yield [ending_early(batch)], None


def other_masks(batch: Batch, seed: int) -> Batch:
    """The batch with other masks: what holds nothing but 0 and 1, of any dtype but floating-point ones."""
    def other(x: Tensor) -> Tensor:
        if x.is_floating_point() or x.is_complex() or x.numel() < 2 or not bool(((x == 0) | (x == 1)).all()):
            return x
        return other_answers(x, seed)

    return map_tensors(other, batch)


def ending_early(batch: Batch) -> Batch:
    """The batch with samples that end at places of their own: zeros behind them in all that has as many places along
    some dimension as the first tensor has along its second, so that masks, adjacencies and values go together."""
    first = first_tensor(batch)
    if first is None or first.dim() < 2:
        return batch
    count, places = first.shape[:2]
    left = torch.arange(1, count + 1) * places // (count + 1)
    here = torch.arange(places) < left.clamp(min=1)[:, None]

    def end(x: Tensor) -> Tensor:
        for dim in range(1, x.dim()):
            if len(x) == count and x.shape[dim] == places:
                shape = [count, *[1] * (dim - 1), places, *[1] * (x.dim() - dim - 1)]
                x = torch.where(here.to(x.device).reshape(shape), x, torch.zeros_like(x))
        return x

    return map_tensors(end, batch)


def other_integers(batch: Batch, seed: int) -> Batch:
    """The batch with other integers where samples have some of their own: lengths of sequences, tokens, classes.

    One number for each sample becomes another, 1 or more, in descending order where the seed is even, as code that
    packs sequences may ask for; of tokens a quarter become those before them, a quarter others, and a quarter 0, which
    often stands for padding. Nothing is larger than the largest was, which stays.
    """
    first = first_tensor(batch)
    count = len(first) if first is not None and first.dim() else 0
    generator = torch.Generator().manual_seed(seed)

    def other(x: Tensor) -> Tensor:
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or not x.dim() or len(x) != count \
                or x.numel() < 2:
            return x
        values = x.detach().flatten().cpu().clone()
        if x.numel() == count:
            largest = int(values.max())
            steps = torch.randperm(count, generator=generator) if seed % 2 else torch.arange(count)
            values = (largest - steps).clamp(min=min(1, largest)).to(x.dtype)
        else:
            drawn = torch.randint(max(int(values.max()), 0) + 1, values.shape, generator=generator).to(x.dtype)
            way = torch.randint(4, values.shape, generator=generator)
            way[values.argmax()] = 3
            values = torch.where(way == 0, values.roll(1), torch.where(way == 1, drawn, values))
            values[way == 2] = 0
        return values.view(x.shape).to(x.device)

    return map_tensors(other, batch)


def hold_other_values(one: Batch, other: Batch) -> bool:
    """Whether two batches of the same tensors hold other values."""
    return any(not torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True) if a is not b)


def randomize_zeros(model: nn.Module) -> None:
    """What is zero in a parameter becomes random: no gradient comes back through a residual branch whose last layer has
    not been trained, nor through dead filters."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point() or \
                    not (zeros := parameter.numel() - int(parameter.count_nonzero())):
                continue
            if id(parameter) not in made:
                values = 0.1 * torch.randn(zeros, generator=generator).to(parameter)
                alive = parameter.detach().clone().masked_scatter_(parameter == 0, values)
                made[id(parameter)] = nn.Parameter(alive, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
