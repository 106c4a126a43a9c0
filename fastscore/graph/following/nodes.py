"""What each node of Torch-Pruning's graph is, and where the channels lie in its output."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import nn

from fastscore.graph.autograd_nodes import parameters_of
from fastscore.graph.cutting import channel_buffers
from fastscore.graph.following import index_maps
from fastscore.graph.following.cuts import LAYERS, Cuts, shape
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.modules.norms import channel_norms

# What a group may pass through, and the part it plays there. A depthwise convolution and a normalisation work on each
# channel alone: they lose the channel, but neither make it nor end it.
CHANNELWISE = {OPTYPE.DEPTHWISE_CONV, OPTYPE.BN, OPTYPE.GN, OPTYPE.IN, OPTYPE.PRELU}
PRODUCERS = LAYERS | {OPTYPE.EMBED}
NORM = OPTYPE.LN  # of nodes: any normalisation over channels, and nothing else
TRANSPARENT = {OPTYPE.ELEMENTWISE, OPTYPE.CONCAT, OPTYPE.SPLIT, OPTYPE.RESHAPE, OPTYPE.UNBIND, OPTYPE.EXPAND,
               OPTYPE.SLICE}
TAKEN = "takes its channels together with"  # and a parameter, in reasons
_OF_LINEARS = ("View", "UnsafeView", "Transpose", "AddBackward")  # what stands behind the product of a Linear
_UNKNOWN = OPTYPE.MHA  # of modules that are no ChannelNorm, and stop whatever comes to them


class Nodes(Cuts, tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's graph of a model before its nodes depend on each other."""

    model: nn.Module
    _module2name: dict[nn.Module, str]
    _op_id: int  # of the next operation that is none of the model's modules
    returned: set[Any]  # autograd functions of the model's outputs
    unread: set[Any]  # and of what layers made, and nothing is computed from
    _met: list[tuple[Any, Any]]  # (node, one after it whose channels were known to lie somewhere before it was reached)

    def _channel_buffers(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if channel_buffers.width(module) is not None]

    def _find_types(self) -> None:
        """Nodes of normalisations over channels are of the type NORM, and no others; those of convolutions as
        layer_types says."""
        for node in self.module2node.values():
            if node.type in (OPTYPE.CUSTOMIZED, NORM) and isinstance(node.module, nn.Module):
                known = channel_norms.norm_of(node.module) is not None
                node.type = NORM if known else _UNKNOWN
            elif node.type == OPTYPE.CONV:
                node.type = type_of(node.module)
            elif node.type == OPTYPE.RESHAPE and _name(node).startswith("ViewAsReal"):
                node.type = OPTYPE.ELEMENTWISE

    def _find_channel_buffers(self, made: Mapping[nn.Module, list[Any]]) -> None:
        """Where a module with buffers of one number for each channel has run, it loses channels as a PReLU does.

        made: module -> the autograd function of its output, in each call.
        """
        nodes = {node.grad_fn: node for node in self.module2node.values() if node.type == OPTYPE.ELEMENTWISE}
        for module, functions in made.items():
            if len(functions) == 1 and (node := nodes.get(functions[0])) is not None and \
                    channel_buffers.width(module) in shape(node):
                node.module, node.type, node.dim_is_known = module, OPTYPE.PRELU, False

    def _find_dims(self) -> None:
        """The dimension that holds the channels, in the output of every layer and of what comes after it, if it is not
        known yet."""
        work = [node for node in self.module2node.values()
                if node.type in PRODUCERS | CHANNELWISE | {NORM} and not hasattr(node, "dim_is_known")]
        known = list(self._dims)
        for node in work:
            self._dims[node] = reading_dim(node, len(shape(node)))
        divided = self._follow(known + work)[0]
        for onward, dim in self._that_end().items():
            divided = self._follow_again(onward, dim, divided)
        for node in [node for node in self.module2node.values() if node.type == OPTYPE.LINEAR]:
            for source in _read_by(node):  # what no layer made has its channels where the layer reads them
                self._dims.setdefault(source, len(shape(source)) - 1)
        for node in self.module2node.values():
            for source in node.inputs if node.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) else ():
                if source.type in TRANSPARENT and source.grad_fn is node.grad_fn.next_functions[0][0]:
                    self._dims.setdefault(source, len(shape(source)) - 1 - len(node.module.kernel_size))
        self._follow_back(list(self._dims))
        while divided:  # of several dimensions, channels are what meets channels further on, or the code leaves open
            onward = min(divided, key=lambda view: (
                view not in self._dims, self.calls.view_of(view.grad_fn).open is None))
            node = divided.pop(onward)
            code = self.calls.view_of(onward.grad_fn)
            part = index_maps.part(self._dims[node], shape(node, onward), shape(onward), code.open, code.kept)
            if part is not None and not (self._is_product(node) or self._is_multiplied(onward)):  # as heads are
                self._dims.setdefault(onward, part)
            if self._divided(node, onward) is None:
                onward.type = OPTYPE.CUSTOMIZED  # its channels lie along more than one dimension from here on
                self._dims[onward] = self._dims[node]
            more, found = self._follow([onward])
            divided |= {view: source for view, source in more.items() if view not in divided}
            self._follow_back(found)

    def _that_end(self) -> dict[Any, int]:
        """Node -> the dimension that is to be followed from there on, in the place of one whose channels end."""
        raise NotImplementedError

    def _follow_again(self, node: Any, dim: int, divided: dict[Any, Any]) -> dict[Any, Any]:
        """Take the channels of a node to lie along `dim`, and find anew where they are in what comes after it; what
        _follow returns first, of everything."""
        work, gone = [node], {node}
        while work:
            more = {onward for onward in work.pop().outputs if onward.type in TRANSPARENT} - gone
            gone |= more
            work += more
        for each in gone:
            self._dims.pop(each, None)
        self._dims[node] = dim
        sources = [source for source in self._dims if source is not node and not gone.isdisjoint(source.outputs)]
        return {onward: source for onward, source in divided.items() if source not in gone} | \
            self._follow([*sources, node])[0]

    def _follow(self, work: list[Any]) -> tuple[dict[Any, Any], list[Any]]:
        """Find the dimensions of what comes after nodes whose own are known, but for views that divide it.

        Returns (each of these views -> the node before it, all nodes whose dimensions are known now)."""
        divided: dict[Any, Any] = {}
        found, ended, spread = list[Any](), list[tuple[Any, Any]](), dict[Any, dict[int, Any]]()
        while work or ended or spread:
            if not work and spread:  # what comes after it is known, as far as others tell
                onward = next(iter(spread))
                work += self._choose(onward, spread.pop(onward))
                continue
            if not work:  # nobody else has channels there
                node, onward = ended.pop()
                if onward not in self._dims:
                    self._dims[onward] = len(shape(onward))
                    work.append(onward)
                continue
            node = work.pop()
            found.append(node)
            for onward in node.outputs:
                if onward in self._dims or onward.type == _UNKNOWN:  # whose last operation says nothing of its own
                    self._met.append((node, onward))
                    continue
                if self._ends_at(node, onward):
                    continue
                gone = self._dims[node] >= len(shape(node, onward))  # as that of one channel, squeezed, or summed over
                if gone and (len(onward.inputs) > 1 or onward.type == OPTYPE.RESHAPE):
                    ended.append((node, onward))  # what it meets may have others
                elif (dim := self.dim_after(node, onward)) is None:
                    divided[onward] = node
                elif self._is_spread(node, onward):
                    spread.setdefault(onward, {}).setdefault(dim, node)
                else:
                    self._dims[onward] = dim
                    work.append(onward)
        return divided, found

    def _is_spread(self, source: Any, node: Any) -> bool:
        """Whether an input of a node is broadcast there, beside others: their channels may lie where it has none, as
        those of a stream that is weighted do."""
        before, dims = shape(source, node), range(len(shape(node)))
        return node.type == OPTYPE.ELEMENTWISE and len(node.inputs) > 1 and any(
            index_maps.is_broadcast(node.grad_fn, dim, before) for dim in dims)

    def _choose(self, node: Any, sources: Mapping[int, Any]) -> list[Any]:
        """Take the channels of a node all of whose known inputs are broadcast, as in an outer product, to lie where
        others do that it is added to, or else where they were found first. sources: dimension -> the input whose
        channels come to lie along it. Returns [the node], or [] where its channels are known by now."""
        made: list[Any] = []
        if node not in self._dims:
            after = node
            while after not in self._dims and len(after.outputs) == 1 and shape(after.outputs[0]) == shape(node) and \
                    after.outputs[0].type == OPTYPE.ELEMENTWISE:
                after = after.outputs[0]
            known = self._dims.get(after, -1)
            self._dims[node] = known if known in sources else next(iter(sources))
            made.append(node)
        self._met += [(source, node) for dim, source in sources.items() if dim != self._dims[node]]
        return made

    def _follow_back(self, work: list[Any]) -> None:
        """To parameters that meet channels, through what is made of them before they do."""
        work = [node for node in work if node.type in TRANSPARENT]
        while work:
            node = work.pop()
            for source in node.inputs:
                if source not in self._dims and (dim := self._dim_before(source, node)) is not None:
                    self._dims[source] = dim
                    if source.type in TRANSPARENT:
                        work.append(source)

    def _ends_at(self, node: Any, onward: Any) -> bool:
        """Whether the channels of a node end at an operation that sums over them."""
        raise NotImplementedError

    def dim_after(self, node: Any, onward: Any, dim: int | None = None) -> int | None:
        """Where channels lie after the next operation; None where along several dimensions. dim: where they lie before
        it, if not where they are known to."""
        dim, before, after = self._dims[node] if dim is None else dim, shape(node, onward), shape(onward)
        if onward.type != OPTYPE.RESHAPE:
            return index_maps.channel_dim(onward.grad_fn, dim, before, after)
        found = index_maps.view(dim, before, after) if dim < len(before) else None
        return None if found is None else found[0]

    def _divided(self, node: Any, onward: Any) -> index_maps.IndexMap | None:
        """The map of a view that divides channels over several dimensions, of which one is known to hold them."""
        dim, before = self._dims[node], shape(node, onward)
        at = self._dims.get(onward)
        return None if at is None or dim >= len(before) else index_maps.divided(dim, before, at, shape(onward))

    def _is_multiplied(self, node: Any) -> bool:
        """Whether what a node makes is multiplied by other activations, as matrices, with no layer between."""
        work, seen = [node], {node}
        while work:
            more = {onward for onward in work.pop().outputs if onward.type in TRANSPARENT} - seen
            if any(map(self._is_product, more)):
                return True
            more = {onward for onward in more if not self._is_within(onward)}
            seen |= more
            work += more
        return False

    def _is_product(self, node: Any) -> bool:
        """Whether an operation multiplies matrices, as no part of what a layer does."""
        return node.type in TRANSPARENT and index_maps.multiplies(node.grad_fn) and not self._is_within(node)

    def _is_within(self, node: Any) -> bool:
        """Whether an operation is a part of what a layer does, with its weight."""
        return any(self.layer_of(self.parameter_name(parameter)) for parameter in parameters_of(node.grad_fn))

    def _dim_before(self, source: Any, node: Any) -> int | None:
        """The dimension of a node's input that comes to hold its channels; None where none does alone."""
        dim, before, after = self._dims[node], shape(source, node), shape(node)
        if node.type == OPTYPE.RESHAPE:
            moved = [found[0] if (found := index_maps.view(at, before, after)) is not None and not found[1] else None
                     for at in range(len(before))]
        elif index_maps.contracts(node.grad_fn):
            of = (index_maps.looked_up, index_maps.of_constants)
            moved = [next((to for each in of if (to := each(node.grad_fn, at, len(before))) is not None), None)
                     for at in range(len(before))]
        else:
            gone = index_maps.saved_dims(node.grad_fn, "_saved_dim", len(before)) if len(before) > len(after) else ()
            moved = [None if at in gone else index_maps.channel_dim(node.grad_fn, at, before, after)
                     for at in range(len(before))]
        return next((at for at, where in enumerate(moved) if where == dim and before[at] > 1), None)

    def dim_of(self, node: Any) -> int | None:
        """The dimension that holds the channels in a node's output; None where none does."""
        return self._dims.get(node)

    def name_of(self, node: Any) -> str:
        """The qualified name of the module of a layer's node."""
        return self._module2name[node.module]

    def parameter_name(self, parameter: nn.Parameter) -> str:
        """The qualified name of a parameter; "" where it is none of the model's."""
        name: str = self._parameter_names.get(parameter, "")
        return name

    def taken_with(self, parameter: str) -> str:
        """That an operation takes channels and a parameter of that name, and nobody knows how."""
        owner, _, key = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        if type_of(module) in PRODUCERS:  # whose own code does not run
            return f"the model's code {TAKEN} {parameter}, which cannot lose channels yet"
        kind = type(module).__name__
        who = f"{owner} ({kind})" if owner else kind
        return f"the code of {who} {TAKEN} its {key}, which cannot lose channels yet"

    def layer_of(self, parameter: str) -> Any:
        """The node of the layer that has a parameter of that name; None of one that is not called, or no layer."""
        node = self.module2node.get(self.model.get_submodule(parameter.rpartition(".")[0]))
        return node if node is not None and node.type in LAYERS else None

    @property
    def normalized_by(self) -> dict[str, str]:
        """Conv or Linear -> the BatchNorm that alone reads its output."""
        pairs = ((node, node.outputs[0]) for node in self.module2node.values()
                 if node.type in LAYERS | {OPTYPE.DEPTHWISE_CONV} and len(node.outputs) == 1)
        return {self._module2name[layer.module]: self._module2name[norm.module] for layer, norm in pairs
                if norm.type == OPTYPE.BN and norm.inputs == [layer]}

    def _is_padded(self, node: Any) -> bool:
        """Whether constants are padded along the dimension that holds the channels."""
        return node in self._dims and self._padding(node) != (0, 0)

    def _padding(self, node: Any) -> tuple[int, int]:
        return index_maps.padding(node.grad_fn, self._dims[node], len(shape(node)))

    def pads_others(self, positions: Mapping[tuple[Any, Any], np.ndarray]) -> bool:
        """Whether some of `positions` hold constants padded beside other channels: as many, whatever goes."""
        for (node, _), at in positions.items():
            if self._is_padded(node):
                before, after = self._padding(node)
                position = at >> 32
                if ((position < before) | (position >= shape(node)[self._dims[node]] - after)).any():
                    return True
        return False

    def writes_parts(self, positions: Mapping[tuple[Any, Any], np.ndarray]) -> bool:
        """Whether some of `positions` are written to a part of the channels of another tensor, or are written over."""
        written = (node for node, _ in positions if node in self._dims and _name(node).endswith("CopySlices"))
        return any(shape(source, node)[at] != shape(node)[self._dims[node]]
                   for node in written for source in node.inputs
                   if (at := self._dims.get(source, -1)) in range(len(shape(source))))

