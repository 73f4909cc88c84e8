"""Deliberately wrong passes, kernels and quantizers of each common kind: the library of checks catches every one."""

from __future__ import annotations

import dataclasses
import functools
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor.kernels import reference
from kbit_inductor.lowering import ops
from kbit_inductor.lowering.registry import KERNELS, Kernel
from kbit_inductor.passes.pipeline import BUILT_IN
from kbit_inductor.passes.registry import make_pass
from kbit_inductor.quantizers import QUANTIZERS, Quantized, clip, rtn
from kbit_inductor.testing import assert_equivalent, check_kernel, check_pass, check_quantizer, rewrite
from kbit_inductor.testing.models import WIDTH, Block, Columns, InPlace, examples
from kbit_inductor.testing.passes import CHECKED, Changes
from kbit_inductor.weights.store import STORE

FUSED = torch.ops.kbit.fused_linear_cpu.default


def calls(gm, *targets):
    return [node for node in gm.graph.nodes if node.target in targets]


# Passes: what each does to a graph, what it says of itself, and the model that shows it.


def drop_a_bias(gm, context):
    for node in calls(gm, functional.linear)[:1]:
        node.args = (*node.args[:2], None)


def transpose_a_weight(gm, context):
    node = calls(gm, functional.linear)[0]
    with gm.graph.inserting_before(node):
        turned = gm.graph.call_method("t", (node.args[1],))
    node.args = (node.args[0], turned, *node.args[2:])


def take_another_weight(gm, context):
    first, second = calls(gm, functional.linear)[:2]
    first.args = (first.args[0], *second.args[1:])


def exchange_packed_weights(gm, context):
    first, second = calls(gm, torch.ops.kbit.linear_cpu.default)[:2]
    first.args, second.args = (first.args[0], second.args[1], *first.args[2:]), (second.args[0], first.args[1], *second.args[2:])


def take_another_activation(gm, context):
    for node in calls(gm, functional.silu):
        node.target = functional.gelu
        node.kwargs = {}


def forget_a_residual(gm, context):
    node = calls(gm, operator.add)[-1]
    node.replace_all_uses_with(node.args[1])
    gm.graph.erase_node(node)


def change_bits_and_say_none(gm, context):
    torch.fx.subgraph_rewriter.replace_pattern(gm, lambda x: x * 2.0, lambda x: (x * 1.1) * (2.0 / 1.1))


def round_to_bfloat16(gm, context):
    for node in calls(gm, functional.silu):
        with gm.graph.inserting_after(node):
            narrow = gm.graph.call_method("bfloat16", (node,))
        with gm.graph.inserting_after(narrow):
            wide = gm.graph.call_method("float", (narrow,))
        node.replace_all_uses_with(wide, delete_user_cb=lambda user, narrow=narrow: user is not narrow)


def move_past_a_write(gm, context):
    product = calls(gm, functional.linear)[0]
    calls(gm, "mul_")[0].append(product)


def erase_a_write_to_a_state(gm, context):
    state = next(node for node in gm.graph.find_nodes(op="placeholder") if "state" in node.name)
    gm.graph.erase_node(next(user for user in list(state.users)[::-1] if not user.users))


def lie_about_a_shape(gm, context):
    node = calls(gm, functional.silu)[0]
    node.meta["example_value"] = node.meta["example_value"][..., :-1]


def use_before_it_is_there(gm, context):
    calls(gm, functional.silu)[0].append(calls(gm, functional.linear)[0])


def scale_twice(gm, context):
    for node in calls(gm, operator.mul)[-1:]:
        with gm.graph.inserting_after(node):
            again = gm.graph.call_function(operator.mul, (node, 2.0))
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


def with_call(index, change):
    def run(gm, context):
        node = calls(gm, FUSED)[index]
        args = list(node.args)
        change(args)
        node.args = tuple(args)

    return run


def set_eps(args):
    args[2] = 0.1


def set_activation(args):
    args[6] = "gelu"


def exchange_gate_and_up(args):
    args[3], args[4] = args[3][::-1], args[4][::-1]


def drop_fused_residual(args):
    args[8] = None


def drop_fused_bias(args):
    args[4] = [None] * len(args[4])


def drop_norm_weight(args):
    args[1] = None


def shift_a_split(gm, context):
    first, second = calls(gm, torch.narrow)[:2]
    second.args = first.args


