"""What a pass knows of the graph that it rewrites: its weights, which nodes are views of them, and what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from kbit_inductor._compat import FakeTensor, FakeTensorMode, is_transformed, member_path, source_name, storage_id
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.ends import ends_of_graph
from kbit_inductor.lowering.registry import Choice
from kbit_inductor.packing import WEIGHT_DTYPES
from kbit_inductor.side import SIDE
from kbit_inductor.weights.derivation import Derivation
from kbit_inductor.weights.store import Slot
from kbit_inductor.weights.views import Strides, WeightView, expanded_batch

VALUE = "example_value"  # the metadata key under which Dynamo keeps a node's fake value
PARTS = tuple(f".weight.{name}" for name in SIDE)  # of a weight that is packed already


@dataclass(frozen=True)
class GraphWeight:
    """A parameter or buffer of at least two dimensions that the graph takes as input, or a weight that it computes from such.

    Attributes:
        node: its placeholder.
        argument: its position among the graph's inputs; for a computed weight, that of the parameter it is named after.
        name: of the layer that owns it, with the parameter's own name where that is not ``weight``.
        config: how it is to be stored; None when it stays in float.
        reason: why it stays in float, or "".
        derivation: how it is computed; None for a parameter.
        computed: the node that computes it.
    """

    node: fx.Node
    argument: int
    name: str
    config: LayerConfig | None
    reason: str = ""
    derivation: Derivation | None = None
    computed: fx.Node | None = None

    @property
    def value(self) -> Tensor:
        """Its fake tensor."""
        fake: Tensor = self.node.meta[VALUE]
        return fake


@dataclass(frozen=True)
class Memory:
    """A storage of the graph whose contents are a weight's: the weight's own, or that of a cast or clone of it."""

    weight: GraphWeight
    view: WeightView
    layout: Strides
    value: Tensor


@dataclass(frozen=True)
class Selection:
    """A storage of the graph that holds matrices picked out of a batch of them, ``W[index]``.

    Attributes:
        weight: which the batch is in.
        view: of all its matrices ``[E, N, K]``.
        layout: how all of them would lie in memory, were they picked in order.
        index: the node of the positions, int32 or int64 of any shape but a scalar's.
        value: the fake tensor of what is picked, ``[*shape of index, N, K]``.
    """

    weight: GraphWeight
    view: WeightView
    layout: Strides
    index: fx.Node
    value: Tensor


@dataclass
class Use:
    """One matched product or look-up.

    Attributes:
        family: of operators, as the registry of kernels knows it.
        weight: the parameter.
        view: the part of it that is multiplied by.
        rows: N.
        columns: K.
        node: what computes it.
        batch: how many matrices there are, where the product takes a batch of them.
        m: rows of x, or of the look-up, in the call that was captured. None: not known.
    """

    family: str
    weight: GraphWeight
    view: WeightView
    rows: int
    columns: int
    node: fx.Node
    batch: int | None = None
    m: int | torch.SymInt | None = None


@dataclass
class Context:
    """The state that passes share while one graph is rewritten.

    Attributes:
        graph: which is rewritten, in place.
        config: the options.
        weights: its parameters and buffers of two dimensions and more.
        memories: by storage of fake tensors, which hold a weight's values.
        selections: by storage of fake tensors, which hold matrices picked out of a weight.
        uses: the products and look-ups that were matched.
        reasons: by name of a layer, why a use of it was not.
        slots: the packed weights that the graph takes after its other inputs.
        operands: the fake operands of each of them, in the order of the graph's inputs.
        choices: the kernel of each use.
        fusions: how often each kind of fusion was done.
    """

    graph: fx.Graph
    config: Config
    weights: list[GraphWeight]
    memories: dict[int, Memory] = field(default_factory=dict)
    selections: dict[int, Selection] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    operands: list[tuple[Tensor, ...]] = field(default_factory=list)
    choices: list[tuple[Use, Choice]] = field(default_factory=list)
    fusions: Counter[str] = field(default_factory=Counter)

    def moved(self, old: fx.Node, new: fx.Node) -> None:
        """Let what is known of a product's node be known of the node that computes it now."""
        for use, _ in self.choices:
            if use.node is old:
                use.node = new

    def explain(self, weight: GraphWeight, reason: str) -> None:
        """Note why a use of ``weight`` was not matched."""
        told = self.reasons.setdefault(weight.name, [])
        if reason not in told:
            told.append(reason)

    def locate(self, node: Any) -> tuple[GraphWeight, WeightView, Strides, Strides] | None:
        """``(weight, view, memory, window)`` of a node that is a weight or a view of one, else None.

        Views are recognised by what they share, not by how they are spelled: a fake tensor on the weight's storage is a view.
        """
        return self.locate_value(node.meta.get(VALUE)) if isinstance(node, fx.Node) else None

    def locate_value(self, value: Any) -> tuple[GraphWeight, WeightView, Strides, Strides] | None:
        """As :meth:`locate`, of a fake value."""
        if not isinstance(value, Tensor) or value.layout != torch.strided or is_transformed(value):
            return None
        memory = self.memories.get(storage_id(value))
        if memory is None or memory.value._version > 0 or not _is_static(value):
            return None
        return memory.weight, memory.view, memory.layout, Strides.of(value)

    def select(self, node: fx.Node, batch: fx.Node, index: fx.Node) -> bool:
        """Know the result of ``node`` as the matrices that ``index`` picks out of ``batch``, a view of a weight, if it is that."""
        located, positions = self.locate(batch), index.meta[VALUE]
        if located is None or len(located[3].size) != 3 or positions.dim() == 0 or positions._version > 0:
            return False
        weight, view, memory, window = located
        return self._remember_selection(weight, view.then(memory, window), window.size, index, node.meta[VALUE])

    def copy_selection(self, node: fx.Node, source: fx.Node) -> None:
        """Know the result of ``node``, a cast or clone of the selection ``source``, as the same matrices."""
        if (picked := self.selected(source)) is not None:
            selection, window = picked
            view = selection.view.then(selection.layout, window)
            self._remember_selection(selection.weight, view, window.size, selection.index, node.meta[VALUE])

    def _remember_selection(
        self, weight: GraphWeight, view: WeightView, size: tuple[int, ...], index: fx.Node, value: Tensor
    ) -> bool:
        count, rows, columns = size
        layout = Strides(size, (rows * columns, *value.stride()[-2:]))
        if not count or layout.stride[1:] not in ((columns, 1), (1, rows)) or value.stride(-3) != rows * columns:
            return False
        self.selections[storage_id(value)] = Selection(weight, view, layout, index, value)
        return True

    def selected(self, node: Any) -> tuple[Selection, Strides] | None:
        """``(selection, window)`` of a node that is a selection, or a view of one matrix after the other; else None.

        ``window`` says where the part of each matrix lies, in memory that holds all of them.
        """
        value: Any = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
        selection = self._selection(value)
        if selection is None or value.dim() != 3 or value.stride(0) != selection.layout.stride[0]:
            return None
        inner = (*value.shape[1:], *value.stride()[1:], value.storage_offset())
        count = selection.index.meta[VALUE].numel()
        if not all(isinstance(n, int) for n in inner) or str(value.shape[0]) != str(count):  # no guard on symbolic sizes
            return None
        size = (selection.layout.size[0], *value.shape[1:])
        return selection, Strides(tuple(size), (selection.layout.stride[0], *value.stride()[1:]), int(value.storage_offset()))

    def is_view(self, node: fx.Node) -> bool:
        """Whether all that ``node`` returns, a tensor or several (``chunk``), are weights or selections, or views of them."""
        values = tensors_of(node)
        return bool(values) and all(self.locate_value(value) is not None or self._selection(value) is not None for value in values)

    def _selection(self, value: Any) -> Selection | None:
        """The selection whose memory the fake tensor ``value`` shares."""
        if not isinstance(value, Tensor) or value.layout != torch.strided or is_transformed(value):
            return None
        selection = self.selections.get(storage_id(value))
        return selection if selection is not None and selection.value._version == 0 else None

    def weight_of(self, node: Any) -> GraphWeight | None:
        """The weight that ``node`` is, or is a view of, or is picked from; None when it is neither."""
        if (located := self.locate(node)) is not None:
            return located[0]
        selection = self._selection(node.meta.get(VALUE)) if isinstance(node, fx.Node) else None
        return None if selection is None else selection.weight

    def spared(self) -> set[fx.Node]:
        """The nodes that nothing reads but what computes a weight that has become an input: no call needs them any more."""
        computed = {weight.computed for weight in self.weights if weight.computed is not None}
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if (node.users or node in computed) and all(user in found for user in node.users):
                found.add(node)
        return found

    def is_inside_transform(self, node: fx.Node) -> bool:
        """Whether ``node`` computes inside ``vmap`` or another torch.func transform, and if so, note it for its weights."""
        if not any(is_transformed(tensor) for each in (node, *node.all_input_nodes) for tensor in tensors_of(each)):
            return False
        for operand in node.all_input_nodes:
            if (located := self.locate(operand)) is not None:
                self.explain(located[0], "used inside a torch.func transform such as vmap")
        return True

    def fake_mode(self) -> FakeTensorMode:
        """The fake mode that the graph's values belong to."""
        for node in self.graph.find_nodes(op="placeholder"):
            if isinstance(value := node.meta.get(VALUE), FakeTensor):
                return value.fake_mode
        return FakeTensorMode()


