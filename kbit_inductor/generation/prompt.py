"""Prompts as a generator takes them: of the right shape, with tokens that exist, padded on the left if at all, and short enough."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.errors import EmptyPromptError, InvalidPaddingError, InvalidPromptError, PromptTooLongError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def prepare(ids: Tensor, mask: Tensor | None, rows: int, max_length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Check a prompt.

    Args:
        ids: integers ``[rows, tokens]``.
        mask: None, or ``[rows, tokens]`` with 0 for padding.
        rows: how many there must be.
        max_length: the tokens must be fewer.
        vocabulary: and each below this.

    Returns:
        ``ids`` as int64, and the number of padding tokens of each row, int64 ``[rows]``. A single row has lost its padding.

    Raises:
        InvalidPromptError, EmptyPromptError, PromptTooLongError, InvalidPaddingError: where one of these does not hold.
    """
    _check_shape(ids, rows)
    ids = ids.to(torch.int64)
    padding = ids.new_zeros(rows) if mask is None else left_padding(mask.to(ids.device), ids)
    if rows == 1:
        ids, padding = ids[:, int(padding) :], torch.zeros_like(padding)
    _check_length(ids.shape[1], max_length)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InvalidPromptError(f"the prompt has tokens from {low} to {high}; give 0 to {vocabulary - 1}, what the model knows")
    return ids, padding


def left_padding(mask: Tensor, ids: Tensor) -> Tensor:
    """How many tokens on the left of each row are padding, int64 ``[rows]``, from an attention mask."""
    if mask.shape != ids.shape:
        raise InvalidPaddingError(f"attention_mask has shape {list(mask.shape)}; give that of the prompt, {list(ids.shape)}")
    padding: Tensor = (mask == 0).sum(-1)
    left = torch.arange(ids.shape[1], device=ids.device) < padding[:, None]
    if not torch.equal(left, mask == 0) or bool((padding == ids.shape[1]).any()):
        raise InvalidPaddingError("attention_mask must be zeros and then at least one 1 in each row: pad prompts on the left")
    return padding


def _check_shape(ids: Tensor, rows: int) -> None:
    wanted = f"give int64 token ids of shape [{rows}, tokens]"
    if not isinstance(ids, Tensor):
        raise InvalidPromptError(f"the prompt is a {type(ids).__name__}; {wanted}")
    if ids.dim() != 2 or ids.shape[0] != rows or ids.dtype not in INTEGERS:
        raise InvalidPromptError(f"the prompt is {ids.dtype} of shape {list(ids.shape)}; {wanted}")


def _check_length(tokens: int, max_length: int) -> None:
    if tokens == 0:
        raise EmptyPromptError("the prompt has no token; give at least one, such as the model's bos_token_id")
    if tokens >= max_length:
        raise PromptTooLongError(
            f"the prompt has {tokens} tokens, and max_length={max_length} has room for {max_length - 1} and a new one; "
            "give a shorter prompt, or make a Generator with a larger max_length"
        )
