"""Random small modules compiled are the same modules with dequantized weights in eager."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BITS, FLOATS, GROUPS, SEEDS, normal
from torch import nn

from kbit_inductor import backend
from kbit_inductor.store import STORE
from kbit_inductor.testing import dequantized_copy, relative_error

WIDTHS = st.integers(1, 40)


class Residual(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*pair) for pair in ((width, inner), (width, inner), (inner, width)))

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Raw(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / width**0.5), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


@st.composite
def modules(draw):
    """A stack of one to four layers, as ``(module, input width)``."""
    first = width = draw(WIDTHS)
    layers = []
    for kind in draw(st.lists(st.sampled_from(["linear", "residual", "gated", "raw", "norm", "tanh"]), min_size=1, max_size=4)):
        out = draw(WIDTHS)
        if kind == "linear":
            layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
        elif kind == "raw":
            layers.append(Raw(width, out))
        elif kind in ("residual", "gated"):
            layers.append((Residual if kind == "residual" else Gated)(width, out))
        else:
            layers.append(nn.LayerNorm(width) if kind == "norm" else nn.Tanh())
        width = out if kind in ("linear", "raw") else width
    return nn.Sequential(*layers), first


@st.composite
def inputs(draw, module, width, dtype):
    """A tensor of two to four dimensions, any of which but the last may be empty, with strides of its own."""
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


def check(module, x, options, unquantized, dynamic=None):
    """``unquantized(module)(x)`` is, bit for bit, what a module without products must give."""
    module = module.to(x.dtype).eval()
    weights = [p for p in module.parameters() if p.dim() == 2]
    with torch.no_grad():
        actual = torch.compile(module, backend="kbit", dynamic=dynamic, options=options)(x)
        assert all(STORE.packed_forms(weight) for weight in weights)
        if not weights:
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


def stable(module):
    """Norms over very few features amplify rounding without bound, so their widths are kept above eight."""
    return all(layer.normalized_shape[0] > 8 for layer in module.modules() if isinstance(layer, nn.LayerNorm))


@settings(max_examples=40)
@given(data=st.data(), bits=BITS, group=GROUPS, symmetric=st.booleans(), dtype=FLOATS, seed=SEEDS)
def test_random_modules_rewritten(data, bits, group, symmetric, dtype, seed):
    torch.manual_seed(seed)
    torch._dynamo.reset()
    module, width = data.draw(modules().filter(lambda drawn: stable(drawn[0])))
    x = data.draw(inputs(module, width, dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
        check(
            module,
            x,
            {"bits": bits, "group_size": group, "symmetric": symmetric, "quantizer": "rtn", "min_elements": 0},
            unquantized=lambda module: module,
        )


@settings(max_examples=6)
@given(data=st.data(), bits=BITS, group=GROUPS, dtype=FLOATS, dynamic=st.sampled_from([None, True, False]), seed=SEEDS)
def test_random_modules_through_inductor(data, bits, group, dtype, dynamic, seed):
    torch.manual_seed(seed)
    torch._dynamo.reset()
    module, width = data.draw(modules().filter(lambda drawn: stable(drawn[0])))
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
