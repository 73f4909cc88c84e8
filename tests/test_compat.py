import gc
import importlib
import subprocess
import sys

import torch
from torch import fx, nn

from kbit_inductor import _compat


def test_every_private_name_exists():
    importlib.reload(_compat)
    for name in _compat.__all__:
        assert hasattr(_compat, name), name


def test_private_names_that_are_looked_up_late_exist():
    tensor = torch.randn(4, 4)
    assert _compat.storage_id(tensor) == _compat.storage_id(tensor.t()) != _compat.storage_id(tensor.clone())
    assert not _compat.is_transformed(tensor)
    assert torch.vmap(lambda row: row + _compat.is_transformed(row))(torch.zeros(2, 3)).eq(1).all()
    assert _compat.is_compiled_function(torch.compile(len)) and not _compat.is_compiled_function(len)


def test_nothing_keeps_the_graph_of_what_is_compiled() -> None:
    def nodes() -> int:
        gc.collect()
        return sum(issubclass(type(each), fx.Node) for each in gc.get_objects())

    kept, counts = [], []
    for width in (24, 40):
        compiled = torch.compile(nn.Linear(16, width), backend="kbit", options={"min_elements": 0})
        with torch.no_grad():
            compiled(torch.zeros(2, 16))
        kept.append(compiled)
        counts.append(nodes())
    assert counts[0] == counts[1]  # Inductor makes patterns of its own with the first, which stay


def test_source_expressions_become_module_paths():
    source = "L['self']._modules['layers']._modules['0']._modules['fc']._parameters['weight']"
    assert _compat.member_path(source) == ["layers", "0", "fc", "weight"]
    assert _compat.member_path("L['x']") == []


def test_private_names_that_are_imported_late_exist():
    with _compat.no_size_asserts(), _compat.below_autograd(), _compat.no_modes():
        assert isinstance(_compat.graph_breaks(), dict)
    with _compat.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(2, 2))
    traced = _compat.trace(lambda x: x + 1, [fake])
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]
    compiled = _compat.inductor(traced, [fake], "default")
    assert torch.equal(compiled(torch.ones(2, 2)), torch.full((2, 2), 2.0))


def test_who_does_not_compile_does_not_wait_for_the_compiler():
    code = "import sys, kbit_inductor; print(*{'torch._dynamo', 'torch._inductor.compile_fx'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not loaded.split()
