"""Text that a model writes to be calibrated on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import kbit_inductor as kbit

VOCABULARY, POSITIONS, END = 40, 24, 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, eos_token_id=END)
    return LlamaForCausalLM(config).eval()


def test_texts_are_whole_repeatable_and_leave_the_random_state_alone(model):
    state = torch.get_rng_state()
    found = kbit.own_text(model, 3, 12, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (3, 12) and found.dtype == torch.int64
    assert int(found.min()) >= 0 and int(found.max()) < VOCABULARY
    assert torch.equal(kbit.own_text(model, 3, 12, seed=5), found)
    assert not torch.equal(kbit.own_text(model, 3, 12, seed=6), found)
    assert kbit.own_text(model, 1, POSITIONS + 9).shape == (1, POSITIONS)


def test_tokens_come_as_often_as_the_model_predicts_them(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike, but for the one that ends a text
        found = kbit.own_text(model, 200, 24)[:, 1:]
    counts = torch.bincount(found.flatten(), minlength=VOCABULARY).double()
    assert counts[END] == 0
    share = counts.sum() / (VOCABULARY - 1)
    others = torch.arange(VOCABULARY) != END
    # Six standard deviations of a binomial count.
    assert ((counts[others] - share).abs() < 6 * share.sqrt()).all()


def test_layers_are_calibrated_on_it(model):
    calibration = kbit.calibrate(model, kbit.own_text(model, 2, 16).split(1), {"quantizer": "gptq"})
    assert calibration.layers["lm_head"].rows == 32


@pytest.mark.parametrize(("count", "length"), [(0, 8), (1, 1)])
def test_a_text_of_nothing_is_an_error(model, count, length):
    with pytest.raises(kbit.InvalidOptionError, match="at least 1 text"):
        kbit.own_text(model, count, length)


def test_models_that_write_no_text_are_named(model):
    with pytest.raises(kbit.NotACausalLMError, match="Linear"):
        kbit.own_text(nn.Linear(2, 2))
    with pytest.raises(kbit.TrainingModeError):
        kbit.own_text(model.train())
    model.eval()