X = (2, 5, WIDTH)
PASSES = {
    "dropped bias": (drop_a_bias, "bounded", "before", "pack", Block, X),
    "transposed weight": (transpose_a_weight, "bounded", "before", "expand", Block, X),
    "another layer's weight": (take_another_weight, "bounded", "before", "pack", Block, X),
    "stale packed weights": (exchange_packed_weights, "bounded", "after", "pack", InPlace, X),
    "another activation": (take_another_activation, "bounded", "before", "pack", Block, X),
    "forgotten residual": (forget_a_residual, "bounded", "before", "pack", Block, X),
    "other bits, said to be the same": (change_bits_and_say_none, "bitwise", "before", "pack", Columns, (2, WIDTH, 5)),
    "rounded to fewer bits": (round_to_bfloat16, "bounded", "before", "expand", Block, X),
    "moved past a write": (move_past_a_write, "bounded", "before", "expand", InPlace, X),
    "erased a write to a state": (erase_a_write_to_a_state, "bitwise", "before", "expand", InPlace, X),
    "wrong shape": (lie_about_a_shape, "bitwise", "before", "expand", Block, X),
    "used before it is computed": (use_before_it_is_there, "bitwise", "before", "expand", Block, X),
    "scaled twice": (scale_twice, "bounded", "before", "expand", Columns, (2, WIDTH, 5)),
    "quantizing that does something else": (drop_a_bias, "quantizing", "before", "pack", Block, X),
    "fused: another eps": (with_call(0, set_eps), "bounded", "after", "fuse", Block, X),
    "fused: another activation": (with_call(2, set_activation), "bounded", "after", "fuse", Block, X),
    "fused: gate and up exchanged": (with_call(2, exchange_gate_and_up), "bounded", "after", "fuse", Block, X),
    "fused: dropped residual": (with_call(1, drop_fused_residual), "bounded", "after", "fuse", Block, X),
    "fused: dropped bias": (with_call(0, drop_fused_bias), "bounded", "after", "fuse", Block, X),
    "fused: dropped norm weight": (with_call(0, drop_norm_weight), "bounded", "after", "fuse", Block, X),
    "fused: another half": (shift_a_split, "bounded", "after", "fuse", Block, X),
}


@pytest.mark.usefixtures("one_thread_without_grad")
@pytest.mark.parametrize("name", PASSES)
def test_wrong_passes_are_caught(name):
    function, tier, side, other, model, shape = PASSES[name]
    # A pass after another one must be before the next, or it would run last.
    following = {"pack": "fuse", "fuse": "chain"}
    sides = {"before": following[other], "after": other} if side == "after" else {"before": other}
    wrong = make_pass(function, name="wrong", tier=tier, **sides)
    with pytest.raises(kbit.BrokenPassError, match="'wrong'"):
        check_pass(wrong, [(model().eval(), (torch.randn(shape),))])


# Kernels: a wrong computation of linear or embedding, from the planes of the reference.


def faulty(change_weight=None, change_result=None, **changed):
    def linear(x, planes, scale, offset, global_scale, bias, group_size, codebook=None):
        operands = {"planes": planes, "scale": scale, "offset": offset, "global_scale": global_scale, "bias": bias}
        operands |= {name: change(operands[name], operands) for name, change in changed.items() if name in operands}
        bias = operands.pop("bias")
        codebook = None if "codebook" in changed else codebook
        group_size = changed["group_size"](group_size) if "group_size" in changed else group_size
        weight = reference.dequantize(**operands, columns=x.shape[-1], group_size=group_size, codebook=codebook)
        weight = weight if change_weight is None else change_weight(weight)
        y = x.float() @ weight.t()
        y = y if bias is None else y + bias.float()
        return (y if change_result is None else change_result(y, bias)).to(x.dtype)

    return linear


def first_weight_for_ever():
    kept = {}

    def linear(x, planes, scale, *rest):
        kept.setdefault((planes.shape, scale.shape), (planes, scale))
        return reference.linear(x, *kept[planes.shape, scale.shape], *rest)

    return linear


def without_strides(x, *operands):
    flat = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
    return reference.linear(flat, *operands)


def in_bfloat16(x, planes, scale, offset, global_scale, bias, group_size, codebook=None):
    weight = reference.dequantize(planes, scale, offset, global_scale, x.shape[-1], group_size, codebook=codebook)
    y = (x.bfloat16() @ weight.bfloat16().t()).to(x.dtype)
    return y if bias is None else y + bias


