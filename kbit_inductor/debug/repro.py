"""A run of operators of a captured graph as a model of its own, and as a program with its tensors."""

from __future__ import annotations

import dataclasses
import inspect
import pprint
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kbit_inductor._compat import hint, import_block, member_path, source_name
from kbit_inductor.config import LAYER_OPTIONS, Config
from kbit_inductor.debug.exact import Concrete
from kbit_inductor.debug.trial import isolated
from kbit_inductor.ends import ends_of_graph
from kbit_inductor.passes.pipeline import BUILT_IN
from kbit_inductor.passes.registry import passes
from kbit_inductor.testing.rewriting import Rewritten

SCRIPT = '''"""{title}

{reason}

Written by kbit_inductor.bisect.
"""

{imports}
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

{registrations}from kbit_inductor.testing import assert_equivalent, rewrite

tensors = load_file(Path(__file__).with_name("tensors.safetensors"))
config = {config}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
{members}

{forward}

inputs = [{inputs}]
{check}
'''
PACKED = "assert_equivalent(Model().eval(), inputs, config, through_inductor=False)"
IN_FLOAT = "rewrite(Model().eval(), *inputs, config=config | {'debug': True})  # checks each pass; no weight is packed"


@dataclass(frozen=True)
class Part:
    """A run of operators of a graph.

    Attributes:
        graph: that they are taken from.
        config: of the model that the graph is of.
        nodes: the operators, in order.
        values: of every node of the graph, by name, when it is run on what it was captured with.
        weights: by name of a placeholder that is a parameter or buffer, the name of its layer.
    """

    graph: fx.GraphModule
    model_config: Config
    nodes: tuple[fx.Node, ...]
    values: Mapping[str, Any]
    weights: Mapping[str, str]

    @classmethod
    def of(cls, rewritten: Rewritten, config: Config) -> Part:
        """All operators of a captured graph."""
        gm = rewritten.captured
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = [hint(value) if isinstance(value, torch.SymInt) else value for value in rewritten.inputs]
        copies = [value if isinstance(value, nn.Parameter) else _copied(value) for value in inputs]
        recorder = _Recorder(gm)
        with isolated():
            recorder.run(*copies)
        values = {**recorder.values, **{node.name: value for node, value in zip(placeholders, inputs, strict=True)}}
        layers = {weight.argument: weight.name for weight in rewritten.context.weights}
        members = {node.name: layers.get(i, "") for i, node in enumerate(placeholders) if member_path(source_name(node) or "")}
        calls = tuple(node for node in gm.graph.nodes if node.op not in ("placeholder", "output"))
        return cls(gm, config, calls, values, members)

    def without(self, front: int, back: int) -> Part:
        """This part without some operators at its ends."""
        return dataclasses.replace(self, nodes=self.nodes[front : len(self.nodes) - back])

    def _read(self) -> list[fx.Node]:
        """The nodes that are read and are no part of it, in order."""
        inside = set(self.nodes)
        return list(dict.fromkeys(each for node in self.nodes for each in node.all_input_nodes if each not in inside))

    def _member(self, node: fx.Node) -> str:
        """The name in the new model of a node that is a parameter or buffer of the old one."""
        return re.sub(r"\W", "_", self.weights[node.name] or node.name)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the module is called with."""
        return tuple(_copied(self.values[node.name]) for node in self._read() if node.name not in self.weights)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of the module."""
        return {self._member(node): self.values[node.name] for node in self._read() if node.name in self.weights}

    @property
    def config(self) -> Config:
        """The model's options for the layers of the module by their new names."""
        overrides, skip = {}, []
        members = [node for node in self.graph.graph.find_nodes(op="placeholder") if self.weights.get(node.name)]
        ends = ends_of_graph([(node, self.values[node.name]) for node in members])
        for node in self._read():
            layer = self.weights.get(node.name)
            chosen = self.model_config.for_layer(layer, node in ends) if layer else None
            if chosen is not None:
                overrides[self._member(node)] = {name: getattr(chosen, name) for name in LAYER_OPTIONS}
            elif layer:
                skip.append(self._member(node))
        return Config(min_elements=self.model_config.min_elements, overrides=overrides, skip=tuple(skip))

    @property
    def module(self) -> fx.GraphModule:
        """The operators as a module. It returns whatever is read by others, or by none."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self._read():
            if node.name not in self.weights:
                env[node] = graph.placeholder(f"input_{len(graph.nodes)}")
        for node in self._read():
            if node.name in self.weights:
                env[node] = graph.get_attr(self._member(node))
        for node in self.nodes:
            env[node] = graph.node_copy(node, lambda operand: env[operand])
            env[node].meta = {}
        inside = set(self.nodes)
        outputs = [env[node] for node in self.nodes if not node.users or any(user not in inside for user in node.users)]
        graph.output(tuple(outputs))
        root = nn.Module()
        for name, tensor in self.tensors.items():
            _add(root, name, tensor)
        for node in self.nodes:
            if node.op == "get_attr":
                root.register_buffer(str(node.target), self.values[node.name], persistent=False)
        return fx.GraphModule(root, graph)


class _Recorder(Concrete):
    """Keeps a copy of every value, as it was when it was computed."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = _copied(value)
        return value


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def _add(module: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        module.register_buffer(name, tensor.detach())


def write(part: Part, folder: Path, title: str, reason: str) -> Path:
    """Write ``part`` as a program ``repro.py`` with ``tensors.safetensors`` into ``folder``, and return its path.

    ``title`` and ``reason`` are told in its docstring.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = {f"input_{i}": value for i, value in enumerate(part.inputs)}
    tensors = {**part.tensors, **{name: value for name, value in given.items() if isinstance(value, Tensor)}}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, folder / "tensors.safetensors")
    code = part.module.graph.python_code("self")
    members = [
        f'self.{name} = nn.Parameter(tensors["{name}"], requires_grad=False)'
        if isinstance(tensor, nn.Parameter)
        else f'self.register_buffer("{name}", tensors["{name}"])'
        for name, tensor in part.tensors.items()
    ]
    options = {name: value for name, value in vars(part.config).items() if value != getattr(Config(), name)}
    script = folder / "repro.py"
    script.write_text(
        SCRIPT.format(
            title=title,
            reason=textwrap.fill(reason, 120),
            imports=import_block(code.globals).strip(),
            registrations=_registrations(),
            check=PACKED if part.config.overrides else IN_FLOAT,
            config=pprint.pformat(options, width=120, sort_dicts=False),
            members=textwrap.indent("\n".join(members) or "pass", " " * 8),
            forward=textwrap.indent(code.src.strip(), " " * 4),
            inputs=", ".join(f'tensors["{name}"]' if isinstance(value, Tensor) else repr(value) for name, value in given.items()),
        ),
        encoding="utf-8",
    )
    return script


def _registrations() -> str:
    """Imports of the modules that the passes of others are in."""
    modules = {getattr(inspect.getmodule(each.run), "__name__", "__main__") for each in passes() if each not in BUILT_IN}
    imports = [f"import {name}  # registers a pass\n" for name in sorted(modules - {"__main__"})]
    return "".join(["# The pass was registered by a program itself: register it here.\n"] * ("__main__" in modules) + imports)
