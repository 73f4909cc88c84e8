"""Epilogues of a GPU's products: in graphs captured for a GPU that need not be there, and in numbers with a CPU in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fusions import ACTIVATIONS
from torch import Tensor, nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor import Config, backend
from kbit_inductor._compat import FakeTensorMode
from kbit_inductor.launches import launches
from kbit_inductor.lowering.registry import KERNELS, Choice
from kbit_inductor.passes import lower
from kbit_inductor.testing import assert_equivalent, dequantized_copy, relative_error, rewrite
from kbit_inductor.testing.rewriting import Rewritten
from kbit_inductor.testing.without_gpu import fake_gpu_model, operators_on_cpu

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("one_thread_without_grad")

(TRITON,) = (kernel for kernel in KERNELS if kernel.name == "triton")
OPTIONS = {"bits": 5, "group_size": 16, "min_elements": 0}
LINEAR, FUSED = "kbit.linear_triton.default", "kbit.fused_linear_triton.default"


@pytest.fixture
def cpu_in_its_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lower, "choose", lambda *_: Choice(TRITON, ()))
    with operators_on_cpu():
        yield


def captured(module: nn.Module, *sizes: tuple[int, ...], dtype: torch.dtype = torch.float16, **options: Any) -> Rewritten:
    """The one graph of ``module`` on a GPU, called with float tensors of these sizes."""
    mode = FakeTensorMode()
    moved = fake_gpu_model(module.eval().to(dtype), mode)
    with mode:
        inputs = [torch.empty(size, dtype=dtype, device="cuda:0") for size in sizes]
        (graph,) = rewrite(moved, *inputs, config=OPTIONS | options)
    return graph


def products(graph: Rewritten) -> dict[str, int]:
    """How often each operator of a product is called."""
    return {name: graph.operators[name] for name in (LINEAR, FUSED) if graph.operators[name]}


def ran(module: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Rewritten, float]:
    """The graph with a CPU in the place of the GPU, and its error from the model with dequantized weights."""
    module.eval().requires_grad_(False)
    (graph,) = rewrite(module, *inputs, config=OPTIONS | options)
    kept = backend.kept_arguments(graph.context, len(graph.inputs))
    (result,) = backend.Bound(graph.graph.forward, kept, tuple(graph.context.slots))(*graph.inputs)
    return graph, relative_error(result, dequantized_copy(module)(*inputs))


class Gated(nn.Module):
    def __init__(self, act: Any = functional.silu, swapped: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size, bias=bias) for size in ((24, 40), (24, 40), (40, 24)))
        self.act, self.swapped = act, swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.act(self.gate(x)), self.up(x)
        return x + self.down(up * gate if self.swapped else gate * up)


class Sandwich(nn.Module):
    """A product followed by other operations, given as a function of it, of x and of a second product, of another x."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        self.linear, self.other, self.after = nn.Linear(24, 24), nn.Linear(24, 24), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x), x, self.other(-x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gated_layer_of_a_gpu_is_two_calls_and_nothing_else(dtype: torch.dtype) -> None:
    graph = captured(Gated(), (3, 24), dtype=dtype)
    assert graph.operators == {FUSED: 2}
    assert graph.fusions == {"activation": 1, "gate": 1, "residual": 1}
    (output,) = graph.graph.graph.find_nodes(op="output")
    value = output.args[0][0].meta["example_value"]
    assert (value.device, value.dtype, tuple(value.shape)) == (torch.device("cuda:0"), dtype, (3, 24))
    assert {choice.kernel.name for _, choice in graph.context.choices} == {"triton"}
    # What `explain` shows of a layer is read from the node that computes it now.
    assert all(use.node in graph.graph.graph.nodes for use, _ in graph.context.choices)


def test_a_block_of_a_transformer_keeps_its_meaning(cpu_in_its_place: None) -> None:
    from kbit_inductor.testing.models import WIDTH, Block

    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    graph, error = ran(block, torch.randn(2, 5, WIDTH))
    assert graph.fusions == {"activation": 1, "gate": 1, "residual": 2, "siblings": 3} and error < 1e-5
    assert graph.operators[LINEAR] == 0 and graph.operators[FUSED] == 4
    # Each pass in float64, and each operator within its bound.
    assert_equivalent(block, torch.randn(2, 5, WIDTH), OPTIONS, through_inductor=False)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("swapped", [False, True])
def test_gates_are_fused(name: str, swapped: bool, cpu_in_its_place: None) -> None:
    graph, error = ran(Gated(ACTIVATIONS[name], swapped, bias=swapped), torch.randn(3, 24))
    assert graph.operators == {FUSED: 2} and error < 1e-5
    assert graph.fusions == {"activation": 1, "gate": 1, "residual": 1}


