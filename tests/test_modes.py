"""The ways in which torch.compile and a model's weights can be set up."""

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.store import STORE


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def assert_compiled_is_right(compiled, model, x):
    with torch.no_grad():
        actual = compiled(x)
        # Two products summed in another order than eager's.
        assert relative_error(actual, dequantized_copy(model)(x)) < 1e-5


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_as_torch_compile_takes_it(mode):
    model = Model()
    assert_compiled_is_right(torch.compile(model, backend="kbit", mode=mode), model, torch.randn(3, 64))


def test_mode_as_an_option_and_config_as_options():
    for options in ({"mode": "max-autotune-no-cudagraphs", "bits": 3}, kbit.Config(bits=3)):
        torch._dynamo.reset()
        model = Model()
        compiled = torch.compile(model, backend="kbit", options=options)
        assert_compiled_is_right(compiled, model, torch.randn(3, 64))
        assert [packed.config.bits for _, packed in STORE.packed_forms(model.up.weight)] == [3]


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_dynamic_and_fullgraph(dynamic, fullgraph):
    model = Model()
    compiled = torch.compile(model, backend="kbit", dynamic=dynamic, fullgraph=fullgraph)
    for rows in (2, 5, 9):
        assert_compiled_is_right(compiled, model, torch.randn(rows, 64))


def test_dynamic_true_compiles_once_for_all_batches():
    model = Model()
    compiled = torch.compile(model, backend="kbit", dynamic=True)
    assert_compiled_is_right(compiled, model, torch.randn(4, 64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 7, 33):
            assert_compiled_is_right(compiled, model, torch.randn(rows, 64))


def test_stance_force_eager_runs_the_float_model():
    model, x = Model(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="kbit", options={"bits": 2})
    with torch.no_grad():
        quantized = compiled(x)
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x), quantized)


def test_inductors_freezing_leaves_weights_in_float_and_says_so(caplog):
    model, x = Model(), torch.randn(3, 64)
    with torch._inductor.config.patch(freezing=True), torch.no_grad(), caplog.at_level("WARNING", "kbit_inductor"):
        actual = torch.compile(model, backend="kbit", options={"bits": 1})(x)
        torch.testing.assert_close(actual, model(x))
    assert "freezing = False" in caplog.text


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = Model()
        x = torch.randn(3, 64)
        actual = torch.compile(model, backend="kbit")(x)
        assert STORE.packed_forms(model.up.weight)
        assert relative_error(actual, dequantized_copy(model)(x)) < 1e-5


def test_a_parameter_that_is_no_modules_own():
    weight = nn.Parameter(torch.randn(64, 64) / 8)

    @torch.compile(backend="kbit")
    def product(x):
        return x @ weight

    x = torch.randn(3, 64)
    with torch.no_grad():
        product(x)
        ((view, packed),) = STORE.packed_forms(weight)
        assert relative_error(product(x), x @ packed.dequantize().t()) < 1e-5
        assert view.apply(weight).shape == (64, 64)


def test_a_warning_names_a_weight_that_changes_at_every_call(caplog):
    model, x = Model(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="kbit")
    with torch.no_grad(), caplog.at_level("WARNING", "kbit_inductor"):
        for _ in range(6):
            compiled(x)
            model.up.weight.mul_(1.01)
    warnings = [record.message for record in caplog.records if "packed again each time" in record.message]
    assert len(warnings) == 1
    assert "up" in warnings[0]


def test_the_reference_takes_over_visibly_without_a_compiler(monkeypatch, caplog):
    from kbit_inductor.lowering import registry

    monkeypatch.setattr(registry, "cpu_library_problem", lambda: "no g++ here")
    model, x = Model(), torch.randn(3, 64)
    with torch.no_grad(), caplog.at_level("WARNING", "kbit_inductor"):
        assert_compiled_is_right(torch.compile(model, backend="kbit"), model, x)
        layer = kbit.explain(model, x).layers[0]
    assert layer.kernels == ("reference",)
    assert layer.rejected["cpu"] == "no g++ here"
    assert sum("slow reference kernel" in record.message for record in caplog.records) == 1
