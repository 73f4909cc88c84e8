"""The text generator: transformers' own greedy text, sampling, streaming, the two graphs, and its errors."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig, MistralForCausalLM

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.generation.captured import Captured
from kbit_inductor.generation.sampling import FIRST_CANDIDATES, Sampling
from kbit_inductor.testing import dequantized_copy
from kbit_inductor.testing.strategies import SEEDS

MAX_LENGTH = 32
VOCABULARY = 200
# Activations that are not rounded, as transformers does not round them either.
OPTIONS = {"bits": 4, "min_elements": 0, "activation_bits": 16}


def tiny(layers: int = 2) -> nn.Module:
    """Weights large enough that every next token depends on the ones before."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return models.with_biases(LlamaForCausalLM(config)).eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def made() -> tuple[kbit.Generator, int]:
    """A generator, and how many graphs it took."""
    torch._dynamo.reset()
    before = graphs()
    generator = kbit.Generator(tiny(), MAX_LENGTH, OPTIONS)
    return generator, graphs() - before


@pytest.fixture
def generator(made: tuple[kbit.Generator, int]) -> kbit.Generator:
    return made[0]


@pytest.fixture(scope="module")
def twin(made: tuple[kbit.Generator, int]) -> nn.Module:
    return dequantized_copy(made[0].model)


def prompt(tokens: int, rows: int = 1) -> Tensor:
    return models.ids(rows, tokens, VOCABULARY)


