"""Finding the channel groups of a model, through Torch-Pruning's dependency graph, and trying them on the model."""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.arguments import check_callable
from fastscore.batches.calls import Forward, call_model, is_call_model, way_out
from fastscore.batches.checks import check_batch, check_rows
from fastscore.batches.devices import usable
from fastscore.batches.outputs import OutputError, checked_forward, floating_tensors
from fastscore.batches.parts import Batch, map_tensors
from fastscore.default_device import keeps_own_on_cpu
from fastscore.garbage import seldom_searched
from fastscore.graph import (
    blocks,
    cache,
    computed_in_run,
    scored_units,
    state_spaces,
    traced_groups,
    whole_experts,
)
from fastscore.graph.cutting import own_tensors
from fastscore.graph.following import dependencies, nested, nodes, with_gradients
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.graph.heads import attention, head_numbers, unnamed_attention
from fastscore.graph.kept import left_alone, obstacles, reasons, training_only, unread
from fastscore.graph.samples import sample_axes, samples_second
from fastscore.graph.trials import (
    across,
    among_samples,
    bias_trial,
    cut_otherwise,
    draws,
    idle_siblings,
    kept_numbers,
    mixing,
    returned_trial,
    running,
    surgery_trial,
    training_trial,
    unrun,
    verification,
)
from fastscore.graph.trials.recording import Recording
from fastscore.modules import counted_samples
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.first_run import check_first_run
from fastscore.modules.inspection import device_of
from fastscore.modules.macs.counting import CountedRun
from fastscore.modules.refused_batches import raised_in
from fastscore.modules.weights import recurrent
from fastscore.modules.wrappers import check_whole, unwrapped, without_checkpoints
from fastscore.progress import working
from fastscore.rng import fork_rng

_RUNS = 3  # in which a model that counts them does something else than in another


@keeps_own_on_cpu
def trace(model: nn.Module, example_inputs: Batch, forward: Forward = call_model,
          samples: Batch | None = None, units: scored_units.Units = "groups") -> ChannelGraph:
    """Find the channel groups of `model` by running `forward(model, example_inputs)` on a copy of it.

    A model that was traced before, and is what it was, is not traced again: see fastscore.graph.cache.

    Args:
        model: any module; of what stands around it (see fastscore.modules.wrappers) the one inside.
        example_inputs: a batch that `forward` takes, of one sample or more.
        forward: calls the model.
        samples: a batch of several samples, if there is one, by which rows are found to belong to samples.
        units: what will be scored (see fastscore.score): whole branches, experts and dimensions of heads are looked for
            where they are.

    Returns:
        The groups, each followed through the traced graph, verified by changing its channels, and tried by surgery; and
        the reason for everything that is in none.

    Raises:
        TypeError: the model returns no tensor, or torch.jit made it; example inputs that hold none.
        ValueError: it cannot run on the example inputs, writes over what its gradients need, its parameters are
            sharded, or see fastscore.modules.first_run.
    """
    model = unwrapped(model)
    check_whole(model)
    check_callable("forward", forward, "forward(model, batch)")
    (check_batch if is_call_model(forward) else check_rows)(example_inputs, "example_inputs")
    searched, known = scored_units.searched(units), cache.get(model, example_inputs, forward, samples)
    if known is not None and searched <= known.searched:
        return known
    searched |= known.searched if known is not None else frozenset()
    with fork_rng(device_of(model)), seldom_searched():
        graph = _traced_anew(model, map_tensors(_to_try, example_inputs), forward, samples, searched)
    cache.put(model, example_inputs, forward, graph, samples)
    return graph


