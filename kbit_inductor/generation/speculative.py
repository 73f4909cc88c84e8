"""Self-speculative decoding: a model drafts with the first planes of its own weights, and verifies with all of them.

A few tokens are drafted one by one at low precision. One pass at full precision then says what would have followed each of them: as
many as agree are kept, and the token after them is the full model's own. So the text is that of the full model. It also writes the
keys and values of all drafted tokens anew, so nothing of low precision stays in the cache.

Speculative decoding: Leviathan et al. (2023) and Chen et al. (2023). Drafting with a lesser form of the same model: Zhang et al.,
"Draft & Verify" (2023), by skipping layers, and Tiwari et al., "QuantSpec" (2025), by fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.errors import InvalidOptionError, InvalidSamplingError
from kbit_inductor.generation.generator import EXAMPLE, Generator, Options, at_least
from kbit_inductor.precision import cascades, precision


class SpeculativeGenerator(Generator):
    """A :class:`Generator` of one greedy text whose weights are a cascade (option ``cascade``), and which drafts with few planes.

    The text is that of a ``Generator`` of the same model, unless two tokens are as likely but for rounding: one pass over several
    tokens sums in another order than a pass for each. Arguments are those of :class:`Generator`, and:

    Args:
        draft_bits: planes that are read for a draft.
        draft_tokens: tokens of a draft, at least 1. ``max_length`` is to have room for them after two others.

    Attributes:
        rounds: drafts that were verified, of all texts.
        accepted: drafted tokens that the full model agreed with.

    Raises:
        InvalidOptionError: ``draft_bits`` or ``draft_tokens`` that cannot be, or do not fit ``max_length``.
        NoCascadeError: no weight of the model is a cascade.
    """

    def __init__(
        self,
        model: nn.Module,
        max_length: int,
        options: Options = None,
        mode: str | None = None,
        *,
        draft_bits: int = 4,
        draft_tokens: int = 4,
    ) -> None:
        self.draft_bits = at_least("draft_bits", draft_bits, 1)
        self.draft_tokens = at_least("draft_tokens", draft_tokens, 1)
        at_least("max_length", max_length, draft_tokens + EXAMPLE + 2)
        self.rounds = self.accepted = 0
        super().__init__(model, max_length, options, mode)

    @property
    def accepted_length(self) -> float:
        """Mean tokens that a round gives: those accepted and one more. NaN before the first."""
        return 1 + self.accepted / self.rounds if self.rounds else float("nan")

    def _compile(self) -> None:
        # What the backend is to pack is not there yet; what is packed already, is.
        packs = self.config.cascade and self.config.bits != "auto"
        planes = self.config.bits if packs else max(planes for _, planes in cascades((self.model,)))
        if self.draft_bits >= planes:  # type: ignore[operator]
            raise InvalidOptionError(f"option 'draft_bits' is {self.draft_bits}; give fewer than the {planes} bits of the weights")
        super()._compile()
        self._verify = self._capture_step(1 + self.draft_tokens)

    def _rebind(self) -> bool:
        return super()._rebind() and self._verify.rebind()

    def stream(self, ids: Tensor, max_new_tokens: int | None = None, **options: Any) -> Iterator[Tensor]:
        """As :meth:`Generator.stream`, for a ``temperature`` of 0.

        Raises:
            InvalidSamplingError: another temperature; and what that raises.
        """
        if options.get("temperature"):
            raise InvalidSamplingError(
                f"temperature is {options['temperature']!r}; a draft is verified for the most likely token only. Leave it out, or "
                "make a Generator"
            )
        return super().stream(ids, max_new_tokens, **options)

    def _tokens(
        self, ids: Tensor, padding: Tensor, count: int, ends: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        self._text += 1
        text = self._text
        position, last = ids.shape[1], ids.shape[1] + count - 1
        known = [choose(self._begin(ids, padding))]
        while True:
            for token in known:
                yield token
                if position == last or bool(torch.isin(token, ends)):
                    return
                self._check_uninterrupted(text)
                position += 1
            known = self._next(position - 1, known[-1], padding, choose)

    def _next(self, past: int, token: Tensor, padding: Tensor, choose: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """What follows ``token`` ``[1]``, before which there are ``past``: one token or more."""
        if past + self.draft_tokens >= self.max_length:
            return [choose(self._step(past, token[:, None], padding))]
        draft = [token]
        with precision(self.draft_bits):
            for i in range(self.draft_tokens):
                draft.append(choose(self._step(past + i, draft[-1][:, None], padding)))
        drafted = torch.stack(draft, 1)
        exact = choose(self._verify(past, drafted, padding)[0])
        agreed = int((exact[:-1] == drafted[0, 1:]).long().cumprod(0).sum())
        self.rounds += 1
        self.accepted += agreed
        return list(exact[: agreed + 1, None])
