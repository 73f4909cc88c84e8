import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit_inductor.config import LayerConfig
from kbit_inductor.lowering import ops, registry
from kbit_inductor.lowering.registry import KERNELS, Kernel, Problem, choose
from kbit_inductor.packing import PackedWeight, pack
from kbit_inductor.testing.strategies import BITS, FLOATS, GROUPS, SEEDS, normal

SUFFIXES = ["", "_cpu"]


@pytest.fixture(autouse=True, scope="module")
def _cpu_kernels():
    assert registry.cpu_library_problem() is None


def operands(packed: PackedWeight) -> tuple:
    planes, scale, *offset, global_scale = packed.operands
    return planes, scale, offset[0] if offset else None, global_scale


def linear_call(suffix, weight, config, x, bias):
    """The operator and its arguments for ``x @ weight.T + bias``, the weight packed as that kernel reads it."""
    overload = ops.overload("linear", suffix)
    if suffix == "_cpu":
        return overload, (x, pack(weight, config, layout="tiled").operands[0], bias, weight.shape[0], 16)
    return overload, (x, *operands(pack(weight, config)), bias, config.group_columns(weight.shape[1]))


def embedding_call(suffix, weight, config, indices):
    overload, columns = ops.overload("embedding", suffix), weight.shape[1]
    if suffix == "_cpu":
        return overload, (indices, pack(weight, config, layout="tiled").operands[0], columns, torch.float32)
    return overload, (indices, *operands(pack(weight, config)), columns, config.group_columns(columns), torch.float32)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_passes_opcheck(suffix, symmetric, dtype):
    x = normal((2, 5, 20), 1, dtype).requires_grad_()
    bias = normal((7,), 2, dtype).requires_grad_()
    call = linear_call(suffix, normal((7, 20), 0), LayerConfig(3, 8, symmetric), x, bias)
    torch.library.opcheck(*call, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_embedding_passes_opcheck(suffix):
    torch.library.opcheck(*embedding_call(suffix, normal((7, 20), 0), LayerConfig(5, 8), torch.tensor([[0, 6], [3, 3]])))


def test_the_fused_operator_passes_opcheck():
    weights = [pack(normal((rows, 20), rows), LayerConfig(3, 8), layout="tiled").operands[0] for rows in (7, 7)]
    x, norm, bias = normal((2, 5, 20), 1), normal((20,), 2), normal((7,), 3)
    for activation, gated, width in (("", False, 14), ("silu", True, 7)):
        residual = normal((2, 5, width), 4)
        arguments = (x, norm, 1e-5, weights, [bias, None], [7, 7], activation, gated, residual, 8)
        torch.library.opcheck(torch.ops.kbit.fused_linear_cpu.default, arguments)


def test_the_gradient_operators_pass_opcheck():
    weight, config = normal((7, 20), 0), LayerConfig(5, 8)
    grad = normal((2, 7), 1).requires_grad_()
    torch.library.opcheck(torch.ops.kbit.linear_grad_input.default, (grad, *operands(pack(weight, config)), 20, 8))
    tiled = pack(weight, config, layout="tiled").operands[0]
    torch.library.opcheck(torch.ops.kbit.linear_grad_input_cpu.default, (grad, tiled, 20))


@given(
    m=st.integers(0, 20), n=st.integers(0, 40), k=st.integers(0, 90), bits=BITS, group=GROUPS, symmetric=st.booleans(),
    dtype=FLOATS, with_bias=st.booleans(), suffix=st.sampled_from(SUFFIXES), seed=SEEDS,
)  # fmt: skip
def test_linear_is_the_float64_product_within_rounding(m, n, k, bits, group, symmetric, dtype, with_bias, suffix, seed):
    config = LayerConfig(bits, group, symmetric, "rtn")
    packed = pack(normal((n, k), seed), config)
    x, bias = normal((m, k), seed + 1, dtype), normal((n,), seed + 2, dtype) if with_bias else None
    overload, arguments = linear_call(suffix, normal((n, k), seed), config, x, bias)
    actual = overload(*arguments)
    assert actual.dtype == dtype
    weight = packed.dequantize(torch.float64)
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    # Higham: a sum of k products in float32 is off by k + 2 roundings of the sum of magnitudes; dequantizing adds three, the
    # bias one. The result is rounded once to its dtype.
    # The CPU's kernel rounds x to 24 or 16 bits of its largest value, so that one stands for all.
    size = x.double().abs().amax(1, keepdim=True).expand_as(x) if suffix == "_cpu" and k else x.double().abs()
    magnitude = size @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    # In an affine grid code * scale and offset may cancel, so their roundings weigh as much as the larger of the two.
    scale, offset = packed.operands[1], packed.operands[-2]
    grid = (2**bits * scale.double().abs() + offset.double().abs()) * packed.operands[-1].double()
    spread = grid[:, torch.arange(k) // config.group_columns(k)]
    magnitude = magnitude + size @ spread.t()
    block = 2.0**-14 if suffix == "_cpu" and dtype != torch.float32 else 0
    bound = ((k + 6) * 2.0**-24 + block) * magnitude + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_gradients_reach_input_and_bias_and_are_those_of_the_dequantized_weight(suffix):
    packed = pack(normal((12, 40), 0), LayerConfig(4, 16))
    x, bias = normal((3, 2, 40), 1).requires_grad_(), normal((12,), 2).requires_grad_()
    grad = normal((3, 2, 12), 3)
    overload, arguments = linear_call(suffix, normal((12, 40), 0), LayerConfig(4, 16), x, bias)
    ours = torch.autograd.grad(overload(*arguments), (x, bias), grad)
    plain = torch.autograd.grad(torch.nn.functional.linear(x, packed.dequantize(), bias), (x, bias), grad)
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_gradient_can_be_differentiated_again(suffix):
    packed = pack(normal((12, 40), 0), LayerConfig(4, 16))
    x = normal((3, 40), 1).requires_grad_()

    def penalty(product):
        (first,) = torch.autograd.grad(product.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    overload, arguments = linear_call(suffix, normal((12, 40), 0), LayerConfig(4, 16), x, None)
    ours = penalty(overload(*arguments))
    plain = penalty(x @ packed.dequantize().t())
    # The CPU's kernel rounds gradients too to 24 bits of their largest.
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2.0**-20 * float(plain.abs().max()))


def test_embedding_refuses_indices_outside_the_table():
    for suffix in SUFFIXES:
        for bad in (-1, 7):
            overload, arguments = embedding_call(suffix, normal((7, 20), 0), LayerConfig(5, 8), torch.tensor([bad]))
            with pytest.raises(IndexError):
                overload(*arguments)


PROBLEM = Problem("linear", "cpu", torch.float32, 64, 64, 4, 64)


def test_the_cheapest_kernel_that_can_is_chosen_and_the_others_say_why_not():
    unable = Kernel("unable", "", lambda problem: "no such instruction", lambda problem: 0.0)
    slow = Kernel("slow", "", lambda problem: None, lambda problem: 2.0)
    fast = Kernel("fast", "", lambda problem: None, lambda problem: 1.0)
    choice = choose(PROBLEM, (unable, slow, fast))
    assert choice.kernel is fast
    assert dict(choice.rejected) == {"unable": "no such instruction", "slow": "is estimated to be slower"}


def test_on_a_cpu_the_compiled_kernel_is_chosen():
    choice = choose(PROBLEM)
    assert choice.kernel.name == "cpu"
    assert set(dict(choice.rejected)) == {kernel.name for kernel in KERNELS} - {"cpu"}


def test_an_unknown_device_gets_the_reference():
    choice = choose(Problem("linear", "meta", torch.float32, 64, 64, 4, 64))
    assert choice.kernel.name == "reference"
    assert "meta" in dict(choice.rejected)["cpu"]
