"""Fields of 1 to 8 bits in words of 32: how GPTQ, AWQ and compressed-tensors lay out codes and zero points.

A row of words is one stream of bits, the lowest of the first word first. Where 32 is no multiple of the bits, a field goes on in
the next word: AutoGPTQ's 3 bits, written there as a special case, are the same stream.
"""

from __future__ import annotations

import torch
from torch import Tensor


def word_count(fields: int, bits: int) -> int:
    """Words that a row of ``fields`` takes."""
    return -(-fields * bits // 32)


def unpack_fields(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` fields of each row of int32 ``words`` ``[R, W]``, as uint8 ``[R, count]``."""
    data = torch.nn.functional.pad(words.contiguous().view(torch.uint8), (0, 1))
    first = torch.arange(count) * bits
    byte = first // 8
    window = data[:, byte].int() | data[:, byte + 1].int() << 8  # a field lies in two bytes at most
    return (window >> (first % 8) & (2**bits - 1)).to(torch.uint8)


def pack_fields(values: Tensor, bits: int) -> Tensor:
    """The inverse: int32 ``[R, W]`` of uint8 ``[R, count]``; what is left of the last word is zero."""
    rows, count = values.shape
    stream = (values.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8) & 1).flatten(1)
    padded = torch.nn.functional.pad(stream, (0, 32 * word_count(count, bits) - stream.size(1)))
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    data = (padded.view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return data.view(torch.int32)