LINEAR_KERNELS = {
    "columns reversed": faulty(change_weight=lambda w: w.flip(1)),
    "rows off by one": faulty(change_weight=lambda w: w.roll(1, 0)),
    "scales off by one group": faulty(scale=lambda s, _: s.roll(1, 1)),
    "offsets off by one group": faulty(offset=lambda z, _: z if z is None else z.roll(1, 1)),
    "groups of another size": faulty(group_size=lambda size: size + 1, scale=lambda s, _: s, offset=lambda z, _: z),
    "zero point off by one": faulty(offset=lambda z, given: z if z is None else z + given["scale"]),
    "a symmetric grid without its middle": faulty(offset=lambda z, given: torch.zeros_like(given["scale"]) if z is None else z),
    "dropped bias": faulty(bias=lambda bias, _: None),
    "bias added twice": faulty(change_result=lambda y, bias: y if bias is None else y + bias.float()),
    "global scale ignored": faulty(global_scale=lambda g, _: torch.ones_like(g)),
    "last column dropped": faulty(change_weight=lambda w: torch.cat([w[:, :-1], torch.zeros_like(w[:, -1:])], 1)),
    "bits in reverse": faulty(planes=lambda planes, _: planes.flip(0)),
    "codebook ignored": faulty(codebook=None),
    "result rounded to half": faulty(change_result=lambda y, bias: y.half().float()),
    "sums of bfloat16": in_bfloat16,
    "stale weight": first_weight_for_ever(),
    "strides ignored": without_strides,
    "one NaN": faulty(change_result=lambda y, bias: y.index_fill(-1, torch.tensor([0]), float("nan"))),
    "a dimension too many": lambda x, *operands: reference.linear(x, *operands)[None],
}
EMBEDDING_KERNELS = {
    "the next row": lambda indices, planes, *rest: reference.embedding((indices + 1) % planes.shape[1], planes, *rest),
    "always float32": lambda *operands: reference.embedding(*operands[:-1], torch.float32) if len(operands) == 8 else None,
}


@functools.cache
def as_kernel(family, name):
    """The faulty function as an operator, which is defined once per process."""
    suffix = "_wrong_" + "".join(filter(str.isalnum, name))
    ops.define(family, suffix)
    torch.library.impl(f"kbit::{family}{suffix}", "CPU", (LINEAR_KERNELS if family == "linear" else EMBEDDING_KERNELS)[name])
    only = {"linear": lambda p: p.family == "linear" and p.dtype != torch.float64,
            "embedding": lambda p: p.family == "embedding" and p.uniform}[family]  # fmt: skip
    return Kernel(name, suffix, lambda problem: None if only(problem) else "of another kind", lambda problem: 1.0)


@pytest.mark.parametrize("name", LINEAR_KERNELS)
def test_wrong_kernels_are_caught(name):
    with pytest.raises(AssertionError, match=r"kernel .*check_case\(kernel, Case\("):
        check_kernel(as_kernel("linear", name))


@pytest.mark.parametrize("name", EMBEDDING_KERNELS)
def test_wrong_look_ups_are_caught(name):
    with pytest.raises(AssertionError, match=r"kernel .*check_case\(kernel, Case\("):
        check_kernel(as_kernel("embedding", name))


def test_a_fake_of_another_shape_is_caught():
    torch.library.define("kbit::linear_wrongfake", ops.FAMILIES["linear"])
    torch.library.impl("kbit::linear_wrongfake", "CPU", reference.linear)
    torch.library.register_fake("kbit::linear_wrongfake", lambda x, *rest: torch.empty_like(x))
    kernel = Kernel("wrong fake", "_wrongfake", lambda p: None if p.family == "linear" else "no", lambda p: 1.0)
    with pytest.raises(AssertionError, match="its fake"):
        check_kernel(kernel)


# Quantizers: a wrong change of what rounding to nearest gives.


def quantizer(**changes):
    def quantize(weight, form, statistics):
        found = rtn(weight, form, statistics)
        return dataclasses.replace(found, **{name: change(found, form) for name, change in changes.items()})

    return quantize


