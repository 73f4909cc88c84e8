"""Bits by layer: the exact choice, plans, and bits="auto" in the backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.amounts import byte_count, second_count
from kbit_inductor.bits import budget
from kbit_inductor.bits.divergence import Divergence, substituted
from kbit_inductor.bits.knapsack import choose
from kbit_inductor.bits.units import find_units
from kbit_inductor.lowering.cost import measure as cost_measure
from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.packing import pack

options = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20).map(float)), min_size=1, max_size=4)


@given(items=st.lists(options, max_size=5), budget=st.integers(0, 40))
def test_the_choice_is_that_of_brute_force(items, budget):
    every = itertools.product(*[range(len(item)) for item in items])
    totals = [tuple(sum(item[i][part] for item, i in zip(items, taken, strict=True)) for part in (1, 0)) for taken in every]
    fitting = [total for total in totals if total[1] <= budget]
    taken = choose(items, budget)
    if not fitting:
        assert taken is None
    else:
        assert tuple(sum(item[i][part] for item, i in zip(items, taken, strict=True)) for part in (1, 0)) == min(fitting)


def test_many_layers_of_few_sizes_are_no_many_states():
    sizes = [1 << 20, 3 << 20, 11 << 18]
    items = [[(bits * sizes[i % 3], (1 + i % 7) * 4.0**-bits) for bits in range(2, 9)] for i in range(300)]
    budget = int(3.5 * sum(sizes) * 100)
    taken = choose(items, budget)
    assert 0.999 * budget <= sum(item[i][0] for item, i in zip(items, taken, strict=True)) <= budget


class Model(nn.Module):
    """A table, two layers that share an input, one whose output hardly matters, and a head that is tied to the table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 64)
        self.left, self.right, self.idle = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        h = torch.relu(self.left(x)) * self.right(x)
        return self.head(h + 1e-3 * self.idle(x + 0.0))


@pytest.fixture
def model(one_thread_without_grad):
    torch.manual_seed(0)
    return Model().eval()


IDS = torch.arange(120).view(4, 30) % 60
AUTO = {"bits": "auto", "average_bits": 3.5}


def test_bits_go_where_they_count(model):
    plan = kbit.plan(model, AUTO, IDS)
    bits = {name: layer.bits for layer in plan.layers for name in layer.names}
    assert bits["left"] == bits["right"] > bits["idle"]
    assert {"table", "head"} in [set(layer.names) for layer in plan.layers]
    assert plan.average_bits <= 3.5 and plan.divergence["plan"] < plan.divergence["uniform"]
    assert kbit.plan(model, AUTO, IDS) == plan


@pytest.mark.parametrize("data", [None, IDS])
def test_memory_is_that_of_the_packed_model(model, data):
    budget = 8_000
    plan = kbit.plan(model, {"bits": "auto", "memory_budget": budget, "group_size": 32}, data)
    floats = sum(layer.bias.nbytes for layer in (model.left, model.right, model.idle))
    config = plan.apply({"group_size": 32})
    packed = [pack(layer.weight, config.for_layer(name)) for name, layer in model.named_modules() if name and name != "head"]
    assert plan.nbytes == sum(one.nbytes for one in packed) <= budget - floats
    smallest = min(layer.elements for layer in plan.layers) // 8  # one bit more of it would not fit
    assert plan.nbytes > budget - floats - smallest


def test_bits_that_are_set_stay(model):
    config = {**AUTO, "overrides": {"idle": {"bits": 7}, "re:.*": {"group_size": 16}}}
    for data in (None, IDS):
        plan = kbit.plan(model, config, data)
        assert plan.overrides["idle"]["bits"] == 7 and plan.average_bits <= 3.5
        assert "set by overrides" in str(plan)
        assert plan.apply(config).for_layer("idle") == kbit.LayerConfig(7, 16)
        assert plan.apply(config).for_layer("left") == kbit.LayerConfig(plan.overrides["left"]["bits"], 16)


