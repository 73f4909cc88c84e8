"""Packed weights that keep their addresses when they are packed again, for the CUDA graphs that were recorded on them.

With ``mode="reduce-overhead"`` Inductor records what a graph does once, addresses included, and then replays it. Packed weights
are inputs that are marked static, so a recording reads them where they were. It is replayed only for a call whose static inputs
have the very addresses of the recording; for any other call torch records anew (``CUDAGraphNode.check_invariants`` of
``torch/_inductor/cudagraph_trees.py``). So memory that was freed is never read: either the call has no tensor there, or the tensor
there is the packed weight of this call.

A weight that changes would cost a recording at each change, and torch keeps the old ones. So what is packed again goes into the
memory of before, and the recordings hold: the stream that packs is the one that reads. Another ``Parameter`` in a weight's place
has packed memory of its own, and is recorded once.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kbit_inductor.packing import PackedWeight

RECORDING = ("cuda",)
"""Types of devices on which addresses are recorded."""


def into(old: PackedWeight | None, new: PackedWeight) -> PackedWeight:
    """``new`` in the memory of ``old``, which nobody may need any more; as it is on a device without recordings.

    Tensors that autograd has kept of ``old`` count the write, so a backward pass through them is refused by torch.
    """
    if old is None or len(old.inputs) != len(new.inputs) or not all(map(_fits, old.inputs, new.inputs)):
        return new
    for there, value in zip(old.inputs, new.inputs, strict=True):
        with torch.inference_mode(there.is_inference()):  # such a tensor can be written to in that mode only
            there.copy_(value)
    return dataclasses.replace(new, operands=old.operands, side=old.side)


def _fits(there: Tensor, value: Tensor) -> bool:
    alike = there.shape == value.shape and there.stride() == value.stride() and there.dtype == value.dtype
    return alike and there.device == value.device and there.device.type in RECORDING
