"""A convolution is a product on rows that lie under its kernel, whatever its size, stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import assert_equivalent, dequantized_copy, relative_error
from kbit_inductor.testing.rewriting import rewrite

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONFIG = {"bits": 5, "group_size": 8, "min_elements": 0}


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, rows = groups * draw(st.integers(2, 3)), groups * draw(st.integers(1, 4))
    per_dim: Any = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    size, stride, padding, dilation = per_dim(1, 3), per_dim(1, 3), per_dim(0, 2), per_dim(1, 2)
    layer = CONVOLUTIONS[dims - 1](channels, rows, size, stride, padding, dilation, groups, bias=draw(st.booleans()))
    if dims == 2 and draw(st.booleans()):
        layer = layer.to(memory_format=torch.channels_last)
    extent = [gap * (k - 1) + 1 + more for k, gap, more in zip(size, dilation, per_dim(0, 3), strict=True)]
    return nn.Sequential(layer).eval(), torch.randn(draw(st.integers(1, 3)), channels, *extent)


@settings(max_examples=8)
@given(cases(), st.booleans())
def test_every_convolution_is_the_product_of_its_kernel(case: tuple[nn.Module, torch.Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    model, x = case
    assert_equivalent(model, x, CONFIG, through_inductor=False, dynamic=dynamic)
    (graph,) = rewrite(model, x, config=CONFIG, dynamic=dynamic)
    assert not any("conv" in name for name in graph.operators), graph.operators


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_patches_and_a_grouped_convolution_through_inductor(dynamic: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, groups=2)).eval()
    x = torch.randn(2, 3, 18, 13)
    actual = torch.compile(model, backend="kbit", options=CONFIG, dynamic=dynamic, fullgraph=True)(x)
    assert relative_error(actual, dequantized_copy(model)(x)) < 72 * 2 * 2.0**-24  # terms of a product, two of them


@torch.no_grad()
def test_no_size_is_guarded() -> None:
    graphs = []
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, groups=2)).eval()

    def count(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        backend.capture(gm, inputs, kbit.Config(min_elements=0))
        return gm.forward

    compiled = torch.compile(model, backend=count, dynamic=True)
    for size in ((2, 6, 7), (3, 8, 9), (5, 11, 6)):
        compiled(torch.randn(size[0], 8, *size[1:]))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), "depthwise convolution, whose products have 9 terms"),
        (nn.ConvTranspose2d(6, 4, 2), "transposed convolution"),
    ],
)
def test_what_stays_in_float_says_why(layer: nn.Module, reason: str) -> None:
    (report,) = kbit.explain(nn.Sequential(layer).eval(), torch.randn(1, 6, 5, 5), config={"min_elements": 0}).layers
    assert not report.matched
    assert reason in report.reasons[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_the_result_is_laid_out_as_in_eager(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    model = nn.Sequential(nn.Conv2d(8, 16, 3)).eval().to(memory_format=memory_format)
    x = torch.randn(2, 8, 5, 7).to(memory_format=memory_format)
    compiled = torch.compile(model, backend="kbit", options=CONFIG)(x)
    assert compiled.stride() == model(x).stride()
