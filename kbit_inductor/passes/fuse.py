"""Fuse what surrounds the CPU's products into them: siblings, gates, activations, residual sums, RMS norms in front.

Each step looks for one shape of graph around ``kbit::fused_linear_cpu`` and replaces it by a call that computes the same; the
operator's definition is in :mod:`kbit_inductor.lowering.cpu`. Only graphs without gradients are fused, since the fused operator has
none. Which fusions happened can be read off the graph: :func:`fuse` returns their counts.

Merging siblings and fusing a gate after the manner of vLLM's ``gate_up_proj`` and ``silu_and_mul``, without concatenating weights.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.lower import Lowered

aten = torch.ops.aten
LINEAR = torch.ops.kbit.linear_cpu.default
FUSED = torch.ops.kbit.fused_linear_cpu.default
ATTENTION = torch.ops.kbit.decode_attention_cpu.default
DECODE_QUERIES = 8  # so many queries at most are a decoding step
ADD = (operator.add, operator.iadd, torch.add, "add", aten.add.Tensor)
MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", aten.mul.Tensor)
CASTS = ("to", "float", "type_as", aten._to_copy.default)
SILU = (functional.silu, torch.nn.functional.silu, aten.silu.default)
RELU = (functional.relu, torch.relu, "relu", aten.relu.default)
SIGMOID = (torch.sigmoid, functional.sigmoid, "sigmoid", aten.sigmoid.default)
TANH = (torch.tanh, functional.tanh, "tanh", aten.tanh.default)
GELU = (functional.gelu, aten.gelu.default)


@dataclass
class Call:
    """The arguments of a ``fused_linear_cpu`` node by name."""

    x: fx.Node
    norm_weight: Any
    eps: float
    weights: list[fx.Node]
    biases: list[Any]
    rows: list[int]
    activation: str
    gated: bool
    residual: Any
    activation_bits: int

    @classmethod
    def of(cls, node: Any) -> Call | None:
        """The call that ``node`` is, if what it reads and gives is written to by nothing: only then may it move."""
        if not isinstance(node, fx.Node) or node.target is not FUSED or not (_is_constant(node) and _is_constant(node.args[0])):
            return None
        return cls(*(list(a) if isinstance(a, (list, tuple)) else a for a in node.args))  # type: ignore[arg-type]

    @property
    def plain(self) -> bool:
        """Whether nothing is fused behind the product yet."""
        return not self.activation and not self.gated and self.residual is None


def fuse(context: Context, lowered: Lowered) -> Counter[str]:
    """Fuse all that can be fused, and return how often each kind of fusion was done."""
    done: Counter[str] = Counter()
    if torch.is_grad_enabled() or not any(choice.kernel.name == "cpu" for _, choice in lowered.choices):
        return done
    fusion = _Fusion(context, lowered, done)
    fusion.begin()
    fusion.merge_siblings()
    for node in list(context.graph.nodes):
        fusion.gate(node)
    for node in list(context.graph.nodes):
        fusion.activation(node)
    for node in list(context.graph.nodes):
        fusion.residual(node)
    for node in list(context.graph.nodes):
        fusion.norm(node)
    for node in list(context.graph.nodes):
        fusion.attention(node)
    return done


class _Fusion:
    def __init__(self, context: Context, lowered: Lowered, done: Counter[str]) -> None:
        self.context = context
        self.graph = context.graph
        self.lowered = lowered
        self.done = done

    def call(self, call: Call, meta_of: fx.Node, value: Any) -> fx.Node:
        """A new node for ``call`` at the insertion point, whose result is like ``value``."""
        node = self.graph.call_function(FUSED, tuple(vars(call).values()))
        node.meta = {**meta_of.meta, VALUE: value} if value is not None else dict(meta_of.meta)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.moved(old, new)

    def moved(self, old: fx.Node, new: fx.Node) -> None:
        """Let what is known of a product's node be known of the node that computes it now."""
        for use, _ in self.lowered.choices:
            if use.node is old:
                use.node = new

    def begin(self) -> None:
        """Every product as a call of the fused operator that fuses nothing."""
        for node in self.graph.find_nodes(op="call_function", target=LINEAR):
            x, weight, bias, rows, bits = node.args
            call = Call(x, None, 0.0, [weight], [bias], [rows], "", False, None, bits)
            with self.graph.inserting_before(node):
                self.replace(node, self.call(call, node, node.meta.get(VALUE)))

    # q/k/v, gate/up: products of one x become one call, whose result is split.
    def merge_siblings(self) -> None:
        families: dict[Any, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="call_function", target=FUSED):
            call = Call.of(node)
            if call is not None and all(bias is None or (bias.op == "placeholder" and _is_constant(bias)) for bias in call.biases):
                families.setdefault((call.x, call.activation_bits, self.group_size(call), node.meta[VALUE].dtype), []).append(node)
        for nodes in families.values():
            if len(nodes) > 1:
                self.merge(nodes)

    def group_size(self, call: Call) -> int:
        """The group size of the call's first weight, which all weights of a call must share."""
        for slot, value in zip(self.lowered.slots, self.lowered.values, strict=True):
            if value is call.weights[0].meta[VALUE]:
                columns = int(call.x.meta[VALUE].shape[-1])
                return slot.form.config.group_columns(columns)
        raise LookupError(f"{call.weights[0]} is no packed weight")

    def merge(self, nodes: list[fx.Node]) -> None:
        calls = [call for node in nodes if (call := Call.of(node)) is not None]
        first = calls[0]
        merged = Call(
            first.x, None, 0.0, [c.weights[0] for c in calls], [c.biases[0] for c in calls], [c.rows[0] for c in calls], "", False,
            None, first.activation_bits,
        )  # fmt: skip
        with self.graph.inserting_before(nodes[0]):
            with self.context.fake_mode():
                value = torch.cat([node.meta[VALUE] for node in nodes], dim=-1)
            together = self.call(merged, nodes[0], value)
            start = 0
            for node, call in zip(nodes, calls, strict=True):
                part = self.graph.call_function(torch.narrow, (together, -1, start, call.rows[0]))
                part.meta = dict(node.meta)
                with self.context.fake_mode():
                    part.meta[VALUE] = torch.narrow(value, -1, start, call.rows[0])
                start += call.rows[0]
                node.replace_all_uses_with(part)
        for node in nodes:
            self.graph.erase_node(node)
            self.moved(node, together)
        self.done["siblings"] += len(nodes)

    # act(gate(x)) * up(x)
    def gate(self, node: fx.Node) -> None:
        if node.target not in MULTIPLY or len(node.args) != 2 or node.kwargs:
            return
        for activated, up in (node.args, node.args[::-1]):
            name = _activation(activated)
            if name and self._gate(node, activated, up, name):  # type: ignore[arg-type]
                self.done["gate"] += 1
                return

    def _gate(self, node: fx.Node, activated: fx.Node, up: Any, name: str) -> bool:
        gate = activated.args[0]
        if not (_is_half(gate, 0) and _is_half(up, 1) and gate.args[0] is up.args[0]):  # type: ignore[union-attr]
            return False
        together: fx.Node = up.args[0]
        call = Call.of(together)
        if call is None or not call.plain or len(call.weights) != 2 or call.rows[0] != call.rows[1]:
            return False
        if not (_only_user(activated) is node and _only_user(up) is node and _only_user(gate) is activated):
            return False
        if set(together.users) != {gate, up}:
            return False
        call.activation, call.gated = name, True
        with self.graph.inserting_before(together):
            fused = self.call(call, node, node.meta[VALUE])
        node.replace_all_uses_with(fused)
        for dead in (node, activated, gate, up, together):
            self.graph.erase_node(dead)
        self.moved(together, fused)
        return True

    # act(linear(x))
    def activation(self, node: fx.Node) -> None:
        name = _activation(node)
        product = node.args[0] if name else None
        call = Call.of(product)
        if call is None or not call.plain or len(call.weights) > 1 or _only_user(product) is not node:
            return
        call.activation = name or ""
        with self.graph.inserting_before(node):
            fused = self.call(call, node, node.meta[VALUE])
        self.replace(node, fused)
        self.graph.erase_node(product)
        self.moved(product, fused)  # type: ignore[arg-type]
        self.done["activation"] += 1

    # residual + linear(x)
    def residual(self, node: fx.Node) -> None:
        if node.target not in ADD or len(node.args) != 2 or node.kwargs:
            return
        for product, other in (node.args, node.args[::-1]):
            call = Call.of(product)
            if call is None or call.residual is not None or _only_user(product) is not node or other is product:
                continue
            if not (_alike(product, other) and _is_constant(other)) or (len(call.weights) > 1 and not call.gated):
                continue
            call.residual = other
            with self.graph.inserting_before(node):
                fused = self.call(call, node, node.meta[VALUE])
            self.replace(node, fused)
            self.graph.erase_node(product)  # type: ignore[arg-type]
            self.moved(product, fused)  # type: ignore[arg-type]
            self.done["residual"] += 1
            return

    # linear(norm_weight * (x * rsqrt(mean(x ** 2) + eps)))
    def norm(self, node: fx.Node) -> None:
        call = Call.of(node)
        if call is None or call.norm_weight is not None:
            return
        found = _rms_norm(call.x)
        if found is None:
            return
        x, weight, eps = found
        normed = call.x
        call.x, call.norm_weight, call.eps = x, weight, eps
        with self.graph.inserting_before(node):
            self.replace(node, self.call(call, node, node.meta[VALUE]))
        _erase_dead(self.graph, normed)
        self.done["norm"] += 1

    # Attention of a few queries over a cache: PyTorch's kernel is made for many.
    def attention(self, node: fx.Node) -> None:
        if node.target is not functional.scaled_dot_product_attention:
            return
        call = _attention_call(node)
        if call is not None:
            with self.graph.inserting_before(node):
                created = self.graph.call_function(ATTENTION, call)
            created.meta = dict(node.meta)
            self.replace(node, created)
            self.done["attention"] += 1


