import importlib

import torch

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


def test_source_expressions_become_module_paths():
    source = "L['self']._modules['layers']._modules['0']._modules['fc']._parameters['weight']"
    assert _compat.member_path(source) == ["layers", "0", "fc", "weight"]
    assert _compat.member_path("L['x']") == []
