"""A plan: the bits of each layer with the reasons. It prints as a table, is kept as JSON, and can be edited."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from kbit_inductor import alike
from kbit_inductor.atomic import replacing
from kbit_inductor.config import Config
from kbit_inductor.errors import UnmatchedOverrideError
from kbit_inductor.printed import printed


@dataclass(frozen=True)
class PlannedLayer:
    """Layers that have the same bits: one, several that share an input, or several names of one weight.

    Attributes:
        names: of the layers.
        shapes: ``(N, K)`` of each different weight.
        bits: chosen.
        nbytes: of the packed weights at these bits, scales included.
        cost: what these bits are estimated to add to the divergence from the float model (without data: relative squared error).
        reason: why these bits.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    bits: int
    nbytes: int
    cost: float
    reason: str

    @property
    def name(self) -> str:
        """All names as one: ``model.layers.0.self_attn.q_proj, k_proj``."""
        parts = [name.split(".") for name in self.names]
        begin = zip(*(each[:-1] for each in parts), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, begin))
        return ".".join([*parts[0][:shared], ", ".join(".".join(each[shared:]) for each in parts)])

    @property
    def elements(self) -> int:
        """Weights, in number."""
        return sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True)
class Plan:
    """Bits by layer, from :func:`kbit_inductor.plan`.

    Attributes:
        layers: what was decided.
        verdict: how the bits were chosen, and what the check against uniform bits gave.
        divergence: from the float model, measured: of ``"plan"``, and of ``"uniform"`` bits that are no larger. Empty without data.
    """

    layers: tuple[PlannedLayer, ...]
    verdict: str
    divergence: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, dict[str, int]]:
        """For the option ``overrides``."""
        return {name: {"bits": layer.bits} for layer in self.layers for name in layer.names}

    @property
    def average_bits(self) -> float:
        """Mean bits of a weight, scales not counted."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.bits * layer.elements for layer in self.layers) / max(elements, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, scales included."""
        return sum(layer.nbytes for layer in self.layers)

    def apply(self, config: Config | Mapping[str, Any] | None = None) -> Config:
        """``config`` with the bits of this plan. Entries of its ``overrides`` win over the plan."""
        resolved = Config.from_options(config)
        return resolved.planned(self.overrides)

    def edited(self, bits: Mapping[str, int]) -> Plan:
        """This plan with other ``bits`` for the layers named; those that share an input with one of them follow it.

        Raises:
            UnmatchedOverrideError: a name that is not in the plan.
        """
        known = {name for layer in self.layers for name in layer.names}
        if unknown := [name for name in bits if name not in known]:
            raise UnmatchedOverrideError(f"the plan has no layer {unknown[0]!r}; it has {', '.join(sorted(known)[:5])}, …")
        layers = []
        for layer in self.layers:
            wanted = [bits[name] for name in layer.names if name in bits]
            layers.append(dataclasses.replace(layer, bits=wanted[-1], reason="set by hand") if wanted else layer)
        return dataclasses.replace(self, layers=tuple(layers), verdict=self.verdict + "; edited")

    def save(self, path: str | Path) -> None:
        """Write it as JSON, to be read and edited, in place of what is there."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan that :meth:`save` has written, as it was edited since."""
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = []
        for layer in saved["layers"]:
            shapes = tuple(tuple(shape) for shape in layer["shapes"])
            layers.append(PlannedLayer(**{**layer, "names": tuple(layer["names"]), "shapes": shapes}))
        return cls(tuple(layers), saved["verdict"], saved["divergence"])

    def __rich__(self) -> Group:
        rows = alike.rows(self.layers, lambda layer: layer.name, lambda layer: (layer.shapes, layer.bits))
        each = all(len(row.items) == 1 for row in rows)
        drawn = Table(show_footer=False, box=box.SIMPLE, padding=(0, 1, 0, 0))
        for title in ("layers", "shape", "bits", "bytes", "cost", *(["why"] if each else [])):
            number = title in ("bits", "bytes", "cost")
            drawn.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for line, row in alike.lines(rows):
            drawn.add_row(line, *([] if row is None else _cells(row.items)[: 4 + each]))
        title = f"bits by layer: {self.average_bits:.2f} on average, {self.nbytes:,} bytes"
        return Group(title, drawn, *([] if each else ["why, layer by layer: in the plan as JSON"]), self.verdict)

    def __str__(self) -> str:
        return printed(self)


def _cells(layers: Sequence[PlannedLayer]) -> list[str]:
    """Of layers of one row; the reason where it is one layer's."""
    shapes = ", ".join(f"{rows} x {columns}" for rows, columns in layers[0].shapes)
    nbytes, cost = sum(layer.nbytes for layer in layers), sum(layer.cost for layer in layers)
    return [shapes, str(layers[0].bits), f"{nbytes:,}", f"{cost:.2g}", layers[0].reason]