def _attention_call(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of ``decode_attention_cpu`` that give what the scaled dot product ``node`` gives, or None."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    values = [given[name].meta.get(VALUE) for name in names[:3]]
    if given.get("dropout_p") or not all(isinstance(v, Tensor) and v.dim() == 4 and v.device.type == "cpu" for v in values):
        return None
    query, key, value = values
    queries = query.shape[2]
    if not isinstance(queries, int) or queries > DECODE_QUERIES or not query.dtype == key.dtype == value.dtype:
        return None
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16) or given.get("is_causal"):
        return None
    if any(not isinstance(tensor.shape[i], int) for tensor in values for i in (1, 3)):
        return None
    shares = query.shape[1] != key.shape[1]
    if (shares and not given.get("enable_gqa")) or key.shape[1] != value.shape[1]:
        return None
    mask = given.get("attn_mask")
    if mask is not None and mask.meta[VALUE].dtype not in (torch.bool, query.dtype):
        return None
    scale = given.get("scale")
    return given["query"], given["key"], given["value"], mask, query.shape[3] ** -0.5 if scale is None else scale


def _activation(node: Any) -> str | None:
    """The name by which the operator knows the activation that ``node`` computes, or None."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    for targets, name in ((SILU, "silu"), (RELU, "relu"), (SIGMOID, "sigmoid"), (TANH, "tanh")):
        if node.target in targets and len(node.args) == 1 and not node.kwargs.get("inplace"):
            return name
    if node.target in GELU and len(node.args) == 1:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None


def _is_half(node: Any, half: int) -> bool:
    """Whether ``node`` is the first or second half of what a merged call computes."""
    if not isinstance(node, fx.Node) or node.target is not torch.narrow:
        return False
    call = Call.of(node.args[0])
    return call is not None and len(call.rows) == 2 and node.args[2] == half * call.rows[0]


def _only_user(node: Any) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(a: Any, b: Any) -> bool:
    """Whether both are tensors of the same shape, dtype and device."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    x, y = a.meta.get(VALUE), b.meta.get(VALUE)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return x.dtype == y.dtype and x.device == y.device and x.dim() == y.dim() and all(map(_same, x.shape, y.shape))


