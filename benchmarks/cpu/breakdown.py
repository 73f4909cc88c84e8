"""Where the time of one decoded token goes, by torch's profiler.

The profile of many tokens less that of one token, divided by their number, leaves what a step costs. Inductor is told to name its
C++ kernels to the profiler. What the profiler sees nothing of, Python and the calls between kernels, is the rest of the time that a
step takes without the profiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cpu import generators
from cpu.timing import Say, silent

# A part of the step, and what the names of its events hold. The first that fits counts.
PARTS = (
    ("sampling", ("argmax", "multinomial", "sort", "topk")),
    ("our kernels", ("kbit::",)),  # in chains attention too
    ("other Inductor kernels", ("cpp_fused",)),  # named after all operators near them, attention among others
    ("attention", ("attention", "aten::bmm", "aten::baddbmm", "aten::_softmax")),
    ("other operators", ("aten::", "mkl::", "mkldnn", "onednn::")),
)
REST = "dispatch"


def measure(folder: Path, bits: Sequence[int], prompt: Sequence[int], new: int, say: Say = silent) -> dict[str, Any]:
    """``rows``: for each number of bits, seconds of a step and of its parts; ``missing``: what failed, with the reason."""
    rows, missing = [], []
    for k in bits:
        say(f"kbit-{k}")
        try:
            with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
                generate = generators.load(folder, f"kbit-{k}", len(prompt) + new + 2).generate
            rows.append({"contender": f"kbit-{k}", **_step(generate, list(prompt), new)})
        except Exception as error:  # one row may fail and the other not
            missing.append({"contender": f"kbit-{k}", "reason": f"{type(error).__name__}: {error}"})
        torch._dynamo.reset()
    return {"rows": rows, "missing": missing}


def _step(generate: generators.Generate, prompt: list[int], new: int) -> dict[str, Any]:
    """A decoded token's seconds, those of each part, and its costliest events."""
    step = statistics.median((_seconds(generate, prompt, new + 1) - _seconds(generate, prompt, 1)) / new for _ in range(5))
    many, one = _events(generate, prompt, new + 1), _events(generate, prompt, 1)
    seconds = {name: max(0.0, total - one.get(name, 0.0)) / new for name, total in many.items()}
    parts = {part: 0.0 for part, _ in PARTS}
    for name, value in seconds.items():
        if (part := part_of(name)) is not None:
            parts[part] += value
    parts[REST] = max(0.0, step - sum(parts.values()))
    costliest = sorted(seconds.items(), key=lambda event: -event[1])[:12]
    return {"seconds": step, "parts": parts, "events": dict(costliest)}


def part_of(event: str) -> str | None:
    """The part that an event of the profiler belongs to, or None if it is a frame around others."""
    name = event.lower()
    return next((part for part, words in PARTS if any(word in name for word in words)), None)


def _events(generate: generators.Generate, prompt: list[int], new: int) -> dict[str, float]:
    """Seconds that the profiler saw in each event itself, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        generate(prompt, new)
    return {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}


def _seconds(generate: generators.Generate, prompt: list[int], new: int) -> float:
    start = time.perf_counter()
    generate(prompt, new)
    return time.perf_counter() - start
