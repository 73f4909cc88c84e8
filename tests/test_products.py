"""Every way to write a product with a constant weight is matched, and what is not says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.binding import Binding
from kbit_inductor.weights.store import STORE

K, N = 48, 40


@pytest.fixture
def without_inductor(monkeypatch):
    """Run the rewritten graph as it is: these tests are about the rewrite."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)


class Product(nn.Module):
    def __init__(self, shape, function, as_buffer=False):
        super().__init__()
        weight = torch.randn(shape) / 8
        if as_buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(N))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


SPELLINGS = {
    "linear": ((N, K), lambda x, w, b: functional.linear(x, w)),
    "linear with bias": ((N, K), functional.linear),
    "linear by keyword": ((N, K), lambda x, w, b: functional.linear(input=x, weight=w, bias=b)),
    "linear with one number for a bias": ((N, K), lambda x, w, b: functional.linear(x, w, b[:1])),
    "linear with a bias for each row": ((N, K), lambda x, w, b: functional.linear(x[0], w, b.expand(5, N))),
    "matmul of t": ((N, K), lambda x, w, b: x @ w.t()),
    "matmul of T": ((N, K), lambda x, w, b: torch.matmul(x, w.T) + b),
    "matmul of mT": ((N, K), lambda x, w, b: x.matmul(w.mT)),
    "matmul of transpose": ((N, K), lambda x, w, b: x @ w.transpose(-1, 0)),
    "matmul of permute": ((N, K), lambda x, w, b: x @ w.permute(1, 0)),
    "matmul, not transposed": ((K, N), lambda x, w, b: x @ w),
    "rmatmul": ((K, N), lambda x, w, b: w.__rmatmul__(x)),
    "mm": ((K, N), lambda x, w, b: torch.mm(x.reshape(-1, K), w)),
    "mm method": ((K, N), lambda x, w, b: x.reshape(-1, K).mm(w)),
    "weight on the left": ((N, K), lambda x, w, b: w @ x.reshape(-1, K).t()),
    "weight on the left, batched": ((N, K), lambda x, w, b: w @ x.transpose(-1, -2)),
    "addmm": ((K, N), lambda x, w, b: torch.addmm(b, x.reshape(-1, K), w)),
    "addmm with factors": ((K, N), lambda x, w, b: torch.addmm(b, x.reshape(-1, K), w, beta=0.5, alpha=2.0)),
    "addmm, beta 0": ((K, N), lambda x, w, b: torch.addmm(b, x.reshape(-1, K), w, beta=0)),
    "addmm of a matrix": ((K, N), lambda x, w, b: torch.addmm(x.reshape(-1, K)[:, :N], x.reshape(-1, K), w)),
    "mv": ((N, K), lambda x, w, b: torch.mv(w, x.reshape(-1, K)[0])),
    "addmv": ((N, K), lambda x, w, b: torch.addmv(b, w, x.reshape(-1, K)[0], alpha=3)),
    "vector times weight": ((K, N), lambda x, w, b: x.reshape(-1, K)[0] @ w),
    "bmm of an expanded weight": ((K, N), lambda x, w, b: torch.bmm(x, w.expand(x.shape[0], K, N))),
    "baddbmm": ((K, N), lambda x, w, b: torch.baddbmm(x[..., :N], x, w.expand(x.shape[0], K, N), beta=2)),
    "einsum": ((N, K), lambda x, w, b: torch.einsum("btk,nk->btn", x, w)),
    "einsum to heads": ((K, 4, 10), lambda x, w, b: torch.einsum("btk,khd->bthd", x, w)),
    "einsum from heads": ((4, 12, N), lambda x, w, b: torch.einsum("bthd,hdn->btn", x.view(*x.shape[:2], 4, 12), w)),
    "tensordot": ((K, N), lambda x, w, b: torch.tensordot(x, w, dims=1)),
    "inner": ((N, K), lambda x, w, b: torch.inner(x, w)),
    "a slice of the weight": ((2 * N, K), lambda x, w, b: functional.linear(x, w[N:], b)),
    "every second column": ((N, 2 * K), lambda x, w, b: functional.linear(x, w[:, ::2], b)),
    "a reshaped weight": ((4, N // 4, K), lambda x, w, b: functional.linear(x, w.view(N, K), b)),
    "a convolution's weight as matrix": ((N, K, 1, 1), lambda x, w, b: x @ w.squeeze(-1).squeeze(-1).t()),
    "a cast weight": ((N, K), lambda x, w, b: functional.linear(x.bfloat16(), w.to(torch.bfloat16))),
    "a cloned weight": ((N, K), lambda x, w, b: functional.linear(x, w.clone())),
    "a detached weight": ((N, K), lambda x, w, b: functional.linear(x, w.detach())),
    "a contiguous transpose": ((K, N), lambda x, w, b: functional.linear(x, w.t().contiguous())),
    "double use": ((K, K), lambda x, w, b: x @ w + (x @ w).relu() @ w),
}  # fmt: skip


@pytest.mark.parametrize("as_buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_product_is_matched_however_it_is_written(spelling, as_buffer, without_inductor):
    shape, function = SPELLINGS[spelling]
    model = Product(shape, function, as_buffer)
    x = torch.randn(3, 5, K)
    with torch.no_grad():
        report = kbit.explain(model, x, config={"bits": 5, "min_elements": 0})
        actual = torch.compile(model, backend="kbit", options={"bits": 5, "min_elements": 0})(x)
        expected = dequantized_copy(model)(x)
    assert [layer.matched for layer in report.layers] == [True] * len(report.layers)
    assert all(not layer.reasons for layer in report.layers)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    # float32: rounding of sums of 48 products. bfloat16: the eager twin rounds weights and result to 8 bits.
    assert relative_error(actual, expected) < (2.0**-7 if actual.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("spelling", ["linear with bias", "addmm", "einsum", "weight on the left, batched"])
def test_a_product_through_inductor_equals_eager(spelling):
    shape, function = SPELLINGS[spelling]
    model = Product(shape, function)
    x = torch.randn(3, 5, K)
    with torch.no_grad():
        actual = torch.compile(model, backend="kbit", fullgraph=True, options={"bits": 3})(x)
        assert relative_error(actual, dequantized_copy(model)(x)) < 1e-5


def test_equal_views_of_one_weight_are_packed_once(without_inductor):
    model = Product((K, K), lambda x, w, b: x @ w + (x @ w).relu() @ w.t())
    with torch.no_grad():
        report = kbit.explain(model, torch.randn(3, 5, K))
    assert sorted(len(layer.uses) for layer in report.layers) == [1, 2]


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.projection = Conv1D(N, K)

    def forward(self, x):
        return self.projection(x)


class Lookup(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(50, K, **options)

    def forward(self, indices):
        return self.table(indices)


def test_conv1d_of_transformers_is_matched_with_its_bias(without_inductor):
    model = Conv1D()
    x = torch.randn(2, 5, K)
    with torch.no_grad():
        (layer,) = kbit.explain(model, x).layers
        actual = torch.compile(model, backend="kbit")(x)
        assert relative_error(actual, dequantized_copy(model)(x)) < 1e-5
    assert (layer.name, layer.shape, layer.matched) == ("projection", (N, K), True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_is_matched(dtype, options, without_inductor):
    model = Lookup(**options)
    indices = torch.randint(0, 50, (4, 7), dtype=dtype)
    with torch.no_grad():
        (layer,) = kbit.explain(model, indices).layers
        actual = torch.compile(model, backend="kbit")(indices)
        torch.testing.assert_close(actual, dequantized_copy(model)(indices), rtol=1e-6, atol=1e-7)
    assert layer.uses == ("embedding",)


def test_multi_head_attention_is_matched_inside_its_composite_operator(without_inductor):
    model = nn.MultiheadAttention(48, 4, batch_first=True).eval()

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 6, 48)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            report = kbit.explain(Attend(), x)
            assert {layer.name: layer.matched for layer in report.layers} == {
                "attention.in_proj_weight": True,
                "attention.out_proj": True,
            }


class Unmatched(nn.Module):
    def __init__(self, weight, function):
        super().__init__()
        self.weight = weight
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def _updated(x, w):
    w.mul_(1.0)
    return x @ w


def _checkpointed(x, w):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda a: a @ w, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("weight", "function", "reason"),
    [
        (torch.randn(4, 4), lambda x, w: x[..., :4] @ w, "too small: 16 elements"),
        (torch.randn(K, K, dtype=torch.float64), lambda x, w: x.double() @ w, "float64"),
        (torch.randn(K, K, dtype=torch.complex64), lambda x, w: x.to(torch.complex64) @ w, "complex64"),
        (torch.randn(K, K), lambda x, w: x @ (w * torch.bernoulli(torch.ones_like(w))), "computed in the forward pass"),
        (torch.randn(K, K), lambda x, w: x.double() @ w.double(), "float64"),
        (torch.randn(K, K), _updated, "writes to it"),
        (torch.randn(K, K), lambda x, w: x + w[:5], "no matrix product"),
        (torch.randn(K, K), _checkpointed, "inside the region"),
    ],
)
def test_what_is_not_matched_says_why(weight, function, reason, without_inductor):
    model = Unmatched(nn.Parameter(weight, requires_grad=False), function)
    x = torch.randn(3, 5, K)
    with torch.no_grad():
        (layer,) = kbit.explain(model, x).layers
        assert not layer.matched
        assert any(reason in told for told in layer.reasons), layer.reasons
        actual = torch.compile(model, backend="kbit")(x)
        torch.testing.assert_close(actual, model(x))


def test_a_sparse_weight_stays_in_float_and_says_so():
    weight = nn.Parameter(torch.randn(K, K).relu().to_sparse_csr(), requires_grad=False)
    model = Unmatched(weight, lambda x, w: (w @ x.t()).t())
    x = torch.randn(5, K)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="kbit")(x), model(x))
        report = kbit.explain(model, x)
    assert not report.matched
    assert report.layers[0].reasons


def test_a_weight_without_values_stays_in_float():
    model = nn.Sequential(nn.Linear(K, N, device="meta"))
    x = torch.randn(2, K, device="meta")
    with torch.no_grad():
        assert torch.compile(model, backend="kbit")(x).shape == (2, N)
        assert kbit.explain(model, x).layers[0].reasons == ("it is on the meta device, without values",)
        assert kbit.quantize_(nn.Sequential(nn.Linear(K, N))).to("meta")(x).shape == (2, N)


def test_max_norm_keeps_an_embedding_in_float():
    model = Lookup(max_norm=1.0)
    with torch.no_grad():
        (layer,) = kbit.explain(model, torch.tensor([1, 2])).layers
    assert "max_norm" in layer.reasons[0] or "writes to it" in layer.reasons[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.vmap(lambda row: row @ w)(x),
        lambda x, w: torch.vmap(lambda a: torch.addmm(a, x[0], w))(x),
        lambda x, w: torch.func.jvp(lambda a: a @ w, (x,), (x,))[1],
    ],
)
def test_a_product_inside_a_functional_transform_stays_in_float(function, without_inductor):
    model = Unmatched(nn.Parameter(torch.randn(K, K), requires_grad=False), function)
    x = torch.randn(3, K, K)
    with torch.no_grad():
        (layer,) = kbit.explain(model, x).layers
        torch.testing.assert_close(torch.compile(model, backend="kbit")(x), model(x))
    assert "torch.func" in layer.reasons[0]


def test_a_product_after_a_functional_transform_is_matched(without_inductor):
    model = Unmatched(nn.Parameter(torch.randn(K, K), requires_grad=False), lambda x, w: torch.vmap(torch.tanh)(x) @ w)
    with torch.no_grad():
        assert kbit.explain(model, torch.randn(3, 5, K)).layers[0].matched


def test_a_graph_without_matches_goes_to_inductor_untouched(monkeypatch):
    seen = []
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: seen.append(gm) or gm.forward)
    graphs = []

    def spy(gm, inputs, **kwargs):
        graphs.append(gm)
        return backend.kbit(gm, inputs, **kwargs)

    torch.compile(Unmatched(nn.Parameter(torch.randn(4, 4)), lambda x, w: x @ w), backend=spy)(torch.randn(2, 4))
    assert seen == graphs