def greedy(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """The text that transformers makes."""
    options = {"max_length": MAX_LENGTH, "attention_mask": torch.ones_like(ids), "do_sample": False} | options
    return model.generate(ids, **options)


# Of one token: no prompt but a step. Of two: the smallest prompt. The last leaves room for one token.
@pytest.mark.parametrize("tokens", [1, 2, 3, 9, MAX_LENGTH - 1])
def test_greedy_is_that_of_transformers(generator: kbit.Generator, twin: nn.Module, tokens: int) -> None:
    ids = prompt(tokens)
    text = generator.generate(ids, eos_token_id=())
    assert torch.equal(text, greedy(twin, ids, eos_token_id=None))
    assert text.shape == (1, MAX_LENGTH)
    assert len(set(text[0].tolist())) > 15, "the same few tokens forever"


def test_rows_padded_on_the_left() -> None:
    model = tiny(layers=1)
    before = graphs()
    generator = kbit.Generator(model, MAX_LENGTH, OPTIONS, batch_size=2)
    oracle = dequantized_copy(model)
    for tokens, padded in [(1, 0), (6, 0), (9, 4), (MAX_LENGTH - 1, MAX_LENGTH - 2)]:
        ids = prompt(tokens, rows=2)
        mask = torch.ones_like(ids)
        ids[1, :padded], mask[1, :padded] = 0, 0
        text = generator.generate(ids, attention_mask=mask, eos_token_id=())
        assert torch.equal(text, greedy(oracle, ids, attention_mask=mask, eos_token_id=None))
    # A row that ends is filled up with the padding token until the other ends.
    ids = prompt(6, rows=2)
    ends = [int(text[0, -20]), int(text[1, -5])]
    text = generator.generate(ids, eos_token_id=ends)
    assert torch.equal(text, greedy(oracle, ids, eos_token_id=ends))
    assert graphs() - before == 2


def test_a_sliding_window() -> None:
    sizes = models.decoder(sliding_window=8, initializer_range=0.2, num_hidden_layers=1, eos_token_id=None)
    model = models.with_biases(MistralForCausalLM(MistralConfig(**sizes))).eval().requires_grad_(False)
    generator = kbit.Generator(model, MAX_LENGTH, OPTIONS)
    oracle = dequantized_copy(model)
    for tokens in (2, 20):  # shorter and longer than the window
        ids = prompt(tokens)
        assert torch.equal(generator.generate(ids), greedy(oracle, ids))


def test_padding_of_a_single_row_is_cut_off(generator: kbit.Generator) -> None:
    ids = prompt(5)
    padded = torch.cat([torch.zeros_like(ids), ids], 1)
    text = generator.generate(padded, 8, attention_mask=(padded != 0))
    assert torch.equal(text[:, 5:], generator.generate(ids, 8))


def test_two_compilations_however_many_texts(made: tuple[kbit.Generator, int]) -> None:
    generator, compiled = made
    assert compiled == 2
    before = graphs()
    for tokens in (1, 2, 17):
        generator.generate(prompt(tokens), 5)
        generator.generate(prompt(tokens), 3, temperature=1.0)
    assert graphs() == before


@pytest.mark.parametrize("rows", [1, 2])
def test_a_decoding_step_is_one_chain(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []
    monkeypatch.setattr(backend, "inductor", lambda graph, inputs, mode: graphs.append(graph) or graph.forward)
    kbit.Generator(tiny(3), 20, options={"bits": 4, "min_elements": 0}, batch_size=rows)
    targets = [node.target for node in graphs[-1].graph.nodes]
    calls = [target for target in targets if str(target).startswith("kbit.")]
    assert calls == [torch.ops.kbit.embedding_cpu.default, torch.ops.kbit.caching_chain_cpu.default]
    assert operator.setitem not in targets  # the cache is written to in the chain


def test_a_text_depends_on_no_earlier_text(generator: kbit.Generator) -> None:
    first, other = prompt(4), prompt(20)
    text = generator.generate(first)
    generator.generate(other)
    assert torch.equal(generator.generate(first), text)


def test_streaming(generator: kbit.Generator) -> None:
    ids = prompt(5)
    seen: list[int] = []
    text = generator.generate(ids, 9, streamer=lambda token: seen.append(int(token)))
    assert text[0, 5:].tolist() == seen
    assert [int(token) for token in generator.stream(ids, 9)] == seen
    assert all(token.shape == (1,) and token.dtype == torch.int64 for token in generator.stream(ids, 2))


def test_an_interrupted_stream_says_so(generator: kbit.Generator) -> None:
    stream = generator.stream(prompt(5))
    next(stream)
    generator.generate(prompt(3), 1)
    with pytest.raises(kbit.InterruptedStreamError, match="second Generator"):
        next(stream)


def test_eos_ends_the_text(generator: kbit.Generator, twin: nn.Module) -> None:
    ids = prompt(5)
    endless = generator.generate(ids, eos_token_id=())
    end = int(endless[0, 12])
    first = endless[0, 5:].tolist().index(end) + 5
    assert torch.equal(generator.generate(ids, eos_token_id=end), endless[:, : first + 1])
    assert torch.equal(generator.generate(ids, eos_token_id=[end, 0]), greedy(twin, ids, eos_token_id=[end, 0]))
    # None: the model's own.
    generator.model.generation_config.eos_token_id = end
    try:
        assert torch.equal(generator.generate(ids), endless[:, : first + 1])
    finally:
        generator.model.generation_config.eos_token_id = 2


def test_sampling_repeats_with_its_seed(generator: kbit.Generator) -> None:
    ids = prompt(5)
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    texts = [generator.generate(ids, seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    own = torch.Generator().manual_seed(1)
    assert torch.equal(generator.generate(ids, generator=own, **options), texts[0])
    assert not torch.equal(generator.generate(ids, generator=own, **options), texts[0])  # it goes on from where it was


@torch.inference_mode()
def test_inference_mode(generator: kbit.Generator, twin: nn.Module) -> None:
    ids = prompt(5)
    assert torch.equal(generator.generate(ids, eos_token_id=()), greedy(twin, ids, eos_token_id=None))


def test_changed_weights_are_seen() -> None:
    model = tiny()
    generator = kbit.Generator(model, MAX_LENGTH, OPTIONS)
    twin_generator = kbit.Generator(model, MAX_LENGTH, OPTIONS)
    ids, before = prompt(5), graphs()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    texts = [generator.generate(ids, eos_token_id=())]
    for assign in (False, True):  # in place, and as new tensors
        other.model.layers[0].mlp.up_proj.weight.mul_(-1)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        model.tie_weights()
        texts.append(generator.generate(ids, eos_token_id=()))
        assert torch.equal(texts[-1], greedy(dequantized_copy(model), ids, eos_token_id=None))
        # Two generators on one model do not disturb each other, and share what is packed.
        assert torch.equal(texts[-1], twin_generator.generate(ids, eos_token_id=()))
    assert not torch.equal(texts[0], texts[1]) and not torch.equal(texts[1], texts[2])
    assert graphs() == before
    assert model.config._attn_implementation == "sdpa"


def test_weights_that_the_graph_does_not_fit_are_noticed() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    module, x = Pair(), torch.randn(3, 64)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=9)
    captured = Captured(lambda x: module(x), module, [x], kbit.Config(bits=8, activation_bits=16))
    assert captured.rebind()
    assert torch.equal(captured(3, x), captured(5, torch.cat([x, x[:2]]))[:3])
    module.two.weight = nn.Parameter(module.one.weight.clone())  # no longer tied
    assert not captured.rebind()
    module.two.weight = module.one.weight
    assert captured.rebind()
    module.double()
    assert not captured.rebind()


def test_generate_makes_a_generator(generator: kbit.Generator) -> None:
    ids = prompt(4)
    text = kbit.generate(generator.model, ids, MAX_LENGTH - 4, options=OPTIONS)
    assert torch.equal(text, generator.generate(ids))


LOGITS = st.integers(0, 2**31).map(lambda seed: torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 3)


@given(logits=LOGITS, temperature=st.floats(0.01, 10), top_k=st.integers(1, 50))
def test_top_k_keeps_the_most_likely(logits: Tensor, temperature: float, top_k: int) -> None:
    probabilities, tokens = Sampling(temperature, top_k).candidates(logits)
    assert tokens is not None and tokens.shape == (3, min(top_k, 40))
    expected = (logits / temperature).topk(min(top_k, 40))
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(probabilities, expected.values.softmax(-1))


@given(logits=LOGITS, top_p=st.floats(0.01, 1, exclude_max=True), top_k=st.none() | st.integers(1, 40))
def test_top_p_keeps_the_fewest(logits: Tensor, top_p: float, top_k: int | None) -> None:
    everything, _ = Sampling(1.0, top_k).candidates(logits)
    everything = everything.sort(descending=True).values.double()
    probabilities, tokens = Sampling(1.0, top_k, top_p).candidates(logits)
    assert tokens is not None
    for row in range(3):
        kept = int((probabilities[row] > 0).sum())
        assert everything[row, :kept].sum() > top_p - 1e-5
        assert everything[row, : kept - 1].sum() < top_p + 1e-5
        assert set(tokens[row, :kept].tolist()) == set(logits[row].topk(kept).indices.tolist())
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))


def test_top_p_looks_past_its_first_candidates() -> None:
    flat = torch.zeros(1, 8 * FIRST_CANDIDATES)
    probabilities, _ = Sampling(1.0, top_p=0.5).candidates(flat)
    assert int((probabilities > 0).sum()) == 4 * FIRST_CANDIDATES


@given(seed=SEEDS)
def test_choosing_follows_the_probabilities(seed: int) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 2000
    drawn = Sampling(0.5, 3).choose(probabilities.log().expand(draws, 4) * 0.5, torch.Generator().manual_seed(seed))
    counts = drawn.bincount(minlength=4)
    assert counts[3] == 0
    expected = probabilities[:3] / probabilities[:3].sum()
    # Six standard deviations of a binomial: one run in a hundred million fails.
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert ((counts[:3] - draws * expected).abs() < 6 * deviation).all()


@given(logits=LOGITS, top_k=st.none() | st.integers(1, 9))
def test_temperature_zero_is_greedy(logits: Tensor, top_k: int | None) -> None:
    assert torch.equal(Sampling(0.0, top_k).choose(logits), logits.argmax(-1))
    assert torch.equal(Sampling(1e-30, top_k).choose(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"temperature": -1.0}, kbit.InvalidSamplingError, "temperature is -1.0"),
        ({"temperature": float("nan")}, kbit.InvalidSamplingError, "temperature is nan"),
        ({"top_k": 0}, kbit.InvalidSamplingError, "top_k is 0"),
        ({"top_p": 0.0}, kbit.InvalidSamplingError, "top_p is 0.0"),
        ({"top_p": 1.1}, kbit.InvalidSamplingError, "top_p is 1.1"),
        ({"eos_token_id": VOCABULARY}, kbit.InvalidSamplingError, "eos_token_id is 200"),
        ({"seed": 1, "generator": torch.Generator()}, kbit.InvalidSamplingError, "both seed and generator"),
        ({"max_new_tokens": 0}, kbit.TooManyTokensError, "max_new_tokens is 0"),
        ({"max_new_tokens": 28}, kbit.TooManyTokensError, "room for 1 to 27"),
        ({"ids": torch.zeros(5, dtype=torch.int64)}, kbit.InvalidPromptError, r"of shape \[1, tokens\]"),
        ({"ids": torch.zeros(2, 5, dtype=torch.int64)}, kbit.InvalidPromptError, r"int64 of shape \[2, 5\]"),
        ({"ids": torch.zeros(1, 5)}, kbit.InvalidPromptError, "float32"),
        ({"ids": [[1, 2]]}, kbit.InvalidPromptError, "the prompt is a list"),
        ({"ids": torch.full((1, 5), VOCABULARY)}, kbit.InvalidPromptError, "give 0 to 199"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, kbit.EmptyPromptError, "bos_token_id"),
        ({"ids": torch.zeros(1, MAX_LENGTH, dtype=torch.int64)}, kbit.PromptTooLongError, "max_length=32"),
        ({"attention_mask": torch.ones(1, 4)}, kbit.InvalidPaddingError, r"shape \[1, 4\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, kbit.InvalidPaddingError, "on the left"),
        ({"attention_mask": torch.zeros(1, 5)}, kbit.InvalidPaddingError, "at least one 1"),
    ],
)
def test_mistakes(generator: kbit.Generator, options: dict[str, Any], error: type[Exception], says: str) -> None:
    # At the call itself, also where the tokens come later.
    for call in (generator.generate, generator.stream):
        with pytest.raises(error, match=says):
            call(**{"ids": prompt(5)} | options)


