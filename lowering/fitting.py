"""A launch whose configuration takes more than the GPU has: the next smaller one is tried, and the log says so once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from kbit_inductor.kernels.triton.config import Config, smaller
from kbit_inductor.lowering.errors import OutOfSharedMemoryError

log = logging.getLogger("kbit_inductor.kernels")


def launch_fitting(launch: Callable[[Config], Tensor], config: Config, device: torch.device) -> Tensor:
    """``launch`` with ``config``, or with the first smaller one that ``device`` has the shared memory and the registers for.

    Raises:
        OutOfSharedMemoryError: it has not enough for the smallest.
    """
    from triton.runtime.errors import OutOfResources

    wanted = config
    while True:
        try:
            result = launch(config)
        except OutOfResources as error:
            next_one = smaller(config)
            if next_one is None:
                raise OutOfSharedMemoryError(
                    f"{device} has not enough for a product cut by {wanted}, nor for a smaller cut ({error}); "
                    "skip the layer, or choose smaller groups"
                ) from error
            config = next_one
        else:
            if config is not wanted:
                _tell(wanted, config, device)
            return result


@functools.cache
def _tell(wanted: Config, config: Config, device: torch.device) -> None:
    log.warning("%s has not the shared memory for %s: products are cut by %s, which may be slower", device, wanted, config)
