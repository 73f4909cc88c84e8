"""The ends of a model: its tables, and its head. All that a model knows goes through them, so they get no fewer bits than
``end_bits``, as llama.cpp's mixes of types give them more.

A head is the last product, where it has as many rows as a table: one for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

Key = TypeVar("Key", fx.Node, Tensor)


def is_table(node: fx.Node) -> bool:
    """Whether rows of ``node``, a placeholder of Dynamo's graph, are looked up."""
    return any(user.target is torch.nn.functional.embedding for user in node.users)


def ends_of_graph(weights: Sequence[tuple[fx.Node, Tensor]]) -> set[fx.Node]:
    """Those of ``weights``, placeholders with their values in the order of the graph, that are ends."""
    tables = {node: value for node, value in weights if is_table(node)}
    return _with_head(tables, [(node, value) for node, value in weights if node not in tables])


def ends_of_model(model: nn.Module) -> set[Tensor]:
    """The weights of ``model`` that are ends."""
    floats = [(module, weight) for module in model.modules() if (weight := module._parameters.get("weight")) is not None]
    tables: dict[Tensor, Tensor] = {weight: weight for module, weight in floats if isinstance(module, nn.Embedding)}
    products = [weight for module, weight in floats if isinstance(module, nn.Linear) and weight not in tables]
    return _with_head(tables, [(weight, weight) for weight in products])


def _with_head(tables: Mapping[Key, Tensor], others: Sequence[tuple[Key, Tensor]]) -> set[Key]:
    matrices = [(key, value) for key, value in others if value.dim() == 2]
    if matrices:
        key, value = matrices[-1]
        if any(value.size(0) == table.size(0) for table in tables.values()):
            return set(tables) | {key}
    return set(tables)
