"""A selection of rows is made before the product whose rows it takes, and only where that gives the same."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn

from kbit_inductor.testing import Rewritten, assert_equivalent, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 4, "group_size": 16, "min_elements": 0, "activation_bits": 16}


class Head(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(32, 40), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


def rows_multiplied(graph: Rewritten) -> list[int | str]:
    return [m if isinstance(m := use.m, int) else str(m) for use, _ in graph.context.choices]


# The result of [2, 5, 40] and how many rows of x it needs.
SELECTED = {
    "the last": (lambda y: y[:, -1], 2),
    "the last, kept as a dimension": (lambda y: y[:, -1:, :], 2),
    "some": (lambda y: y[:, 1:4:2], 4),
    "of a batch": (lambda y: y[1], 5),
    "with an ellipsis": (lambda y: y[..., -1, :], 2),
    "none": (lambda y: y[:, 5:], 0),
    "behind a softcap": (lambda y: (torch.tanh(y / 30) * 30)[:, -1], 2),
    "behind a cast": (lambda y: y.to(torch.float64)[:, -1], 2),
    "of a selection": (lambda y: y[:, 2:][:, -1], 2),
}


@pytest.mark.parametrize("name", SELECTED)
def test_only_selected_rows_are_multiplied(name: str) -> None:
    function, rows = SELECTED[name]
    model, x = Head(function).eval(), torch.randn(2, 5, 32)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert graph.fusions["selected"] >= 1 and rows_multiplied(graph) == [rows]
    assert_equivalent(model, x, OPTIONS, through_inductor=False)


def test_with_symbolic_sizes() -> None:
    model, x = Head(lambda y: y[:, -1]).eval(), torch.randn(2, 5, 32)
    (graph,) = rewrite(model, x, config=OPTIONS, dynamic=True)
    (rows,) = rows_multiplied(graph)
    assert graph.fusions["selected"] == 1 and isinstance(rows, str) and "*" not in rows  # the batch alone
    assert_equivalent(model, x, OPTIONS, through_inductor=False, dynamic=True)


LEFT = {
    "all rows are read too": lambda y: y[:, -1] + y.sum(),
    "columns": lambda y: y[..., :8],
    "a column of rows": lambda y: y[:, -1, 3],
    "rows that a tensor names": lambda y: y[:, torch.tensor([1, 2])],
    "a new dimension": lambda y: y[None],
    "behind what mixes rows": lambda y: y.softmax(1)[:, -1],
    "written to before": lambda y: y.add_(1)[:, -1],
    "written to afterwards": lambda y: y[:, -1].add_(1),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_needs_more_is_left(name: str) -> None:
    model, x = Head(LEFT[name]).eval(), torch.randn(2, 5, 32)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert not graph.fusions["selected"] and rows_multiplied(graph) == [10]
    assert_equivalent(model, x, OPTIONS, through_inductor=False)


def test_the_head_of_a_language_model_multiplies_the_last_token_alone() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = models.gemma2()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits[:, -1]

    (graph,) = rewrite(Last().eval(), models.ids(), config=OPTIONS)
    head = [use for use, _ in graph.context.choices if use.family == "linear"][-1]
    assert graph.fusions["selected"] == 1 and head.m == models.ids().shape[0]
