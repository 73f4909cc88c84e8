"""The options of the backend: what ``options=`` of ``torch.compile`` takes and :class:`Config` holds are the same thing."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kbit_inductor.amounts import byte_count, second_count
from kbit_inductor.calibration import Calibration
from kbit_inductor.errors import InvalidOptionError, UnknownOptionError
from kbit_inductor.kernels.layout import FP8, MAX_BITS
from kbit_inductor.quantizers import CODEBOOK_NAMES, QUANTIZERS, Codebook, Format, codebook
from kbit_inductor.quantizers.codebooks import UNIFORM, ZERO, is_codebook
from kbit_inductor.quantizers.pruning import is_sparsity
from kbit_inductor.quantizers.registry import LEARNING
from kbit_inductor.quantizers.registry import find as find_quantizer

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PLACEHOLDER_BITS = 4  # of layers whose bits no plan has chosen
AUTO_ACTIVATION_BITS = 8  # what "auto" means for the kernels of the CPU
BUDGETS = ("average_bits", "memory_budget", "latency_budget")
LAYER_OPTIONS = (
    "bits", "group_size", "symmetric", "quantizer", "activation_bits", "codebook", "cascade", "sparsity", "low_rank", "outliers",
    "bias_correction",
)  # fmt: skip
WITHOUT_SIDE: Mapping[str, Any] = {"low_rank": 0, "outliers": 0.0, "bias_correction": False}


@dataclass(frozen=True)
class LayerConfig:
    """How one weight is stored.

    Args:
        bits: bits per code, 1 to 8.
        group_size: columns that share a scale, at least 1, or -1 for a whole row. It need not divide the row.
        symmetric: store a scale per group only, and no offset.
        quantizer: name of the method that chooses codes, one of ``kbit_inductor.quantizers.QUANTIZERS``.
        activation_bits: what the layer's input is rounded to on the fly: 1 to 8 bits (integers, with a scale for at most 128
            columns of a group), or 16: not rounded. ``"auto"`` is 8 on a CPU and 16 elsewhere. ``"fp8"`` is 8-bit floats (e4m3)
            with a scale for each row on a GPU, and 8 on a CPU.
        codebook: what codes stand for between the ends of a group: ``"uniform"``, an even grid, ``"normal"``, the levels with the
            least squared error for a Gaussian, or ``"nf"``, its quantiles. At 1 and 8 bits they are all the same. Or levels of
            one's own, ``2 ** bits`` of them from 0 to 255, as a text: ``"0 90 166 255"`` (:func:`kbit_inductor.learn_codebooks`).
        cascade: store nested codes: the first k of the ``bits`` are the model of k bits, which ``kbit_inductor.precision`` chooses
            at run time. On a CPU only; it has offsets, no codebook, and a search of its own.
        sparsity: the share of each row that is set to zero before it is quantized, or ``"2:4"`` and the like: at most 2 of each 4
            neighbours stay. By Wanda with a calibration, by magnitude without. Or ``"<0.01"``: entries of a smaller magnitude. It
            goes with ``symmetric``, whose grid holds zero, and with quantizers that look at one entry at a time.
        low_rank: rank of a float term beside the product of the codes, which makes good most of what they have lost; 0 for none.
        outliers: share of the input columns, 0 to 1, whose weights stay in float: those whose rounding costs most.
        bias_correction: add to the bias what the outputs lack on average, with a calibration, which knows the mean of the inputs.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    quantizer: str = "clip"
    activation_bits: int | str = "auto"
    codebook: str = "uniform"
    cascade: bool = False
    sparsity: float | str = 0.0
    low_rank: int = 0
    outliers: float = 0.0
    bias_correction: bool = False

    def __post_init__(self) -> None:
        self._check_bits()
        _integer("group_size", self.group_size, lambda v: v == -1 or v >= 1, "a positive integer, or -1 for a whole row")
        if not isinstance(self.symmetric, bool):
            raise InvalidOptionError(f"option 'symmetric' is {self.symmetric!r}; give True or False")
        if find_quantizer(self.quantizer) is None:
            raise InvalidOptionError(f"option 'quantizer' is {self.quantizer!r}; give one of {', '.join(sorted(QUANTIZERS))}")
        if self.activation_bits not in ("auto", "fp8"):
            wanted = "an integer from 1 to 8, 16, 'fp8' or 'auto'"
            _integer("activation_bits", self.activation_bits, lambda v: 1 <= v <= MAX_BITS or v == 16, wanted)
        if not is_codebook(self.codebook, self.bits):
            names = ", ".join(CODEBOOK_NAMES)
            raise InvalidOptionError(
                f"option 'codebook' is {self.codebook!r}; give {names}, or a text of 2 ** bits levels that ascend from 0 to 255"
            )
        if not isinstance(self.cascade, bool):
            raise InvalidOptionError(f"option 'cascade' is {self.cascade!r}; give True or False")
        if self.cascade and (self.symmetric, self.quantizer, self.codebook) != (False, "clip", "uniform"):
            raise InvalidOptionError(
                "option 'cascade' finds codes and offsets by a search of its own; leave 'symmetric', 'quantizer' and 'codebook' out"
            )
        self._check_sparsity()
        self._check_side()

    def _check_side(self) -> None:
        _integer("low_rank", self.low_rank, lambda v: v >= 0, "an integer, zero or more")
        share = self.outliers
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise InvalidOptionError(f"option 'outliers' is {share!r}; give a share of the columns, from 0 to 1")
        if not isinstance(self.bias_correction, bool):
            raise InvalidOptionError(f"option 'bias_correction' is {self.bias_correction!r}; give True or False")
        name = next((name for name, none in WITHOUT_SIDE.items() if getattr(self, name) != none), None)
        if name is None:
            return
        if self.cascade:
            raise InvalidOptionError(f"option {name!r} does not go with 'cascade', whose codes lose more with fewer planes")
        if name != "bias_correction" and QUANTIZERS[self.quantizer].needs in LEARNING:
            raise InvalidOptionError(
                f"option {name!r} does not go with the quantizer {self.quantizer!r}, whose codes are not to be near the weight; "
                "give another one, 'gptq' for one"
            )

    @property
    def without_side(self) -> LayerConfig:
        """The same without floats beside the codes."""
        return dataclasses.replace(self, **WITHOUT_SIDE)

    def _check_sparsity(self) -> None:
        if not is_sparsity(self.sparsity):
            raise InvalidOptionError(f"option 'sparsity' is {self.sparsity!r}; give a share from 0 to below 1, '2:4' or '<0.01'")
        if not self.sparsity:
            return
        if not self.symmetric or self.bits in (1, "auto") or ZERO not in (self.levels() or (ZERO,)):
            raise InvalidOptionError(
                "option 'sparsity' needs a grid that holds zero; give with it symmetric=True, 2 bits or more, and the codebook "
                "'uniform' or 'nf'"
            )
        if QUANTIZERS[self.quantizer].needs not in ("nothing", "squares"):
            raise InvalidOptionError(
                f"option 'sparsity' does not go with the quantizer {self.quantizer!r}, which would put into the zeros what other "
                "entries lose; give 'clip', 'hqq' or 'rtn'"
            )

    def _check_bits(self) -> None:
        _integer("bits", self.bits, lambda v: 1 <= v <= MAX_BITS, f"an integer from 1 to {MAX_BITS}")

    def storage(self) -> LayerConfig:
        """The part that says how the weight is stored: equal for layers that can share a packed weight."""
        name = self.codebook if self.levels() else "uniform"
        return dataclasses.replace(self, activation_bits="auto", codebook=name)

    def activation_bits_on(self, device: str) -> int:
        """What kernels of a device, ``"cpu"`` or another one, round activations to: 1 to 8, ``FP8``, or 16 where they do not."""
        if isinstance(self.activation_bits, str):
            elsewhere = FP8 if self.activation_bits == "fp8" else 16
            return AUTO_ACTIVATION_BITS if device == "cpu" else elsewhere
        return self.activation_bits

    def levels(self) -> Codebook | None:
        """The levels that codes stand for; None where every code is its own."""
        return codebook(self.codebook, self.bits)

    def format(self, columns: int) -> Format:
        """The form of the codes of a weight with rows of ``columns``."""
        return Format(self.bits, self.group_columns(columns), self.symmetric, self.levels())

    def group_columns(self, columns: int) -> int:
        """The group size in columns for a row of ``columns``: never more than the row, at least 1."""
        whole = max(columns, 1)
        return whole if self.group_size == -1 else min(self.group_size, whole)


