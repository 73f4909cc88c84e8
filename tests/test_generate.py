"""Hugging Face generation with a compiled model: the tokens of the packed weights, and no compilation per token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedTokenizerFast, pipeline

from kbit_inductor.testing import dequantized_copy, relative_error

OPTIONS = {"bits": 8, "min_elements": 0}
PROMPT = 9
NEW = 20
# Between float32 sums of the same terms in another order: the bound derived in test_transformers.py, 16 weights of at most
# 88 columns at 2^-24 each.
ROUNDING = 16 * 88 * 2**-24


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    # Weights large enough that every next token depends on the ones before.
    llama = models.with_biases(models.llama(initializer_range=0.2))
    llama.generation_config.eos_token_id = None  # it never ends early
    return llama


@pytest.fixture
def prompt() -> dict[str, Tensor]:
    """Two prompts, the second padded on the left."""
    torch.manual_seed(1)
    input_ids = models.ids(tokens=PROMPT)
    mask = torch.ones_like(input_ids)
    input_ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}


def generate(model: nn.Module, prompt: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)


def compile_forward(model: nn.Module) -> nn.Module:
    """``model`` with its forward compiled. A twin made of it afterwards would be compiled too: see :func:`twin`."""
    model.forward = torch.compile(model.forward, backend="kbit", options=OPTIONS)
    return model


def twin(model: nn.Module) -> nn.Module:
    """The oracle: the dequantized model in eager."""
    compiled = model.__dict__.pop("forward", None)
    dequantized = dequantized_copy(model)
    if compiled is not None:
        model.forward = compiled
    return dequantized


def assert_same_generation(actual: Any, expected: Any) -> None:
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert relative_error(ours, theirs) < ROUNDING, step
        # Else two tokens would be about as likely, and rounding would choose.
        best = theirs.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 2 * (ours - theirs).abs().max(), step
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(len(set(row.tolist())) > NEW // 4 for row in actual.sequences[:, PROMPT:]), "the same few tokens forever"


def graphs_compiled_by(call: Callable[[], Any]) -> int:
    before = counters["stats"]["unique_graphs"]
    call()
    return counters["stats"]["unique_graphs"] - before


def test_dynamic_cache(model: nn.Module, prompt: dict[str, Tensor]) -> None:
    compile_forward(model)
    results = []
    # The first call is compiled for the prompt's length. The second, with one token and a cache, is another graph; the
    # third sees that the cache's length changes from call to call and is compiled for any length.
    assert graphs_compiled_by(lambda: results.append(generate(model, prompt))) <= 3
    assert_same_generation(results[0], generate(twin(model), prompt))
    # 20 more tokens than ever before, so of lengths that are new.
    assert graphs_compiled_by(lambda: results.append(generate(model, prompt, max_new_tokens=2 * NEW))) == 0
    assert torch.equal(results[1].sequences[:, : PROMPT + NEW], results[0].sequences)


def test_static_cache_and_stance_force_eager(model: nn.Module, prompt: dict[str, Tensor]) -> None:
    static = {"cache_implementation": "static"}
    in_float = generate(model, prompt, **static)
    compile_forward(model)
    results = []
    # One graph for the prompt, one for every next token.
    assert graphs_compiled_by(lambda: results.append(generate(model, prompt, **static))) == 2
    expected = generate(twin(model), prompt, **static)
    assert_same_generation(results[0], expected)
    assert graphs_compiled_by(lambda: results.append(generate(model, prompt, **static))) == 0
    assert torch.equal(results[1].sequences, results[0].sequences)

    with torch.compiler.set_stance("force_eager"):
        forced = generate(model, prompt, **static)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(forced.logits, in_float.logits, strict=True))
    assert not torch.equal(forced.logits[0], results[0].logits[0])


def test_compile_config(model: nn.Module, prompt: dict[str, Tensor]) -> None:
    # mode=None: its default is a mode, and torch.compile takes either a mode or options.
    config = CompileConfig(backend="kbit", mode=None, options=OPTIONS, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    results = []

    def run() -> None:
        results.append(generate(model, prompt, cache_implementation="static", compile_config=config))

    assert graphs_compiled_by(run) == 1
    assert graphs_compiled_by(run) == 0
    assert torch.equal(results[0].sequences, results[1].sequences)
    # transformers runs the prompt in eager, so in float, and compiles what follows.
    oracle = with_other_prefill(twin(model), prefill=model)
    assert_same_generation(results[0], generate(oracle, prompt, cache_implementation="static"))


def with_other_prefill(model: nn.Module, prefill: nn.Module) -> nn.Module:
    """``model``, with ``prefill`` in its place where there is more than one token."""
    decode = model.forward

    @functools.wraps(decode)
    def forward(*arguments: Any, **options: Any) -> Any:
        return (decode if options["input_ids"].size(1) == 1 else prefill.forward)(*arguments, **options)

    model.forward = forward
    return model


def test_pipeline(model: nn.Module) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"word{i}": i for i in range(4, models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left")
    texts = [" ".join(f"word{i}" for i in range(10, 10 + length)) for length in (PROMPT, PROMPT - 3)]

    def complete(model: nn.Module) -> list[str]:
        generator = pipeline("text-generation", model=model, tokenizer=fast, device="cpu", batch_size=2)
        # Without the four special tokens, which the decoded text would leave out.
        options = {"do_sample": False, "suppress_tokens": list(range(4)), "cache_implementation": "static"}
        found = generator(texts, max_new_tokens=NEW, **options)
        return [one["generated_text"] for (one,) in found]

    compile_forward(model)
    completed: list[list[str]] = []
    assert graphs_compiled_by(lambda: completed.append(complete(model))) > 0
    assert completed[0] == complete(twin(model))
    for text, whole in zip(texts, completed[0], strict=True):
        assert whole.startswith(text)
        assert whole.count("word") == text.count("word") + NEW


@torch.no_grad()
def test_autocast_is_as_exact_as_in_eager(model: nn.Module, prompt: dict[str, Tensor]) -> None:
    compiled = torch.compile(model, backend="kbit", options=OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        actual = compiled(**prompt, use_cache=False).logits
        eager = twin(model)(**prompt, use_cache=False).logits
    exact = twin(model)(**prompt, use_cache=False).logits
    assert actual.dtype == eager.dtype == torch.bfloat16
    # Both round the same values to bfloat16, at other places. Two independent errors of size e lie √2 e apart, at most 2 e.
    rounding = relative_error(eager, exact)
    assert relative_error(actual, eager) < 2 * rounding
    assert relative_error(actual, exact) < 2 * rounding
