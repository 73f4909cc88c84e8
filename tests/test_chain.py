"""Chains: the operator against the calls it is made of, and where the calls of a graph become chains."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fusions import OPTIONS, Compiled
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_products import Weight
from threads import with_threads
from torch import Tensor, nn
from torch.nn import functional

from kbit_inductor import backend
from kbit_inductor.debug.exact import Concrete
from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering import chain as chains
from kbit_inductor.passes.chain import MOST_ROWS
from kbit_inductor.testing import dequantized_copy, nodes, relative_error, rewrite
from kbit_inductor.testing.strategies import SEEDS

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
build.load()
KBIT = torch.ops.kbit

positions = st.integers(chains.NONE, 2**40)
operands = st.lists(st.tuples(positions, positions, positions), min_size=1, max_size=3).map(
    lambda rows: tuple(zip(*rows, strict=True))
)
numbers = st.floats(allow_nan=False)
OPERATORS = chains.Operators(KBIT.fused_linear_cpu, KBIT.attention_cpu, KBIT.append_cpu)
products = st.builds(
    lambda operands, **rest: chains.Product(weights=operands[0], biases=operands[1], rows=operands[2], **rest),
    operands, x=positions, norm_weight=positions, eps=numbers, activation=st.sampled_from(["", "silu"]), gated=st.booleans(),
    residual=positions, activation_bits=st.integers(1, 16), dtype=st.none() | st.sampled_from(chains.DTYPES),
)  # fmt: skip
attentions = st.builds(chains.Attention, positions, positions, positions, positions, numbers)
appends = st.builds(chains.Append, *[positions] * 3, st.tuples(positions, positions, positions), *[positions] * 5)
steps_of_any_kind = st.lists(st.builds(chains.Step, products | attentions | appends, st.booleans()), max_size=4)


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
        dtype = chains.DTYPES[kind % 3] if kind > 3 else None  # the last of all
        return chains.Product(x, norm, 1e-5, weights, biases, tuple(parts), "silu" if gated else "", gated, residual, 8, dtype)

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
    expected = chains.run(chain.inputs, steps, OPERATORS)
    actual = with_threads(threads, KBIT.chain_cpu, chain.inputs, *chains.encode(steps))
    assert len(actual) == sum(returned[: len(steps)])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.is_contiguous()
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


# --- chains that append to caches ------------------------------------------------------------------------------------


class Step:
    """A product, its heads appended to caches from ``start`` on, attention over them, and a product of that."""

    def __init__(
        self, batch: int, queries: int, key_heads: int, group: int, half: int, start: int, turned: bool, dtype: torch.dtype
    ) -> None:
        heads, size = key_heads * group, 2 * half
        columns = (heads * size, key_heads * size, key_heads * size)
        self.inputs = [torch.randn(batch, queries, 24).to(dtype)]
        self.inputs += [Weight(rows, 24, 4, 8, exponent=-4).tiled for rows in columns]
        self.inputs += [Weight(24, heads * size, 4, 8, exponent=-4).tiled]
        if turned:
            self.inputs += [torch.rand(1, queries, size).to(dtype), torch.rand(1, queries, size).to(dtype)]
        self.caches = [torch.randn(batch, key_heads, start + queries + 1, size).to(dtype) for _ in range(2)]
        self.starts = [start]
        cache = len(self.inputs)
        rows, query, keys, values, attended, _ = range(cache + 2, cache + 8)
        angles = (5, 6) if turned else (chains.NONE, chains.NONE)
        none, starts = (chains.NONE,) * 3, (0, columns[0], columns[0] + columns[1])
        self.steps = [
            chains.Step(chains.Product(0, chains.NONE, 0.0, (1, 2, 3), none, columns, "", False, chains.NONE, 8), False),
            chains.Step(chains.Append(rows, rows, rows, starts, *angles, cache, cache + 1, heads), False),
            chains.Step(chains.Attention(query, keys, values, chains.NONE, 0.3), True),
            chains.Step(chains.Product(attended, chains.NONE, 0.0, (4,), none[:1], (24,), "", False, 0, 8), True),
        ]  # fmt: skip
        self.places = [torch.empty(batch, queries, width, dtype=dtype) for width in (heads * size, 24)]

    def arguments(self) -> tuple[object, ...]:
        program, *rest = chains.encode(self.steps)
        return self.inputs, [*self.places, *self.caches], self.starts, [len(self.places), *program], *rest


@given(
    batch=st.integers(0, 2), queries=st.integers(0, 3), key_heads=st.integers(1, 2), group=st.integers(1, 3),
    half=st.integers(1, 20), start=st.integers(0, 5), turned=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_a_chain_appends_as_its_calls_do(batch, queries, key_heads, group, half, start, turned, dtype, threads, seed):
    torch.manual_seed(seed)
    step = Step(batch, queries, key_heads, group, half, start, turned, dtype)
    caches = [cache.clone() for cache in step.caches]
    expected = chains.run([*step.inputs, *caches], step.steps, OPERATORS, step.starts)
    with_threads(threads, KBIT.caching_chain_cpu, *step.arguments())
    for actual, known in zip([*step.places, *step.caches], [*expected, *caches], strict=True):
        assert torch.equal(actual, known)


@given(
    batch=st.integers(0, 2), queries=st.integers(0, 3), key_heads=st.integers(0, 2), group=st.integers(0, 3),
    half=st.integers(1, 20), start=st.integers(0, 5), gap=st.integers(0, 3), turned=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float16]), seed=SEEDS,
)  # fmt: skip
def test_appending_is_what_its_definition_says(batch, queries, key_heads, group, half, start, gap, turned, dtype, seed):
    torch.manual_seed(seed)
    heads, size = key_heads * group, 2 * half
    widths = [heads * size, key_heads * size, key_heads * half]
    columns = [gap, gap + widths[0], 2 * gap + widths[0] + widths[1]]
    x = torch.randn(batch, queries, columns[2] + widths[2] + gap).to(dtype)
    angles = [torch.randn(1 if turned == 1 else batch, queries, size).to(dtype) if turned else None for _ in range(2)]
    caches = [torch.randn(batch, start + queries + 1, key_heads, width).to(dtype).transpose(1, 2) for width in (size, half)]
    operands = (x, x, x, *angles, *caches, start, columns, heads)
    query = KBIT.append_cpu(*operands)
    assert nodes._append_excess(query, operands) <= 1
    assert query.shape == (batch, heads, queries, size)


def test_appending_leaves_the_rest_of_a_cache_alone():
    x, caches = torch.ones(1, 2, 12), [torch.zeros(1, 1, 6, 4) for _ in range(2)]
    KBIT.append_cpu(x, x, x, None, None, *caches, 3, [0, 4, 8], 1)
    for cache in caches:
        assert cache[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("name", ["append_cpu", "caching_chain_cpu"])
def test_operators_that_write_are_as_torch_expects_operators(name):
    torch.manual_seed(0)
    step = Step(1, 2, 1, 2, 4, 3, True, torch.float32)
    x, angles = torch.randn(1, 2, 40), step.inputs[-2:]
    operands = {"append_cpu": (x, x, x, *angles, *step.caches, 3, [0, 16, 24], 2), "caching_chain_cpu": step.arguments()}
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(KBIT, name).default, operands[name], test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 5}, "no room for 2 more after 5"),
        ({"start": -1}, "no room"),
        ({"columns": [0, 4, 9]}, "are not among the 12"),
        ({"columns": [-1, 4, 8]}, "are not among the 12"),
        ({"columns": [0, 4]}, "columns must be those"),
        ({"heads": 2**40}, "query must be"),
        ({"heads": 4}, "are not among the 12"),
        ({"cos": torch.ones(1, 2, 4)}, "both cos and sin"),
        ({"cos": torch.ones(1, 2, 2), "sin": torch.ones(1, 2, 2)}, "cos and sin must be"),
        ({"keys": torch.zeros(1, 1, 6, 4, dtype=torch.float64)}, "keys must be"),
        ({"values": torch.zeros(2, 1, 6, 4)}, "do not fit 1 sequences"),
        ({"key": torch.ones(1, 3, 12)}, "query, key and value must be"),
    ],
)
def test_what_cannot_be_appended_raises(change, message):
    x = torch.ones(1, 2, 12)
    operands = {"query": x, "key": x, "value": x, "cos": None, "sin": None, "keys": torch.zeros(1, 1, 6, 4)}
    operands |= {"values": torch.zeros(1, 1, 6, 4), "start": 3, "columns": [0, 4, 8], "heads": 1} | change
    with pytest.raises(RuntimeError, match=message):
        KBIT.append_cpu(*operands.values())


@given(place=st.integers(0, 200), value=st.integers(-3, 60), cut=st.integers(0, 3), seed=SEEDS)
def test_a_damaged_program_that_appends_is_refused_or_harmless(place, value, cut, seed):
    torch.manual_seed(seed)
    inputs, written, starts, program, *rest = Step(1, 1, 1, 2, 4, 2, True, torch.float32).arguments()
    program[place % len(program)] = value
    with contextlib.suppress(RuntimeError):
        KBIT.caching_chain_cpu(inputs, written, starts, program[: len(program) - cut], *rest)


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


class Decoder(nn.Module):
    """A decoding step of two layers: heads of ``x`` are turned and put into caches, which are attended to.

    What ``touch`` makes of the keys of the first layer, between the writes and the attention, is added to the result.
    """

    def __init__(self, touch=lambda keys: 0.0) -> None:
        super().__init__()
        shapes = {"q": 16, "k": 8, "v": 8, "out": 16}
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(16, rows) for name, rows in shapes.items()}) for _ in range(2))
        self.touch = touch

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Tensor, *caches: Tensor) -> Tensor:
        start, end, touched = past.shape[0], past.shape[0] + x.shape[1], 0.0
        for position, layer in enumerate(self.layers):
            q, k, v = (layer[name](x).view(x.shape[0], x.shape[1], -1, 8).transpose(1, 2) for name in "qkv")
            q, k = (self.turned(each, cos[:, None], sin[:, None]) for each in (q, k))
            keys, values = caches[2 * position : 2 * position + 2]
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            if position == 0:
                touched = self.touch(keys)
            y = functional.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], enable_gqa=True)
            x = x + layer["out"](y.transpose(1, 2).reshape(x.shape))
        return x + touched

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., :4], x[..., 4:]
        return x * cos + torch.cat([-second, first], -1) * sin


def decoding(module: nn.Module, batch: int = 1) -> tuple[int, int]:
    """How many attentions of ``module`` are steps that append, and how many calls are in chains."""
    torch.manual_seed(0)
    past = torch.empty(5)
    torch._dynamo.mark_dynamic(past, 0)
    caches = [torch.randn(batch, 1, 9, 8) for _ in range(4)]
    before = [cache.clone() for cache in caches]
    inputs = (torch.randn(batch, 1, 16), torch.rand(1, 1, 8), torch.rand(1, 1, 8), past)
    module.eval().requires_grad_(False)
    (graph,) = rewrite(module, *inputs, *caches, config=OPTIONS)
    for cache, value in zip(caches, before, strict=True):
        cache.copy_(value)  # capturing has run the module
    kept = backend.kept_arguments(graph.context, len(graph.inputs))
    (result,) = backend.Bound(Concrete(graph.graph).run, kept, tuple(graph.context.slots))(*graph.inputs)
    expected = dequantized_copy(module)(*inputs, *before)
    for actual, known in zip([result, *caches], [expected, *before], strict=True):
        assert relative_error(actual, known) < 1e-5
    return graph.fusions["appended"], graph.fusions["chained"]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_decoding_step_is_one_chain(batch):
    assert decoding(Decoder(), batch) == (2, 6)


@pytest.mark.parametrize("touch", [lambda keys: keys.mul_(2)[0, 0, 0, 0], lambda keys: keys.sum()], ids=["written", "read"])
def test_a_cache_that_others_touch_is_written_where_it_was(touch):
    assert decoding(Decoder(touch))[0] == 1
