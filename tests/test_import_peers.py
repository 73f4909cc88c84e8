"""Weights packed by other projects' own packages, each where it is installed: the values are those that they unpack."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packed_files import HALF, Model, imported, write
from safetensors.torch import load_file
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.models.modules import PackedMatrix

ROWS, COLUMNS, GROUP = 64, 128, 32
NOT_HERE = "what writes such files is not installed"


def weight(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def with_bias(tensors: dict[str, Any]) -> dict[str, Any]:
    return {**{f"fc.{name}": tensor for name, tensor in tensors.items()}, "fc.bias": torch.zeros(ROWS)}


def file_of(package: str, path: str) -> Any:
    """A file of an installed package, run by itself: the whole package may want a GPU, or another release of transformers."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package}: {NOT_HERE}")
    spec = importlib.util.spec_from_file_location(f"{package}_alone", Path(found.origin).parent / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_autogptq(tmp_path: Path, bits: int) -> None:
    layer = file_of("auto_gptq", "nn_modules/qlinear/qlinear_cuda_old.py").QuantLinear(bits, GROUP, COLUMNS, ROWS, bias=True)
    random = torch.Generator().manual_seed(bits)
    scale = (torch.rand(ROWS, COLUMNS // GROUP, generator=random) * 0.1 + 0.1).half()
    zero = torch.randint(1, 2**bits, scale.shape, generator=random).float()
    codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=random)
    linear = nn.Linear(COLUMNS, ROWS).half()
    group = torch.arange(COLUMNS) // GROUP
    linear.weight.data = ((codes - zero[:, group]) * scale.float()[:, group]).half()
    layer.pack(linear, scale.float(), zero.clone(), None)
    write(tmp_path, with_bias(layer.state_dict()), quant_method="gptq", bits=bits, group_size=GROUP)
    # Rows of the identity through their product: float32, so exact in a product of 11 bits and 8.
    layer.scales, layer.bias = layer.scales.float(), None
    theirs = layer(torch.eye(COLUMNS)).T
    found = imported(tmp_path, ROWS, COLUMNS).weight
    if bits < 8:
        assert torch.equal(found.dequantize(), theirs) and found.error == 0
    else:  # a ninth bit there is not
        assert bool(((found.dequantize() - theirs).abs() <= (scale.float() * zero)[:, group] * HALF).all())


@pytest.mark.parametrize("style", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel(tmp_path: Path, bits: int, style: str) -> None:
    linears = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason=NOT_HERE)
    utils = pytest.importorskip("gptqmodel.utils.model", reason=NOT_HERE)
    random = torch.Generator().manual_seed(bits)
    group = (torch.arange(COLUMNS) // GROUP)[torch.randperm(COLUMNS, generator=random)]
    scale = (torch.rand(ROWS, COLUMNS // GROUP, generator=random) * 0.1 + 0.1).half()
    zero = torch.randint(0, 2**bits, scale.shape, generator=random).float()  # those of 0 borrow from others, less one
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (torch.randint(0, 2**bits, (ROWS, COLUMNS)) - zero[:, group]) * scale.float()[:, group]
    told = {"bits": bits, "group_size": GROUP, "sym": False, "desc_act": True}
    layer = linears.TorchLinear(**told, in_features=COLUMNS, out_features=ROWS, bias=False)
    layer.pack_original(linear, scale.float(), zero.clone(), group.int())
    if style == "gptq":
        utils.convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    write(tmp_path, with_bias(layer.state_dict()), quant_method="gptq", checkpoint_format=style, **told)
    found = imported(tmp_path, ROWS, COLUMNS).weight
    if bits < 8:
        assert torch.equal(found.dequantize(), linear.weight) and found.error == 0 and found.order is not None
    else:
        assert bool(((found.dequantize() - linear.weight).abs() <= (scale.float() * zero)[:, group] * HALF).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_exported_as_gptq_is_read_by_gptqmodel(tmp_path: Path, bits: int) -> None:
    linears = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason=NOT_HERE)
    utils = pytest.importorskip("gptqmodel.utils.model", reason=NOT_HERE)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=64)).eval()
    skip = ["lm_head", "model.embed_tokens"]
    kbit.to_gptq(kbit.quantize_(model, {"bits": bits, "group_size": 32, "symmetric": True, "skip": skip}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            told = {"bits": bits, "group_size": 32, "sym": True, "desc_act": False}
            theirs = linears.TorchLinear(**told, in_features=module.in_features, out_features=module.out_features, bias=False)
            stored = {key: tensors[f"model.layers.0.{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
            theirs.load_state_dict(stored)
            utils.convert_gptq_v1_to_v2_format_module(theirs, bits, torch.int32)
            theirs.post_init()
            theirs.scales = theirs.scales.float()
            assert torch.equal(theirs.dequantize_weight().T, module.weight.dequantize())


@pytest.mark.parametrize("style", ["gemv", "gemv_fast"])
def test_awq_of_gptqmodel(tmp_path: Path, style: str) -> None:
    kernels = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{style}_awq", reason=NOT_HERE)
    random, group_size = torch.Generator().manual_seed(0), 64
    group = torch.arange(COLUMNS) // group_size
    scale = (torch.rand(ROWS, COLUMNS // group_size, generator=random) * 0.1 + 0.1).half()
    zero = torch.randint(0, 16, scale.shape, generator=random).float()
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (torch.randint(0, 16, (ROWS, COLUMNS)) - zero[:, group]) * scale.float()[:, group]
    told = {"bits": 4, "group_size": group_size, "sym": False, "desc_act": False}
    kind = kernels.AwqGEMVLinear if style == "gemv" else kernels.AwqGEMVFastLinear
    layer = kind(**told, in_features=COLUMNS, out_features=ROWS, bias=False)
    layer.pack(linear, scale.float(), zero)
    write(tmp_path, with_bias(layer.state_dict()), quant_method="awq", checkpoint_format=style, **told)
    found, product = imported(tmp_path, ROWS, COLUMNS).weight, scale.double() * zero
    # The faster kernels' file has scale times zero point, rounded to float16.
    theirs = linear.weight.double() + (0 if style == "gemv" else (product - product.half())[:, group])
    assert torch.equal(found.packed.dequantize(torch.float64), theirs) and found.error == 0


def test_autoawq(tmp_path: Path) -> None:
    theirs = file_of("awq", "utils/packing_utils.py")
    random = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (COLUMNS, ROWS // 8), dtype=torch.int32, generator=random)
    zeros = torch.randint(-(2**31), 2**31, (COLUMNS // GROUP, ROWS // 8), dtype=torch.int32, generator=random)
    scales = torch.rand(COLUMNS // GROUP, ROWS, generator=random).half()
    tensors = with_bias({"qweight": words, "qzeros": zeros, "scales": scales})
    write(tmp_path, tensors, quant_method="awq", bits=4, group_size=GROUP, version="gemm")
    wanted = theirs.dequantize_gemm(words, zeros, scales.float(), 4, GROUP).T
    assert torch.equal(imported(tmp_path, ROWS, COLUMNS).weight.dequantize(), wanted)


@pytest.mark.parametrize(
    ("bits", "symmetric", "strategy"),
    [(4, True, "group"), (4, False, "group"), (4, False, "channel"), (8, True, "channel"), (8, True, "group"), (3, True, "group")],
)
def test_compressed_tensors(tmp_path: Path, bits: int, symmetric: bool, strategy: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason=NOT_HERE)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=NOT_HERE)
    group = {"group_size": GROUP} if strategy == "group" else {}
    told = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **group)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=told)
    shape = (ROWS, COLUMNS // GROUP if strategy == "group" else 1)
    scale = (weight().abs().max() / 2 ** (bits - 1) * (1 + torch.rand(shape))).bfloat16()
    low = 0 if symmetric else -(2 ** (bits - 1))
    zero = torch.randint(low, 1 if symmetric else -low, shape, dtype=torch.int8)
    compressor = compressors.PackedQuantizationCompressor
    state = compressor.compress({"weight": weight().bfloat16(), "weight_scale": scale, "weight_zero_point": zero}, scheme)
    theirs = compressor.decompress({**state, "weight_scale": scale.float()}, scheme)["weight"]
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": told.model_dump(mode="json")}}}
    write(tmp_path, with_bias(state), quant_method="compressed-tensors", format="pack-quantized", **groups)
    found = imported(tmp_path, ROWS, COLUMNS).weight
    assert torch.equal(found.dequantize(), theirs.float()) and found.config.bits == bits + (not symmetric)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_nf4(tmp_path: Path, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason=NOT_HERE)
    codes, state = functional.quantize_4bit(weight(), quant_type="nf4", blocksize=64, compress_statistics=nested)
    tensors = {"weight": codes, **{f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}
    write(tmp_path, with_bias(tensors), quant_method="bitsandbytes", load_in_4bit=True)
    theirs = functional.dequantize_4bit(codes, state)
    found = imported(tmp_path, ROWS, COLUMNS).weight
    largest = theirs.reshape(ROWS, -1, 64).abs().amax(-1).repeat_interleave(64, 1)
    # A level is off by half of 1/127 of a block's largest value, and that one is rounded to float16.
    assert bool(((found.dequantize() - theirs).abs() <= largest * (0.5 / 127 + HALF) * (1 + HALF)).all())
    assert math.sqrt(found.error) == pytest.approx(relative(found.dequantize(), theirs), rel=1e-3)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason=NOT_HERE)
    codes, largest, _ = functional.int8_vectorwise_quant(weight().half())
    write(tmp_path, with_bias({"weight": codes, "SCB": largest}), quant_method="bitsandbytes", load_in_8bit=True)
    theirs = functional.int8_vectorwise_dequant(codes, largest).double()
    found = imported(tmp_path, ROWS, COLUMNS).weight.packed.dequantize(torch.float64)
    assert bool(((found - theirs).abs() <= theirs.abs() * HALF).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(tmp_path: Path, bits: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize", reason=NOT_HERE)
    linear = nn.Linear(COLUMNS, ROWS)
    told = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer = quantize.HQQLinear(linear, told, compute_dtype=torch.float32, device="cpu")
    state = layer.state_dict()
    write(tmp_path, {f"fc.{name}": tensor for name, tensor in state.items()}, quant_method="hqq")
    theirs = layer.dequantize().double()
    found = imported(tmp_path, ROWS, COLUMNS).weight.packed.dequantize(torch.float64)
    # A scale and its product with the zero point are rounded to float16. A value is at most the largest code times the scale, and
    # that.
    most = (state["scale"] * (2**bits - 1 + state["zero"].abs())).view(ROWS, -1).repeat_interleave(64, 1).double()
    assert bool(((found - theirs).abs() <= most * HALF).all())


@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "int4 with zero points"])
def test_torchao(kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason=NOT_HERE)
    mapping = torchao.MappingType.ASYMMETRIC if "zero" in kind else torchao.MappingType.SYMMETRIC
    width = getattr(torch, kind.split()[0])
    told = torchao.IntxWeightOnlyConfig(weight_dtype=width, granularity=torchao.PerGroup(GROUP), mapping_type=mapping)
    model = Model(ROWS, COLUMNS)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig() if kind == "int8" else told)
    kept: Any = model.fc.weight
    theirs = kept.dequantize().double()
    kbit.from_torchao(model)
    found = model.fc.weight.packed.dequantize(torch.float64)
    low = 2.0 ** (model.fc.weight.config.bits - 1)
    most = kept.scale.double().reshape(ROWS, -1).repeat_interleave(kept.block_size[1], 1) * 4 * low
    assert bool(((found - theirs).abs() <= most * HALF).all()) and float(model.fc.weight.error) < HALF
    assert model.fc(torch.eye(COLUMNS)).shape == (COLUMNS, ROWS)


def test_a_torchao_tensor_of_one_kernel_is_named() -> None:
    pytest.importorskip("torchao.quantization", reason=NOT_HERE)
    from torchao.quantization import Int4Tensor

    model = Model(ROWS, COLUMNS)
    packed = torch.zeros(ROWS, COLUMNS // 2, dtype=torch.int8)
    grid = torch.ones(COLUMNS // GROUP, ROWS)
    model.fc.weight = nn.Parameter(Int4Tensor(packed, grid, grid, [1, GROUP], torch.Size([ROWS, COLUMNS])), requires_grad=False)
    with pytest.raises(kbit.UnsupportedFormatError, match="layer 'fc' has a Int4Tensor"):
        kbit.from_torchao(model)


def test_pt2e() -> None:
    quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason=NOT_HERE)
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason=NOT_HERE)
    x = torch.randn(4, COLUMNS)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize.prepare_pt2e(torch.export.export(Model(ROWS, COLUMNS).eval(), (x,)).module(), quantizer)
    prepared(x)
    model = quantize.convert_pt2e(prepared)
    wanted = model(x)
    theirs = model._frozen_param0.double() * model._scale_0.double()[:, None]
    kbit.from_pt2e(model)
    (matrix,) = (module for module in model.modules() if isinstance(module, PackedMatrix))
    assert bool(((matrix.packed.dequantize(torch.float64) - theirs).abs() <= theirs.abs() * HALF).all())
    torch.testing.assert_close(model(x), wanted, atol=float(theirs.abs().sum(1).max() * x.abs().max()) * HALF, rtol=0)
    assert [name for name, _ in model.named_parameters()] == ["fc.bias"] and not hasattr(model, "_frozen_param0")


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_onnx(tmp_path: Path, bits: int, symmetric: bool) -> None:
    onnx = pytest.importorskip("onnx", reason=NOT_HERE)
    runtime = pytest.importorskip("onnxruntime", reason=NOT_HERE)
    nbits = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer", reason=NOT_HERE)
    columns = 100  # the last block is not whole
    matrix = weight()[:, :columns].T.contiguous().numpy()
    constants = [
        onnx.numpy_helper.from_array(matrix, "onnx::MatMul_7"),
        onnx.numpy_helper.from_array(torch.zeros(ROWS).numpy(), "fc.bias"),
    ]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["product"], name="/fc/MatMul"),
        onnx.helper.make_node("Add", ["product", "fc.bias"], ["y"], name="/fc/Add"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [None, size]) for name, size in (("x", columns), ("y", ROWS))]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    quantizer = nbits.MatMulNBitsQuantizer(model, bits=bits, block_size=GROUP, is_symmetric=symmetric)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "packed.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "packed.onnx"), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": torch.eye(columns).numpy()})
    layer = kbit.from_onnx(tmp_path / "packed.onnx", lambda: Model(ROWS, columns)).fc
    found, wanted = layer.weight.packed.dequantize(torch.float64), torch.from_numpy(theirs).T.double()
    stored = layer.weight.stored()
    scale = (stored["scale"].double().abs() * stored["global_scale"]).repeat_interleave(GROUP, 1)[:, :columns]
    assert bool(((found - wanted).abs() <= scale * 2 ** (bits + 1) * HALF).all())


def test_the_table_of_the_page_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import imports

    rows = json.loads(imports.RESULTS.read_text())["rows"]
    assert "\n".join(imports.table(rows)) in imports.PAGE.read_text(encoding="utf-8")
    assert all(row["exact"] == (row["error"] == 0) for row in rows)