def test_a_worse_plan_is_not_taken(model, monkeypatch):
    found = iter([0.5, 0.4])  # of the plan, and of uniform bits
    original = Divergence.of
    monkeypatch.setattr(Divergence, "of", lambda self, packed: next(found) if len(packed) == 4 else original(self, packed))
    plan = kbit.plan(model, AUTO, IDS)
    assert {layer.bits for layer in plan.layers} == {3}
    assert "diverges by 0.5, uniform 3 bits by 0.4, so these are taken" in str(plan)


def test_a_plan_tells_alike_layers_in_one_line():
    def layer(index, bits, *parts):
        return kbit.PlannedLayer(
            tuple(f"model.layers.{index}.{part}" for part in parts), ((64, 32),), bits, 100, 0.5, f"why {index}"
        )

    attention = [layer(index, 3 + index // 3, "self_attn.q_proj", "self_attn.k_proj") for index in range(4)]
    head = kbit.PlannedLayer(("model.embed_tokens", "lm_head"), ((64, 32),), 6, 100, 0.5, "set by overrides")
    assert [each.name for each in (head, attention[3])] == [
        "model.embed_tokens, lm_head",
        "model.layers.3.self_attn.q_proj, k_proj",
    ]
    told = str(kbit.Plan((head, *attention), "so it is"))
    assert "model.layers.0-2.self_attn.q_proj, k_proj  64 x 32     3    300   1.5" in told and "in the plan as JSON" in told
    assert "set by overrides" in str(kbit.Plan((head, *attention[2:]), "so it is"))  # every line is one layer's


def test_a_plan_is_kept_and_edited(model, tmp_path):
    plan = kbit.plan(model, AUTO)
    plan.save(tmp_path / "plan.json")
    assert kbit.Plan.load(tmp_path / "plan.json") == plan
    edited = plan.edited({"head": 8})
    assert edited.overrides["table"] == edited.overrides["head"] == {"bits": 8}
    with pytest.raises(kbit.UnmatchedOverrideError, match="'heat'"):
        plan.edited({"heat": 8})


def test_a_plan_without_data_says_so_and_keeps_the_ends(model):
    plan = kbit.plan(model, AUTO)
    assert "not checked" in plan.verdict and plan.divergence == {}
    assert plan.overrides["table"]["bits"] >= 3


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"bits": 4}, kbit.InvalidOptionError, "bits is 4"),
        ({"bits": "auto"}, kbit.InvalidOptionError, "0 are given"),
        ({"bits": "auto", "average_bits": 3, "memory_budget": 9}, kbit.InvalidOptionError, "2 are given"),
        ({"bits": 4, "average_bits": 3.5}, kbit.InvalidOptionError, "goes with bits='auto'"),
        ({"bits": "auto", "average_bits": 9}, kbit.InvalidOptionError, "from 1 to 8"),
        ({"bits": "auto", "memory_budget": "9 potatoes"}, kbit.InvalidOptionError, "90 MB"),
        ({"bits": "auto", "memory_budget": 1000}, kbit.BudgetError, "give more"),
        ({"bits": "auto", "memory_budget": 10}, kbit.BudgetError, "are missing without it; give more"),
        ({"bits": "best"}, kbit.InvalidOptionError, "'best'"),
        ({**AUTO, "overrides": {"re:.*": {"bits": 4}}}, kbit.BudgetError, "3.5 bits"),
    ],
)
def test_mistakes(model, config, error, message):
    with pytest.raises(error, match=message):
        kbit.plan(model, config)


def test_data_without_a_batch_is_an_error(model):
    with pytest.raises(kbit.EmptyCalibrationError):
        kbit.plan(model, AUTO, [])


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(7, 7), ("7", 7), ("90 MB", 90_000_000), ("1.5GiB", 3 << 29), ("2 kB", 2000), ("3 B", 3), ("1KiB", 1024)],
)
def test_amounts_of_memory(amount, expected):
    assert byte_count(amount) == expected


