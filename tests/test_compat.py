import importlib

from kbit_inductor import _compat


def test_every_private_name_exists():
    importlib.reload(_compat)
    for name in _compat.__all__:
        assert hasattr(_compat, name), name


def test_source_expressions_become_module_paths():
    source = "L['self']._modules['layers']._modules['0']._modules['fc']._parameters['weight']"
    assert _compat.member_path(source) == ["layers", "0", "fc", "weight"]
    assert _compat.member_path("L['x']") == []