def reading_dim(node: Any, dims: int) -> int:
    """The dimension of channels in what a layer reads, or makes, that has so many dimensions."""
    if node.type in (OPTYPE.LINEAR, OPTYPE.EMBED):
        return dims - 1
    norm = channel_norms.norm_of(node.module) if node.type == NORM else None
    if norm is not None:
        return norm.dim if norm.dim > 0 else dims + norm.dim
    return dims - 1 - len(node.module.kernel_size) if node.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) else 1


def _read_by(linear: Any) -> Iterator[Any]:
    """The nodes that the products of a Linear read, in each of its calls: at most a bias and views stand between."""
    work = [linear] if index_maps.contracts(linear.grad_fn) else list(linear.inputs)
    while work:
        node = work.pop()
        if node.type not in TRANSPARENT | {OPTYPE.LINEAR} or not hasattr(node.grad_fn, "name"):
            continue
        if index_maps.contracts(node.grad_fn):
            yield from (source for source in node.inputs if source.type in TRANSPARENT | {OPTYPE.PARAMETER}
                        and shape(source) and not _name(source).startswith("TBackward"))
        elif len(node.inputs) == 1 and _name(node).startswith(_OF_LINEARS):
            work += node.inputs


def _name(node: Any) -> str:
    name: str = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
    return name
