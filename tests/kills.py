"""Kill processes that save a model, at random moments, and look what is left: ``python tests/kills.py FOLDER KILLS``.

The savers are forks of this process, so that torch is imported once. Prints counts as JSON. ``tests/test_saving.py`` runs it with
few kills, and ``make kills`` with many.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from test_surgery import IDS, OPTIONS, Model, model
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.atomic import TEMPORARY

SHARD_BYTES = 2000  # many files for a small model
BITS = (2, 4)


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(description="Kill saves at random moments, and count what is left as JSON.")
    parser.add_argument("folder", type=Path, help="where the models are saved")
    parser.add_argument("kills", type=int, help="how many saves are killed")
    told = parser.parse_args()
    folder, kills = told.folder, told.kills
    models = [kbit.quantize_(model(), {**OPTIONS, "bits": bits}) for bits in BITS]
    outputs = [each(IDS) for each in models]
    begin = time.perf_counter()
    for each in models:
        save(each, folder)
    duration = (time.perf_counter() - begin) / len(models)
    seen: collections.Counter[str] = collections.Counter()
    moments = random.Random(0)
    for _ in range(kills):
        with saving(models, folder):
            time.sleep(moments.uniform(0, 4 * duration))
        seen["killed"] += 1
        seen["left a file that is not whole"] += any(path.name.startswith(TEMPORARY) for path in folder.iterdir())
        seen[found(folder, outputs)] += 1
    with saving(models[:1], folder), saving(models[1:], folder):
        for _ in range(20):
            seen["read while two save"] += 1
            seen[found(folder, outputs)] += 1
    seen["disk full"] += disk_full(models[0], folder)
    seen[found(folder, outputs)] += 1
    print(json.dumps(seen))


def save(one: nn.Module, folder: Path) -> None:
    kbit.save(one, folder, shard_bytes=SHARD_BYTES)


def found(folder: Path, outputs: list[Tensor]) -> str:
    """Which of the models is in ``folder``, "whole", or nothing that is known."""
    output = kbit.load(folder, Model).eval()(IDS)
    return "whole" if any(torch.equal(output, wanted) for wanted in outputs) else "half"


@contextmanager
def saving(models: list[nn.Module], folder: Path) -> Iterator[None]:
    """A process that saves ``models`` over and over, and is killed at the end."""
    process = os.fork()
    if process == 0:
        while True:
            for each in models:
                save(each, folder)
    try:
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def disk_full(one: nn.Module, folder: Path) -> bool:
    """Whether saving where files can hold no more than 1 KB is an OSError."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        save(one, folder)
    except OSError as error:
        return "arge" in str(error) or "space" in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return False


if __name__ == "__main__":
    main()