def _traced_anew(model: nn.Module, example_inputs: Batch, forward: Forward,
                 samples: Batch | None, searched: frozenset[str]) -> ChannelGraph:
    """See trace. searched: the coarser and finer units that are looked for."""
    written = check_first_run(model, example_inputs, forward)
    computed_in_run.note(model, forward, example_inputs, samples)
    eval_model = evaluation_copy(model)
    own_tensors.require_gradients(eval_model)
    own_tensors.randomize_constants(eval_model)

    def run(model: nn.Module, batch: Batch = example_inputs) -> list[Tensor]:
        return [checked_forward(forward)(model, batch)]

    def run_as_in_training(model: nn.Module, batch: Batch = example_inputs) -> list[Tensor]:
        return [tensor for tensor in run_for_all(model, batch, True)
                if tensor.requires_grad or not torch.is_grad_enabled()]

    def run_as_trained(model: nn.Module) -> list[Tensor]:
        with training_only.as_in_training(model):
            return run(model)

    def run_for_all(model: nn.Module, batch: Batch, trained: bool) -> list[Tensor]:
        with training_only.as_in_training(model, trained) as returned:
            try:
                returned.append(forward(model, batch))
            except Exception:  # of a forward= that expects what evaluation gives
                if not returned:
                    raise
        return list({id(tensor): tensor for tensor in floating_tensors(returned)}.values())

    counted = CountedRun(eval_model, example_inputs, forward)
    with torch.enable_grad(), without_checkpoints(), recurrent.sketched(eval_model), \
            working(f"tracing {type(model).__name__}"):
        try:
            found, ran, explained, recording = _traced(eval_model, run, searched, written,
                                                       partial(way_out, eval_model, forward, example_inputs))
        except ValueError as error:
            if how := running.only_whole(eval_model, run, example_inputs, samples):
                raise ValueError(f"{type(model).__name__}: {how}") from error
            raise
        if inactive := training_only.callable_layers(eval_model) - ran:
            with suppress(Exception):  # of a model's code that does not train
                more, ran_in_training, explained_then = (found, ran, explained) if training_trial.takes_same_way(
                    recording, lambda model, trained: run_for_all(model, example_inputs, trained)) else \
                    _traced(eval_model, run_as_in_training, searched, written)[:3]
                if ran <= ran_in_training and (more.groups or not found.groups):
                    found, explained = training_only.merge(found, more, inactive), explained | explained_then
                    inactive = inactive - ran_in_training
        found = training_trial.with_parameters(recording, found, run_as_trained, run_as_in_training)
        found = idle_siblings.with_siblings(recording, found)
        chooses, tried, taken = recording.chooses, recording.tried, recording.taken
        found = replace(found, drawing=draws.drawing(eval_model, run) if recording.draws else ())
        del recording
        found = replace(found, groups=traced_groups.all_held(eval_model, found.groups),
                        head_dims=traced_groups.all_held(eval_model, found.head_dims))
        # how users call a model that `forward` calls without a cache
        with_cache = getattr(forward, "with_cache", lambda *_: None)(model, example_inputs)
        found = returned_trial.offered(model, eval_model, computed_in_run.less(eval_model, found), run,
                                       run_as_in_training, with_cache, tried)
        samples = example_inputs if samples is None else map_tensors(_to_try, samples)
        ways = counted_samples.Ways(model)
        try:
            axes = sample_axes.of_graph(eval_model, found, run, run_as_in_training, samples, example_inputs,
                                        partial(ways.watched, counted.once), counted.once, "norms" in searched)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            said = running.overwriting(eval_model, run, run_as_trained)
            raise ValueError(f"{type(model).__name__}: {said}") from error
        if axes.together or chooses or ways.may_differ(among_samples.tried(samples)):
            found = found.less(among_samples.refusals(eval_model, run, found.groups, example_inputs, samples))
    graph = left_alone.named(eval_model, training_only.with_skip_reasons(found, inactive - explained), taken)
    axes = replace(axes, transposing=samples_second.transposing(forward, samples))
    return replace(graph, samples=axes, searched=searched, **counted.products(axes.batch))


def _to_try(tensor: Tensor) -> Tensor:
    """A tensor to try a model on: zeros for NaN, of which no two are equal; a pass of scores says where they are."""
    tensor = usable(tensor)
    may_hold_nan = tensor.is_floating_point() and not tensor.is_meta  # check_first_run says what meta tensors lack
    return torch.where(tensor.isnan(), 0, tensor) if may_hold_nan and tensor.isnan().any() else tensor


def _traced(eval_model: nn.Module, run: Callable[[nn.Module], list[Tensor]], searched: Container[str],
            written: Collection[str], otherwise: Callable[[Exception], str] = lambda error: ""
            ) -> tuple[ChannelGraph, set[str], set[str], Recording]:
    """(the groups of one way of running an evaluation copy, the layers that ran, those that are kept with a
    reason that came of trying them, the recording of a run). searched: see ChannelGraph. written: Linears whose
    outputs are written to, as far as that is known. otherwise: what more is said of an error of the model's call."""
    plain = _traced_as_it_is(eval_model, run, searched, written, otherwise)
    if not plain[2]:
        return plain
    with own_tensors.buffers_as_parameters(eval_model) as any_buffers, suppress(Exception):  # of code that writes there
        more = _traced_as_it_is(eval_model, run, searched, written) if any_buffers else plain
        if {group.name for group in more[0].groups} > {group.name for group in plain[0].groups}:
            return more
    return plain


