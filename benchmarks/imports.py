"""Weights packed by other projects' own packages, taken over: what is exact, and the error of the rest.

    python benchmarks/imports.py

It writes the table of docs/import.md. Formats whose package is not installed are left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from page import replace
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.models.gguf_blocks import TYPES, packed_of
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.packing import PackedWeight

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "import.md", REPOSITORY / "benchmarks" / "results" / "import.json"
ROWS, COLUMNS, GROUP = 256, 1024, 128
UNITS_OF_K_QUANTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of a block
Row = dict[str, Any]


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(COLUMNS, ROWS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` through it."""
        y: Tensor = self.fc(x)
        return y


def row(name: str, source: str, theirs: Tensor, nbytes: int, packed: PackedWeight, order: Tensor | None = None) -> Row:
    """What is found of one format. ``error`` is relative: the norm of the difference over that of the weight."""
    found = packed.dequantize(torch.float64)
    found = found if order is None else found[:, order.argsort()]
    error = float((found - theirs.double()).norm() / theirs.double().norm())
    bits = [round(8 * size / theirs.numel(), 3) for size in (nbytes, packed.nbytes)]
    return {
        "format": name, "source": source, "bits_in_file": bits[0], "bits_in_memory": bits[1],
        "exact": torch.equal(found.float(), theirs.float()), "error": error,
    }  # fmt: skip


def version(package: str) -> str:
    """Name and version, for the table."""
    return f"{package} {importlib.metadata.version(package)}"


