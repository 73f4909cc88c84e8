"""Chains: the operator against the calls it is made of, and where the calls of a graph become chains."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fusions import Compiled
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_products import Weight
from threads import with_threads
from torch import Tensor, nn
from torch.nn import functional

from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering import chain as chains
from kbit_inductor.passes.chain import MOST_ROWS
from kbit_inductor.testing.strategies import SEEDS

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
build.load()
KBIT = torch.ops.kbit

positions = st.integers(chains.NONE, 2**40)
operands = st.lists(st.tuples(positions, positions, positions), min_size=1, max_size=3).map(
    lambda rows: tuple(zip(*rows, strict=True))
)
numbers = st.floats(allow_nan=False)
products = st.builds(
    lambda operands, **rest: chains.Product(weights=operands[0], biases=operands[1], rows=operands[2], **rest),
    operands, x=positions, norm_weight=positions, eps=numbers, activation=st.sampled_from(["", "silu"]), gated=st.booleans(),
    residual=positions, activation_bits=st.integers(1, 16),
)  # fmt: skip
attentions = st.builds(chains.Attention, positions, positions, positions, positions, numbers)
steps_of_any_kind = st.lists(st.builds(chains.Step, products | attentions, st.booleans()), max_size=4)


@given(steps=steps_of_any_kind)
def test_steps_written_as_numbers_are_read_back(steps):
    assert chains.decode(*chains.encode(steps)) == steps


class Chain:
    """A random chain: perhaps attention, then products, each of the result before it."""

    def __init__(self, batch: int, queries: int, widths: list[int], with_attention: bool, dtype: torch.dtype) -> None:
        self.inputs: list[Tensor] = []
        self.dtype = dtype
        self.drafts: list[chains.Product | chains.Attention] = []  # the results counted backwards: -2, -3, ...
        width = widths[0]
        shape = (batch, queries, width)
        if with_attention:
            query, cache = torch.randn(batch, 2, queries, 8), torch.randn(batch, 1, 9, 8)
            call = chains.Attention(self.add(query), self.add(cache), self.add(cache + 1), self.add(torch.randn(queries, 9)), 0.3)
            self.drafts.append(call)
            width = 2 * 8
        else:
            self.first = self.add(torch.randn(shape))
        for position, rows in enumerate(widths):
            x = self.result(len(self.drafts) - 1) if self.drafts else self.first
            self.drafts.append(self.product(x, width, rows, position, (batch, queries)))
            width = rows
        self.shape = (batch, queries)

    def add(self, tensor: Tensor) -> int:
        self.inputs.append(tensor if tensor.dtype == torch.uint8 else tensor.to(self.dtype))
        return len(self.inputs) - 1

    def result(self, step: int) -> int:
        return -2 - step

    def product(self, x: int, columns: int, rows: int, kind: int, shape: tuple[int, int]) -> chains.Product:
        gated = kind % 2 == 1
        parts = [rows, rows] if gated else [rows // 2, rows - rows // 2]
        weights = tuple(self.add(Weight(n, columns, 1 + (kind + n) % 8, 32, exponent=-6).tiled) for n in parts)
        biases = tuple(self.add(torch.randn(n)) if kind % 3 == 0 else chains.NONE for n in parts)
        norm = self.add(torch.rand(columns)) if kind % 3 == 1 else chains.NONE
        residual = self.add(torch.randn(*shape, rows)) if kind % 3 == 2 else chains.NONE
        return chains.Product(x, norm, 1e-5, weights, biases, tuple(parts), "silu" if gated else "", gated, residual, 8)

    def steps(self, returned: list[bool]) -> list[chains.Step]:
        results = {self.result(step): len(self.inputs) + step for step in range(len(self.drafts))}
        return [
            chains.Step(draft if isinstance(draft, chains.Attention) else self.placed(draft, results), kept)
            for draft, kept in zip(self.drafts, returned, strict=False)
        ]

    def placed(self, draft: chains.Product, results: dict[int, int]) -> chains.Product:
        return chains.Product(**{**vars(draft), "x": results.get(draft.x, draft.x)})


@given(
    batch=st.integers(0, 2), queries=st.integers(0, 4), widths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    with_attention=st.booleans(), returned=st.lists(st.booleans(), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), bad=st.booleans(), threads=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_a_chain_gives_bit_for_bit_what_its_calls_give(batch, queries, widths, with_attention, returned, dtype, bad, threads, seed):
    torch.manual_seed(seed)
    chain = Chain(batch, queries, widths, with_attention, dtype)
    if bad and chain.inputs[0].numel():
        chain.inputs[0].view(-1)[0] = float("nan")
    steps = chain.steps(returned)
    expected = chains.run(chain.inputs, steps, KBIT.fused_linear_cpu, KBIT.decode_attention_cpu)
    actual = with_threads(threads, KBIT.chain_cpu, chain.inputs, *chains.encode(steps))
    assert len(actual) == sum(returned[: len(steps)])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and a.is_contiguous()
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def test_the_operator_is_as_torch_expects_operators():
    torch.manual_seed(0)
    chain = Chain(1, 2, [24, 40, 16], True, torch.float32)
    steps = chain.steps([False, True, False, True])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(KBIT.chain_cpu.default, (chain.inputs, *chains.encode(steps)), test_utils=tests)


@given(place=st.integers(0, 200), value=st.integers(-3, 60), cut=st.integers(0, 3), seed=SEEDS)
def test_a_damaged_program_is_refused_or_harmless(place, value, cut, seed):
    torch.manual_seed(seed)
    chain = Chain(1, 1, [16, 24, 16], seed % 2 == 0, torch.float32)
    program, numbers, activations = chains.encode(chain.steps([True] * 4))
    program[place % len(program)] = value
    # What must not happen is a read of memory that is not there: it would end the process, and the sanitizers see it.
    with contextlib.suppress(RuntimeError):
        KBIT.chain_cpu(chain.inputs, program[: len(program) - cut], numbers, activations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, n, a: (p[:-1], n, a), "ends within a step"),
        (lambda p, n, a: ([*p, 0], n, a), "longer than its steps"),
        (lambda p, n, a: (p, [*n, 0.0], a), "a number and an activation for each step"),
        (lambda p, n, a: ([*p[:2], 99, *p[3:]], n, a), "a value that is not there"),
        (lambda p, n, a: (p, n, ["swish"]), "swish"),
    ],
)
def test_a_wrong_program_raises(change, message):
    chain = Chain(1, 1, [16], False, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        KBIT.chain_cpu(chain.inputs, *change(*chains.encode(chain.steps([True]))))


# --- the pass --------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three products in a row, with something of the caller's between the second and the third."""

    def __init__(self, between=lambda x, y: y) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        y = second(functional.silu(first(x)))
        return third(self.between(x, y))


