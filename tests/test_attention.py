"""Attention: the operator against its definition, and where it takes the place of PyTorch's in a graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threads import with_threads
from torch import Tensor, nn
from torch.nn import functional

from kbit_inductor import backend
from kbit_inductor.kernels.cpu import build
from kbit_inductor.passes.patterns import FEW_QUERIES
from kbit_inductor.testing.strategies import FLOATS, SEEDS

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
build.load()


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """The definition, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(group, 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ value


@given(
    batch=st.integers(0, 3), key_heads=st.integers(1, 3), group=st.integers(1, 4),
    queries=st.one_of(st.integers(0, 5), st.integers(15, 80)), causal=st.booleans(),
    length=st.one_of(st.integers(1, 20), st.integers(60, 300)), size=st.integers(1, 70), value_size=st.integers(0, 70),
    dtype=FLOATS, masked=st.sampled_from(["no", "bool", "float", "row"]),
    transposed=st.booleans(), threads=st.integers(1, 2), seed=SEEDS,
)  # fmt: skip
def test_the_operator_is_attention(
    batch, key_heads, group, queries, causal, length, size, value_size, dtype, masked, transposed, threads, seed
):
    torch.manual_seed(seed)
    query = torch.randn(batch, queries, key_heads * group, size).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, key_heads, length, n).to(dtype) for n in (size, value_size))
    if transposed:
        key = key.transpose(2, 3).contiguous().transpose(2, 3)
    mask = None
    if masked == "bool":
        mask = torch.rand(batch, 1, queries, length) < 0.5
        mask[..., 0] = True
    elif masked == "float":
        mask = torch.randn(key_heads * group, 1, length).to(dtype)
    elif masked == "row":
        mask = torch.arange(length) <= length // 2
    actual = with_threads(threads, torch.ops.kbit.attention_cpu, query, key, value, mask, 0.3, causal)
    exact = attention(query, key, value, mask, 0.3, causal)
    assert actual.dtype == dtype and actual.shape == exact.shape
    # Scores are sums of `size` products, off by size roundings of at most |q| |k|; exp turns that into a relative error of the
    # weights; the sum over keys adds `length` roundings. All of it scales with the largest value.
    if actual.numel():
        spread = 0.3 * float(query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax())
        bound = (4 * (size + 4) * 2.0**-24 * spread + 2 * (length + 8) * 2.0**-24) * float(value.double().abs().amax())
        assert float((actual.double() - exact).abs().amax()) <= bound + torch.finfo(dtype).eps * float(exact.abs().amax())


QUERIES = pytest.mark.parametrize("queries", [2, 40])  # by either of the two ways


@QUERIES
def test_a_query_that_may_look_at_nothing_is_zero_as_in_pytorch(queries):
    query, key, value = (torch.randn(1, 2, n, 8) for n in (queries, 100, 100))
    mask = torch.ones(queries, 100, dtype=torch.bool)
    mask[1] = False
    actual = torch.ops.kbit.attention_cpu(query, key, value, mask, 1.0)
    assert actual[:, :, 1].eq(0).all() and actual[:, :, 0].ne(0).all()
    torch.testing.assert_close(actual, functional.scaled_dot_product_attention(query, key, value, mask, scale=1.0))


@QUERIES
def test_an_empty_cache_gives_zeros(queries):
    query, empty = torch.randn(1, 2, queries, 8), torch.randn(1, 2, 0, 8)
    assert torch.ops.kbit.attention_cpu(query, empty, empty, None, 1.0).eq(0).all()


@QUERIES
def test_not_a_number_stays_with_its_head(queries):
    query, key, value = (torch.randn(1, 2, n, 8) for n in (queries, 100, 100))
    key[0, 0, 50, 3] = float("nan")
    actual = torch.ops.kbit.attention_cpu(query, key, value, None, 1.0)
    assert actual[0, 0].isnan().all() and actual[0, 1].isfinite().all()


@QUERIES
def test_an_infinite_query_stays_alone(queries):
    query, key, value = (torch.randn(1, 1, n, 8) for n in (queries, 100, 100))
    query[0, 0, 1, 2] = float("inf")
    actual = torch.ops.kbit.attention_cpu(query, key, value, None, 1.0)
    assert actual[0, 0, 1].isnan().all() and actual[0, 0, 0].isfinite().all()


@QUERIES
def test_large_scores_do_not_overflow(queries):
    query, key, value = (torch.randn(1, 1, n, 8) * 100 for n in (queries, 100, 100))
    actual = torch.ops.kbit.attention_cpu(query, key, value, None, 1.0)
    torch.testing.assert_close(actual.double(), attention(query, key, value, None, 1.0), rtol=1e-3, atol=1e-3)


def test_opcheck():
    query, key, value = (torch.randn(1, 2, n, 8) for n in (1, 10, 10))
    torch.library.opcheck(torch.ops.kbit.attention_cpu.default, (query, key, value, None, 0.5))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 1, 8), (1, 2, 9, 7), (1, 2, 9, 8)), "do not fit"),
        (((1, 2, 1, 8), (1, 2, 9, 8), (1, 2, 8, 8)), "do not fit"),
        (((1, 3, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8)), "no multiple"),
        (((2, 1, 8), (1, 2, 9, 8), (1, 2, 9, 8)), "query must be"),
    ],
)
def test_operands_that_do_not_fit_raise(shapes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.attention_cpu(*(torch.randn(shape) for shape in shapes), None, 1.0)


class Attention(nn.Module):
    def __init__(self, queries: int, **options: object) -> None:
        super().__init__()
        self.linear, self.queries, self.options = nn.Linear(32, 32), queries, options
        self.keys = nn.Buffer(torch.randn(1, 4, 50, 8))

    def forward(self, x: Tensor) -> Tensor:
        query = self.linear(x).view(1, self.queries, 4, 8).transpose(1, 2)
        options = {name: value(x) if callable(value) else value for name, value in self.options.items()}
        return functional.scaled_dot_product_attention(query, self.keys, self.keys, **options)


def fusions(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
        run = backend.pipeline.run
        patch.setattr(backend.pipeline, "run", lambda gm, context, *rest: found.append(context) or run(gm, context, *rest))
        result = torch.compile(module, backend="kbit", options={"min_elements": 0, "bits": 8})(x)
    return found[-1].fusions["attention"], result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.5},
        {"attn_mask": lambda x: x[0].sum() + torch.zeros(1, 50)},
        {"attn_mask": lambda x: (torch.arange(50) < 9)[None]},
    ],
    ids=["plain", "scale", "float mask", "bool mask"],
)
def test_a_decoding_step_takes_it(options):
    module, x = Attention(1, **options), torch.randn(1, 1, 32)
    count, result = fusions(module, x)
    assert count == 1
    torch.testing.assert_close(result, module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("queries", [1, 4, FEW_QUERIES + 1, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_many_queries_take_it(queries, causal):
    module, x = Attention(queries, is_causal=causal), torch.randn(1, queries, 32)
    count, result = fusions(module, x)
    assert count == 1
    torch.testing.assert_close(result, module(x), rtol=0.05, atol=0.05)


def test_many_queries_of_half_precision_that_all_look_everywhere_stay_with_pytorch():
    module = Attention(FEW_QUERIES + 1).bfloat16()
    assert fusions(module, torch.randn(1, FEW_QUERIES + 1, 32, dtype=torch.bfloat16))[0] == 0