def test_a_graph_without_packed_weights_needs_no_compiled_library():
    assert Binding(STORE, ()).fingerprint is None  # an operator without an implementation, where nothing has loaded the library
    assert Binding(STORE, ()).operands([torch.zeros(2)]) == []


@pytest.mark.parametrize("enabled_outside", [False, True])
def test_autocast_runs_the_product_in_its_dtype(enabled_outside, without_inductor):
    model = Product(*SPELLINGS["matmul, not transposed"])
    if not enabled_outside:
        plain = model.function

        def inside(x, w, b):
            with torch.autocast("cpu", torch.bfloat16):
                return plain(x, w, b)

        model.function = inside
    x = torch.randn(3, 5, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled_outside):
        compiled = torch.compile(model, backend="kbit", options={"bits": 8})
        actual = compiled(x)
        assert kbit.explain(model, x).layers[0].matched
        expected = dequantized_copy(model)(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_each_dtype(dtype, without_inductor):
    model = Product(*SPELLINGS["linear with bias"]).to(dtype)
    x = torch.randn(3, 5, K, dtype=dtype)
    with torch.no_grad():
        actual = torch.compile(model, backend="kbit", options={"bits": 8})(x)
        expected = dequantized_copy(model).float()(x.float())
    assert actual.dtype == dtype
    # The twin's weights are rounded to dtype, and so is our result: two roundings, which half the epsilon each bounds.
    assert relative_error(actual, expected) < torch.finfo(dtype).eps + 1e-5
