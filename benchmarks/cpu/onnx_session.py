"""Sessions of ONNX Runtime that share one pool of threads.

With a pool for each session, as is the default, the idle pools of a layer's copies would spin while another copy is measured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def session(model: bytes) -> Any:
    """A session of a serialized model on the CPU."""
    import onnxruntime

    _share_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def _share_threads() -> None:
    """Make the pool, before the first session."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
