"""Random small modules compiled are the same modules with dequantized weights in eager."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kbit_inductor import backend
from kbit_inductor.testing import assert_equivalent, dequantized_copy, relative_error
from kbit_inductor.testing.strategies import BITS, FLOATS, GROUPS, SEEDS, inputs, modules, options
from kbit_inductor.weights.store import STORE


def check(module, x, options, unquantized, dynamic=None):
    """``unquantized(module)(x)`` is, bit for bit, what a module without products must give."""
    module = module.to(x.dtype).eval()
    weights = [p for p in module.parameters() if p.dim() == 2]
    with torch.no_grad():
        actual = torch.compile(module, backend="kbit", dynamic=dynamic, options=options)(x)
        assert all(STORE.packed_forms(weight) for weight in weights)
        if all(p.dim() < 2 for p in module.parameters()):
            assert torch.equal(actual, unquantized(module)(x))
            return
        expected = dequantized_copy(module).double()(x.double())
    assert actual.shape == expected.shape
    assert actual.dtype == x.dtype
    if not actual.numel():
        return
    # Each layer rounds its result to the dtype and its sums to float32; a norm may divide by a small spread, which the layers
    # after it inherit. With at most 24 roundings of eps / 2, and a norm gaining at most sixteen in widths above eight, the
    # relative error stays below 12 * 16 * eps.
    assert relative_error(actual, expected) < 192 * torch.finfo(x.dtype).eps


@settings(max_examples=8)
@given(data=st.data(), chosen=options(), dtype=FLOATS)
def test_random_modules_rewritten(data, chosen, dtype):
    module, width = data.draw(modules().filter(lambda drawn: any(p.dim() == 2 for p in drawn[0].parameters())))
    x = data.draw(inputs(module, width, dtype))
    assert_equivalent(module.to(dtype).eval(), x, chosen, through_inductor=False)


@settings(max_examples=6)
@given(data=st.data(), bits=BITS, group=GROUPS, dtype=FLOATS, dynamic=st.sampled_from([None, True, False]), seed=SEEDS)
def test_random_modules_through_inductor(data, bits, group, dtype, dynamic, seed):
    torch.manual_seed(seed)
    torch._dynamo.reset()
    module, width = data.draw(modules())
    x = data.draw(inputs(module, width, dtype))
    check(
        module,
        x,
        {"bits": bits, "group_size": group, "min_elements": 0},
        unquantized=lambda module: torch.compile(module, backend="inductor", dynamic=dynamic),
        dynamic=dynamic,
    )


@given(bits=BITS, seed=SEEDS, rows=st.integers(1, 6))
def test_a_model_whose_weight_needs_no_more_than_k_bits_is_exact(bits, seed, rows):
    """Integers below 2**k in every group, and integer inputs: every sum is exact in float32, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 64), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    layer = nn.Sequential(nn.Linear(64, rows, bias=False))
    layer[0].weight.data = codes
    x = torch.randint(-8, 9, (3, 64), generator=generator).float()
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
        compiled = torch.compile(layer, backend="kbit", options={"bits": bits, "group_size": 32, "min_elements": 0})
        assert torch.equal(compiled(x), x @ codes.t())
        assert STORE.packed_forms(layer[0].weight)
