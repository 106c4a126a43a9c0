"""One run of a model, recorded layer by layer; and runs that differ from it by what is asked for."""

import copy
import traceback
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.batches.parts import version_of
from fastscore.graph.following.nodes import PRODUCERS
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.graph.trials.choices import HELD, TURNS, Choices, Noted
from fastscore.graph.trials.differences import all_close, changed, differ
from fastscore.graph.trials.draws import SteadyDraws
from fastscore.graph.trials.plain_layers import may_make_several
from fastscore.graph.trials.replaced_layers import read_by, replaced, skipped, unwrapped
from fastscore.modules import hooks
from fastscore.modules.inspection import channel_dim, device_of, runs_own_code
from fastscore.modules.narrower import without
from fastscore.modules.norms.channel_norms import OneNode, norm_of
from fastscore.modules.weights.parameter_layers import ParameterLinear

Positions = Mapping[str, Tensor]  # layer -> int64 positions of its input or output
MISREAD = "reads something else where some channels are gone"
READ = "the model's own code"  # where it makes Python numbers of what layers gave
OWN_FAULT = "fastscore fails"  # what leak() begins with where not the model's code is to blame


class Recording:
    """What every layer (Conv, Linear, Embedding, normalisation over channels) gave in one run, and runs that differ
    from it by what is asked for.

    model: an evaluation copy. run(model): its output.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        self.model, self._run_model = model, run
        self.norms = {name for name, module in model.named_modules() if norm_of(module) is not None}
        self.layers = {name: module for name, module in model.named_modules()
                       if type_of(module) in PRODUCERS or name in self.norms}
        self._dims = {name: channel_dim(layer) for name, layer in self.layers.items()}
        self.outputs: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        self._read: list[tuple[str, Tensor, int]] = []  # while recording: what layers read, and its version then
        self._made: list[tuple[str, Tensor, int]] = []  # while recording: views that layers made, and their version
        self.order: dict[str, None] = {}  # the layers that ran, in the order of their first calls
        self.overwritten = set[str]()  # layers whose input is written to after they have read it
        self.several = set[str]()  # layers of a class whose forward returns no tensor, but several
        self.lost = set[str]()  # Linears whose output is a view that is written to: autograd's graph lacks their node
        self.swapped: dict[tuple[str, int], dict[str, Any]] = {}  # (layer, call) -> parameters that were put in for it
        self.nested, self.transformed = set[str](), set[str]()  # layers that see nested tensors; run under torch.func
        self.first_layers = dict[str, Tensor | None]()  # that no gradient leaves, in one call -> see `_note_first`
        self.from_zeros = set[str]()  # those of which a part, or all, that they read in such a call is 0
        self.taken = set[int]()  # ids of parameters that anything is computed from
        self.idle_calls = set[tuple[str, int]]()  # (layer, number): of layers with others, that no output comes of
        self.detached = frozenset[str]()  # those of which no gradient comes back, while something does
        self.tried: tuple[ChannelGroup, ...] = ()  # without some channels of which, all at once, the model has run
        self.chooses = self.draws = False  # whether something is chosen by channels, and shows nowhere; draws at random
        self.watched: Callable[[Any], AbstractContextManager[Any]] = nullcontext  # what runs are in: see unrun.PassedBy
        self.without_gradients = set[str]()  # those that run under torch.no_grad, or inference_mode, in one call

    def find_several(self) -> None:
        """Note `several`, as a run of the model shows them, which need not be recorded."""
        of_their_own = {name: layer for name, layer in self.layers.items() if may_make_several(layer)}
        if of_their_own:
            self.several = hooks.layers_that(of_their_own, lambda: self._run_model(self.model),
                                             lambda args, output: not isinstance(output, Tensor))

    def forget_norms(self, but: Container[str]) -> None:
        """From now on normalisations run as they are, but for those of `but`: what is read there is of no concern."""
        for name in [name for name in self.norms if name not in but]:
            self.forget(name)

    def forget(self, layer: str) -> None:
        """From now on a layer runs as it is, and nothing is known of it."""
        self.norms.discard(layer)
        self.order.pop(layer, None)
        del self.layers[layer], self.outputs[layer]

    @contextmanager
    def computing(self, layers: Collection[str]) -> Iterator[None]:
        """In the block, these layers compute what they give, as the code between layers does."""
        held = self.outputs
        self.outputs = {layer: outputs for layer, outputs in held.items() if layer not in layers}
        try:
            yield
        finally:
            self.outputs = held

    @property
    def layers_that_ran(self) -> set[str]:
        """The layers that were called in the recorded run."""
        return {layer for layer, outputs in self.outputs.items() if outputs} | self.several | self.nested

    @contextmanager
    def record(self) -> Iterator[None]:
        """The model is run once in the block, by whoever it may be, and its layers' outputs are kept."""
        for outputs in self.outputs.values():
            outputs.clear()
        noted = {layer: self._record(layer, dict(self.layers[layer]._parameters)) for layer in self.outputs}
        try:
            with replaced(self.model, noted | self._instance_norms()):
                yield
            self.overwritten = {layer for layer, x, version in self._read if version_of(x) != version}
            self.lost |= {layer for layer, x, version in self._made if version_of(x) != version}
        finally:
            self._read.clear()
            self._made.clear()

    def calls_of(self, layer: str) -> int | None:
        """How often a layer was called; None where its own code may take its weight more often than once a call."""
        module = self.layers[layer]
        own = runs_own_code(module) and not isinstance(module, ParameterLinear)
        return None if own else len(self.outputs[layer])

    def _instance_norms(self) -> dict[str, Callable[..., Tensor]]:
        """Forwards that show none of the views by which an InstanceNorm has samples and channels in one dimension."""
        def of(module: nn.Module) -> Callable[..., Tensor]:
            return lambda x: OneNode.apply(x, module)

        return {name: of(module) for name, module in self.model.named_modules()
                if type_of(module) == OPTYPE.IN}

    def leak(self, made: Positions, read: Positions, turn: int | None = None, copies: Positions | None = None
             ) -> str | None:
        """Run with the outputs at `made` changed and all others held; where an input differs that is not in `read`.
        turn: what is chosen by what is changed comes out otherwise, for each number in another way; HELD: as it did.
        copies: of layers that have several weights, those of which all that they read and make is changed."""
        copies = copies or {}
        before, found = self.inputs, list[str]()
        choices = None if turn is None else Choices(self.choices, None if turn == HELD else turn)

        def compare(layer: str, call: int, x: Tensor | None) -> None:
            known = before[layer][call]
            if layer in copies and known is not None and x is not None and x.shape == known.shape:
                x, known = (without(each, 0, copies[layer]) for each in (x, known))
            if known is not None and x is not None and differ(x, known, self._dims[layer], read.get(layer)):
                found.append(layer)

        try:
            output = self._replay_changed(made, compare, choices, copies)
        except Exception as error:  # of the model's code, which picks rows by what the channels hold
            if choices is not None and choices.read:
                return READ
            return found[0] if found else _fault(error)
        if choices is not None and choices.read:
            return READ
        if not found and not all_close(output, self.output):
            return "the output"
        self.chooses |= choices is not None and choices.differ and not found
        return found[0] if found else None

    def shows_without_gradient(self, layers: Collection[str]) -> bool:
        """Whether what `layers` make, of which no gradient comes back, shows in the output, or in what others read;
        beyond what is chosen by it, which a small change leaves as it is."""
        before, found = self.inputs, list[str]()

        def idle(layer: str, call: int) -> bool:
            return layer in layers or (layer, call) in self.idle_calls

        def compare(layer: str, call: int, x: Tensor | None) -> None:
            known = before[layer][call]
            if not idle(layer, call) and x is not None and known is not None and differ(x, known, self._dims[layer]):
                found.append(layer)

        try:
            output = self._replay_changed(self._whole({*layers, *dict(self.idle_calls)}), compare,
                                          Choices(self.choices, None), only=idle)
        except Exception:  # of the model's code, which looks at them
            return True
        return bool(found) or not all_close(output, self.output)

    def read_by_others(self, layers: Collection[str]) -> str | None:
        """Where what `layers` make shows: the output, or a layer that is none of them; None where it does not."""
        everything = {layer: torch.arange(x.shape[self._dims[layer]]) for layer in layers
                      for x in self.inputs[layer][:1] if x is not None}
        made = self._whole(layers)
        turns = (None, *range(TURNS if self.choices else 0))
        return next(filter(None, (self.leak(made, everything, turn) for turn in turns)), None)

    def _whole(self, layers: Collection[str]) -> Positions:
        return {layer: torch.arange(self.outputs[layer][0].shape[self._dims[layer]]) for layer in layers
                if self.outputs.get(layer)}

    def _record(self, layer: str, own: Mapping[str, Any]) -> Callable[..., Tensor]:
        """A layer's forward, which notes what there is to note. own: its parameters, where it is not run with others,
        as by torch.func.functional_call."""
        module = self.layers[layer]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = read_by(args, kwargs)
            self.order.setdefault(layer)
            if x is not None and x.is_nested:
                self.nested.add(layer)
            if layer in self.norms and (len(args) + len(kwargs) != 1 or x is None):  # computed of what, nobody knows
                unknown: Tensor = type(module).forward(module, *args, **kwargs)
                return unknown
            output: Tensor = OneNode.apply(x, module) if layer in self.norms else \
                OneNode.apply(x, module, module.weight) if layer in self.lost else \
                type(module).forward(module, *args, **kwargs)
            if not isinstance(output, Tensor):  # what reads them, nobody knows
                self.several |= {layer} if may_make_several(module) else set()
                return output
            if output._is_view() and type(module).forward is nn.Linear.forward:
                self._made.append((layer, output, version_of(output)))
            if any(module._parameters.get(name) is not parameter for name, parameter in own.items()):
                self.swapped[layer, len(self.outputs[layer])] = {
                    name: None if held is None else held.detach() for name, held in module._parameters.items()}
            self.outputs[layer].append(output.detach().clone())
            if torch._C._functorch.maybe_get_level(output) != -1:
                self.transformed.add(layer)
            if x is not None:
                self._read.append((layer, x, version_of(x)))
                if not x.requires_grad:
                    self._note_first(layer, unwrapped(x.detach()))
            if not torch.is_grad_enabled():
                self.without_gradients.add(layer)
            return output

        return forward

    def _note_first(self, layer: str, x: Tensor) -> None:
        """Note of a call that no gradient leaves which places of the channels hold anything, bool [C]; None: all may.

        Where all is 0, as in the state that a cell begins with, whatever goes is worth nothing."""
        if x.is_nested or x.layout != torch.strided or not x.dim():
            self.first_layers[layer] = None
            return
        held = x.movedim(self._dims[layer], -1)[None].flatten(0, -2).any(0)
        if not bool(held.all()):
            self.from_zeros.add(layer)
        if bool(held.any()):
            before = self.first_layers.get(layer, torch.zeros_like(held))
            self.first_layers[layer] = None if before is None or before.shape != held.shape else before | held

    def reads_given(self, member: Member) -> bool:
        """Whether a layer reads, in one call, what no gradient leaves where it is to read these channels."""
        if member.layer not in self.first_layers:
            return False
        held = self.first_layers[member.layer]
        return held is None or int(member.index.max()) >= len(held) or bool(held[member.index.to(held.device)].any())

    def run_again(self, model: nn.Module, run: Callable[[nn.Module], Tensor] | None = None,
                  see: Callable[[str, int, Tensor | None], None] = lambda layer, call, x: None) -> Tensor:
        """The output of a run of `model`, the recorded one, or of another `run` of it, in which layers compute nothing,
        but give what they gave. see(layer, call, input) is called for each call of one."""
        assert model is self.model
        again = copy.copy(self)
        again._run_model = run or self._run_model
        return again._replay_changed({}, see)

    @property
    def inputs(self) -> Mapping[str, list[Tensor | None]]:
        """Layer -> what it read in each call, where layers give what they gave in the recorded run, and a GroupNorm
        what it reads; None where that is no tensor."""
        return self._replayed[0]

    @property
    def output(self) -> Tensor:
        """The output of the run that `inputs` are of."""
        return self._replayed[1]

    @cached_property
    def _replayed(self) -> tuple[dict[str, list[Tensor | None]], Tensor, bool, Noted]:
        inputs: dict[str, list[Tensor | None]] = {layer: [] for layer in self.outputs}
        choices = Choices()
        with self.watched(None):
            output = self._replay_changed({}, lambda layer, call, x: inputs[layer].append(
                None if x is None else x.clone()), choices)
        made = choices.noted if any(operands is not None for _, operands in choices.noted) else []
        return inputs, output, self.draws or rng.has_drawn(device_of(self.model)), made

    @cached_property
    def steady(self) -> tuple[Mapping[str, list[Tensor | None]], Tensor]:
        """`inputs` and `output`; where the model's code draws random numbers, those of a run in which all are alike."""
        inputs, output, drawn, _ = self._replayed
        if drawn:
            inputs = {layer: [] for layer in self.outputs}
            with self.steady_draws():
                output = self._replay_changed({}, lambda layer, call, x: inputs[layer].append(
                    None if x is None else x.clone()))
        return inputs, output

    def steady_draws(self) -> AbstractContextManager[object]:
        """What the runs are in that are compared with `steady`."""
        return SteadyDraws() if self._replayed[2] else nullcontext()

    @property
    def choices(self) -> Noted:
        """What the model's code makes choices by, of what layers gave: see Choices."""
        return self._replayed[3]

    def _replay_changed(self, made: Positions, see: Callable[[str, int, Tensor | None], None],
                        choices: Choices | None = None, copies: Positions | None = None,
                        only: Callable[[str, int], bool] = lambda *_: True) -> Tensor:
        """The output of a run in which layers compute nothing, but give what they gave, changed at `copies`, and at
        `made` in `only` these calls. see(layer, call, input) is called for each call of a layer."""
        def forward_of(layer: str) -> Callable[..., Tensor]:
            calls, module = enumerate(self.outputs[layer]), self.layers[layer]

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                call, output = next(calls, (-1, None))
                if output is None:  # one call more than before
                    computed: Tensor = type(module).forward(module, *args, **kwargs)
                    return computed
                x = read_by(args, kwargs)
                with nullcontext() if choices is None else choices.paused():
                    see(layer, call, None if x is None or _looks_at_shape(module, x) else unwrapped(x))
                    of_copies = changed(output, 0, copies[layer]) if copies and layer in copies else output
                    changes = layer in made and only(layer, call)
                    return changed(of_copies, self._dims[layer], made[layer]) if changes else of_copies.clone()

            return forward

        with choices or nullcontext(), self.watched(made):
            return self.replay({layer: forward_of(layer) for layer in self.outputs}, self.model)

    @torch.no_grad()
    def replay(self, forwards: Mapping[str, Callable[..., Tensor]], model: nn.Module) -> Tensor:
        """The output of a run of `model`, a copy of the recorded one, whose layers compute `forwards` in place of their
        own, and whose GroupNorms pass on what they read, as norms with a gate do, times that."""
        rng.start_over(device_of(model))
        with skipped(model, self.model), replaced(model, forwards):
            return self._run_model(model).clone()

    @contextmanager
    def parameters_of(self, layer: str, call: int) -> Iterator[None]:
        """In the block, a layer of the recorded model holds the parameters that it had in the call of that number."""
        held = self.layers[layer]._parameters
        own = dict(held)
        held.update(self.swapped.get((layer, call), {}))
        try:
            yield
        finally:
            held.update(own)


def _fault(error: Exception) -> str:
    """Whose an error of a run is: what compares lies in this file or the one it compares by, and calls torch alone."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    own = frame.f_code.co_filename in (__file__, differ.__code__.co_filename)
    return f"{OWN_FAULT} to compare runs without its channels, which is no fault of the model's: please report " \
           f"{error!r:.200} in {frame.f_code.co_name}()" if own else f"the model's own code ({type(error).__name__})"


def _looks_at_shape(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer takes no more from what it is given than its shape, as embeddings of positions do in BART."""
    return isinstance(module, nn.Embedding) and x.is_floating_point()
