"""Small models, each with something that passes get wrong: biases, ties, views, residuals, in-place operations, dynamic sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 24


class Block(nn.Module):
    """A layer of a transformer: RMS norms, attention, a gated product, residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=i < 3) for i in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, 24]`` to the same."""
        normed = self.norms[0](x)
        q, k, v = (part(normed).unflatten(-1, (2, 12)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        y: Tensor = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return y


class Tied(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, indices: Tensor) -> Tensor:
        """``[B, T]`` below 30 to ``[B, T, 30]``."""
        return functional.linear(torch.relu(self.inner(self.table(indices))), self.table.weight)


class Last(nn.Module):
    """The logits of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, WIDTH]`` to ``[B, 30]``."""
        return self.head(x)[:, -1]  # type: ignore[no-any-return]


class Spellings(nn.Module):
    """Products that are not ``nn.Linear``, of views of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 5)
        self.right = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, 24]`` to the same."""
        first, second = self.both.chunk(2)
        y = functional.linear(x, second, self.bias) - x @ first.t()
        y = torch.einsum("btk,kn->btn", y, self.right)
        return torch.addmm(self.bias, y.flatten(0, 1), self.right, beta=0.5).view_as(x)


class InPlace(nn.Module):
    """Writes between two reads of one tensor, and to a state of its own."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("state", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """``[…, 24]`` to the same."""
        x = x.clone()
        before = self.first(x)
        x.mul_(3).add_(self.state)
        self.state.add_(1)
        y: Tensor = before + functional.relu_(self.second(x))
        return y


class Columns(nn.Module):
    """Batch norms after a product and after a convolution, a dropout, scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(WIDTH, 16, 3), nn.Linear(16, WIDTH)
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(WIDTH)])
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        for norm in self.norms:
            for name, low in (("weight", 0.5), ("bias", -1.0), ("running_mean", -1.0), ("running_var", 0.5)):
                nn.init.uniform_(getattr(norm, name), low, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 24, T]``, T of 3 or more, to ``[B, 24]``."""
        y = torch.relu(self.norms[0](self.conv(x))).mean(-1)
        return functional.dropout(self.norms[1](self.linear(y)) * self.scale, 0.5, self.training) * 2.0


def examples() -> list[tuple[nn.Module, tuple[Any, ...]]]:
    """A fresh set of models in ``eval()``, with inputs."""
    x = torch.randn(2, 5, WIDTH)
    pairs: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH, bias=False), nn.Tanh()), (x,)),
        (Block(), (x,)),
        (Tied(), (torch.arange(10).view(2, 5),)),
        (Last(), (x,)),
        (Spellings(), (x,)),
        (InPlace(), (x,)),
        (Columns(), (x.transpose(1, 2),)),
    ]
    return [(model.eval().requires_grad_(False), inputs) for model, inputs in pairs]
