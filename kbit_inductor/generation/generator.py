"""Text from a causal language model of Hugging Face, one token at a time, with as little work as possible around the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Generator as Coroutine
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.config import Config
from kbit_inductor.errors import (
    InterruptedStreamError,
    InvalidOptionError,
    InvalidPromptError,
    InvalidSamplingError,
    KbitError,
    TooManyTokensError,
    TrainingModeError,
    UncapturableModelError,
)
from kbit_inductor.generation.captured import Captured
from kbit_inductor.generation.prompt import prepare
from kbit_inductor.generation.sampling import Sampling
from kbit_inductor.weights.release import trim_heap

Options = Mapping[str, Any] | Config | None
EXAMPLE = 2  # the smallest size that torch.compile does not take for a special case


class Generator:
    """A causal language model with one static cache and two compiled graphs: one for a prompt, one for a token.

    Both are compiled when the generator is made, and called without Dynamo's guards. Weights that are changed or replaced later are
    seen at the next text. The model itself is not changed; it may have several generators. A generator writes one text at a time.

    Args:
        model: with a language-model head, in evaluation mode.
        max_length: how many tokens a prompt and what follows it may have together. The cache has this length.
        options: those of the backend, as in ``torch.compile(model, backend="kbit", options=…)``.
        mode: as in ``torch.compile``.
        batch_size: how many prompts are continued at once.

    Raises:
        UnknownOptionError, InvalidOptionError: an option that does not exist, or a value that it does not take.
        NotACausalLMError: a model that does not predict the next token.
        TrainingModeError: a model in training mode.
        UncapturableModelError: a model that ``torch.compile`` cannot capture as one graph for every length.
    """

    def __init__(
        self, model: nn.Module, max_length: int, options: Options = None, mode: str | None = None, batch_size: int = 1
    ) -> None:
        # transformers is no requirement of this package, and takes seconds to import.
        from kbit_inductor import huggingface

        huggingface.check(model)
        self.model: Any = model
        self.config = Config.from_options(options, mode)
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.max_length = at_least("max_length", max_length, 2)
        self._sizes = huggingface.text_config(model)
        known = getattr(self._sizes, "max_position_embeddings", None)
        if known is not None and max_length > known:
            raise InvalidOptionError(f"option 'max_length' is {max_length}, but the model has positions for {known} tokens only")
        self._text = 0
        self._compile()

    def _compile(self) -> None:
        """Compile both graphs, with an empty cache."""
        from kbit_inductor import huggingface

        self._check_mode()
        model, name = self.model, huggingface.cache_argument(self.model)
        # The last token of a text is never read again, so the cache is never full: a full one would be a special case.
        self._length = max(self.max_length, EXAMPLE + 3)
        with torch.inference_mode(False), huggingface.own_attention(model):
            buffers = huggingface.empty_cache(model, self.batch_size, self._length)
            padding = torch.zeros(self.batch_size, dtype=torch.int64, device=model.device)
            prompt = padding.new_zeros(self.batch_size, EXAMPLE)
            # Only the number of tokens varies. Dynamo would take for variable whatever differs between two generators.
            for fixed in (padding, *(each for pair in buffers for each in pair)):
                torch._dynamo.mark_static(fixed)
            torch._dynamo.mark_static(prompt, 0)
            torch._dynamo.mark_dynamic(prompt, 1, min=EXAMPLE, max=self._length - 1)

            def read(ids: Tensor, padding: Tensor) -> Tensor:
                return huggingface.last_logits(model, buffers, name, ids, padding, 0)[:, -1]

            self._read = self._capture(read, prompt, padding)
        self._buffers = buffers
        self._step = self._capture_step(1)
        trim_heap()  # of what compiling took

    def _capture_step(self, new: int) -> Captured:
        """The graph for ``new`` tokens after any number of others: the logits of the last, or of each where they are several."""
        from kbit_inductor import huggingface

        model, name, buffers = self.model, huggingface.cache_argument(self.model), self._buffers

        def step(ids: Tensor, padding: Tensor, past: Tensor) -> Tensor:
            logits = huggingface.last_logits(model, buffers, name, ids, padding, past.shape[0], ids.shape[1])
            return logits[:, -1] if ids.shape[1] == 1 else logits

        with torch.inference_mode(False), huggingface.own_attention(model):
            padding = torch.zeros(self.batch_size, dtype=torch.int64, device=model.device)
            # How many tokens there are before, as the size of a tensor: sizes are what can be captured as variable.
            past = padding.new_empty(EXAMPLE)
            torch._dynamo.mark_dynamic(past, 0, min=EXAMPLE, max=self._length - 1 - new)
            ids = padding.new_zeros(self.batch_size, new)
            torch._dynamo.mark_static(ids)
            torch._dynamo.mark_static(padding)
            return self._capture(step, ids, padding, past)

    def _capture(self, function: Callable[..., Tensor], *examples: Tensor) -> Captured:
        try:
            return Captured(function, self.model, examples, self.config)
        except KbitError:
            raise
        except Exception as error:
            raise UncapturableModelError(
                f"torch.compile cannot capture {type(self.model).__name__} as one graph for texts of any length "
                f"({type(error).__name__}, see above); use model.generate with a compiled model.forward"
            ) from error

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int | None = None,
        *,
        streamer: Callable[[Tensor], object] | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue prompts.

        Args:
            ids: integers ``[batch_size, tokens]``, with room for at least one more token.
            max_new_tokens: None for as many as fit into ``max_length``.
            streamer: called with each new token, int64 ``[batch_size]``, as soon as it is chosen.
            **options: those of :meth:`stream`, which says what is raised.

        Returns:
            int64 ``[batch_size, tokens and new tokens]``: the prompts and what follows. A row that ends before another is filled up
            with the model's padding token.
        """
        new = []
        for token in self.stream(ids, max_new_tokens, **options):
            new.append(token)
            if streamer is not None:
                streamer(token)
        return torch.cat([ids.to(new[0]), torch.stack(new, 1)], 1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue prompts, token by token.

        Args:
            ids: integers ``[batch_size, tokens]``, with room for at least one more token.
            max_new_tokens: None for as many as fit into ``max_length``.
            attention_mask: ``[batch_size, tokens]``, 0 for padding, which must be at the left, and 1 for the tokens of the prompt.
            temperature: 0 for the most likely token; else tokens are drawn, from logits divided by this.
            top_k: draw from this many of the most likely tokens only.
            top_p: draw from the fewest of the most likely tokens only that together have this probability.
            eos_token_id: a text ends with any of these tokens. None for the model's own, ``()`` for none.
            seed: makes the drawing repeatable.
            generator: to draw with, in place of a seed. Without both, torch's global one is used.

        Returns:
            An iterator of int64 ``[batch_size]``. It computes a token when it is asked for one.

        Raises:
            InvalidPromptError, EmptyPromptError, PromptTooLongError, InvalidPaddingError: about ``ids`` and ``attention_mask``.
            TooManyTokensError, InvalidSamplingError: about the other arguments.
            TrainingModeError: the model is in training mode now.
            InterruptedStreamError: from the iterator, when another text was begun before this one has ended.
        """
        self._check_mode()
        ids, padding = prepare(ids, attention_mask, self.batch_size, self.max_length, self._sizes.vocab_size)
        count = self._count(ids.shape[1], max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        ends = self._ends(eos_token_id)
        random = _random(seed, generator, self.model.device)
        return self._tokens(ids.to(ends), padding.to(ends), count, ends, lambda logits: sampling.choose(logits, random))

    def continuation(self, ids: Tensor, attention_mask: Tensor | None = None) -> Coroutine[Tensor, Tensor, None]:
        """Logits step by step, for whoever chooses tokens by other rules than :meth:`stream` does.

        Args:
            ids: integers ``[batch_size, tokens]``, with room for at least one more token.
            attention_mask: as in :meth:`stream`.

        Returns:
            A coroutine: ``next`` gives the logits ``[batch_size, vocabulary]`` that follow the prompts, and ``send(tokens)``, of
            int64 ``[batch_size]``, those that follow ``tokens`` too.

        Raises:
            InvalidPromptError, EmptyPromptError, PromptTooLongError, InvalidPaddingError: about the arguments.
            TrainingModeError: the model is in training mode now.
            TooManyTokensError: from the coroutine, when ``max_length`` tokens were given.
            InterruptedStreamError: from the coroutine, when another text was begun.
        """
        self._check_mode()
        ids, padding = prepare(ids, attention_mask, self.batch_size, self.max_length, self._sizes.vocab_size)
        return self._steps(ids.to(self.model.device), padding.to(self.model.device))

    def _tokens(
        self, ids: Tensor, padding: Tensor, count: int, ends: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        ended = torch.zeros_like(padding, dtype=torch.bool)
        steps = self._steps(ids, padding)
        logits = next(steps)
        for left in reversed(range(count)):
            token = choose(logits)
            if len(ends) > 0:
                token = token.where(~ended, self._filler(ends))
                ended |= torch.isin(token, ends)
            yield token
            if left == 0 or bool(ended.all()):
                return
            logits = steps.send(token)

    def _steps(self, ids: Tensor, padding: Tensor) -> Coroutine[Tensor, Tensor, None]:
        """The logits that follow ``ids``, then those that follow each token that is sent."""
        self._text += 1
        text, position = self._text, ids.shape[1]
        logits = self._begin(ids, padding)
        while True:
            token = yield logits
            self._check_uninterrupted(text)
            if position >= self.max_length - 1:
                raise TooManyTokensError(f"max_length={self.max_length} has no room for more; make a Generator with a larger one")
            logits = self._step(position, token[:, None], padding)
            position += 1

    def _check_uninterrupted(self, text: int) -> None:
        if self._text != text:
            raise InterruptedStreamError("the generator has begun another text; make a second Generator to write two at a time")

    def _begin(self, ids: Tensor, padding: Tensor) -> Tensor:
        """The logits that follow the prompt, which is in the cache afterwards."""
        if not self._rebind():
            self._compile()
        if ids.shape[1] == 1:
            return self._step(0, ids, padding)
        return self._read(ids.shape[1], ids, padding)

    def _rebind(self) -> bool:
        """Take the model's weights of now. False where the graphs were compiled for other ones."""
        return self._read.rebind() and self._step.rebind()

    def _check_mode(self) -> None:
        if self.model.training:
            raise TrainingModeError("the model is in training mode, where dropout changes what it predicts; call model.eval()")

    def _count(self, tokens: int, count: int | None) -> int:
        room = self.max_length - tokens
        if count is None:
            return room
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= room:
            raise TooManyTokensError(
                f"max_new_tokens is {count!r}; after {tokens} tokens max_length={self.max_length} has room for 1 to {room}. "
                "Give so many, or make a Generator with a larger max_length"
            )
        return count

    def _ends(self, given: int | Sequence[int] | None) -> Tensor:
        """The tokens that end a text, int64, on the model's device."""
        if given is None:
            own = getattr(self.model.generation_config, "eos_token_id", None)
            given = () if own is None else own
        ends = [given] if isinstance(given, int) else list(given)
        vocabulary = self._sizes.vocab_size
        if any(isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < vocabulary for end in ends):
            raise InvalidSamplingError(f"eos_token_id is {given!r}; give a token below {vocabulary}, or several")
        return torch.tensor(ends, dtype=torch.int64, device=self.model.device)

    def _filler(self, ends: Tensor) -> Tensor:
        """What follows the end of a row that is shorter than others."""
        pad = getattr(self.model.generation_config, "pad_token_id", None)
        return ends[0] if pad is None else ends.new_tensor(pad)


def generate(
    model: nn.Module, ids: Tensor, max_new_tokens: int, *, options: Options = None, mode: str | None = None, **more: Any
) -> Tensor:
    """Continue ``ids`` once. A :class:`Generator` is made for it, which compiles, and forgotten: for more than one text keep one.

    ``more`` is that of :meth:`Generator.generate`, which says what is returned and raised.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] == 0:
        raise InvalidPromptError("the prompt must be token ids of shape [prompts, tokens], of at least one prompt")
    count = at_least("max_new_tokens", max_new_tokens, 1)
    generator = Generator(model, max(ids.shape[1] + count, 2), options, mode, ids.shape[0])
    return generator.generate(ids, count, **more)


def at_least(option: str, value: int, least: int) -> int:
    """``value`` of ``option``, once it is known to be an integer of ``least`` or more; else InvalidOptionError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidOptionError(f"option {option!r} is {value!r}; give an integer, {least} or more")
    return value


def _random(seed: int | None, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise InvalidSamplingError("both seed and generator are given; give one of them")
    return torch.Generator(device).manual_seed(seed)
