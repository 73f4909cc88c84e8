"""The operators of a GPU on a machine that has none: packed weights, shapes, derivatives, and their place in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from kbit_inductor import LayerConfig, backend
from kbit_inductor.kernels.layout import FP8
from kbit_inductor.kernels.reference import round_activations
from kbit_inductor.lowering.gpu import dequantize_words
from kbit_inductor.lowering.registry import KERNELS, Choice, Problem, choose
from kbit_inductor.packing import operand_specs, pack, plane_operands
from kbit_inductor.passes import lower

activation_bits_on = LayerConfig.activation_bits_on
(TRITON,) = (kernel for kernel in KERNELS if kernel.name == "triton")


def linear(x, words, scale, offset, global_scale, bias, bits, group_size, codebook=None, activation_bits=16):
    if activation_bits < 16:
        x = round_activations(x.reshape(-1, x.shape[-1]), group_size, activation_bits).view(x.shape).to(x.dtype)
    weight = dequantize_words(words, scale, offset, global_scale, bits, x.shape[-1], group_size, codebook)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def embedding(indices, words, scale, offset, global_scale, embedding_dim, bits, group_size, dtype, codebook=None):
    table = dequantize_words(words, scale, offset, global_scale, bits, embedding_dim, group_size, codebook, dtype)
    return table[indices]


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The operators, with implementations in plain PyTorch."""
    with torch.library._scoped_library("kbit", "IMPL") as library:
        library.impl("linear_triton", linear, "CPU")
        library.impl("embedding_triton", embedding, "CPU")
        yield


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"codebook": "normal"}], ids=str)
def test_words_hold_what_planes_hold(bits, options):
    weight = torch.randn(2, 20, 100)
    for value in (weight, weight[0]):
        config = LayerConfig(bits=bits, group_size=40, **options)
        planes, words = (pack(value, config, layout=layout) for layout in ("planes", "words"))
        assert torch.equal(words.dequantize(), planes.dequantize())
        batch = value.size(0) if value.dim() == 3 else None
        specs = operand_specs(20, 100, config, "words", batch)
        assert [(tuple(operand.shape), operand.dtype) for operand in words.operands] == specs
        assert all(operand.is_contiguous() for operand in words.operands)


def test_gradients_pass_through(on_cpu):
    config = LayerConfig(bits=3, group_size=16)
    packed = pack(torch.randn(12, 40), config, layout="words")
    *operands, codebook = plane_operands(packed.operands, config)
    x, bias, grad = torch.randn(3, 40, requires_grad=True), torch.randn(12, requires_grad=True), torch.randn(3, 12)
    y = torch.ops.kbit.linear_triton(x, *operands, bias, 3, 16, codebook)
    plain = torch.nn.functional.linear(x, packed.dequantize(), bias)
    torch.testing.assert_close(y, plain)
    ours, theirs = (torch.autograd.grad(of, (x, bias), grad) for of in (y, plain))
    torch.testing.assert_close(ours, theirs)

    to_x = lambda g: torch.ops.kbit.linear_grad_input_triton(g, *operands, 3, 16, codebook, 40)  # noqa: E731
    again = torch.autograd.grad(to_x(grad.requires_grad_()), grad, x.detach())
    torch.testing.assert_close(again[0], torch.nn.functional.linear(x.detach(), packed.dequantize()))


@pytest.mark.parametrize(("wanted", "given"), [("auto", 16), (16, 16), (8, 8), (3, 3), ("fp8", FP8)])
def test_activations_are_rounded_when_asked(on_cpu, monkeypatch, wanted, given):
    """On a GPU "auto" means not at all. The weight is made to look as if it were on one."""
    monkeypatch.setattr(lower, "choose", lambda *_: Choice(TRITON, ()))
    monkeypatch.setattr(LayerConfig, "activation_bits_on", lambda self, device: activation_bits_on(self, "cuda"))
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    layer, x = torch.nn.Linear(64, 40), torch.randn(3, 64)
    options = {"bits": 3, "group_size": 32, "min_elements": 0, "activation_bits": wanted}
    with torch.no_grad():
        y = torch.compile(torch.nn.Sequential(layer), backend="kbit", options=options)(x)
        packed = pack(layer.weight, LayerConfig(bits=3, group_size=32), layout="words")
        *operands, codebook = plane_operands(packed.operands, packed.config)
        expected = torch.ops.kbit.linear_triton(x, *operands, layer.bias, 3, 32, codebook, given)
    assert torch.equal(y, expected)