@dataclass(frozen=True)
class Config(LayerConfig):
    """Every option of the backend.

    Args:
        bits: as for a layer, or ``"auto"``: chosen for each layer under one of the three budgets.
        end_bits: the least bits, 1 to 8, of the ends of a model, which are tables and the head, where neither a plan nor
            ``overrides`` have set theirs. A head is a last product with as many rows as a table.
        average_bits: mean bits of a weight, scales not counted.
        memory_budget: bytes of all the model's weights, packed or not, as a number or a text such as ``"90 MB"``.
        latency_budget: seconds that all products on packed weights may take for one row, such as a token, as the cost model expects
            on the device that the weights are on: a number or a text such as ``"2 ms"``.
        skip: layer names, or ``"re:…"`` patterns, that stay in float.
        overrides: layer name, or ``"re:…"`` pattern (matched against the whole name), to a mapping with any of the options
            above. The last entry that matches wins.
        min_elements: weights with fewer elements stay in float.
        release_weights: free the float weights once they are packed.
        mode: as in ``torch.compile``; it reaches Inductor.
        debug: check the graph after each pass, and log what the pass did: see docs/extending/pass.md. Slow.
        calibration: statistics of the layers' inputs, from :func:`kbit_inductor.calibrate`, for the quantizers that use them.

    Raises:
        UnknownOptionError: (from :meth:`from_options`) a name that is no option.
        InvalidOptionError: a value that its option does not take.
    """

    bits: int | Literal["auto"] = 4  # type: ignore[assignment]  # a layer's bits are a number in the end
    end_bits: int = 6
    average_bits: float | None = None
    memory_budget: int | str | None = None
    latency_budget: float | str | None = None
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    min_elements: int = 1024
    release_weights: bool = False
    mode: str = "default"
    debug: bool = False
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("end_bits", self.end_bits, lambda v: 1 <= v <= MAX_BITS, f"an integer from 1 to {MAX_BITS}")
        _integer("min_elements", self.min_elements, lambda v: v >= 0, "an integer, zero or more")
        for name in ("release_weights", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidOptionError(f"option {name!r} is {getattr(self, name)!r}; give True or False")
        if self.mode not in MODES:
            raise InvalidOptionError(f"option 'mode' is {self.mode!r}; give one of {', '.join(MODES)}")
        if isinstance(self.skip, str) or not all(isinstance(name, str) for name in self.skip):
            raise InvalidOptionError(f"option 'skip' is {self.skip!r}; give a list of layer names or 're:…' patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            kind = type(self.calibration).__name__
            raise InvalidOptionError(f"option 'calibration' is a {kind}; give what kbit_inductor.calibrate(model, data) returns")
        if not isinstance(self.overrides, Mapping):
            raise InvalidOptionError(f"option 'overrides' is {self.overrides!r}; give a mapping from layer names to options")
        for pattern, options in self.overrides.items():
            _check_override(pattern, options)
        for pattern in (*self.skip, *self.overrides):
            _check_pattern(pattern)

    def _check_bits(self) -> None:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if self.bits != "auto":
            super()._check_bits()
            if budgets:
                raise InvalidOptionError(f"option {budgets[0]!r} goes with bits='auto'; bits is {self.bits!r}")
            return
        if len(budgets) != 1:
            raise InvalidOptionError(f"bits='auto' goes with one of {', '.join(BUDGETS)}; {len(budgets)} are given")
        average = self.average_bits
        if average is not None and (
            isinstance(average, bool) or not isinstance(average, (int, float)) or not 1 <= average <= MAX_BITS
        ):
            raise InvalidOptionError(f"option 'average_bits' is {average!r}; give a number from 1 to {MAX_BITS}")
        if self.memory_budget is not None:
            byte_count(self.memory_budget)
        if self.latency_budget is not None:
            second_count(self.latency_budget)

    @property
    def budget_seconds(self) -> float | None:
        """``latency_budget`` in seconds."""
        return None if self.latency_budget is None else second_count(self.latency_budget)

    @property
    def budget_bytes(self) -> int | None:
        """``memory_budget`` in bytes."""
        return None if self.memory_budget is None else byte_count(self.memory_budget)

    def pinned_bits(self, name: str) -> int | None:
        """The bits that ``overrides`` set for layer ``name``, or None."""
        pinned = [options["bits"] for pattern, options in self.overrides.items() if "bits" in options and matches(pattern, name)]
        return pinned[-1] if pinned else None

    def planned(self, overrides: Mapping[str, Mapping[str, Any]]) -> Config:
        """This config with the bits chosen: ``overrides`` come before its own, so that its own win."""
        ours = {name: {**overrides.get(name, {}), **own} for name, own in self.overrides.items()}
        merged = {**{name: bits for name, bits in overrides.items() if name not in ours}, **ours}
        bits = PLACEHOLDER_BITS if self.bits == "auto" else self.bits
        return dataclasses.replace(self, bits=bits, average_bits=None, memory_budget=None, latency_budget=None, overrides=merged)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Config | None, mode: str | None = None) -> Config:
        """The config that ``torch.compile(…, mode=mode, options=options)`` asks for.

        Raises:
            UnknownOptionError, InvalidOptionError: a name that is no option, a value that its option does not take, or no options.
        """
        if isinstance(options, Config):
            return options if mode is None else dataclasses.replace(options, mode=mode)
        if options is not None and not isinstance(options, Mapping):
            raise InvalidOptionError(f"the options are {options!r}; give a mapping such as {{'bits': 4}}, or a Config")
        given = dict(options or {})
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise UnknownOptionError(_unknown("option", key, known))
        if mode is not None:
            given["mode"] = mode
        return cls(**given)

    def for_layer(self, name: str, is_end: bool = False) -> LayerConfig | None:
        """The options of layer ``name``, a table or the head where it ``is_end``, or None when it is to be skipped."""
        if any(matches(pattern, name) for pattern in self.skip):
            return None
        chosen = {key: getattr(self, key) for key in LAYER_OPTIONS}
        if self.bits == "auto":
            chosen["bits"] = PLACEHOLDER_BITS
        elif is_end:
            bits = max(self.bits, self.end_bits)
            chosen |= {"bits": bits, "codebook": self.codebook if is_codebook(self.codebook, bits) else UNIFORM}
        if is_end:
            chosen |= {"sparsity": 0.0, **WITHOUT_SIDE}
        for pattern, options in self.overrides.items():
            if matches(pattern, name):
                chosen |= options
        return LayerConfig(**chosen)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern``, a layer name or ``"re:…"``, means the layer ``name``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name


def _integer(option: str, value: object, accept: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not accept(value):
        raise InvalidOptionError(f"option {option!r} is {value!r}; give {wanted}")


def _check_pattern(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise InvalidOptionError(f"option 'overrides' has the key {pattern!r}; give a layer name or a 're:…' pattern")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise InvalidOptionError(
                f"options 'overrides' and 'skip': the pattern {pattern!r} is no regular expression: {error}"
            ) from None


def _check_override(pattern: str, options: object) -> None:
    if not isinstance(options, Mapping):
        raise InvalidOptionError(f"override {pattern!r} is {options!r}; give a mapping such as {{'bits': 8}}")
    for key in options:
        if key not in LAYER_OPTIONS:
            raise UnknownOptionError(_unknown(f"option of override {pattern!r}:", key, LAYER_OPTIONS))
    try:
        LayerConfig(**options)
    except InvalidOptionError as error:
        raise InvalidOptionError(f"override {pattern!r}: {error}") from None


def _unknown(what: str, key: object, known: Any) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {key!r}.{hint} Known: {', '.join(known)}"