class Siblings(nn.Module):
    """Products of one x of different widths, read as attention reads them."""

    def __init__(self, count: int = 3, bias: bool = True, first_bias: bool = True) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(24, 8 * (1 + i), bias=bias and (i > 0 or first_bias)) for i in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x).unflatten(-1, (-1, 8)).transpose(0, 1) for part in self.parts)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"codebook": "nf"}, {"activation_bits": 8}])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_one_x_are_one_call(options: dict[str, Any], bias: bool, cpu_in_its_place: None) -> None:
    module, x = Siblings(bias=bias).eval().requires_grad_(False), torch.randn(5, 24)
    (graph,) = rewrite(module, x, config=OPTIONS | options)
    assert products(graph) == {FUSED: 1} and graph.fusions == {"siblings": 3}
    assert [use.node.target for use, _ in graph.context.choices] == [torch.ops.kbit.fused_linear_triton.default] * 3
    assert_equivalent(module, x, OPTIONS | options, through_inductor=False)


@pytest.mark.parametrize(
    ("module", "options", "calls"),
    [
        (Siblings(first_bias=False), {}, {LINEAR: 1, FUSED: 1}),  # one has no bias
        (Siblings(), {"overrides": {"parts.0": {"bits": 3}}}, {LINEAR: 1, FUSED: 1}),
        (Siblings(2), {"overrides": {"parts.0": {"group_size": 8}}}, {LINEAR: 2}),
        (Siblings(9), {}, {FUSED: 1, LINEAR: 1}),  # a launch takes eight
    ],
)
def test_only_matrices_of_one_kind_share_a_call(module: nn.Module, options: dict[str, Any], calls: dict[str, int]) -> None:
    assert products(captured(module, (5, 24), **options)) == calls


