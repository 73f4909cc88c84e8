"""A layout that is changed some rows at a time is the one that is changed at once, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kbit_inductor as kbit
from kbit_inductor import row_parts
from kbit_inductor.lowering.registry import cpu_library_problem
from kbit_inductor.packing import pack
from kbit_inductor.testing.strategies import SEEDS, normal

OPTIONS = [
    {"bits": 2}, {"bits": 3, "codebook": "nf"}, {"bits": 1, "symmetric": True}, {"bits": 7, "codebook": "normal", "group_size": 20},
    {"bits": 4, "group_size": -1}, {"bits": 5, "cascade": True}, {"bits": 2, "activation_bits": 2},
]  # fmt: skip
LAYOUTS = ("planes", "words", "tiled")


@given(st.sampled_from(OPTIONS), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.integers(33, 90), st.integers(1, 70), SEEDS)
def test_parts_are_the_whole(options: dict[str, object], source: str, target: str, rows: int, columns: int, seed: int) -> None:
    assert cpu_library_problem() is None  # loads it
    config = kbit.LayerConfig(**options)  # type: ignore[arg-type]
    if config.cascade and "words" in (source, target):
        source = target = "tiled"
    whole = pack(normal((rows, columns), seed), config, layout=source)
    wanted = whole.laid_out(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_parts, "AT_ONCE", 16 * columns)
        assert len(row_parts.parts(rows, columns)) > 2
        found = pack(normal((rows, columns), seed), config, layout=source).laid_out(target)
        back = found.laid_out("planes")
    assert found.rows == whole.rows == rows
    for one, other in ((found, wanted), (back, whole.laid_out("planes"))):
        assert all(torch.equal(here, there) for here, there in zip(one.operands, other.operands, strict=True))
    x = normal((2, columns), seed + 1)
    if target == "tiled":
        product = torch.ops.kbit.linear_cpu
        assert torch.equal(product(x, found.operands[0], None, rows, 16), product(x, wanted.operands[0], None, rows, 16))