def counted(x, planes, scale, offset, global_scale, bias, group_size, codebook=None, activation_bits=16):
    rounded = round_activations(x, group_size, activation_bits).to(x.dtype)
    return torch.ops.kbit.linear(rounded, planes, scale, offset, global_scale, bias, group_size, codebook)


def test_few_bits_are_counted(monkeypatch):
    """Where counting is estimated to be faster: one bit. Gradients are those without rounding."""
    problem = Problem("linear", "cuda", torch.float16, 40, 64, bits=1, group_size=32, activation_bits=2)
    choice = choose(problem)
    assert choice.kernel.name == "triton-bits"
    assert choose(dataclasses.replace(problem, bits=2)).kernel is TRITON
    assert choose(dataclasses.replace(problem, activation_bits=5)).kernel is TRITON
    assert "multiples of 32" in dict(choose(dataclasses.replace(problem, group_size=40)).rejected)["triton-bits"]

    monkeypatch.setattr(lower, "choose", lambda *_: choice)
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    layer, x = torch.nn.Linear(64, 40).requires_grad_(False), torch.randn(3, 64)
    packed = pack(layer.weight, LayerConfig(bits=1, group_size=32))
    *operands, codebook = plane_operands(packed.operands, packed.config)
    options = {"bits": 1, "group_size": 32, "min_elements": 0, "activation_bits": 2}
    with torch.library._scoped_library("kbit", "IMPL") as library:
        library.impl("linear_triton_bits", counted, "CPU")
        with torch.no_grad():
            y = torch.compile(torch.nn.Sequential(layer), backend="kbit", options=options)(x)
        x.requires_grad_()
        again = torch.ops.kbit.linear_triton_bits(x, *operands, layer.bias, 32, codebook, 2)
        assert torch.equal(y, again)
        (gradient,) = torch.autograd.grad(again.sum(), x)
    torch.testing.assert_close(gradient, packed.dequantize().sum(0).expand_as(x))


def batched(x, words, scale, offset, global_scale, index, bits, group_size, codebook=None, activation_bits=16):
    zeros = [None] * len(words) if offset is None else offset
    levels = [None] * len(words) if codebook is None else codebook
    operands = zip(words, scale, zeros, global_scale, levels, strict=True)
    weight = [dequantize_words(w, s, z, g, bits, x.shape[-1], group_size, c) for w, s, z, g, c in operands]
    matrices = torch.stack(weight).to(x.dtype)
    return x @ (matrices if index is None else matrices[index.long()]).mT


def grouped(x, words, scale, offset, global_scale, offsets, *rest):
    matrix = torch.searchsorted(offsets, torch.arange(len(x)), right=True)
    return batched(x[:, None], words, scale, offset, global_scale, matrix, *rest)[:, 0]


@pytest.fixture
def experts_on_cpu() -> Iterator[None]:
    with torch.library._scoped_library("kbit", "IMPL") as library:
        library.impl("batched_linear_triton", batched, "CPU")
        library.impl("grouped_linear_triton", grouped, "CPU")
        yield


