"""Weights with zeros: which entries are cut, and that zero stays zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kbit_inductor as kbit
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Statistics
from kbit_inductor.quantizers.pruning import pruned
from kbit_inductor.testing.strategies import GROUPS, SEEDS, normal

SPARSITIES = st.sampled_from([0.25, 0.5, 0.9, "2:4", "1:3"])


@given(
    bits=st.integers(2, 8), rows=st.integers(0, 4), columns=st.integers(0, 70), group=GROUPS, sparsity=SPARSITIES,
    name=st.sampled_from(["rtn", "clip", "hqq"]), book=st.sampled_from(["uniform", "nf"]), seed=SEEDS,
)  # fmt: skip
def test_zeros_stay_zeros_and_are_counted_in_the_error(bits, rows, columns, group, sparsity, name, book, seed):
    weight = normal((rows, columns), seed)
    packed = pack(weight, kbit.LayerConfig(bits, group, True, name, codebook=book, sparsity=sparsity))
    values, cut = packed.dequantize(), pruned(weight, sparsity) == 0
    assert (values[cut] == 0).all()
    norm = float(weight.double().square().sum())
    wanted = float((values - weight).double().square().sum()) / norm if norm else 0
    assert packed.error == pytest.approx(wanted, rel=1e-3, abs=1e-6)  # float32 sums of squares


@given(rows=st.integers(1, 4), columns=st.integers(1, 40), sparsity=SPARSITIES, weighted=st.booleans(), seed=SEEDS)
def test_as_many_stay_as_are_to_and_they_count_most(rows, columns, sparsity, weighted, seed):
    weight = normal((rows, columns), seed)
    statistics = Statistics(torch.logspace(-2, 2, columns)) if weighted else None
    kept = pruned(weight, sparsity, statistics) != 0
    scores = weight.abs() if statistics is None else weight.abs() * statistics.importance().sqrt()
    count, width = (columns - int(sparsity * columns), columns) if isinstance(sparsity, float) else map(int, sparsity.split(":"))
    for row in range(rows):
        for start in range(0, columns, width):
            block, stays = scores[row, start : start + width], kept[row, start : start + width]
            assert int(stays.sum()) == min(count, len(block))
            assert stays.all() or block[stays].min() >= block[~stays].max()


@given(rows=st.integers(0, 4), columns=st.integers(0, 40), threshold=st.sampled_from(["<0.5", "<1e-3", "<2"]), seed=SEEDS)
def test_what_is_below_a_threshold_is_cut_and_counted(rows, columns, threshold, seed):
    weight, limit = normal((rows, columns), seed), float(threshold[1:])
    kept = pruned(weight, threshold, Statistics(torch.logspace(-2, 2, columns))) if columns else pruned(weight, threshold)
    assert torch.equal(kept, weight * (weight.abs() >= limit))
    packed = pack(weight, kbit.LayerConfig(8, 8, True, sparsity=threshold))
    assert (packed.dequantize()[weight.abs() < limit] == 0).all()


def test_equal_entries_are_cut_from_the_end():
    assert pruned(torch.ones(1, 8), "2:4").tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert pruned(torch.ones(1, 3), 0.5).tolist() == [[1, 1, 0]]


def test_a_compiled_model_computes_with_the_zeros_and_its_ends_stay_whole(one_thread_without_grad):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 40)).eval()
    kbit.quantize_(model, {"bits": 4, "symmetric": True, "sparsity": "2:4"})
    assert int((model[1].weight.dequantize() != 0).view(32, 8, 4).sum(-1).max()) == 2
    for end in (model[0], model[2]):
        assert int((end.weight.dequantize() != 0).view(-1, 8, 4).sum(-1).max()) > 2
    ids = torch.arange(6)
    values = [model[i].weight.dequantize() for i in (0, 1, 2)]
    wanted = torch.nn.functional.linear(
        torch.nn.functional.linear(values[0][ids], values[1], model[1].bias), values[2], model[2].bias
    )
    # Activations have 8 bits: half a step of 1 / 127 of the largest, in each of two products whose sums add up less than that.
    assert float((model(ids) - wanted).norm() / wanted.norm()) < 2 / 127


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0, "symmetric": True}, "below 1"),
        ({"sparsity": "4:2", "symmetric": True}, "2:4"),
        ({"sparsity": True}, "2:4"),
        ({"sparsity": "<0", "symmetric": True}, "<0.01"),
        ({"sparsity": "<1e999", "symmetric": True}, "<0.01"),
        ({"sparsity": "<-1", "symmetric": True}, "<0.01"),
        ({"sparsity": 0.5}, "symmetric=True"),
        ({"sparsity": 0.5, "symmetric": True, "bits": 1}, "2 bits"),
        ({"sparsity": 0.5, "symmetric": True, "codebook": "normal"}, "'nf'"),
        ({"sparsity": 0.5, "symmetric": True, "quantizer": "gptq"}, "'gptq'"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(kbit.InvalidOptionError, match=message):
        kbit.Config(**options)