@pytest.mark.parametrize("rounding", [16, 8])
def test_the_product_adds_its_side_term(rounding: int, cpu_in_its_place: None) -> None:
    options = {"low_rank": 4, "outliers": 0.1, "activation_bits": rounding}
    module, x = Siblings().eval().requires_grad_(False), torch.randn(5, 24)
    (graph,) = rewrite(module, x, config=OPTIONS | options)
    assert products(graph) == {FUSED: 3} and graph.fusions == {"residual": 3} and not graph.operators["add"]
    assert_equivalent(module, x, OPTIONS | options, through_inductor=False)
    corrected = {"bias_correction": True}
    (graph,) = rewrite(module, x, config=OPTIONS | corrected)
    assert products(graph) == {FUSED: 1} and graph.fusions == {"siblings": 3}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_layer_of_a_language_model_is_four_calls(kind: str, cpu_in_its_place: None) -> None:
    """Queries, keys and values; the output with the residual sum; the gate and its factor; the way down with the residual sum."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    config = transformers.AutoConfig.for_model(kind, num_key_value_heads=2, **shape)
    layer = transformers.AutoModel.from_config(config).eval().layers[0].requires_grad_(False)
    x, rotation = torch.randn(1, 5, 64), torch.randn(1, 5, 16)
    (graph,) = rewrite(lambda x, angles: layer(x, position_embeddings=(angles, angles)), x, rotation, config=OPTIONS)
    assert products(graph) == {FUSED: 4}
    assert graph.fusions == {"activation": 1, "gate": 1, "siblings": 3, "residual": 2}


class Normed(nn.Module):
    """A norm as transformers spells it, or torch, in front of two products."""

    def __init__(self, spelled: bool) -> None:
        super().__init__()
        self.spelled, self.weight = spelled, nn.Parameter(torch.rand(24) + 0.5)
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.spelled:
            wide = x.to(torch.float32)
            normed = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        else:
            normed = functional.rms_norm(x, (24,), self.weight, 1e-5)
        return self.first(normed), self.second(normed)


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rounding", "norms"), [(8, 1), ("fp8", 1), (16, 0)])
def test_norms_are_fused_where_activations_are_rounded(spelled: bool, dtype: torch.dtype, rounding: Any, norms: int) -> None:
    graph = captured(Normed(spelled), (3, 24), dtype=dtype, activation_bits=rounding)
    assert (graph.fusions["norm"], graph.fusions["siblings"]) == (norms, 2)
    operators = {name for name in graph.operators if "placeholder" not in name}
    assert (operators == {FUSED, "narrow"}) == bool(norms)  # nothing is left of the norm


def test_a_fused_norm_keeps_its_meaning(cpu_in_its_place: None) -> None:
    torch.manual_seed(0)
    assert_equivalent(Normed(True).eval(), torch.randn(3, 24), OPTIONS | {"activation_bits": 8}, through_inductor=False)


FUSED_ONCE = {
    "relu": (lambda y, x, z: torch.relu(y) - z.sum(), {"activation": 1}),
    "a factor of another kind": (lambda y, x, z: y * x - z.sum(), {"gate": 1}),
    "a residual sum": (lambda y, x, z: x.add(y) - z.sum(), {"residual": 1}),
    "all three": (lambda y, x, z: functional.gelu(y) * x + z, {"activation": 1, "gate": 1, "residual": 1}),
}


@pytest.mark.parametrize("name", sorted(FUSED_ONCE))
def test_what_follows_a_product_is_fused(name: str, cpu_in_its_place: None) -> None:
    after, fusions = FUSED_ONCE[name]
    graph, error = ran(Sandwich(after), torch.randn(3, 24))
    assert graph.fusions == fusions and graph.operators[FUSED] == 1 and error < 1e-5


NOT_FUSED = {
    "a product read twice": lambda y, x, z: torch.relu(y) + y.sum() - z.sum(),
    "a sum that broadcasts": lambda y, x, z: y + x[:1] - z.sum(),
    "a sum of another dtype": lambda y, x, z: y + x.double() - z.sum(),
    "a sum with alpha": lambda y, x, z: torch.add(y, x, alpha=2) - z.sum(),
    "a number": lambda y, x, z: y * 2.0 - z.sum(),
    "a product with itself": lambda y, x, z: y * y - z.sum(),
    "an activation in place": lambda y, x, z: functional.relu_(y) - z.sum(),
    "a factor that is written": lambda y, x, z: y * x.clone().mul_(2) - z.sum(),
    "a sum into the residual": lambda y, x, z: (x.clone().__iadd__(y), y)[0] - z.sum(),
}


@pytest.mark.parametrize("name", sorted(NOT_FUSED))
def test_what_looks_alike_is_not_fused(name: str, cpu_in_its_place: None) -> None:
    graph, error = ran(Sandwich(NOT_FUSED[name]), torch.randn(3, 24))
    assert not graph.fusions and graph.operators[LINEAR] == 2 and error < 1e-5


def test_a_product_does_not_move_past_a_write_to_its_bias(cpu_in_its_place: None) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 24) / 5)
            self.register_buffer("bias", torch.randn(24))

        def forward(self, x: Tensor) -> Tensor:
            y = functional.linear(x, self.weight, self.bias)
            self.bias.add_(1)
            return torch.relu(y)

    module, x = Written(), torch.randn(3, 24)
    before = module.bias.clone()
    (graph,) = rewrite(module.eval().requires_grad_(False), x, config=OPTIONS)
    assert not graph.fusions
    module.bias.copy_(before)
    kept = backend.kept_arguments(graph.context, len(graph.inputs))
    result = backend.Bound(graph.graph.forward, kept, tuple(graph.context.slots))(*graph.inputs)[0]
    module.bias.copy_(before)
    assert relative_error(result, dequantized_copy(module)(x)) < 1e-5


def test_nothing_is_fused_where_gradients_are_wanted(cpu_in_its_place: None) -> None:
    seen: list[Any] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(backend.capture(gm, inputs, Config(**OPTIONS))[1].fusions)
        return gm.forward

    with torch.enable_grad():
        torch.compile(Gated(), backend=keep)(torch.randn(3, 24, requires_grad=True))
    assert seen == [{}]


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_symbolic_and_empty_batches(rows: int, cpu_in_its_place: None) -> None:
    module = Gated().eval().requires_grad_(False)
    (graph,) = rewrite(module, torch.randn(4, 24), config=OPTIONS, dynamic=True)
    assert graph.operators[FUSED] == 2
    compiled = torch.compile(module, backend="kbit", options=OPTIONS, dynamic=True)
    compiled(torch.randn(4, 24))
    x = torch.randn(rows, 24)
    torch.testing.assert_close(compiled(x), dequantized_copy(module)(x), rtol=1e-5, atol=1e-5)


class Layer(Gated):
    """Like a decoder's. Of the products of one x, two are siblings: a sum and an activation are fused into the others."""

    def __init__(self) -> None:
        super().__init__(bias=False)
        self.q, self.k, self.v, self.gelu, self.o = (nn.Linear(24, n, bias=False) for n in (24, 8, 8, 8, 24))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.rms_norm(x, (24,), None)
        both = torch.cat([self.k(y), self.v(y), functional.gelu(self.gelu(y))], -1)
        return super().forward(x + self.o(self.q(y) + both))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_what_is_tuned_is_what_a_gpu_launches(packed: bool, activation_bits: int) -> None:
    """Siblings and gates together, found on a CPU, of float weights and of packed modules."""
    options = OPTIONS | {"activation_bits": activation_bits}
    graph = captured(Layer(), (3, 24), activation_bits=activation_bits)
    nodes = [node for node in graph.graph.graph.nodes if str(node.target) in (LINEAR, FUSED)]
    words = [node.args[1:2] if str(node.target) == LINEAR else node.args[3] for node in nodes]
    rows = {sum(each.meta["example_value"].shape[0] for each in one) for one in words}
    model = Layer().eval()
    if packed:
        kbit.quantize_(model, options)
    found = launches(model, [torch.randn(3, 24)], options, torch.bfloat16)
    assert {each.rows for each in found} == rows == {8, 16, 24, 80}
    assert sorted((each.rows, each.columns) for each in found) == [(8, 24), (16, 24), (24, 24), (24, 40), (80, 24)]
    assert {(each.device, each.dtype, each.bits, each.activation_bits) for each in found} == {
        ("cuda", torch.bfloat16, 5, activation_bits)
    }
