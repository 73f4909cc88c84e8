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
    data = words.contiguous().view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -data.size(1) % bits)).unflatten(1, (-1, bits))
    eight = torch.zeros(data.shape[:2], dtype=torch.int64)  # fields, which lie in so many bytes as a field has bits
    for byte in range(bits):
        eight |= data[..., byte].long() << (8 * byte)
    fields: Tensor = (eight.unsqueeze(-1) >> (bits * torch.arange(8))) & (2**bits - 1)
    return fields.to(torch.uint8).flatten(1)[:, :count]


def pack_fields(values: Tensor, bits: int) -> Tensor:
    """The inverse: int32 ``[R, W]`` of uint8 ``[R, count]``; what is left of the last word is zero."""
    rows, count = values.shape
    stream = (values.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8) & 1).flatten(1)
    padded = torch.nn.functional.pad(stream, (0, 32 * word_count(count, bits) - stream.size(1)))
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    data = (padded.view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return data.view(torch.int32)