def test_mistakes_in_making() -> None:
    model = tiny()
    for options, says in [
        ({"max_length": 1}, "'max_length' is 1"),
        ({"max_length": 65}, "64 tokens"),
        ({"batch_size": 0}, "batch"),
    ]:
        with pytest.raises(kbit.InvalidOptionError, match=says):
            kbit.Generator(model, **{"max_length": MAX_LENGTH} | options)
    with pytest.raises(kbit.UnknownOptionError, match="Did you mean 'bits'"):
        kbit.Generator(model, MAX_LENGTH, {"bit": 4})
    with pytest.raises(kbit.UnmatchedOverrideError, match="no_such_layer"):
        kbit.Generator(model, MAX_LENGTH, {"skip": ["no_such_layer"]})
    with pytest.raises(kbit.TrainingModeError, match="eval"):
        kbit.Generator(model.train(), MAX_LENGTH)
    with pytest.raises(kbit.InvalidPromptError, match="shape"):
        kbit.generate(model, torch.zeros(4), 3)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Linear(4, 4), "AutoModelForCausalLM"),
        (lambda: LlamaModel(tiny().config), "no head"),
        (models.t5, "encoder"),
    ],
)
def test_models_that_write_no_text(model: Any, says: str) -> None:
    with pytest.raises(kbit.NotACausalLMError, match=says):
        kbit.Generator(model(), MAX_LENGTH)


def test_a_model_with_an_attention_of_its_own() -> None:
    with pytest.raises(kbit.UncapturableModelError, match="SDPA"):
        kbit.Generator(models.gemma2(), MAX_LENGTH)


@pytest.mark.parametrize("trouble", [lambda x: torch._dynamo.graph_break(), lambda x: bool(x.shape[1] > 7)])
def test_a_model_that_cannot_be_captured(trouble: Any) -> None:
    model = tiny(layers=1)
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * (2 if trouble(x) else 1)
    with pytest.raises(kbit.UncapturableModelError, match="one graph for texts of any length"):
        kbit.Generator(model, MAX_LENGTH)