def test_weights_are_back_after_a_look(model):
    weights = {weight: pack(weight, kbit.LayerConfig(1)) for weight in (model.left.weight, model.table.weight)}
    before, addresses = model(IDS), [weight.data_ptr() for weight in weights]
    with substituted(model, weights):
        assert not torch.equal(model(IDS), before)
        with pytest.raises(IndexError):
            model(torch.full((1, 1), 1000))
    assert torch.equal(model(IDS), before) and [weight.data_ptr() for weight in weights] == addresses


def test_the_backend_chooses_bits_without_data(model):
    config = kbit.Config(**AUTO)
    report = kbit.explain(model, IDS, config=config)
    layers = [(layer.config.bits, layer.shape[0] * layer.shape[1]) for layer in report.matched]
    assert len(layers) == 4 and len({bits for bits, _ in layers}) > 1
    assert sum(bits * size for bits, size in layers) <= 3.5 * sum(size for _, size in layers)
    by_name = {layer.name: layer.config.bits for layer in report.matched}
    assert by_name["left"] == by_name["right"]
    assert torch.isfinite(torch.compile(model, backend="kbit", options=AUTO)(IDS)).all()


def test_a_plan_compiles_to_its_bits(model):
    plan = kbit.plan(model, AUTO, IDS)
    report = kbit.explain(model, IDS, config=plan.apply())
    assert {layer.name.split(" = ")[0]: layer.config.bits for layer in report.matched}.items() <= {
        name: entry["bits"] for name, entry in plan.overrides.items()
    }.items()


def test_a_released_model_keeps_its_bits(model):
    compiled = torch.compile(model, backend="kbit", options={**AUTO, "release_weights": True})
    first = compiled(IDS)
    torch._dynamo.reset()
    again = torch.compile(model, backend="kbit", options={**AUTO, "release_weights": True})(IDS)
    assert torch.equal(first, again)


@pytest.fixture
def known_cpu(monkeypatch):
    """A CPU on which reading a GB takes a second, and nothing else takes time."""
    cpu = DeviceRecord(
        name="CPU", pattern="", target="cpu", peak_bandwidth=1e9, peak_matrix_rate=1e15, clock=1e9, multiprocessors=1, lanes=1,
        l2_bytes=0, shared_memory=0, registers=0, threads=1, warp=1, source="made up", reached_bandwidth=1e9,
        reached_instruction_rate=1e15, launch=0.0,
    )  # fmt: skip
    monkeypatch.setattr(cost_measure, "record_of", lambda _: cpu)
    budget._seconds.cache_clear()
    yield
    budget._seconds.cache_clear()


def test_a_latency_budget_is_kept_by_what_is_expected(known_cpu, model):
    units = find_units(model, kbit.Config())
    in_all = {bits: sum(budget.seconds(unit, bits) for unit in units) for bits in range(1, 9)}
    # Reading takes all the time: three layers, the head, and one row of the table, which is the head's too.
    assert in_all[4] == pytest.approx(1e-9 * sum(64 * n * (4 / 8 + 4 / 64) + 4 * (64 + n) for n in (64, 64, 64, 60)), rel=1e-3)
    limit = (in_all[3] + in_all[4]) / 2
    plan = kbit.plan(model, {"bits": "auto", "latency_budget": limit}, IDS)
    assert sum(budget.seconds(unit, plan.overrides[unit.names[0]]["bits"]) for unit in units) <= limit
    assert 3 < plan.average_bits < 4 and plan.divergence["plan"] < plan.divergence["uniform"]
    assert "latency_budget" in plan.verdict
    with pytest.raises(kbit.BudgetError, match="latency_budget='1 ns'"):
        kbit.plan(model, {"bits": "auto", "latency_budget": "1 ns"}, IDS)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2 ms", 2e-3), ("300us", 3e-4), ("1.5 µs", 1.5e-6), (0.25, 0.25), ("1e-3", 1e-3), (1, 1.0)]
)
def test_seconds_are_read(text, seconds):
    assert second_count(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "0 ms", -1, True, "3 MB", float("nan")])
def test_what_is_no_time_is_told(text):
    with pytest.raises(kbit.InvalidOptionError, match="2 ms"):
        kbit.Config(bits="auto", latency_budget=text)
