"""The configuration that a launch takes: the fastest that was measured for its shape, or None for the kernel's own rule.

A launch asks once for each bucket of shapes and device, and then only looks it up. With ``KBIT_TUNE=1`` in the environment the
first launch of a shape measures what no table has, for two seconds at most; else nothing is measured but by ``kbit tune``.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.tuner.key import bucket, place_of, shape_key
from kbit_inductor.lowering.tuner.store import Store, user_store
from kbit_inductor.lowering.tuner.table import Table
from kbit_inductor.lowering.tuner.tune import LIMIT, Tuned, tune

log = logging.getLogger("kbit_inductor.kernels")


def config_for(problem: Problem, m: int, device: torch.device) -> Config | None:
    """The fastest configuration known for ``m`` rows of x on a GPU; None where none was measured, as by an interpreter on a CPU."""
    if device.type != "cuda":
        return None
    measure = os.environ.get("KBIT_TUNE", "0") not in ("", "0") and not torch.cuda.is_current_stream_capturing()
    return _config_for(problem, bucket(m), device, measure)


@functools.cache
def _config_for(problem: Problem, m: int, device: torch.device, measure: bool) -> Config | None:
    store, place, shape = user_store(), place_of(device), shape_key(problem, m)
    best = store.table(place).best(shape)
    if best is None and measure:
        tune_shape(problem, m, device, store)
        best = store.table(place).best(shape)
    return best


def forget() -> None:
    """Ask the tables again, since they have changed."""
    _config_for.cache_clear()


def tune_shape(
    problem: Problem, m: int, device: torch.device, store: Store, limit: float = LIMIT, exhaustive: bool = False
) -> Tuned:
    """Measure a shape on a GPU and keep what came of it.

    Args:
        problem: the product.
        m: rows of x; the whole bucket is measured as its largest.
        device: a GPU of this machine.
        store: which keeps it.
        limit: seconds.
        exhaustive: measure all that fits and not the short list alone, without a limit: to compare the cost model with.
    """
    from kbit_inductor.lowering.cost.measure import record_of
    from kbit_inductor.lowering.cost.short_list import candidates, short_list
    from kbit_inductor.lowering.tuner.gpu_timer import gpu_timer

    m, record, place, shape = bucket(m), record_of(device), place_of(device), shape_key(problem, m)
    listed = [each.config for each in short_list(problem, m, record)]
    configs = dict.fromkeys((*listed, *candidates(problem, m, record))) if exhaustive else listed
    known = store.table(place).shapes.get(shape)
    tuned = tune(configs, gpu_timer(problem, m, device), known, float("inf") if exhaustive else limit)
    store.add(Table(place, {shape: tuned.times}))
    for config, why in tuned.dropped:
        log.info("%s: %s does not fit: %s", shape, config, why)
    if not tuned.complete:
        log.info("%s: tried %d of %d configurations in the time there was", shape, len(tuned.times), len(configs))
    return tuned