def chained(module: nn.Module, *inputs: Tensor, **options: object) -> tuple[int, int]:
    """How many calls of ``module`` went into chains, and how many products stayed calls of their own."""
    compiled = Compiled(module, *inputs, chains=True, **options)
    assert compiled.error < 1e-5
    return compiled.fusions["chained"], compiled.products()


@pytest.mark.parametrize("shape", [(24,), (1, 24), (MOST_ROWS, 24), (2, 3, 24)])
def test_products_of_few_rows_are_chained(shape):
    assert chained(Layers(), torch.randn(shape)) == (3, 0)


def test_products_of_many_rows_are_not():
    assert chained(Layers(), torch.randn(MOST_ROWS + 1, 24)) == (0, 3)


def test_products_of_a_size_that_is_not_known_are_not():
    module = Layers()
    x = torch.randn(3, 24)
    torch._dynamo.mark_dynamic(x, 0)
    assert chained(module, x) == (0, 3)


def test_what_is_computed_between_products_parts_chains():
    assert chained(Layers(lambda x, y: y.cumsum(-1)), torch.randn(1, 24)) == (2, 1)


def test_a_result_that_is_written_to_is_not_read_by_a_later_step():
    assert chained(Layers(lambda x, y: y.mul_(2)), torch.randn(1, 24)) == (0, 3)


def test_an_operand_that_is_written_to_keeps_its_readers_apart():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y = self.first(x)
            z = z.clone().mul_(2)
            return self.second(y) + self.first(z)

    assert chained(Written(), torch.randn(1, 24), torch.randn(1, 24)) == (2, 1)


def test_what_others_read_is_returned():
    class Both(Layers):
        def forward(self, x: Tensor) -> Tensor:
            first, second, third = self.layers
            y = first(x)
            return torch.cat([y * 3, third(second(y))], -1)

    assert chained(Both(), torch.randn(1, 24)) == (3, 0)
