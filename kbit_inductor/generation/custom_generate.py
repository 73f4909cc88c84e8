"""``model.generate`` of transformers on the steps of a :class:`Generator`: its logits processors and stopping criteria, and none of
its work around a step.

The loop follows ``GenerationMixin._sample`` of transformers, so that the same seed draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.errors import InvalidSamplingError, TooManyTokensError
from kbit_inductor.generation.generator import Generator

PLAIN = {"num_beams": 1, "output_attentions": False, "output_hidden_states": False}  # what other values ask for is not there


def custom_generate(generator: Generator, streamer: Any | None = None) -> Callable[..., Any]:
    """The argument of this name for ``generate`` of ``generator.model``.

    Prompts, padded on the left, must be as many as the generator's ``batch_size``, sequences to return counted. Tokens are chosen
    greedily or drawn, as the generation config says, with all of its processors and criteria.

    Args:
        generator: whose steps are taken.
        streamer: given here, since ``generate`` does not hand its own on.

    Returns:
        A function that ``generate`` calls. It gives int64 ``[batch_size, tokens]``, or with ``return_dict_in_generate`` an output
        of transformers with ``sequences``, ``scores`` and ``logits``.

    Raises:
        InvalidSamplingError: from ``generate``: beams, attentions or hidden states are asked for, or the model is another one.
        TooManyTokensError: from ``generate``: the text may grow longer than the generator's ``max_length``.
        InvalidPromptError, InvalidPaddingError: from ``generate``, as :meth:`Generator.stream` does.
    """

    def decode(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **arguments: Any
    ) -> Any:  # fmt: skip
        _check(generator, model, generation_config)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        steps = generator.continuation(input_ids, arguments.get("attention_mask"))
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        kept: dict[str, tuple[Tensor, ...]] = {"logits": (), "scores": ()}
        logits = next(steps).float()
        while True:
            scores = logits_processor(input_ids, logits)
            _keep(kept, generation_config, logits=logits, scores=scores)
            tokens = scores.softmax(-1).multinomial(1).squeeze(1) if generation_config.do_sample else scores.argmax(-1)
            if ends:
                tokens = tokens.where(unfinished, _filler(generation_config))
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished &= ~stopping_criteria(input_ids, scores)
            if not unfinished.any():
                break
            logits = steps.send(tokens).float()
        if streamer is not None:
            streamer.end()
        return _output(input_ids, kept) if generation_config.return_dict_in_generate else input_ids

    return decode


def _check(generator: Generator, model: Any, asked: Any) -> None:
    if model is not generator.model:
        raise InvalidSamplingError("the generator is of another model; call generate of generator.model")
    for option, plain in PLAIN.items():
        value = getattr(asked, option)
        if value not in (None, plain):
            raise InvalidSamplingError(f"{option} is {value!r}; a generator has {plain!r} only. Leave custom_generate out")
    if asked.max_length > generator.max_length:
        raise TooManyTokensError(
            f"max_length of the text is {asked.max_length}, that of the generator {generator.max_length}; ask for fewer "
            "tokens, or make a Generator with a larger max_length"
        )


def _filler(asked: Any) -> int:
    """What follows the end of a row that is shorter than others, as in transformers."""
    if asked.pad_token_id is not None:
        return int(asked.pad_token_id)
    ends = asked.eos_token_id
    return int(ends[0] if isinstance(ends, Sequence) else ends)


def _keep(kept: dict[str, tuple[Tensor, ...]], asked: Any, **values: Tensor) -> None:
    """Keep of a step what is asked for."""
    for name, value in values.items():
        if asked.return_dict_in_generate and getattr(asked, f"output_{name}"):
            kept[name] += (value,)


def _output(sequences: Tensor, kept: dict[str, tuple[Tensor, ...]]) -> Any:
    from transformers.generation import utils

    given: dict[str, Any] = {"sequences": sequences} | {name: values or None for name, values in kept.items()}
    return utils.GenerateDecoderOnlyOutput(**given)
