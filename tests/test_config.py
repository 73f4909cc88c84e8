import pytest
import torch

import kbit_inductor as kbit
from kbit_inductor import logs
from kbit_inductor.config import Config, LayerConfig


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0}, {"bits": 9}, {"bits": 4.0}, {"bits": True}, {"bits": "four"}, {"group_size": 0}, {"group_size": -2},
        {"group_size": 1.5}, {"symmetric": 1}, {"quantizer": "magic"}, {"min_elements": -1}, {"release_weights": "yes"},
        {"mode": "fastest"}, {"skip": "lm_head"}, {"skip": [3]}, {"overrides": [1]}, {"overrides": {"a": 3}},
        {"overrides": {"a": {"bits": 99}}}, {"overrides": {"re:(": {"bits": 2}}}, {"overrides": {3: {"bits": 2}}},
    ],
)  # fmt: skip
def test_a_bad_value_names_its_option(options):
    with pytest.raises(kbit.InvalidOptionError, match=next(iter(options)).rstrip("s")):
        Config.from_options(options)


@pytest.mark.parametrize("options", [4, "bits=4", LayerConfig(bits=4)])
def test_what_holds_no_options_is_refused(options):
    with pytest.raises(kbit.InvalidOptionError, match=r"give a mapping such as \{'bits': 4\}, or a Config"):
        Config.from_options(options)


def test_an_unknown_option_lists_the_known_ones_and_the_closest():
    with pytest.raises(kbit.UnknownOptionError, match=r"'bit'.*Did you mean 'bits'.*group_size"):
        Config.from_options({"bit": 3})
    with pytest.raises(kbit.UnknownOptionError, match=r"override 'a'.*'skip'"):
        Config.from_options({"overrides": {"a": {"skip": True}}})


def test_every_mistake_is_a_kbit_error():
    for name in ("UnknownOptionError", "InvalidOptionError", "UnmatchedOverrideError", "NonFiniteWeightError"):
        assert issubclass(getattr(kbit, name), kbit.KbitError)


def test_options_and_config_are_the_same_thing():
    options = {"bits": 3, "group_size": 32, "overrides": {"a": {"bits": 8}}, "skip": ["b"]}
    assert Config.from_options(options) == Config(bits=3, group_size=32, overrides={"a": {"bits": 8}}, skip=("b",))
    assert Config.from_options(Config(bits=3), mode="max-autotune") == Config(bits=3, mode="max-autotune")


def test_the_last_override_that_matches_wins_and_skip_beats_all():
    config = Config(bits=4, overrides={"re:.*mlp.*": {"bits": 2}, "x.mlp.up": {"bits": 8}}, skip=("re:head.*",))
    assert config.for_layer("x.mlp.down") == LayerConfig(bits=2)
    assert config.for_layer("x.mlp.up") == LayerConfig(bits=8)
    assert config.for_layer("x.attn") == LayerConfig(bits=4)
    assert config.for_layer("head.0") is None


def test_patterns_match_whole_names():
    assert Config(overrides={"re:fc": {"bits": 2}}).for_layer("fc1") == LayerConfig()


@pytest.mark.parametrize(("group_size", "columns", "expected"), [(-1, 70, 70), (64, 70, 64), (64, 10, 10), (-1, 0, 1), (64, 0, 1)])
def test_a_group_is_no_wider_than_the_row(group_size, columns, expected):
    assert LayerConfig(group_size=group_size).group_columns(columns) == expected


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bits": 9}, kbit.InvalidOptionError),
        ({"bitz": 4}, kbit.UnknownOptionError),
        ({"overrides": {"third": {"bits": 2}}}, kbit.UnmatchedOverrideError),
        ({"skip": ["third"]}, kbit.UnmatchedOverrideError),
    ],
)
def test_torch_compile_raises_our_own_class_at_every_call(options, error):
    compiled = torch.compile(TwoLayers(), backend="kbit", options=options)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(error):
            compiled(torch.randn(2, 64))


def test_a_weight_with_nan_is_named_and_can_be_mended():
    model = TwoLayers()
    model.second.weight.data[0, 0] = float("nan")
    compiled = torch.compile(model, backend="kbit")
    x = torch.randn(2, 64)
    with torch.no_grad():
        with pytest.raises(kbit.NonFiniteWeightError, match="'second'"):
            compiled(x)
        model.second.weight[0, 0] = 0.0
        assert torch.isfinite(compiled(x)).all()


def test_log_settings():
    import logging

    assert logs.parse("+capture,pack,-release") == {
        "capture": logging.DEBUG,
        "pack": logging.INFO,
        "release": logging.ERROR,
    }
    assert logs.parse("all") == dict.fromkeys(logs.TOPICS, logging.INFO)
    assert logs.parse("") == {}
    with pytest.raises(kbit.InvalidOptionError, match=r"'captur'.*known topics"):
        logs.parse("captur")


def test_a_mistake_in_the_log_setting_is_our_own_error(monkeypatch):
    monkeypatch.setenv("KBIT_LOGS", "captur")
    with torch.no_grad(), pytest.raises(kbit.InvalidOptionError, match="KBIT_LOGS"):
        torch.compile(TwoLayers(), backend="kbit")(torch.randn(2, 64))


def test_chosen_topics_are_printed(capsys):
    import logging

    root = logging.getLogger("kbit_inductor")
    try:
        logs.configure("pack")
        logs.logger("pack").info("packed something")
        logs.logger("capture").info("captured something")
        assert "packed something" in capsys.readouterr().err
    finally:
        logs.logger("pack").setLevel(logging.NOTSET)
        root.handlers.clear()
        root.propagate = True
