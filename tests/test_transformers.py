"""Twelve transformers architectures: every constant weight matrix is packed, and the output is that of the packed weights."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn

from kbit_inductor import backend
from kbit_inductor.capture import Context
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.store import STORE

QUANTIZATION_BOUND = 0.02  # what the project promises for 8 bits
UNIT_ROUNDOFF = 2**-24  # of float32

# All that stays in float, by architecture, and why. Anything else there would be a silent fallback.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "Whisper": {
        # An nn.Embedding, but its forward pass is weight[start:stop], which is added.
        "model.decoder.embed_positions": "used by getitem",
    },
    "ViT": {
        "vit.embeddings.cls_token": "used by cat",
        "vit.embeddings.position_embeddings": "used by add",
    },
    "Mamba": {
        f"backbone.layers.{layer}.mixer.{name}": reason
        for layer in range(2)
        for name, reason in (("conv1d", "used by a depthwise convolution"), ("A_log", "used by exp"))
    },
}


# What is said of weights that are packed.
TOLD: dict[str, dict[str, str]] = {"Gemma2": {"model.embed_tokens": "the softcap that follows"}}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that has rows and columns, under the name that the backend gives it."""
    members = [*model.named_parameters(), *model.named_buffers()]
    return {name.removesuffix(".weight"): value for name, value in members if value.dim() >= 2 and value.is_floating_point()}


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """The context of every graph that is compiled."""
    seen: list[Context] = []
    original = backend.capture

    def recording(*arguments: object) -> object:
        captured = original(*arguments)
        assert captured is not None, "a graph without any match"
        seen.append(captured[1])
        return captured

    monkeypatch.setattr(backend, "capture", recording)
    return seen


COMPILED = ("Llama", "T5", "Mixtral", "Mamba")
"""Compiled to the end, by Inductor, ten seconds each. Of the others, the graph that Inductor is given is run as it is."""


@pytest.mark.parametrize("name", models.MODELS)
@torch.no_grad()
def test_architecture(name: str, contexts: list[Context], monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in COMPILED:
        monkeypatch.setattr(backend, "inductor", lambda graph, inputs, mode: graph)
    model, inputs = models.build(name)
    expected = model(**inputs)[0]
    # fullgraph: a graph break is an error. All twelve have none in float, so the backend may add none.
    compiled = torch.compile(model, backend="kbit", options={"bits": 8, "min_elements": 0}, fullgraph=True)
    actual = compiled(**inputs)[0]

    # No silent fallback: each weight is packed once or excused, whatever else reads it is excused too, and every excuse
    # is for a weight that exists.
    exceptions = EXCEPTIONS.get(name, {})
    forms = {layer: STORE.packed_forms(weight) for layer, weight in weights(model).items()}
    assert {layer: len(packed) for layer, packed in forms.items()} == {layer: layer not in exceptions for layer in forms}
    (context,) = contexts
    expected_reasons = exceptions | TOLD.get(name, {})
    assert context.reasons.keys() == expected_reasons.keys()
    for layer, reason in expected_reasons.items():
        assert all(told.startswith(reason) for told in context.reasons[layer]), context.reasons[layer]

    # The compiled model adds the same float32 numbers as the dequantized one, in another order. A sum of K terms then
    # differs by at most K unit roundoffs of the terms' magnitude, and what one product is off passes through the next
    # ones, of which there are at most as many as weights: 1e-4 or so, one hundredth of what the codes are off.
    packed = [form for found in forms.values() for _, form in found]
    rounding = len(packed) * max(form.columns for form in packed) * UNIT_ROUNDOFF
    dequantized = dequantized_copy(model)(**inputs)[0]
    assert relative_error(dequantized, expected) > 10 * rounding  # or the next line would not tell the two apart
    assert relative_error(actual, dequantized) < rounding
    assert relative_error(actual, expected) < QUANTIZATION_BOUND


def test_every_matrix_layer_of_these_models_is_among_the_weights() -> None:
    # What test_architecture counts are parameters; here the modules that hold them are counted.
    for name in models.MODELS:
        model, _ = models.build(name)
        layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") or isinstance(m, nn.Embedding)]
        packed = {id(w) for layer, w in weights(model).items() if layer not in EXCEPTIONS.get(name, {})}
        left_out = [m for m in layers if id(m.weight) not in packed]
        # Whisper's table of positions is the one exception that is such a layer.
        assert [type(m).__name__ for m in left_out] == ["WhisperPositionalEmbedding"] * (name == "Whisper"), name