def test_gradients_of_experts_pass_through(experts_on_cpu):
    config = LayerConfig(bits=3, group_size=16, codebook="normal")
    packed = pack(torch.randn(3, 12, 40), config, layout="words")
    *operands, codebook = plane_operands(packed.operands, config)
    weight, index, offsets = packed.dequantize(), torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 4])
    x = torch.randn(4, 2, 40, requires_grad=True)
    y = torch.ops.kbit.batched_linear_triton(x, *operands, index, 3, 16, codebook)
    torch.testing.assert_close(y, x @ weight[index].mT)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad((x @ weight[index].mT).sum(), x))
    rows = x[:, 0]
    y = torch.ops.kbit.grouped_linear_triton(rows, *operands, offsets, 3, 16, codebook)
    expected = (rows[:, None] @ weight[[0, 2, 2, 2]].mT)[:, 0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (torch.nn.Parameter(torch.randn(3, 40, 40) / 8, requires_grad=False) for _ in range(2))

    def forward(self, x, index, offsets):
        hidden = torch.einsum("sk,snk->sn", x, self.up[index])
        return torch.nn.functional.grouped_mm(hidden, self.down.mT, offs=offsets)


def test_a_graph_takes_batches_of_words(experts_on_cpu, monkeypatch):
    """With the choice that a GPU would lead to."""
    monkeypatch.setattr(lower, "choose", lambda *_: Choice(TRITON, ()))
    model, x = Experts().bfloat16(), torch.randn(6, 40).bfloat16()
    index, offsets = torch.tensor([2, 0, 0, 1, 2, 0]), torch.tensor([2, 2, 6], dtype=torch.int32)
    graphs = []
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: graphs.append(gm) or gm.forward)
    torch.compile(model, backend="kbit", options={"bits": 5, "group_size": 8, "min_elements": 0})(x, index, offsets)
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert {"kbit.batched_linear_triton.default", "kbit.grouped_linear_triton.default"} <= called


def test_fakes_give_the_shapes_of_results():
    with torch.device("meta"):
        stacked = torch.ops.kbit.batched_linear_triton(
            torch.empty(2, 3, 64).half(), torch.empty(2, 20, 16, dtype=torch.int16), torch.empty(2, 2, 20).half(), None,
            torch.empty(2, 1), None, 4, 32,
        )  # fmt: skip
        x, words, scale, one = (
            torch.empty(2, 3, 64).half(),
            torch.empty(20, 16, dtype=torch.int16),
            torch.empty(2, 20).half(),
            torch.empty(1),
        )
        y = torch.ops.kbit.linear_triton(x, words, scale, None, one, None, 4, 32)
        lists = ([words] * 2, [scale] * 2, [], [one] * 2, [], [])
        wide = torch.ops.kbit.fused_linear_triton(x, None, 0.0, *lists, 4, 32, "silu", False, None, None, 16)
        fused = torch.ops.kbit.fused_linear_triton(x, None, 0.0, *lists, 4, 32, "silu", True, None, y, 16)
        rows = torch.ops.kbit.embedding_triton(
            torch.empty(5, dtype=torch.int64), words, scale, None, one, 64, 4, 32, torch.bfloat16
        )
    assert (y.shape, y.dtype) == (fused.shape, fused.dtype) == (stacked.shape, stacked.dtype) == ((2, 3, 20), torch.float16)
    assert (wide.shape, wide.dtype) == ((2, 3, 40), torch.float16)
    assert (rows.shape, rows.dtype) == ((5, 64), torch.bfloat16)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 72), torch.nn.Linear(72, 50)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.embed(tokens)))


def test_a_graph_takes_words(on_cpu, monkeypatch):
    """With the choice that a GPU would lead to. Embedding and head share one packed weight."""
    monkeypatch.setattr(lower, "choose", lambda *_: Choice(TRITON, ()))
    model, tokens = Model().eval(), torch.arange(6)
    compiled = torch.compile(model, backend="kbit", options={"bits": 5, "group_size": 24, "codebook": "normal", "end_bits": 1})
    with torch.no_grad():
        y = compiled(tokens)
    weight = pack(model.embed.weight, LayerConfig(bits=5, group_size=24, codebook="normal"), layout="words").dequantize()
    expected = torch.nn.functional.linear(torch.relu(weight[tokens]), weight, model.head.bias)
    torch.testing.assert_close(y, expected)
