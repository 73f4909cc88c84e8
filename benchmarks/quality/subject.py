"""A model that is measured, with the text it predicts and what it is calibrated on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.calibration import Calibration
from quality import measures
from quality.methods import Method, ours
from quality.rounding import matrices, rounded


class Subject:
    """What takes long is done when it is first asked for, and once.

    Args:
        model: a causal language model on float weights.
        text: to be predicted, token ids ``[windows, length]``.
        other: the same of another text, for calibration.
    """

    def __init__(self, model: nn.Module, text: Tensor, other: Tensor) -> None:
        self.model, self.text, self.other = model, text, other
        self._statistics: dict[str, Calibration] = {}

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """Log-probabilities of the float model."""
        return measures.logits(self.model, self.text)

    @functools.cached_property
    def own(self) -> Tensor:
        """As much text as ``other``, which the model has written itself."""
        return kbit.own_text(self.model, *self.other.shape)

    @functools.cached_property
    def random(self) -> Tensor:
        """As many tokens drawn at random."""
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return torch.randint(vocabulary, self.other.shape, generator=torch.Generator().manual_seed(0))

    def data(self, text: str) -> Tensor:
        """What to calibrate on: :attr:`Method.text`."""
        tokens: Tensor = getattr(self, text)
        return tokens

    def statistics(self, text: str, options: Mapping[str, Any] | None = None) -> Calibration:
        """Of the inputs of all layers, and the codes learned with ``options``, if given."""
        if options is not None:
            return kbit.calibrate(self.model, self.data(text).split(1), options)
        if text not in self._statistics:
            self._statistics[text] = kbit.calibrate(self.model, self.data(text).split(1), {"quantizer": "gptq"})
        return self._statistics[text]

    @torch.no_grad()
    def row(self, method: Method) -> dict[str, Any]:
        """The results of ``method``, or why there are none."""
        row: dict[str, Any] = {"family": method.family, "name": method.name}
        if (missing := method.reason_missing()) is not None:
            return {**row, "missing": missing}
        with rounded(method, self.model, self.statistics(method.text, method.options)) as bits:
            return {**row, "bits": bits, **self.scores(measures.logits(self.model, self.text))}

    def planned(self, family: str, name: str, options: Mapping[str, Any], text: str) -> dict[str, Any]:
        """The results of ``bits="auto"``, planned on the first of the calibration data."""
        asked = {"bits": "auto", "quantizer": "gptq", **options, "calibration": self.statistics(text)}
        plan = kbit.plan(self.model, asked, self.data(text)[:2].split(1))
        config = plan.apply(asked)
        names = {id(module.weight): name for name, module in self.model.named_modules() if hasattr(module, "weight")}
        layers = iter([config.for_layer(names[id(weight)]) for weight in matrices(self.model)])
        method = Method(family, name, lambda weight, seen: ours(next(layers), True, weight, seen), text=text)  # type: ignore[arg-type]
        return {**self.row(method), "verdict": plan.verdict}

    def budget(self, bits: float) -> int:
        """The bytes of all weights at ``bits`` in all for each weight of a matrix."""
        packed = sum(weight.numel() for weight in matrices(self.model))
        floats = sum(weight.nbytes for weight in self.model.parameters()) - 4 * packed
        return floats + int(bits * packed / 8)

    def scores(self, found: list[Tensor]) -> dict[str, Any]:
        """Of log-probabilities."""
        return measures.score(found, self.exact, self.text).summary()
