"""One row of the whole-model comparison in a process of its own: ``python benchmarks/cpu/worker.py FOLDER VARIANT LENGTH``.

Standard input and output speak JSON, a line each. When the model is loaded and compiled the process says ``{"ready": sizes}``. Then
``{"tokens": […], "new": n}`` is answered by ``{"seconds": s, "generated": […]}`` and ``{"memory": true}`` by sizes in bytes.
Between two questions the process sleeps, so others can be measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks/, where the package cpu is

from cpu import generators, memory  # noqa: E402 (see above)


def main(folder: Path, variant: str, length: int) -> None:
    generators.imports(variant)
    start = memory.resident()
    loaded = generators.load(folder, variant, length)
    sizes = {"weight_bytes": loaded.weight_bytes, "cache_bytes": loaded.cache_bytes}
    _tell(ready={"start_bytes": start, "loading_peak_bytes": memory.peak() - start, **sizes})
    memory.reset_peak()
    for line in sys.stdin:
        question = json.loads(line)
        if "memory" in question:
            _tell(resident_bytes=memory.resident() - start, peak_bytes=memory.peak() - start)
        else:
            begin = time.perf_counter()
            generated = loaded.generate(question["tokens"], question["new"])
            _tell(seconds=time.perf_counter() - begin, generated=generated)


def _tell(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
