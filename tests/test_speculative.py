"""Self-speculative decoding: the text is the full model's, whatever is drafted, and drafts are read at few planes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.generation import captured

VOCABULARY = 200
OPTIONS = {"bits": 8, "cascade": True, "group_size": 16, "min_elements": 0, "activation_bits": 16}


def tiny() -> nn.Module:
    """Weights large enough that every next token depends on the ones before."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made() -> tuple[kbit.Generator, kbit.SpeculativeGenerator]:
    """A generator, and one that drafts, of the same three graphs. They are captured and not compiled, which takes long."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "kbit", lambda graph, inputs, options: backend.Bound(graph, tuple(range(len(inputs))), ()))
        speculative = kbit.SpeculativeGenerator(kbit.quantize_(tiny(), OPTIONS), 32, OPTIONS, draft_bits=3, draft_tokens=3)
    plain = object.__new__(kbit.Generator)
    plain.__dict__ = speculative.__dict__.copy()
    return plain, speculative


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_the_text_is_that_of_the_full_model(made, bits):
    plain, speculative = made
    speculative.draft_bits, speculative.rounds, speculative.accepted = bits, 0, 0
    for length in (1, 2, 9, 28, 31):
        ids = prompt(length, bits)
        for ends in ((), None):
            assert torch.equal(speculative.generate(ids, eos_token_id=ends), plain.generate(ids, eos_token_id=ends))
    assert speculative.rounds > 0 and 0 <= speculative.accepted <= 3 * speculative.rounds
    # Two texts of 200 tokens that have nothing to do with one another agree once in 200 tokens.
    assert bits < 6 or speculative.accepted > speculative.rounds


def test_drafts_read_few_planes_and_verifying_reads_all(made, monkeypatch):
    _, speculative = made
    read: list[tuple[str, int]] = []
    for name in ("_step", "_verify"):
        called = getattr(speculative, name)

        def noted(*arguments: object, name: str = name, called: object = called) -> torch.Tensor:
            bits = torch.ops.kbit.set_precision_cpu(0)
            torch.ops.kbit.set_precision_cpu(bits)
            read.append((name, bits))
            return called(*arguments)  # type: ignore[operator]

        noted.rebind = called.rebind  # type: ignore[attr-defined]
        monkeypatch.setattr(speculative, name, noted)
    speculative.draft_bits = 2
    speculative.generate(prompt(5), 2)
    assert read == [("_step", 2)] * 3 + [("_verify", 0)]


def test_a_text_that_ends_within_a_draft_ends(made):
    plain, speculative = made
    speculative.draft_bits = 7
    ids = prompt(6)
    whole = plain.generate(ids, 12, eos_token_id=())[0]
    for end in whole[7:].tolist():
        text = speculative.generate(ids, 12, eos_token_id=end)
        assert torch.equal(text, plain.generate(ids, 12, eos_token_id=end))
    seen: list[torch.Tensor] = []
    for count in range(1, 7):
        assert torch.equal(speculative.generate(ids, count, eos_token_id=(), streamer=seen.append)[0], whole[: 6 + count])
    assert all(token.shape == (1,) for token in seen)


def test_weights_that_change_are_seen(made):
    plain, speculative = made
    speculative.draft_bits = 6
    norm = plain.model.model.norm.weight
    before = norm.clone()
    norm.copy_(torch.rand(len(norm)) * 3)
    ids = prompt(4)
    assert torch.equal(speculative.generate(ids, 10), plain.generate(ids, 10))
    norm.copy_(before)


def test_mistakes_say_what_to_do(made):
    _, speculative = made
    with pytest.raises(kbit.InvalidSamplingError, match="temperature"):
        speculative.generate(prompt(4), temperature=0.5)
    stream = speculative.stream(prompt(4), 9)
    next(stream)
    speculative.generate(prompt(4), 1)
    with pytest.raises(kbit.InterruptedStreamError):
        list(stream)
    model = speculative.model
    for wrong, message in (
        ({"draft_bits": 0}, "draft_bits"),
        ({"draft_tokens": 0}, "draft_tokens"),
        ({"draft_tokens": 30}, "max_length"),
    ):
        with pytest.raises(kbit.InvalidOptionError, match=message):
            kbit.SpeculativeGenerator(model, 32, OPTIONS, **wrong)
    with pytest.raises(kbit.InvalidOptionError, match="fewer than the 8 bits"):
        kbit.SpeculativeGenerator(model, 32, OPTIONS, draft_bits=8)
    with pytest.raises(kbit.NoCascadeError, match="cascade=True"):
        kbit.SpeculativeGenerator(tiny(), 32, {"bits": 4, "min_elements": 0})
