"""transformers' ``generate`` on the steps of a generator: the same tokens as without, for all that it can be asked."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.errors import InvalidSamplingError, TooManyTokensError
from kbit_inductor.testing import dequantized_copy

OPTIONS = {"bits": 8, "min_elements": 0, "activation_bits": 16}
LENGTH = 24


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    # Weights large enough that every next token depends on the ones before.
    llama = models.llama(initializer_range=0.2, num_hidden_layers=1)
    llama.generation_config.eos_token_id = None
    return llama


@pytest.fixture(scope="module")
def generator(model: nn.Module) -> kbit.Generator:
    return kbit.Generator(model, LENGTH, options=OPTIONS, batch_size=2)


@pytest.fixture(scope="module")
def twin(generator: kbit.Generator) -> nn.Module:
    """The dequantized model in eager."""
    return dequantized_copy(generator.model)


@pytest.fixture(scope="module")
def prompt() -> dict[str, Tensor]:
    """Two prompts, the second padded on the left."""
    torch.manual_seed(1)
    ids = models.ids(tokens=9)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class Listener:
    """A streamer of transformers that remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.ended = True


def both(generator: kbit.Generator, twin: Any, prompt: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    """What the generator gives through transformers, and what transformers gives with the dequantized model in eager."""
    found = []
    for model, more in ((generator.model, {"custom_generate": kbit.custom_generate(generator)}), (twin, {})):
        torch.manual_seed(3)
        found.append(model.generate(**prompt, **{"max_new_tokens": 12, "pad_token_id": 0} | options, **more))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"do_sample": False, "eos_token_id": list(range(40))},
    ],
    ids=["greedy", "processors", "drawn", "ends"],
)
def test_the_tokens_are_those_of_transformers(
    generator: kbit.Generator, twin: nn.Module, prompt: dict[str, Tensor], options: dict[str, Any]
) -> None:
    ours, theirs = both(generator, twin, prompt, **options)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > prompt["input_ids"].shape[1]


def test_several_sequences_of_one_prompt_with_scores(generator: kbit.Generator, twin: nn.Module, prompt: dict[str, Tensor]) -> None:
    one = {name: value[:1] for name, value in prompt.items()}
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_return_sequences": 2}
    ours, theirs = both(generator, twin, one, do_sample=True, **asked)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(ours.logits) == len(theirs.scores)


def test_a_streamer_hears_every_token(generator: kbit.Generator, prompt: dict[str, Tensor]) -> None:
    listener = Listener()
    decode = kbit.custom_generate(generator, listener)  # type: ignore[arg-type]
    model: Any = generator.model
    found = model.generate(**prompt, max_new_tokens=5, do_sample=False, custom_generate=decode)
    assert listener.ended
    assert torch.equal(listener.heard[0], prompt["input_ids"])
    assert torch.equal(torch.stack(listener.heard[1:], 1), found[:, -5:])


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_what_a_generator_lacks_is_refused(generator: kbit.Generator, prompt: dict[str, Tensor], option: dict[str, Any]) -> None:
    model: Any = generator.model
    with pytest.raises(InvalidSamplingError, match=next(iter(option))):
        model.generate(
            **prompt, max_new_tokens=2, return_dict_in_generate=True, **option, custom_generate=kbit.custom_generate(generator)
        )


def test_a_text_that_may_grow_too_long_is_refused(generator: kbit.Generator, prompt: dict[str, Tensor]) -> None:
    model: Any = generator.model
    with pytest.raises(TooManyTokensError, match=str(LENGTH)):
        model.generate(**prompt, max_new_tokens=LENGTH, custom_generate=kbit.custom_generate(generator))


def test_another_model_is_refused(generator: kbit.Generator, prompt: dict[str, Tensor]) -> None:
    other: Any = models.llama()
    with pytest.raises(InvalidSamplingError, match="another model"):
        other.generate(**prompt, max_new_tokens=2, custom_generate=kbit.custom_generate(generator))


def test_a_continuation_ends_where_the_room_does(generator: kbit.Generator, prompt: dict[str, Tensor]) -> None:
    steps = generator.continuation(**{"ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]})
    tokens = next(steps).argmax(-1)
    for _ in range(LENGTH - prompt["input_ids"].shape[1] - 1):
        tokens = steps.send(tokens).argmax(-1)
    with pytest.raises(TooManyTokensError):
        steps.send(tokens)
