"""Products with a batch of matrices: the operators against those of one matrix, whose own tests prove them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threads import with_threads
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.lowering import ops, registry
from kbit_inductor.packing import PackedWeight, operand_specs, pack, plane_operands
from kbit_inductor.quantizers import CODEBOOK_NAMES
from kbit_inductor.testing.strategies import BITS, FLOATS, GROUPS, SEEDS, normal

SUFFIXES = ["", "_cpu"]
LAYOUTS = {"": "planes", "_cpu": "tiled"}


@pytest.fixture(autouse=True, scope="module")
def _cpu_kernels():
    assert registry.cpu_library_problem() is None


def call(family: str, suffix: str, packed: PackedWeight, x: Tensor, where: Tensor | None, rows: int, bits: int = 16) -> tuple:
    """The operator and its arguments, for a batch or for one matrix, where ``where`` is the bias."""
    if suffix == "_cpu":
        return ops.overload(family, suffix), (x, packed.operands[0], where, rows, bits)
    *operands, codebook = plane_operands(packed.operands, packed.config)
    return ops.overload(family), (x, *operands, where, packed.config.group_columns(packed.columns), codebook)


def product(suffix: str, weight: Tensor, config: LayerConfig, x: Tensor, bits: int) -> Tensor:
    """``x @ weight.T`` by the operator of one matrix."""
    operator, arguments = call("linear", suffix, pack(weight, config, layout=LAYOUTS[suffix]), x, None, weight.shape[0], bits)
    return operator(*arguments)


def assert_same(suffix: str, actual: Tensor, expected: Tensor, x: Tensor, weight: Tensor) -> None:
    """The CPU's kernel computes all rows of one matrix as it does without the others, so not even the order of a sum may differ.

    PyTorch's product, which the reference uses, sums in an order that depends on where a tensor lies in memory: two sums of K
    products in float32, each rounded once to the dtype of x.
    """
    assert actual.dtype == x.dtype
    if suffix == "_cpu":
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    magnitude = x.double().abs() @ weight.double().abs().t()
    rounding = torch.finfo(x.dtype).eps * expected.double().abs() + torch.finfo(x.dtype).smallest_normal
    assert ((actual.double() - expected.double()).abs() <= 2 * (x.shape[1] + 2) * 2.0**-24 * magnitude + rounding).all()


def configs() -> st.SearchStrategy[LayerConfig]:
    return st.builds(LayerConfig, BITS, GROUPS, st.booleans(), quantizer=st.just("rtn"), codebook=st.sampled_from(CODEBOOK_NAMES))


def strided(x: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    return {"plain": x, "transposed": x.mT.contiguous().mT, "sliced": torch.stack([x, x], -1)[..., 0]}[how]


STRIDES = st.sampled_from(["plain", "transposed", "sliced"])


@given(
    entries=st.integers(1, 6), m=st.integers(0, 7), n=st.integers(0, 40), k=st.integers(0, 90), config=configs(), dtype=FLOATS,
    suffix=st.sampled_from(SUFFIXES), bits=st.sampled_from([1, 4, 8, 16]), indexed=st.booleans(), how=STRIDES,
    threads=st.integers(1, 2), seed=SEEDS,
)  # fmt: skip
def test_each_entry_is_multiplied_by_its_matrix(entries, m, n, k, config, dtype, suffix, bits, indexed, how, threads, seed):
    count = 3 if indexed else entries
    weight, x = strided(normal((count, n, k), seed), how), strided(normal((entries, m, k), seed + 1, dtype), how)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-count, count, (entries,), generator=generator, dtype=torch.int32) if indexed else None
    packed = pack(weight, config, layout=LAYOUTS[suffix])
    operator, arguments = call("batched_linear", suffix, packed, x, index, n, bits)
    actual = with_threads(threads, operator, *arguments)
    assert actual.shape == (entries, m, n)
    matrices = torch.arange(count) if index is None else index % count
    for i in range(count):
        mine = x[matrices == i].flatten(0, 1)
        expected = product(suffix, weight[i], config, mine, bits)
        assert_same(suffix, actual[matrices == i].flatten(0, 1), expected, mine, packed.dequantize()[i])


@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 20)), min_size=1, max_size=6), rest=st.integers(0, 3),
    n=st.integers(0, 40), k=st.integers(0, 90), config=configs(), dtype=FLOATS, suffix=st.sampled_from(SUFFIXES),
    bits=st.sampled_from([1, 4, 8, 16]), how=STRIDES, offset_dtype=st.sampled_from([torch.int32, torch.int64]),
    threads=st.integers(1, 2), seed=SEEDS,
)  # fmt: skip
def test_each_group_of_rows_is_multiplied_by_its_matrix(
    counts, rest, n, k, config, dtype, suffix, bits, how, offset_dtype, threads, seed
):
    weight = strided(normal((len(counts), n, k), seed), how)
    x = strided(normal((sum(counts) + rest, k), seed + 1, dtype), how)
    offsets = torch.tensor(counts).cumsum(0, dtype=offset_dtype)
    packed = pack(weight, config, layout=LAYOUTS[suffix])
    operator, arguments = call("grouped_linear", suffix, packed, x, offsets, n, bits)
    actual = with_threads(threads, operator, *arguments)
    *results, zeros = actual.split([*counts, rest])
    for i, (result, group) in enumerate(zip(results, x.split([*counts, rest]), strict=False)):
        assert_same(suffix, result, product(suffix, weight[i], config, group, bits), group, packed.dequantize()[i])
    assert not zeros.any()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_rows_of_unlike_groups(suffix):
    # More rows than one chunk of the kernel holds, in one group, and few in the others.
    weight, counts, config = normal((4, 33, 70), 0), [1, 300, 0, 2], LayerConfig(3, 32)
    x = normal((sum(counts), 70), 1)
    packed = pack(weight, config, layout=LAYOUTS[suffix])
    operator, arguments = call("grouped_linear", suffix, packed, x, torch.tensor(counts).cumsum(0), 33)
    for threads in (1, 2):
        results = with_threads(threads, operator, *arguments).split(counts)
        for i, (result, group) in enumerate(zip(results, x.split(counts), strict=True)):
            assert_same(suffix, result, product(suffix, weight[i], config, group, 16), group, packed.dequantize()[i])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_that_is_no_number_poisons_only_itself(suffix, bits):
    packed = pack(normal((3, 20, 40), 0), LayerConfig(4, 16), layout=LAYOUTS[suffix])
    x = normal((9, 40), 1)
    operator, arguments = call("grouped_linear", suffix, packed, x, torch.tensor([4, 4, 9]), 20, bits)
    clean = operator(*arguments)
    spoiled = x.clone()
    spoiled[2, 5] = float("nan")
    actual = operator(spoiled, *arguments[1:])
    assert actual[2].isnan().all()
    others = torch.arange(9) != 2
    torch.testing.assert_close(actual[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["planes", "tiled"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_packed_batch_is_its_packed_matrices(bits, symmetric, layout):
    weight = normal((3, 18, 50), bits) * torch.tensor([1.0, 1e-6, 1e6])[:, None, None]
    config = LayerConfig(bits, 16, symmetric, codebook="normal")
    packed = pack(weight, config, layout=layout)
    matrices = [pack(matrix, config, layout=layout) for matrix in weight]
    assert torch.equal(packed.dequantize(), torch.stack([matrix.dequantize() for matrix in matrices]))
    assert packed.nbytes == sum(matrix.nbytes for matrix in matrices)
    assert [(tuple(each.shape), each.dtype) for each in packed.operands] == operand_specs(18, 50, config, layout, 3)
    exact = float((packed.dequantize().double() - weight).square().sum() / weight.double().square().sum())
    assert packed.error == pytest.approx(exact, rel=1e-3)


def where(family: str) -> Tensor:
    return torch.tensor([0, 1, 5] if family == "grouped_linear" else [2, 0, 0, -1])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("family", ["batched_linear", "grouped_linear"])
def test_opcheck(family, suffix):
    packed = pack(normal((3, 7, 20), 0), LayerConfig(3, 8), layout=LAYOUTS[suffix])
    x = normal((6, 20) if family == "grouped_linear" else (4, 2, 20), 1).requires_grad_()
    torch.library.opcheck(*call(family, suffix, packed, x, where(family), 7))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_gradient_operators_pass_opcheck(suffix):
    packed, grad = pack(normal((3, 7, 20), 0), LayerConfig(3, 8), layout=LAYOUTS[suffix]), normal((4, 7), 1)
    matrix = torch.tensor([0, 3, 2, 2])
    if suffix:
        torch.library.opcheck(torch.ops.kbit.matrices_grad_input_cpu.default, (grad, packed.operands[0], matrix, 20))
    else:
        *operands, codebook = plane_operands(packed.operands, packed.config)
        torch.library.opcheck(torch.ops.kbit.matrices_grad_input.default, (grad, *operands, matrix, 8, codebook, 20))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_gradients_are_those_of_the_dequantized_weight(suffix):
    packed = pack(normal((3, 12, 40), 0), LayerConfig(4, 16), layout=LAYOUTS[suffix])
    weight = packed.dequantize()
    x, grad = normal((4, 2, 40), 1).requires_grad_(), normal((4, 2, 12), 2)
    index = torch.tensor([2, 0, 0, -1])
    operator, arguments = call("batched_linear", suffix, packed, x, index, 12)
    ours = torch.autograd.grad(operator(*arguments), x, grad)
    torch.testing.assert_close(ours, torch.autograd.grad(x @ weight[index].mT, x, grad))

    x, grad, counts = normal((7, 40), 3).requires_grad_(), normal((7, 12), 4), [2, 0, 3]
    operator, arguments = call("grouped_linear", suffix, packed, x, torch.tensor(counts).cumsum(0), 12)
    ours = torch.autograd.grad(operator(*arguments), x, grad)
    groups = zip(x.split([*counts, 2]), weight, strict=False)
    plain = torch.cat([*(group @ matrix.t() for group, matrix in groups), x.new_zeros(2, 12)])
    torch.testing.assert_close(ours, torch.autograd.grad(plain, x, grad))


def test_mistakes_are_errors():
    packed = pack(normal((3, 12, 40), 0), LayerConfig(4, 16), layout="tiled")
    x = normal((2, 5, 40), 1)
    batched, grouped = torch.ops.kbit.batched_linear_cpu, torch.ops.kbit.grouped_linear_cpu
    (weight,) = packed.operands
    with pytest.raises(IndexError, match="index 3 is out of range in a batch of 3"):
        batched(x, weight, torch.tensor([0, 3]), 12, 16)
    with pytest.raises(RuntimeError, match="batch of 2, the packed weight one of 3"):
        batched(x, weight, None, 12, 16)
    with pytest.raises(RuntimeError, match="index must have shape"):
        batched(x, weight, torch.tensor([0]), 12, 16)
    with pytest.raises(RuntimeError, match="12 rows, not 13"):
        batched(x, weight, torch.tensor([0, 1]), 13, 16)
    with pytest.raises(RuntimeError, match="39 columns"):
        batched(x[..., :39], weight, torch.tensor([0, 1]), 12, 16)
    for offsets in ([2, 1, 5], [-1, 1, 5], [1, 2, 6]):
        with pytest.raises(IndexError, match="offsets must ascend"):
            grouped(x[0], weight, torch.tensor(offsets), 12, 16)
    with pytest.raises(RuntimeError, match="KBT1"):
        grouped(x[0], torch.zeros_like(weight), torch.tensor([1, 2, 5]), 12, 16)
    with pytest.raises(IndexError, match="out of range"):
        operator, arguments = call("batched_linear", "", pack(normal((3, 12, 40), 0), LayerConfig(4)), x, torch.tensor([0, 3]), 12)
        operator(*arguments)
