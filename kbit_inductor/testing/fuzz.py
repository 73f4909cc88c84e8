"""Check drawn examples for as long as one likes: ``python -m kbit_inductor.testing.fuzz --minutes 20``.

Each property is tried in batches until its share of the time is over. An example that fails is shrunk,
told, and kept in hypothesis' example database, from which the next run tries it first.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import kbit_inductor.testing.strategies as drawn  # says what to install where hypothesis is missing
from kbit_inductor.config import LayerConfig
from kbit_inductor.lowering.registry import KERNELS
from kbit_inductor.packing import pack
from kbit_inductor.testing.equivalence import assert_equivalent
from kbit_inductor.testing.kernels import Case, check_case

BATCH = 200
ROOT = f"{Path(__file__).resolve().parents[2]}/"
"""What paths begin with in a failure, which is kept for readers elsewhere."""


def packing(data: Any) -> None:
    """A packed weight has the shape of the float one, and codes that can hold it exactly do."""
    bits, group_size = data.draw(drawn.BITS), data.draw(drawn.GROUPS)
    exact = data.draw(st.booleans())
    weight = data.draw(drawn.weights(st.just(bits), group_size, ["exact"] if exact else drawn.WEIGHTS[:-1]))
    restored = pack(weight, LayerConfig(bits, group_size, quantizer="rtn")).dequantize()
    assert restored.shape == weight.shape and bool(torch.isfinite(restored).all())
    assert not exact or group_size == 1 or torch.equal(restored, weight)


def kernels(data: Any) -> None:
    """Every kernel that takes a product or look-up is within the bound of its definition."""
    case: Case = data.draw(drawn.cases())
    for kernel in KERNELS:
        if kernel.supports(case.problem("cpu")) is None:
            check_case(kernel, case)


def models(data: Any) -> None:
    """A model as the passes leave it means what it meant, and its packed operators are within their bounds."""
    module, width = data.draw(drawn.modules().filter(lambda pair: any(p.dim() >= 2 for p in pair[0].parameters())))
    x = data.draw(drawn.inputs(module, width))
    assert_equivalent(module.eval(), x, data.draw(drawn.options()), through_inductor=False, dynamic=data.draw(st.booleans()))


SHARES = {packing: 0.1, kernels: 0.3, models: 0.6}
"""The part of the time that each property is tried for."""


@dataclass
class Outcome:
    """What became of one property.

    Attributes:
        examples: how many were drawn and checked.
        seconds: that took.
        failure: of the first that failed, after shrinking; "" where none did.
    """

    examples: int = 0
    seconds: float = 0.0
    failure: str = ""


def fuzz(checked: Callable[[Any], None], seconds: float, database: Path) -> Outcome:
    """Try ``checked`` on batches of examples until ``seconds`` are over or one fails."""
    outcome, start = Outcome(), time.perf_counter()

    @functools.wraps(checked)  # by its source the database knows it
    def count(data: Any) -> None:
        torch._dynamo.reset()
        with torch.no_grad():
            checked(data)
        outcome.examples += 1

    long = settings(
        max_examples=BATCH,
        deadline=None,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(database),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    while (spent := time.perf_counter() - start) < seconds:
        try:
            long(given(st.data())(count))()
        except Exception as error:  # whatever it is, it is the outcome
            told = f"{type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", ()))
            outcome.failure = told.replace(ROOT, "")
            break
    outcome.seconds = round(time.perf_counter() - start if outcome.failure else spent, 1)
    return outcome


def main(
    minutes: Annotated[float, typer.Option(help="How long, in all.")] = 10.0,
    database: Annotated[Path, typer.Option(help="Where failing examples are kept.")] = Path(".hypothesis/examples"),
    record: Annotated[Path | None, typer.Option(help="A JSON file that the outcome is added to.")] = None,
) -> None:
    """Check drawn weights, products and models; ends with 1 where one failed."""
    torch.set_num_threads(1)
    outcomes = {}
    for checked, share in SHARES.items():
        outcome = outcomes[checked.__name__] = fuzz(checked, 60 * minutes * share, database)
        typer.echo(
            f"{checked.__name__}: {outcome.examples} examples in {outcome.seconds:.0f} s, {outcome.failure or 'none failed'}"
        )
    if record is not None:
        runs = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
        runs.append({"torch": torch.__version__, **{name: asdict(each) for name, each in outcomes.items()}})
        record.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(any(outcome.failure for outcome in outcomes.values()))


if __name__ == "__main__":
    typer.run(main)
