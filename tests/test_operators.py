import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BITS, FLOATS, GROUPS, SEEDS, normal

from kbit_inductor.config import LayerConfig
from kbit_inductor.lowering import ops, registry
from kbit_inductor.lowering.registry import Kernel, Problem, choose
from kbit_inductor.packing import PackedWeight, pack

SUFFIXES = ["", "_cpu"]


@pytest.fixture(autouse=True, scope="module")
def _cpu_kernels():
    assert registry._cpu_library_problem() is None


def operands(packed: PackedWeight) -> tuple:
    planes, scale, *offset, global_scale = packed.operands
    return planes, scale, offset[0] if offset else None, global_scale


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_passes_opcheck(suffix, symmetric, dtype):
    packed = pack(normal((7, 20), 0), LayerConfig(3, 8, symmetric))
    x = normal((2, 5, 20), 1, dtype).requires_grad_()
    bias = normal((7,), 2, dtype).requires_grad_()
    torch.library.opcheck(ops.overload("linear", suffix), (x, *operands(packed), bias, 8), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_embedding_passes_opcheck(suffix):
    packed = pack(normal((7, 20), 0), LayerConfig(5, 8))
    indices = torch.tensor([[0, 6], [3, 3]])
    torch.library.opcheck(ops.overload("embedding", suffix), (indices, *operands(packed), 20, 8, torch.float32))


def test_the_gradient_operator_passes_opcheck():
    packed = pack(normal((7, 20), 0), LayerConfig(5, 8))
    grad = normal((2, 7), 1).requires_grad_()
    torch.library.opcheck(torch.ops.kbit.linear_grad_input.default, (grad, *operands(packed), 20, 8))


@given(
    m=st.integers(0, 20), n=st.integers(0, 40), k=st.integers(0, 90), bits=BITS, group=GROUPS, symmetric=st.booleans(),
    dtype=FLOATS, with_bias=st.booleans(), suffix=st.sampled_from(SUFFIXES), seed=SEEDS,
)  # fmt: skip
def test_linear_is_the_float64_product_within_rounding(m, n, k, bits, group, symmetric, dtype, with_bias, suffix, seed):
    config = LayerConfig(bits, group, symmetric, "rtn")
    packed = pack(normal((n, k), seed), config)
    x, bias = normal((m, k), seed + 1, dtype), normal((n,), seed + 2, dtype) if with_bias else None
    actual = ops.overload("linear", suffix)(x, *operands(packed), bias, config.group_columns(k))
    assert actual.dtype == dtype
    weight = packed.dequantize(torch.float64)
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    # Higham: a sum of k products in float32 is off by k + 2 roundings of the sum of magnitudes; dequantizing adds three, the
    # bias one. The result is rounded once to its dtype.
    magnitude = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    # In an affine grid code * scale and offset may cancel, so their roundings weigh as much as the larger of the two.
    scale, offset = packed.operands[1], packed.operands[-2]
    grid = (2**bits * scale.double().abs() + offset.double().abs()) * packed.operands[-1].double()
    spread = grid[:, torch.arange(k) // config.group_columns(k)]
    magnitude = magnitude + x.double().abs() @ spread.t()
    bound = (k + 6) * 2.0**-24 * magnitude + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_gradients_reach_input_and_bias_and_are_those_of_the_dequantized_weight(suffix):
    packed = pack(normal((12, 40), 0), LayerConfig(4, 16))
    x, bias = normal((3, 2, 40), 1).requires_grad_(), normal((12,), 2).requires_grad_()
    grad = normal((3, 2, 12), 3)
    ours = torch.autograd.grad(ops.overload("linear", suffix)(x, *operands(packed), bias, 16), (x, bias), grad)
    plain = torch.autograd.grad(torch.nn.functional.linear(x, packed.dequantize(), bias), (x, bias), grad)
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_gradient_can_be_differentiated_again():
    packed = pack(normal((12, 40), 0), LayerConfig(4, 16))
    x = normal((3, 40), 1).requires_grad_()

    def penalty(product):
        (first,) = torch.autograd.grad(product.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours = penalty(torch.ops.kbit.linear(x, *operands(packed), None, 16))
    torch.testing.assert_close(ours, penalty(x @ packed.dequantize().t()))


def test_embedding_refuses_indices_outside_the_table():
    packed = pack(normal((7, 20), 0), LayerConfig(5, 8))
    for suffix in SUFFIXES:
        for bad in (-1, 7):
            with pytest.raises(IndexError):
                ops.overload("embedding", suffix)(torch.tensor([bad]), *operands(packed), 20, 8, torch.float32)


PROBLEM = Problem("linear", "cpu", torch.float32, 64, 64, 4, 64)


def test_the_cheapest_kernel_that_can_is_chosen_and_the_others_say_why_not():
    unable = Kernel("unable", "", lambda problem: "no such instruction", lambda problem: 0.0)
    slow = Kernel("slow", "", lambda problem: None, lambda problem: 2.0)
    fast = Kernel("fast", "", lambda problem: None, lambda problem: 1.0)
    choice = choose(PROBLEM, (unable, slow, fast))
    assert choice.kernel is fast
    assert dict(choice.rejected) == {"unable": "no such instruction", "slow": "moves more bytes"}


def test_on_a_cpu_the_compiled_kernel_is_chosen():
    choice = choose(PROBLEM)
    assert choice.kernel.name == "cpu"
    assert set(dict(choice.rejected)) == {"triton", "reference"}


def test_an_unknown_device_gets_the_reference():
    choice = choose(Problem("linear", "meta", torch.float32, 64, 64, 4, 64))
    assert choice.kernel.name == "reference"
    assert "meta" in dict(choice.rejected)["cpu"]