def _is_constant(node: Any) -> bool:
    """Whether ``node`` is a tensor that nothing in the graph writes to: a call that reads it may then move.

    In-place operations raise the version of the fake tensors that Dynamo ran them on. A node without a value, a step of a product in
    an unusual spelling, is taken for written.
    """
    value = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value._version == 0


def _same(a: Any, b: Any) -> bool:
    return a is b or str(a) == str(b)  # without a guard on symbolic sizes


def _rms_norm(node: Any) -> tuple[fx.Node, fx.Node, float] | None:
    """``(x, weight, eps)`` when ``node`` is the RMS norm of x over its last dimension, as transformers and torch spell it."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is functional.rms_norm or node.target is torch.rms_norm:
        return _torch_rms_norm(node)
    weight, scaled = _pair(node, MULTIPLY, lambda n: isinstance(n, fx.Node) and n.op == "placeholder")
    scaled = _uncast(scaled)
    x, inverse = _pair(scaled, MULTIPLY, lambda n: not _is_rsqrt(n))
    if weight is None or x is None or not _is_rsqrt(inverse):
        return None
    mean, eps = _pair(inverse.args[0], ADD, lambda n: isinstance(n, fx.Node))  # type: ignore[union-attr]
    if not isinstance(eps, float) or not _is_mean_square(mean, x):
        return None
    return _float32_norm(_uncast(x), weight, eps)


def _torch_rms_norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    arguments = dict(zip(("input", "normalized_shape", "weight", "eps"), node.args, strict=False)) | dict(node.kwargs)
    x, weight, eps = arguments.get("input"), arguments.get("weight"), arguments.get("eps")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(eps, float):
        return None
    return _float32_norm(x, weight, eps)


def _float32_norm(x: Any, weight: Any, eps: float) -> tuple[fx.Node, fx.Node, float] | None:
    """The norm if all of it is float32: with other dtypes the roundings between its steps would be lost."""
    if not (_is_constant(x) and _is_constant(weight)):
        return None
    a, b = x.meta[VALUE], weight.meta[VALUE]
    fits = a.dtype == b.dtype == torch.float32 and b.dim() == 1
    return (x, weight, eps) if fits and a.shape[-1] == b.shape[0] else None


def _pair(node: Any, targets: tuple[Any, ...], first: Callable[[Any], bool]) -> tuple[Any, Any]:
    """The two operands of ``node`` if it is one of ``targets``, the one that satisfies ``first`` in front; else ``(None, None)``."""
    if not isinstance(node, fx.Node) or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None, None
    a, b = node.args
    if first(a):
        return a, b
    return (b, a) if first(b) else (None, None)


def _is_rsqrt(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (torch.rsqrt, "rsqrt", aten.rsqrt.default)


def _is_mean_square(node: Any, x: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or node.target not in ("mean", torch.mean):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    square = node.args[0]
    if dims not in (-1, [-1], (-1,)) or keeps is not True or not isinstance(square, fx.Node):
        return False
    return square.target in ("pow", torch.pow, operator.pow) and square.args == (x, 2)


def _uncast(node: Any) -> Any:
    """What ``node`` casts, when the cast changes nothing: Dynamo records ``x.to(float32)`` of a float32 tensor too."""
    while isinstance(node, fx.Node) and node.target in CASTS and isinstance(node.args[0], fx.Node):
        if not _alike(node, node.args[0]):
            break
        node = node.args[0]
    return node


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` and what only it used, if nothing uses it."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        _erase_dead(graph, operand)