def from_folder(name: str, source: str, tensors: dict[str, Tensor], theirs: Tensor, **quantization: Any) -> Row:
    """What becomes of a layer in a folder of safetensors."""
    from safetensors.torch import save_file

    plain = {f"fc.{key}": tensor.contiguous() for key, tensor in tensors.items() if isinstance(tensor, Tensor)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        save_file(plain, Path(folder) / "model.safetensors")
        matrix = kbit.from_checkpoint(folder, Layer).fc.weight
    nbytes = sum(tensor.nbytes for tensor in plain.values())
    return row(name, source, theirs, nbytes, matrix.packed.laid_out("planes"), matrix.order)


def gguf() -> Iterator[Row]:
    """Blocks that gguf quantizes; of K quants, which it does not write, random ones that it reads."""
    import gguf

    for kind, block in TYPES.items():
        quantization = gguf.GGMLQuantizationType[kind]
        if kind in UNITS_OF_K_QUANTS:
            data = torch.randint(0, 256, (ROWS * COLUMNS // 256, block.nbytes), dtype=torch.uint8)
            for at in UNITS_OF_K_QUANTS[kind]:
                data[:, at : at + 2] = (torch.randn(len(data), 1) * 0.01).half().view(torch.uint8)
            data = data.view(ROWS, -1)
        else:
            data = torch.from_numpy(gguf.quants.quantize(torch.randn(ROWS, COLUMNS).numpy(), quantization))
        theirs = torch.from_numpy(gguf.dequantize(data.numpy(), quantization))
        yield row(f"GGUF {kind}", version("gguf"), theirs, data.nbytes, packed_of(data, kind))


def file_of(package: str, path: str) -> Any:
    """A file of a package alone, which as a whole may want a GPU."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(package)
    spec = importlib.util.spec_from_file_location(f"{package}_alone", Path(found.origin).parent / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gptq() -> Iterator[Row]:
    """AutoGPTQ's layers, unpacked by their own product with the identity."""
    kind = file_of("auto_gptq", "nn_modules/qlinear/qlinear_cuda_old.py").QuantLinear
    group = torch.arange(COLUMNS) // GROUP
    for bits, symmetric in ((2, True), (3, True), (4, True), (8, True), (4, False)):
        layer = kind(bits, GROUP, COLUMNS, ROWS, bias=False)
        scale = (torch.rand(ROWS, COLUMNS // GROUP) * 0.1 + 0.1).half()
        middle = torch.full(scale.shape, 2.0 ** (bits - 1))
        zero = middle if symmetric else torch.randint(1, 2**bits, scale.shape).float()
        linear = nn.Linear(COLUMNS, ROWS, bias=False).half()
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS))
        linear.weight.data = ((codes - zero[:, group]) * scale.float()[:, group]).half()
        layer.pack(linear, scale.float(), zero.clone(), None)
        state = dict(layer.state_dict())
        layer.scales = layer.scales.float()
        theirs = layer(torch.eye(COLUMNS)).T
        name = f"GPTQ {bits} bits, {'symmetric' if symmetric else 'zero points'}"
        yield from_folder(name, version("auto-gptq"), state, theirs, quant_method="gptq", bits=bits, group_size=GROUP)


def grid_weight(zero: Tensor, group: Tensor, bits: int) -> tuple[nn.Linear, Tensor]:
    """A layer whose weights lie on grids with the zero points ``zero`` ``[N, G]``, and the scales of these, float16."""
    scale = (torch.rand(zero.shape) * 0.1 + 0.1).half()
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (torch.randint(0, 2**bits, (ROWS, COLUMNS)) - zero[:, group]) * scale.float()[:, group]
    return linear, scale


def gptqmodel() -> Iterator[Row]:
    """GPTQModel's layers, unpacked by themselves: zero points of both conventions, and groups in the order of importance."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases = [*((bits, style, False) for bits in (2, 3, 4, 8) for style in ("gptq", "gptq_v2")), (4, "gptq_v2", True)]
    for bits, style, ordered in cases:
        group = torch.arange(COLUMNS) // GROUP
        group = group[torch.randperm(COLUMNS)] if ordered else group
        zero = torch.randint(0, 2**bits, (ROWS, COLUMNS // GROUP)).float()
        linear, scale = grid_weight(zero, group, bits)
        told = {"bits": bits, "group_size": GROUP, "sym": False, "desc_act": ordered}
        layer = TorchLinear(**told, in_features=COLUMNS, out_features=ROWS, bias=False)
        layer.pack_original(linear, scale.float(), zero.clone(), group.int())
        layer.post_init()
        layer.scales = layer.scales.float()
        theirs = layer.dequantize_weight().T
        if style == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, types.SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        tensors = {**layer.state_dict(), "scales": layer.scales.half()}
        name = f"GPTQ {bits} bits, zero points{' less one' if style == 'gptq' else ''}{', desc_act' if ordered else ''}"
        options = {"quant_method": "gptq", "checkpoint_format": style, **told}
        yield from_folder(name, version("gptqmodel"), tensors, theirs, **options)


def awq_of_other_kernels() -> Iterator[Row]:
    """AWQ's layers as GPTQModel packs them for products of one row. They unpack on a GPU alone: the values are those that were
    packed, for ``gemv_fast`` with the rounding of scale times zero point that the file has."""
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear

    for kind, style in ((AwqGEMVLinear, "gemv"), (AwqGEMVFastLinear, "gemv_fast")):
        zero = torch.randint(0, 16, (ROWS, COLUMNS // GROUP)).float()
        linear, scale = grid_weight(zero, torch.arange(COLUMNS) // GROUP, 4)
        told = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
        layer = kind(**told, in_features=COLUMNS, out_features=ROWS, bias=False)
        layer.pack(linear, scale.float(), zero)
        theirs = linear.weight.detach().double()
        if style == "gemv_fast":
            product = scale.double() * zero
            theirs += (product - product.half())[:, torch.arange(COLUMNS) // GROUP]
        name = f"AWQ 4 bits for {style}, zero points"
        options = {"quant_method": "awq", "checkpoint_format": style, **told}
        yield from_folder(name, version("gptqmodel"), layer.state_dict(), theirs, **options)


def awq() -> Iterator[Row]:
    """Random words that AutoAWQ unpacks."""
    theirs = file_of("awq", "utils/packing_utils.py")
    shapes = ((COLUMNS, ROWS // 8), (COLUMNS // GROUP, ROWS // 8))
    words, zeros = (torch.randint(-(2**31), 2**31, shape, dtype=torch.int32) for shape in shapes)
    scales = torch.rand(COLUMNS // GROUP, ROWS).half()
    wanted = theirs.dequantize_gemm(words, zeros, scales.float(), 4, GROUP).T
    tensors = {"qweight": words, "qzeros": zeros, "scales": scales}
    yield from_folder("AWQ 4 bits, zero points", version("autoawq"), tensors, wanted, quant_method="awq", bits=4, group_size=GROUP)


def compressed_tensors() -> Iterator[Row]:
    """What the compressors have packed and unpack."""
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases = [("group", bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]
    for strategy, bits, symmetric in [
        *cases,
        ("channel", 4, True),
        ("channel", 4, False),
        ("channel", 8, True),
        ("plain", 8, True),
    ]:
        groups = COLUMNS // GROUP if strategy == "group" else 1
        size = {"group_size": GROUP} if strategy == "group" else {}
        told = QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy="channel" if groups == 1 else strategy, **size
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=told)
        half = 2 ** (bits - 1)
        scale = (4 / half * (1 + torch.rand(ROWS, groups))).bfloat16()
        zero = torch.randint(-half, half, scale.shape, dtype=torch.int8) * (not symmetric)
        weight = {"weight": torch.randn(ROWS, COLUMNS).bfloat16(), "weight_scale": scale, "weight_zero_point": zero}
        compressor: Any = IntQuantizationCompressor if strategy == "plain" else PackedQuantizationCompressor
        state = compressor.compress(weight, scheme)
        theirs = compressor.decompress({**state, "weight_scale": scale.float()}, scheme)["weight"]
        kind = "int-quantized, a row" if strategy == "plain" else "a row" if groups == 1 else f"groups of {GROUP}"
        name = f"compressed-tensors W{bits}A16, {kind}, {'symmetric' if symmetric else 'zero points'}"
        options = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if strategy == "plain" else "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": told.model_dump(mode="json")}},
        }
        yield from_folder(name, version("compressed-tensors"), state, theirs, **options)


def bitsandbytes() -> Iterator[Row]:
    """NF4, and int8 rows."""
    from bitsandbytes import functional

    weight = torch.randn(ROWS, COLUMNS)
    for nested in (False, True):
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
        tensors = {"weight": codes, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}
        name = f"bitsandbytes NF4{', double quantization' if nested else ''}"
        yield from_folder(
            name, version("bitsandbytes"), tensors, functional.dequantize_4bit(codes, state), quant_method="bitsandbytes"
        )
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = functional.int8_vectorwise_dequant(codes, largest)
    tensors = {"weight": codes, "SCB": largest}
    yield from_folder("bitsandbytes int8", version("bitsandbytes"), tensors, theirs, quant_method="bitsandbytes")


def hqq() -> Iterator[Row]:
    """HQQ's own layers on a CPU."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (2, 3, 4, 8):
        told = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        layer = HQQLinear(nn.Linear(COLUMNS, ROWS, bias=False), told, compute_dtype=torch.float32, device="cpu")
        yield from_folder(f"HQQ {bits} bits", version("hqq"), layer.state_dict(), layer.dequantize(), quant_method="hqq")


def torchao() -> Iterator[Row]:
    """Tensor subclasses of a model in memory."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    intx = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    for name, told in (("torchao int4", intx), ("torchao int8", Int8WeightOnlyConfig())):
        model = Layer()
        quantize_(model, told)
        weight: Any = model.fc.weight
        theirs, nbytes = weight.dequantize(), weight.qdata.nbytes + weight.scale.nbytes
        yield row(name, version("torchao"), theirs, nbytes, kbit.from_torchao(model).fc.weight.packed.laid_out("planes"))


def pt2e() -> Iterator[Row]:
    """A graph that torchao has quantized for x86."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x = torch.randn(4, COLUMNS)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(Layer().eval(), (x,)).module(), quantizer)
    prepared(x)
    model = convert_pt2e(prepared)
    theirs = model._frozen_param0.double() * model._scale_0.double()[:, None]
    nbytes = model._frozen_param0.nbytes + model._scale_0.nbytes + model._zero_point_0.nbytes
    (matrix,) = (module for module in kbit.from_pt2e(model).modules() if isinstance(module, PackedMatrix))
    yield row("PT2E int8", version("torchao"), theirs, nbytes, matrix.packed.laid_out("planes"))


def onnx() -> Iterator[Row]:
    """MatMulNBits as ONNX Runtime's quantizer writes it and its session computes it."""
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    matrix = onnx.numpy_helper.from_array(torch.randn(COLUMNS, ROWS).numpy(), "fc.weight")
    node = onnx.helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="/fc/MatMul")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [None, size]) for name, size in (("x", COLUMNS), ("y", ROWS))]
    for bits in (4, 8):
        graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:], [matrix])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=GROUP, is_symmetric=True)
        quantizer.process()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            quantizer.model.save_model_to_file(str(path))
            session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
            theirs = torch.from_numpy(session.run(None, {"x": torch.eye(COLUMNS).numpy()})[0]).T
            packed = kbit.from_onnx(path, Layer).fc.weight.packed.laid_out("planes")
            nbytes = sum(len(tensor.raw_data) for tensor in onnx.load(str(path)).graph.initializer)
        yield row(f"ONNX MatMulNBits {bits} bits", version("onnxruntime"), theirs, nbytes, packed)


FORMATS: tuple[Callable[[], Iterator[Row]], ...] = (
    gguf, gptq, gptqmodel, awq, awq_of_other_kernels, compressed_tensors, bitsandbytes, hqq, torchao, pt2e, onnx,
)  # fmt: skip


def table(rows: list[Row]) -> list[str]:
    """The rows in Markdown."""
    lines = ["| format | written by | bits per weight in the file | in memory | values |", "|---|---|---:|---:|---|"]
    for each in rows:
        values = "exact" if each["exact"] else f"error {each['error']:.1e}"
        bits = f"{each['bits_in_file']:.2f} | {each['bits_in_memory']:.2f}"
        lines.append(f"| {each['format']} | {each['source']} | {bits} | {values} |")
    return lines


def main() -> None:
    """Measure, and write the results and the table."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for format in FORMATS:
        try:
            rows += format()
        except ImportError as error:
            print(f"{format.__name__} is left out: {error}", file=sys.stderr)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    replace(PAGE, "table", table(rows))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