def tensors_of(node: fx.Node) -> list[Tensor]:
    """The fake tensors that ``node`` returns."""
    value = node.meta.get(VALUE)
    return [item for item in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(item, Tensor)]


def share_writes(graph: fx.Graph) -> None:
    """Let every tensor of ``graph`` know of a write to its memory: its version says so then, which all passes ask.

    ``x.data`` and a detached ``x`` that comes as another input share its memory, but count versions of their own.
    """
    tensors = [
        value for node in graph.nodes for value in tensors_of(node) if value.layout == torch.strided and not is_transformed(value)
    ]
    written = {storage_id(value) for value in tensors if value._version > 0}
    for value in tensors:
        if value._version == 0 and storage_id(value) in written:
            torch.autograd.graph.increment_version(value)


def find_weights(graph: fx.Graph, inputs: Sequence[Any], config: Config) -> list[GraphWeight]:
    """The weights among the inputs of Dynamo's graph: parameters, and buffers of modules, of two or more dimensions."""
    named = list(_named_weights(graph, inputs))
    ends = ends_of_graph([(node, node.meta[VALUE]) for _, node, _ in named])
    found = []
    for argument, node, name in named:
        layer = config.for_layer(name, node in ends)
        reason = ineligible(node.meta[VALUE], config) or ("" if layer is not None else "skipped by the option 'skip'")
        found.append(GraphWeight(node, argument, name, None if reason else layer, reason))
    return found


