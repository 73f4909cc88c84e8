"""hypothesis strategies for what a backend of quantized weights meets: weights, options, inputs, modules.

Examples shrink to few layers, small widths and zero seeds, and modules print as PyTorch prints them, so a failing one can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import MissingPackageError
from kbit_inductor.lowering.registry import MATRIX_FAMILIES
from kbit_inductor.testing.kernels import Case

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError:
    raise MissingPackageError(
        "kbit_inductor.testing.strategies draws with hypothesis; pip install kbit-inductor[testing]"
    ) from None

BITS = st.integers(1, 8)
GROUPS = st.one_of(st.sampled_from([1, 8, 16, 32, 64, 128]), st.integers(1, 200))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31 - 1)
WIDTHS = st.integers(1, 40)
WEIGHTS = ("gaussian", "heavy tails", "outlier columns", "constant", "zeros", "exact")


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian values that depend on ``seed`` only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def weights(draw: Any, bits: SearchStrategy[int] = BITS, group_size: int = 16, kinds: Sequence[str] = WEIGHTS) -> Tensor:
    """A float32 matrix of 1 to 40 rows and columns: Gaussian, with heavy tails, with columns that are thirty times as large,
    constant, zero, or integers that codes of ``bits`` hold exactly in groups of ``group_size``."""
    kind, rows, columns, seed = draw(st.sampled_from(kinds)), draw(WIDTHS), draw(WIDTHS), draw(SEEDS)
    values = normal((rows, columns), seed)
    if kind == "exact":
        levels = 2 ** draw(bits)
        codes = torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
        codes[:, ::group_size], codes[:, 1::group_size] = 0, levels - 1
        return codes
    if kind == "heavy tails":
        return values / normal((rows, columns), seed + 1).abs().clamp_min(0.02)
    if kind == "outlier columns":
        values[:, draw(st.integers(0, columns - 1))] *= 30
    return (
        torch.full_like(values, draw(st.sampled_from([1.0, -3.5, 1e-30, 1e30])))
        if kind == "constant"
        else (torch.zeros_like(values) if kind == "zeros" else values)
    )


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Options of the backend, for weights of any size."""
    return {
        "bits": draw(BITS),
        "group_size": draw(st.one_of(GROUPS, st.just(-1))),
        "symmetric": draw(st.booleans()),
        "quantizer": draw(st.sampled_from(["rtn", "clip"])),
        "codebook": draw(st.sampled_from(["uniform", "normal"])),
        "activation_bits": draw(st.sampled_from([16, 8])),
        "min_elements": 0,
    }


class Residual(nn.Module):
    """Two products with an activation between, added to the input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, width]`` to the same."""
        y: Tensor = x + self.down(functional.gelu(self.up(x)))
        return y


class Gated(nn.Module):
    """A product of two products of one input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*pair) for pair in ((width, inner), (width, inner), (inner, width)))

    def forward(self, x: Tensor) -> Tensor:
        """``[…, width]`` to the same."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class Raw(nn.Module):
    """``addmm`` with a weight that is not transposed."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / width**0.5), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        """``[…, width]`` to ``[…, out]``."""
        y: Tensor = torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y


class Attention(nn.Module):
    """Each row attends to those of its sequence, with one head."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, S, width]`` to the same."""
        y: Tensor = self.out(functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))
        return y


class Convolution(nn.Module):
    """A causal convolution over the rows of a sequence: as many after it, and none is no mistake."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, out, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, S, width]`` to ``[…, S, out]``."""
        batch = x.flatten(0, -3) if x.dim() > 2 else x[None]
        y: Tensor = self.conv(functional.pad(batch.transpose(1, 2), (2, 0))).transpose(1, 2)[:, : x.shape[-2]]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class InPlace(nn.Module):
    """A product that is written to, and read by a view of it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, width]`` to ``[…, out]``."""
        y: Tensor = self.fc(x)
        left = y[..., : y.shape[-1] // 2]
        left.mul_(2)
        return y.add_(1)


CHANGING = {"linear": nn.Linear, "raw": Raw, "convolution": Convolution, "in place": InPlace}
KEEPING = {"residual": Residual, "gated": Gated, "attention": Attention}


@st.composite
def modules(draw: Any) -> tuple[nn.Sequential, int]:
    """A stack of one to four layers, as ``(module, input width)``. Norms have more than eight features: over very few, they
    amplify rounding without bound."""
    first = width = draw(WIDTHS)
    layers: list[nn.Module] = []
    torch.manual_seed(draw(SEEDS))
    for kind in draw(st.lists(st.sampled_from([*CHANGING, *KEEPING, "norm", "tanh"]), min_size=1, max_size=4)):
        out = draw(WIDTHS)
        if kind == "linear":
            layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
        elif kind in CHANGING or kind in KEEPING:
            layers.append((CHANGING | KEEPING)[kind](width, out))
        else:
            layers.append(nn.LayerNorm(width) if kind == "norm" and width > 8 else nn.Tanh())
        width = out if kind in CHANGING else width
    return nn.Sequential(*layers), first


@st.composite
def cases(draw: Any) -> Case:
    """One product or look-up for :func:`kbit_inductor.testing.kernels.check_case`."""
    chosen = draw(options())
    config = LayerConfig(**{name: value for name, value in chosen.items() if name != "min_elements"})
    size = (draw(st.integers(0, 6)), draw(WIDTHS), draw(st.integers(1, 200)))
    dtype = draw(st.one_of(FLOATS, st.just(torch.float64)))
    return Case(draw(st.sampled_from(MATRIX_FAMILIES)), size, config, dtype, draw(st.booleans()), draw(st.booleans()), draw(SEEDS))


@st.composite
def inputs(draw: Any, module: nn.Sequential, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of two to four dimensions for ``module``, any of which but the last may be empty, with strides of its own."""
    shape = (*draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)), width)
    x = normal(shape, draw(SEEDS), dtype)
    layouts = ["contiguous", "transposed", "sliced", "repeated rows"]
    if not any(isinstance(layer, nn.LayerNorm) for layer in module):
        layouts.append("repeated columns")  # which have no spread for a norm to divide by
    layout = draw(st.sampled_from(layouts))
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.cat([x, x], dim=-1)[..., :width]
    if layout == "repeated rows":
        return x[:1].expand(shape)
    if layout == "repeated columns":
        return x[..., :1].expand(shape)
    return x
