"""What of the Triton kernels the tests run in Triton's interpreter, counted: ``python benchmarks/gpu/interpreter.py``.

Every check of tests/test_triton_kernels.py is run until each number of bits was tried with each dtype, by as many random examples
as that takes; calls are counted where the checks call a kernel. Writes benchmarks/results/gpu_interpreter.json, and a table of it
into docs/interpreter.md. It needs some minutes and no GPU. No check may fail.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPOSITORY / "benchmarks")  # where the package gpu is, in place of this folder
sys.path.insert(0, str(REPOSITORY / "tests"))

import test_triton_kernels as checks  # noqa: E402 (the environment is read when kernels are defined)
import torch  # noqa: E402
import triton  # noqa: E402

from kbit_inductor.lowering.tuner.key import source_hash  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu_interpreter.json"
PAGE = REPOSITORY / "docs" / "interpreter.md"
DTYPES = ("float16", "bfloat16", "float32")
BITS = range(1, 9)
MINUTES = 1.5  # for each check
PAGE_HEAD = """# What the interpreter has run

How many random products and look-ups of each kind `python benchmarks/gpu/interpreter.py` has compared with the reference in Triton
{version}'s interpreter, by the checks of `tests/test_triton_kernels.py`, each with shapes, groups, strides, bias, codebook and
configuration of its own. None was outside the bound. CI runs the same checks, on fewer.

The operands that such a kernel is given:

```python
import torch

from kbit_inductor import LayerConfig
from kbit_inductor.packing import pack

packed = pack(torch.randn(16, 64), LayerConfig(bits=3, group_size=32), layout="words")
print([(operand.dtype, tuple(operand.shape)) for operand in packed.operands])
```

"""
SETTING = {"triton": triton.__version__, "source": source_hash()}
Cell = tuple[str, int, str]

CHECKS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "linear": (checks.check_linear, ("products", "products, columns split", "products, activations rounded")),
    "grouped": (checks.check_grouped, ("grouped products",)),
    "batched": (checks.check_batched, ("batched products",)),
    "bits": (checks.check_bits, ("counted bits",)),
    "dequantize": (checks.check_dequantize, ("unpacking to float",)),
    "embedding": (checks.check_embedding, ("embedding",)),
}
"""Each check, and the families of which it tries every number of bits and dtype."""


def families(kernel: str, given: dict[str, Any]) -> list[str]:
    """What a call of a kernel counts for."""
    if kernel == "linear":
        config = given["config"]
        found = ["products, activations rounded" if given["activation_bits"] < 16 else "products"]
        return found + (["products, columns split"] if config is not None and config.split_k > 1 else [])
    names = {"grouped_linear": "grouped products", "batched_linear": "batched products", "linear_bits": "counted bits"}
    return [names.get(kernel, "unpacking to float" if kernel == "dequantize" else kernel)]


def count_calls(seen: Counter[Cell]) -> None:
    """Count each call of a kernel that the checks make."""
    for module, name in (
        (checks.triton_linear, "linear"), (checks.triton_grouped, "grouped_linear"), (checks.triton_grouped, "batched_linear"),
        (checks.triton_bits, "linear_bits"), (checks.triton_dequantize, "dequantize"), (checks.triton_embedding, "embedding"),
    ):  # fmt: skip
        setattr(module, name, _counted(getattr(module, name), seen))


def _counted(kernel: Callable[..., torch.Tensor], seen: Counter[Cell]) -> Callable[..., torch.Tensor]:
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def call(*arguments: Any, **options: Any) -> torch.Tensor:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        given, result = bound.arguments, kernel(*arguments, **options)
        bits = given["planes"].size(0) if "planes" in given else given["bits"]
        if result.numel():  # of an empty one nothing is launched
            for family in families(kernel.__name__, given):
                seen[family, bits, str(result.dtype).removeprefix("torch.")] += 1
        return result

    return call


def table(seen: Counter[Cell]) -> str:
    """The counts as a page."""
    lines = ["| family | dtype | " + " | ".join(f"{bits} bit" for bits in BITS) + " |", "|---|---|" + "---:|" * len(BITS)]
    for family in dict.fromkeys(family for _, (_, tried) in CHECKS.items() for family in tried):
        for dtype in DTYPES:
            lines.append(f"| {family} | {dtype} | " + " | ".join(str(seen[family, bits, dtype]) for bits in BITS) + " |")
    return PAGE_HEAD.replace("{version}", triton.__version__) + "\n".join(lines) + "\n"


def kept() -> Counter[Cell]:
    """What earlier runs have counted of the same kernels."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if found.get("setting") != SETTING:
        return Counter()
    return Counter({
        (family, int(bits), dtype): count
        for family, dtypes in found["families"].items()
        for dtype, counts in dtypes.items() for bits, count in counts.items()
    })  # fmt: skip


def write(seen: Counter[Cell]) -> None:
    """The results and the page."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (family, bits, dtype), count in sorted(seen.items()):
        found.setdefault(family, {}).setdefault(dtype, {})[str(bits)] = count
    RESULTS.write_text(json.dumps({"setting": SETTING, "families": found}, indent=1) + "\n")
    PAGE.write_text(table(seen))


def main() -> int:
    """Arguments are checks, to run those alone; counts of earlier runs of the same kernels stay. 1 where a cell was never tried."""
    names = sys.argv[1:] or list(CHECKS)
    seen = kept()
    count_calls(seen)
    checks.dot_of_bfloat16()
    missing = []
    for name in names:
        check, tried = CHECKS[name]
        cells = [(family, bits, dtype) for family in tried for bits in BITS for dtype in DTYPES]
        end = time.monotonic() + 60 * MINUTES
        while any(not seen[cell] for cell in cells) and time.monotonic() < end:
            check()
        missing += [cell for cell in cells if not seen[cell]]
        print(name, sum(seen[cell] for cell in cells), flush=True)
    write(seen)
    print("never tried:", missing or "none")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