def _named_weights(graph: fx.Graph, inputs: Sequence[Any]) -> Iterator[tuple[int, fx.Node, str]]:
    """Position, placeholder and name of each."""
    for argument, (node, real) in enumerate(zip(graph.find_nodes(op="placeholder"), inputs, strict=True)):
        value = node.meta.get(VALUE)
        if not isinstance(value, Tensor) or value.dim() < 2 or not (value.is_floating_point() or value.is_complex()):
            continue
        name, is_member = layer_name(node)
        if not name.endswith(PARTS) and (is_member or isinstance(real, nn.Parameter)):
            yield argument, node, name


def layer_name(node: fx.Node) -> tuple[str, bool]:
    """The layer of the placeholder ``node``, with its own name where that is not ``weight``, and whether it is a module's."""
    source = source_name(node) or node.name
    path = member_path(source)
    return ".".join(path[:-1] if path[-1:] == ["weight"] and len(path) > 1 else path) or source, bool(path)


def begin(graph: fx.Graph, weights: list[GraphWeight], config: Config) -> Context:
    """A context in which every eligible weight's own memory is known."""
    context = Context(graph, config, weights)
    for weight in weights:
        if weight.config is None:
            context.explain(weight, weight.reason)
        else:
            value = weight.value
            context.memories[storage_id(value)] = Memory(weight, WeightView(), Strides.of(value), value)
    return context


def ineligible(value: Tensor, config: Config) -> str:
    """Why a weight with the fake tensor ``value`` stays in float, or ""."""
    if value.layout != torch.strided:
        return f"its layout is {value.layout}"
    if type(value).__name__ not in ("FakeTensor", "Parameter"):
        return f"it is a tensor subclass, {type(value).__name__}"
    if value.dtype not in WEIGHT_DTYPES:
        return f"its dtype is {value.dtype}"
    if value.device.type == "meta":
        return "it is on the meta device, without values"
    if not _is_static(value):
        return "its shape is dynamic"
    if value.numel() < config.min_elements:
        return f"it is too small: {value.numel()} elements, fewer than min_elements={config.min_elements}"
    if value._version > 0:
        return "the forward pass writes to it"
    return ""


def _is_static(value: Tensor) -> bool:
    extents = [extent for extent, batch in zip(value.shape, expanded_batch(value), strict=True) if not batch]
    return all(isinstance(n, int) for n in (*extents, *value.stride(), value.storage_offset()))
