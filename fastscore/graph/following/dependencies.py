"""What Torch-Pruning's tracer knows about a model: which node follows which, and where channels lie in each."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn

from fastscore.graph import layers_inside
from fastscore.graph.cutting import channel_buffers
from fastscore.graph.following import contractions, crossings, index_maps, lost_ways, ties
from fastscore.graph.following.cuts import shape, slice_of
from fastscore.graph.following.index_maps import IndexMap
from fastscore.graph.following.lost_ways import Key
from fastscore.graph.following.nodes import Nodes
from fastscore.graph.following.noted_calls import NotedCalls, outputs_of, states_given
from fastscore.graph.kept import obstacles
from fastscore.graph.layer_types import OPTYPE, groups_of, holds_its_product, of_groups, type_of
from fastscore.modules import hooks
from fastscore.modules.inspection import parameter_owners
from fastscore.modules.norms import channel_norms
from fastscore.modules.weights import recurrent

_MOST_ARRIVALS = 100  # at one node, each time at new places: more than there are branches that end somewhere

# (node, pruning function) -> int64 [M], ascending: where channels of the root lie in the node's output or input, in
# the form of fastscore.graph.following.index_maps
Positions: TypeAlias = Mapping[Key, np.ndarray]
_Arrival: TypeAlias = tuple[Any, Any, np.ndarray, Key | None]  # node, function, positions, where they come from


class Graph(Nodes):
    """Torch-Pruning's graph of a model, whose dependencies know how channels move along them.

    Torch-Pruning guesses widths from the neighbours, wrongly or for hours where much is rearranged; autograd knows the
    shape of every tensor. A dependency's index_mapping holds the functions that positions go through from its source to
    its target.

    cuts: what splits and slices are taken for whose places the code has from no attribute: places that it fixes; those
    where what lies beside each other comes from, which move with it; or shares of the whole, which stay such.
    """

    cuts: Literal["fixed", "moving", "shares"] = "fixed"

    def build(self, model: nn.Module, run: Callable[[nn.Module, Any], list[Tensor]], inside: Container[str] = (),
              nested: Container[str] = ()) -> None:
        """Trace one call of run(model, None) -> outputs, whose gradients must be enabled. inside: modules whose parts
        are traced in their place. nested: layers that see nested tensors, and are not traced."""
        self.model, self.verbose, self.ignored_params = model, False, list[nn.Parameter]()
        self.written = dict[str, str]()  # group -> why it does not go, if it does not run with fewer channels
        self.returned, self.unread = set[Any](), set[Any]()
        self._in_vain = set[Any]()  # autograd functions of what is computed, and not used
        self._outputs: list[Tensor] = []  # in torch 2.11, an autograd.Function's node is gone with its output
        self._module2name = {module: name for name, module in model.named_modules()}
        self._parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        around = [module for module in self._module2name if isinstance(module, nn.Linear) and holds_its_product(module)]
        for linear in around:  # whose bias is read by code
            held = [parameter for parameter in linear._parameters.values() if parameter is not None]
            self._param_to_name |= {parameter: self._parameter_names[parameter] for parameter in held}
            self.unwrapped_parameters += [(parameter, 0) for parameter in held]
        for module in model.modules():
            if channel_norms.norm_of(module) is not None:
                self.CUSTOMIZED_PRUNERS[type(module)] = channel_buffers.NORMS
        states = [module for module in model.modules() if recurrent.state_layers(module)]
        self._transformers = {name: set(module.modules()) for module, name in self._module2name.items()
                              if isinstance(module, nn.Transformer)}
        self._several = {id(layer._parameters.get("weight")): name for layer, name in self._module2name.items()
                         if name in inside}
        self.IGNORED_LAYERS_IN_TRACING = [  # whose parts the tracer is to see
            *states, *around,
            *(module for module, name in self._module2name.items() if name in inside or name in nested)]

        def keeping(*args: Any) -> list[Tensor]:
            outputs = run(*args)
            self.returned = {output.grad_fn for output in outputs} - self.unread
            ends, self._in_vain = self.calls.ends(outputs)
            sums = [end.sum() for end in ends]  # roots, behind which each end is what it is
            self._in_vain |= {end.grad_fn for end in sums}
            self._outputs = [*outputs, *sums]
            return self._outputs

        with NotedCalls(ties.weights(self._module2name), model) as self.calls, \
                outputs_of(self._channel_buffers()) as made, \
                states_given(states) as self._given, outputs_of(layers_inside.of(model)) as self._inside:
            self._own_parameters = self.unwrapped_parameters
            self.module2node = dict[nn.Module, Any]()
            with hooks.none_left_after_errors(model):
                self.module2node = self._trace(model, None, keeping, output_transform=None)
            self.unwrapped_parameters = self._own_parameters
        self._unwrapped = {id(parameter) for parameter, _ in self.unwrapped_parameters}
        self._find_types()
        self._find_channel_buffers(made)
        for node in self.module2node.values():
            if node.type == OPTYPE.PARAMETER:
                node._name = self._param_to_name[node.module]
        self._connect_all({})

    def runs_again(self, run: Callable[[], object]) -> None:
        """Take `run` for one more run of the model, where one is needed; what goes together is known from then on."""
        self.calls.run = run
        ties.tie(self)

    def pass_by(self, layers: Iterable[Any], dims: Mapping[Any, int]) -> None:
        """Take nodes of layers for operations that are none, and find anew what depends on what. dims: node -> the
        dimension that holds the channels in its output."""
        for node in layers:
            del self.module2node[node.module]
            name = node.grad_fn.name()
            node.module = tp.ops._ReshapeOp(self._op_id) if "View" in name else tp.ops._ElementWiseOp(self._op_id, name)
            node.type, self._op_id = type_of(node.module), self._op_id + 1
            self.module2node[node.module] = node
        for node in self.module2node.values():
            if isinstance(node.module, tp.ops._ReshapeOp):
                node.type = OPTYPE.RESHAPE  # of views that were found to divide channels
            node.dependencies.clear()
        self._connect_all(dims)
        ties.tie(self)

    def _connect_all(self, dims: Mapping[Any, int]) -> None:
        self._dims, self._met = dict(dims), []
        self._find_dims()
        for node in self.module2node.values():
            self._connect(node)

    def _trace_computational_graph(self, module2node: Any, output: Tensor, gradfn2module: dict[Any, Any], *args: Any,
                                   **kwargs: Any) -> None:
        """As Torch-Pruning's; first, layers that run others come to stand where their own weights are read."""
        layers_inside.move(gradfn2module, self._inside)
        self._inside = {}
        self._own_parameters += self._of_uncalled_embeddings({*gradfn2module.values()}) if not module2node else []
        self.unwrapped_parameters = self._own_parameters
        super()._trace_computational_graph(module2node, output, gradfn2module, *args, **kwargs)
        self.unwrapped_parameters = []  # or it would look for them behind each concatenation, for index maps of its own

    def _of_uncalled_embeddings(self, called: Container[Any]) -> list[tuple[Tensor, int]]:
        """(weight, dimension of channels) of embeddings that no other layer shares a weight with and that code does not
        call, but reads as parameters of its own."""
        owners = parameter_owners(self.model)
        found = {name: module.weight for name, module in self.model.named_modules()
                 if isinstance(module, nn.Embedding) and module not in called and owners[id(module.weight)] == 1}
        self._param_to_name |= {weight: f"{name}.weight" for name, weight in found.items()}
        return [(weight, 1) for weight in found.values()]

    def release(self) -> None:
        """Forget the nodes, which refer to each other and to all that autograd kept, so that it is gone at once."""
        for node in self.module2node.values():
            vars(node).clear()
        self.module2node.clear()
        self._outputs.clear()
        self._in_vain.clear()
        self.returned.clear()
        self.unread.clear()
        self.calls.forget()

    def positions_of(self, root: Any, others: bool = False, part: np.ndarray | None = None
                     ) -> tuple[Positions, str | None, Mapping[Key, Key | None]]:
        """Where the channels that `root` makes lie, everywhere; or as far as what keeps them from being removed.
        others: and those of other layers that are cut into equal parts together with them. part: int64, ascending:
        of these outputs alone, which are numbered from 0.

        Returns (positions, what keeps them, the `came` of lost_ways.lost)."""
        pruner = self.get_pruner_of_module(root.module)
        part = np.arange(pruner.get_out_channels(root.module)) if part is None else part
        positions: dict[Key, np.ndarray] = {}
        work: list[_Arrival] = [(root, pruner.prune_out_channels, part << 32 | np.arange(len(part)), None)]
        came: dict[Key, Key | None] = {}
        arrivals = Counter[Key]()
        obstacle = endless = None
        while obstacle is None and (work or self._rest_of_grouped(positions, work, others)):
            node, function, arrived, before = work.pop()
            if before is not None and before[0] not in node.inputs and self._reduces(node):
                continue  # from behind: what is made of all channels of others has none of them
            known = positions.get((node, function))
            if known is None:
                new = positions[node, function] = arrived
                came[node, function] = before
                obstacle = obstacles.why(self, node, function)
                if node.grad_fn in self._in_vain and (obstacle is not None or self._moves(node)):
                    obstacle = None
                    continue  # it asks for widths, not for the order in them: the trial by surgery shows which
            else:
                if endless or (len(arrived) == len(known) and (arrived == known).all()):
                    continue  # as most that comes back is: no need to sort
                new = np.setdiff1d(arrived, known, assume_unique=True)
                if not len(new):
                    continue
                positions[node, function] = np.union1d(known, new)
                arrivals[node, function] += 1
                if arrivals[node, function] >= _MOST_ARRIVALS:
                    endless = "a loop in the model's code puts its channels in other places each time " \
                              f"({node.grad_fn.name()})"
                    continue  # a better reason may lie where they have not been
            if self._is_padded(node) and new[-1] >> 32 >= shape(node)[self._dims[node]]:
                obstacle = f"their number changes on the way to {node.grad_fn.name()}"  # and they come round for ever
            for dependency in node.dependencies:
                if dependency.is_triggered_by(function):
                    onward = new
                    for follow in dependency.index_mapping:
                        onward = follow(onward)
                    if len(onward):
                        work.append((dependency.target, dependency.handler, onward, (node, function)))
        obstacle = obstacle or endless
        if obstacle is not None and not endless and not obstacle.endswith(obstacles.SEVERAL):  # which says more
            last = next(reversed(came))
            obstacle = lost_ways.lost(self, came).get(last) or lost_ways.at_end(self, came, last) or obstacle
        return positions, obstacle, came

    def free_part(self, root: Any) -> np.ndarray | None:
        """Of a layer whose channels do not go, the outputs that nothing keeps where code splits them at numbers that
        modules keep, int64; None where there are none."""
        parts = self.parts_of(root)
        free = [part for part in parts if self.positions_of(root, part=part)[1] is None]
        return np.concatenate(free) if 0 < len(free) < len(parts) else None

    def _rest_of_grouped(self, positions: Positions, work: list[_Arrival], parts: bool) -> bool:
        """Put to `work` the other channels of what works in groups of them on a concatenation, or, with `parts`, cuts
        it into equal ones; whether there are any. The same place in each goes at once, whoever makes the channels: they
        are numbered as those of the root that lie at the same place."""
        for (node, function), at in positions.items():
            width, period = self._period(node, function) if parts or node.type != OPTYPE.SPLIT else (0, 0)
            if not width:
                continue
            known = np.unique(at >> 32)
            if len(known) >= width or known[-1] >= width:  # all are there; or their number changes on the way
                continue
            channel = np.full(period, -1)
            channel[known % period] = (at & index_maps.CHANNEL)[np.searchsorted(at >> 32, known)]
            rest = np.setdiff1d(np.arange(width), known)
            if (channel[rest % period] >= 0).all():
                work.append((node, function, rest << 32 | channel[rest % period], None))
                return True
        return False

    def _period(self, node: Any, function: Any) -> tuple[int, int]:
        """(how many channels come to a node, how many make one of its groups, or equal parts); (0, 0) without these."""
        if node.type == OPTYPE.SPLIT:
            part = self._chunk(node)
            whole: int = node.grad_fn._saved_self_sym_sizes[self._dims[node]] if part else 0
            return (whole, part) if part and whole % part == 0 else (0, 0)
        module = node.module
        reads = node.type == OPTYPE.GN or (node.type == OPTYPE.CONV and function.__name__ == "prune_in_channels")
        sections = groups_of(module) if reads else 1
        width: int = channel_buffers.surgeon(module).get_in_channels(module) if sections > 1 else 0
        return width, width // sections

    def _reduces(self, node: Any) -> bool:
        """Whether a node makes one number of all channels of an input."""
        return any(math.prod(shape(node)) < math.prod(shape(source, node)) for source in obstacles.reduced(self, node))

    def _moves(self, node: Any) -> bool:
        """Whether a view has channels in other places than before."""
        return node.type == OPTYPE.RESHAPE and any(dependency.index_mapping for dependency in node.dependencies
                                                   if dependency.target in node.inputs)

    def _connect(self, node: Any) -> None:
        """The dependencies between a node and its inputs, both ways, with their index maps."""
        pruner = self.get_pruner_of_module(node.module)
        edges = [edge for edge in getattr(node.grad_fn, "next_functions", ()) if self._is_traced(edge[0])]
        begins = self._begins(node) if node.type == OPTYPE.CONCAT and self._cuts(node) else []
        # a module that is called twice has the inputs of all its calls, and the function of one
        for number, (source, edge) in enumerate(itertools.zip_longest(node.inputs, edges[:len(node.inputs)])):
            forward = tp.dependency.Dependency(self.get_pruner_of_module(source.module).prune_out_channels,
                                             pruner.prune_in_channels, source, node)
            inverse = tp.dependency.Dependency(forward.handler, forward.trigger, node, source)
            maps: list[IndexMap] = []
            if source.type == OPTYPE.SPLIT and self._cuts(source):
                maps.append(index_maps.Lost() if edge is None else self._split_part(source, edge[1]))
            if begins:
                end = begins[number] + index_maps.shape_of(*edge)[self._dims[node]]
                maps.append(index_maps.Inverse(index_maps.SliceMap(begins[number], end)))
            elif not contractions.carries(self, source, node):
                maps.append(index_maps.Lost())
            elif node in self._dims and index_maps.is_broadcast(node.grad_fn, self._dims[node], shape(source, node)):
                maps.append(index_maps.Lost())  # what has one value for all channels has none of them
            elif (moved := self._index_map(source, node)) is not None:
                maps.append(moved)
            forward.index_mapping = [each.forward for each in maps]
            inverse.index_mapping = [each.inverse for each in reversed(maps)]
            source.dependencies.append(forward)
            node.dependencies.append(inverse)

    def _ends_at(self, node: Any, onward: Any) -> bool:
        return contractions.summed(self, node, onward)

    def _that_end(self) -> dict[Any, int]:
        return crossings.that_end(self, self._met)

    def _index_map(self, source: Any, node: Any) -> IndexMap | None:
        """From the channels of a node's one input to its output's; None where each stays where it is."""
        if self._is_padded(node):
            before, _ = self._padding(node)
            return index_maps.Inverse(index_maps.SliceMap(before, before + shape(source, node)[self._dims[node]]))
        if node.type == OPTYPE.SLICE and self._cuts(node):
            return slice_of(node.grad_fn, shape(source, node)[self._dims[node]])
        if source not in self._dims or self._dims[source] >= len(shape(source)):
            return None  # along more than one dimension: nothing of it goes
        if node.type == OPTYPE.DEPTHWISE_CONV:
            return index_maps.of_groups(node.module.in_channels, node.module.out_channels)
        if node.type == OPTYPE.RESHAPE:
            found = index_maps.view(self._dims[source], shape(source, node), shape(node))
            if found is None:
                return self._divided(source, node)
            return found[1] if found[1] else None
        return index_maps.regrouped(node.grad_fn, self._dims[source], shape(source, node))

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        """Torch-Pruning's, but for what it takes for another layer than it is here."""
        kind = OPTYPE.DEPTHWISE_CONV if of_groups(module) else None
        return self.REGISTERED_PRUNERS[kind] if kind else super().get_pruner_of_module(module)

    def _begins(self, node: Any) -> list[int]:
        """Where each traced input of a concatenation begins. What no layer made has a width, but no node."""
        dim, begins, begin = self._dims[node], list[int](), 0
        widths = self.calls.concatenated.get(node.grad_fn)
        for number, edge in enumerate(node.grad_fn.next_functions):
            if self._is_traced(edge[0]):
                begins.append(begin)
            begin += widths[number] if widths is not None else index_maps.shape_of(*edge)[dim]
        return begins

    def _split_part(self, split: Any, number: int) -> index_maps.SliceMap:
        sizes = [index_maps.shape_of(split.grad_fn, part)[self._dims[split]] for part in range(number + 1)]
        return index_maps.SliceMap(sum(sizes[:-1]), sum(sizes))

    def _is_traced(self, function: Any) -> bool:
        return function is not None and ("AccumulateGrad" not in function.name()
                                         or id(function.variable) in self._unwrapped)