def _traced_as_it_is(eval_model: nn.Module, run: Callable[[nn.Module], list[Tensor]], searched: Container[str],
                     written: Collection[str], otherwise: Callable[[Exception], str] = lambda error: ""
                     ) -> tuple[ChannelGraph, set[str], set[str], Recording]:
    """`_traced`, where buffers are constants."""
    graph = dependencies.Graph()
    has_run, unused, device = False, set[str](), device_of(eval_model)
    whose_gradients: AbstractContextManager[Any] = nullcontext()  # how torch.no_grad() runs

    def first_run(model: nn.Module, batch: object) -> list[Tensor]:
        nonlocal has_run
        rng.start_over(device)
        unused.clear()
        with unread.Outputs(model) as made, whose_gradients:
            outputs = run(model)
        has_run, recording.draws = True, rng.has_drawn(device)
        layers, recording.idle_calls, more = made.unread(outputs)
        unused.update(layers)
        graph.unread = {tensor.grad_fn for tensor in more}
        return [*outputs, *more]

    def whole(eval_model: nn.Module) -> Tensor:
        return torch.cat([output.flatten() for output in run(eval_model)])

    recording = Recording(eval_model, whole)
    recording.lost.update(written)
    passed_by = unrun.PassedBy(eval_model)
    recording.watched = passed_by.watched
    try:
        try:
            with recording.record():
                graph.build(eval_model, first_run)
        except Exception:  # of a model with nested tensors, or layers that make several; any other's is its own
            recording.find_several()
            if not recording.nested and not recording.several:
                raise
        for name in nested.seeing(eval_model, recording.layers, run) if recording.nested else ():
            recording.nested.add(name)
            recording.forget(name)
        anew = not recording.lost <= set(written) or recording.nested or recording.several
        ways: list[AbstractContextManager[Any]] = [nullcontext()] if anew or recording.without_gradients else []
        for whose_gradients in [with_gradients.GradientsStay(), *ways] if recording.without_gradients else ways:
            graph.release()
            graph = dependencies.Graph()
            try:
                with recording.record():
                    graph.build(eval_model, first_run, inside=recording.several, nested=recording.nested)
                if recording.without_gradients <= unused:
                    break
            except Exception:  # of code that writes, under torch.no_grad(), to what has gradients
                if whose_gradients is ways[0]:
                    raise
    except OutputError:
        raise
    except Exception as error:  # the tracer raises whatever its guesses run into
        blame = "Torch-Pruning cannot trace it" if has_run else "it cannot run on example_inputs (of score: batches)"
        advice = "" if has_run else otherwise(error)
        raise ValueError(f"{type(eval_model).__name__}: {blame}: {raised_in(eval_model, error)}{advice}") from error
    graph.calls.note_unseen_readers(recording.calls_of)
    recording.taken = graph.calls.taken
    graph.runs_again(lambda: running.run_between(recording))
    if unverified := reasons.of_gradients_of_its_own(recording):
        graph.release()
        return ChannelGraph((), unverified, {}), recording.layers_that_ran, set(unverified), recording
    idle = frozenset(unused)
    if unused and recording.shows_without_gradient(unused):
        recording.detached = idle
        unused.clear()
        graph.unread.clear()
    branches, kept_blocks = blocks.find(eval_model, whole) if "blocks" in searched else ([], {})
    mixtures, kept_experts = whole_experts.find(eval_model, whole, idle) if "experts" in searched else ((), {})
    attentions = attention.find(recording, unused, "head_dims" in searched)

    def followed() -> ChannelGraph:
        return traced_groups.of_graph(eval_model, graph, attentions.layers(), recording, unused, idle)

    found = plain = followed()
    named = attentions.layers()
    divided, cut, taken = ({layer for layer, why in found.skipped.items() if says in why}
                           for says in (obstacles.DIVIDED, obstacles.CUT, nodes.TAKEN))
    of_heads = (divided | cut | taken) - state_spaces.layers(eval_model)
    unnamed = unnamed_attention.find(eval_model, recording.run_again, graph.calls.products, of_heads, idle,
                                     attentions, "head_dims" in searched)
    if attentions.with_unnamed(unnamed, divided):
        found = followed()
    heads, left = attentions.groups, attentions.skipped

    def groups_of(taken: Mapping[str, set[str]], roots: Collection[str]) -> ChannelGraph:
        return traced_groups.of_graph(eval_model, graph, taken, recording, unused, (), roots)

    guesses = cut_otherwise.guesses(graph, plain, partial(groups_of, named))  # if the heads do not go
    passing, passed = across.guesses(graph, recording, partial(groups_of, attentions.layers()))
    found = state_spaces.with_widths(eval_model, _with_heads(eval_model, found, heads))
    graph.release()
    readers = graph.calls.read_elsewhere
    recording.forget_norms(but={member.layer for group in (*found.groups, *guesses, *passing)
                                for member in group.role("norm", "channelwise")})
    with bias_trial.all_grown(recording) as biases:  # one trial of both, as a rule
        seen_by_none = biases if found.groups and verification.nothing_leaks(recording, found.groups) else None
    leaks = verification.leaks(recording, found.groups) if seen_by_none is None else {}
    members = {group.name: group.members for group in found.groups}
    again = next(filter(None, (recording.leak({}, {}) for _ in range(_RUNS if leaks else 0))), None)
    mixed = leaks if again is not None or not recording.choices else \
        verification.leaks(recording, [group for group in found.groups if group.name in leaks], held=True)
    by = mixing.mixers(recording, [group for group in found.groups if group.name in mixed]) if again is None else {}
    kept = {group: reasons.of_leak(where, members[group], recording, readers, group not in mixed, by.get(group))
            if again is None else reasons.not_twice(again, recording.model) for group, where in leaks.items()}
    try:
        chosen = verification.leaks(recording, [group for group in found.groups if group.name not in leaks],
                                    chosen=True)
    except Exception:  # of a run in which nothing is changed
        running.check_runs_again(eval_model, whole)
        raise
    kept |= {group: reasons.of_choice(where) for group, where in chosen.items()}
    decided = head_numbers.decided_by(eval_model, [group for group in found.groups if group.name not in kept],
                                      partial(recording.run_again, recording.model))
    kept |= decided
    tried = [group for group in found.groups if group.name not in kept]
    refused = surgery_trial.refusals(recording, tried)
    seen_elsewhere = {group.name: why for group in tried if group.name not in refused and (
        why := reasons.read_elsewhere(group.members, readers))}
    going = surgery_trial.go_one_by_one(recording, [group for group in tried if group.name in seen_elsewhere])
    refused |= {name: why for name, why in seen_elsewhere.items() if name not in going}
    if found.groups and len(refused) == len(tried):
        running.check_runs_again(eval_model, whole)
    tried, refused = kept_numbers.mended(recording, tried, refused)
    joined = surgery_trial.together(recording, tried, refused)
    made = {member.layer for group in joined for member in group.role("producer")}
    kept |= {name: reasons.of_refusal(why, members[name], recording, readers, graph.written.get(name))
             for name, why in refused.items() if name not in made}
    for group in unnamed.groups:  # guesses: what is known of their layers without them is why these stay
        kept |= {layer: plain.skipped[layer] for member in group.role("producer")
                 if group.name in kept and (layer := member.layer) in plain.skipped and layer not in decided}
    found = replace(found, groups=tuple(group for group in tried if group.name not in refused),
                    skipped={**found.skipped, **kept, **left}, experts=mixtures,
                    head_dims=tuple(attentions.head_dims), whole_heads=attentions.whole_heads,
                    not_both=attentions.not_both)
    found = cut_otherwise.that_go(recording, replace(found, groups=(*found.groups, *joined)), guesses)
    found = across.that_go(recording, found, passing, passed)
    found = _with_heads(eval_model, found, ())
    found = state_spaces.settled(found, bias_trial.kept_biases(recording, seen_by_none or ()) if found.groups else {})
    found = passed_by.that_go(recording, found)
    ran = recording.layers_that_ran
    residual, refused_blocks = blocks.that_go(eval_model, whole, branches, found.groups)
    found = replace(found, blocks=residual,
                    kept_whole={"blocks": {**kept_blocks, **refused_blocks}, "experts": kept_experts})
    return found, ran, {*left, *kept, *((readers.keys() | graph.calls.read_detached.keys()) - ran)}, recording


def _with_heads(model: nn.Module, graph: ChannelGraph, heads: Sequence[ChannelGroup]) -> ChannelGraph:
    """The graph with groups of heads, in order of their layers."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return replace(graph, groups=tuple(sorted([*graph.groups, *heads], key=lambda group: order[group.name])))