def rounded_down(weight, form, statistics):
    found = rtn(weight, form)
    scale = (found.scale.float() * found.global_scale)[:, torch.arange(weight.shape[1]) // form.group_size]
    offset = 0.0 if found.offset is None else (found.offset.float() * found.global_scale)
    offset = offset if found.offset is None else offset[:, torch.arange(weight.shape[1]) // form.group_size]
    zero = (2**form.bits - 1) / 2 if found.offset is None and form.codebook is None else 0
    zero = found.codes.float() - ((found.codes.float() - zero) if found.offset is None else found.codes.float())
    codes = torch.where(scale == 0, 0.0, (weight.float() - offset) / torch.where(scale == 0, 1.0, scale) + zero).floor()
    return dataclasses.replace(found, codes=codes.clamp(0, 2**form.bits - 1).to(torch.uint8))


def first_codes_for_ever():
    kept = {}

    def quantize(weight, form, statistics):
        return kept.setdefault((weight.shape, form), rtn(weight, form))

    return quantize


def at_random(weight, form, statistics):
    found = rtn(weight, form)
    codes = (found.codes.int() + torch.randint(0, 2, found.codes.shape)).clamp_max(2**form.bits - 1)
    return dataclasses.replace(found, codes=codes.to(torch.uint8))


def in_place(weight, form, statistics):
    found = rtn(weight, form)
    weight.mul_(0.5)
    return found


QUANTIZER_FAULTS = {
    "rounded down": rounded_down,
    "zero point off by one": quantizer(offset=lambda q, f: None if q.offset is None else q.offset + q.scale),
    "scales off by one group": quantizer(scale=lambda q, f: q.scale.roll(1, 1)),
    "rows off by one": quantizer(codes=lambda q, f: q.codes.roll(1, 0)),
    "columns reversed": quantizer(codes=lambda q, f: q.codes.flip(1)),
    "an error of nothing": quantizer(error=lambda q, f: 0.0),
    "scales of float32": quantizer(scale=lambda q, f: q.scale.float()),
    "the highest code never": quantizer(codes=lambda q, f: q.codes.clamp_max(max(2**f.bits - 2, 0))),
    "a code too many": quantizer(
        codes=lambda q, f: torch.where(q.codes == 2**f.bits - 1, 2**f.bits % 256, q.codes).to(torch.uint8)
    ),
    "codes of int32": quantizer(codes=lambda q, f: q.codes.int()),
    "an offset where none is wanted": quantizer(offset=lambda q, f: torch.zeros_like(q.scale)),
    "a global scale of 3": quantizer(global_scale=lambda q, f: torch.tensor([3.0])),
    "the global scale forgotten": quantizer(global_scale=lambda q, f: torch.ones(1)),
    "the first weight's codes for ever": first_codes_for_ever(),
    "at random": at_random,
    "the weight written to": in_place,
}


@pytest.mark.parametrize("name", QUANTIZER_FAULTS)
def test_wrong_quantizers_are_caught(name):
    with pytest.raises(AssertionError, match="the quantizer is wrong"):
        check_quantizer(QUANTIZER_FAULTS[name])


def test_there_are_enough_faults():
    assert len(PASSES) + len(LINEAR_KERNELS) + len(EMBEDDING_KERNELS) + 1 + len(QUANTIZER_FAULTS) >= 25


# And what is right is found right.


@pytest.mark.usefixtures("one_thread_without_grad")
def test_our_passes_are_right():
    changes = [Changes(each) for each in BUILT_IN]
    for model, inputs in examples():
        rewrite(model, *inputs, config={**CHECKED, "debug": True}, observers=changes)
    assert all(each.count for each in changes)


@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS if "triton" not in kernel.suffix])  # those need a GPU
def test_our_kernels_are_right(name):
    assert check_kernel(next(kernel for kernel in KERNELS if kernel.name == name), cases=300)


@pytest.mark.parametrize("name", ["clip", "rtn"])  # the others search longer: 20 s
def test_our_quantizers_are_right(name):
    assert check_quantizer(QUANTIZERS[name]) > 100


def test_a_check_that_checks_nothing_fails():
    with pytest.raises(AssertionError, match="changed none of the graphs"):
        check_pass(make_pass(lambda gm, context: gm, name="nothing", tier="bitwise"), examples()[:1])
    with pytest.raises(AssertionError, match="supports none"):
        check_kernel(next(kernel for kernel in KERNELS if kernel.name == "triton"))
    with pytest.raises(LookupError, match="no weight"):
        assert_equivalent(nn.ReLU(), torch.randn(3))


@pytest.mark.usefixtures("one_thread_without_grad")
def test_a_stale_weight_is_caught_and_named():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = torch.randn(3, 64)
    options = {"bits": 4}
    torch.compile(model, backend="kbit", options=options)(x)
    assert_equivalent(model, x, options)
    model[2].weight.data.mul_(2)  # raises no version: a limit that stays
    assert STORE.packed_forms(model[2].weight)
    with pytest.raises(AssertionError, match=r"layer '2'.*stale"):
        assert_equivalent(model, x, options, through_inductor=False)


@pytest.mark.usefixtures("one_thread_without_grad")
def test_a_wrong_kernel_in_a_model_is_named_by_node_and_layer(monkeypatch):
    from kbit_inductor.testing import nodes

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    right = nodes.WHOLE["fused_linear_cpu"]

    def off_by_one(*args):
        exact, bound = right(*args)
        return exact + (args[6] == [32]), bound  # only in the layer of 32 rows

    # The definition is made wrong and not the kernel: to the check that is the same.
    monkeypatch.setattr(nodes, "WHOLE", {**nodes.WHOLE, "fused_linear_cpu": off_by_one})
    with pytest.raises(
        AssertionError, match=r"node '.*' is .* times its bound.*layers 2.*again: .*assert_equivalent\(model, inputs, "
    ):
        assert_equivalent(model, torch.randn(30, 64), {"bits": 3}, through_inductor=False)


def test_quantized_is_what_is_changed_above():
    assert {field.name for field in dataclasses.fields(Quantized)} >= {"codes", "scale", "offset", "global_scale", "error"}
    assert clip is QUANTIZERS["clip"].quantize
