"""``torch.compile(model, backend="kbit")``: from Dynamo's graph to a callable that runs on packed weights."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor import logs
from kbit_inductor._compat import cache_tag, copy_graph, inductor
from kbit_inductor.bits.graph import with_bits
from kbit_inductor.calibration import warn_lacking
from kbit_inductor.capture import Context, begin, find_weights, share_writes
from kbit_inductor.config import Config
from kbit_inductor.debug.inspector import Inspector
from kbit_inductor.digest import digest
from kbit_inductor.errors import KbitError, ReleasedWeightError
from kbit_inductor.instruction_set import check_instruction_set
from kbit_inductor.kernel_registry import kernels
from kbit_inductor.overrides import check_overrides
from kbit_inductor.passes import pipeline
from kbit_inductor.passes.pipeline import Observer
from kbit_inductor.passes.record import Pass
from kbit_inductor.passes.registry import passes
from kbit_inductor.weights.binding import Binding
from kbit_inductor.weights.release import MEND, is_released
from kbit_inductor.weights.store import STORE, Slot

log = logs.logger("capture")
kernel_log = logs.logger("kernels")
Compiled = Callable[..., Any]


def kbit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Config | None = None,
) -> Compiled:
    """The backend that Dynamo calls. ``options`` are the fields of :class:`kbit_inductor.Config`.

    A mistake in the options is raised by the returned callable, since Dynamo would wrap an error raised here in one of its own.
    """
    try:
        logs.configure()
        return compile_graph(gm, example_inputs, Config.from_options(options, mode))
    except KbitError as error:
        return raiser(error)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Compiled:
    """Rewrite a graph to packed weights and compile it by Inductor; a graph that nothing changes in goes to Inductor untouched."""
    rewritten, context = capture(gm, example_inputs, config)
    _log_matches(context, example_inputs)
    _log_constants(gm)
    kept = kept_arguments(context, len(example_inputs))
    floats = tuple((weight.argument, weight.name) for weight in context.weights if weight.argument in kept)
    with cache_tag(f"kbit-{digest((*passes(), *kernels()))}"):
        if not context.slots:
            untouched = passes() == pipeline.BUILT_IN and not context.fusions
            inner = inductor(gm if untouched else rewritten, example_inputs, config.mode)
            return Bound(inner, tuple(range(len(example_inputs))), (), floats)
        inner = inductor(rewritten, [*(example_inputs[i] for i in kept), *itertools.chain(*context.operands)], config.mode)
    return Bound(inner, kept, tuple(context.slots), floats)


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    chosen: Sequence[Pass] | None = None,
    observers: Sequence[Observer] = (),
) -> tuple[fx.GraphModule, Context]:
    """A copy of ``gm`` that takes packed weights, with what was found.

    Args:
        gm: Dynamo's graph.
        example_inputs: what it is called with.
        config: the options.
        chosen: the passes, in order; None for all that are registered.
        observers: what looks on. Under ``debug`` an :class:`Inspector` is among them.

    Raises:
        BrokenPassError: under ``debug``, a pass that breaks the graph or its promise.
    """
    check_instruction_set()
    copied = copy_graph(gm)
    share_writes(copied.graph)
    weights = find_weights(copied.graph, example_inputs, config)
    check_overrides(config, weights, example_inputs)
    if config.bits == "auto":
        config = with_bits(config, weights, example_inputs)
        weights = find_weights(copied.graph, example_inputs, config)
    context = begin(copied.graph, weights, config)
    if config.debug or os.environ.get("KBIT_DEBUG", "0") not in ("", "0"):
        observers = (*observers, Inspector(example_inputs))
    pipeline.run(copied, context, passes() if chosen is None else chosen, observers)
    copied.graph.lint()
    copied.recompile()
    return copied, context


def kept_arguments(context: Context, count: int) -> tuple[int, ...]:
    """The positions of the original inputs that the rewritten graph still takes."""
    alive = set(context.graph.find_nodes(op="placeholder"))
    dropped = {weight.argument for weight in context.weights if weight.node not in alive and weight.derivation is None}
    return tuple(i for i in range(count) if i not in dropped)


class Bound:
    """A compiled graph, called with the arguments of the captured one: the weights among them are packed.

    Args:
        inner: takes the arguments that are kept, and then packed weights.
        kept: the positions of the arguments that it still takes.
        slots: the packed weights.
        floats: positions and names of the weights that it reads as floats, which must be there.
    """

    def __init__(
        self, inner: Compiled, kept: tuple[int, ...], slots: tuple[Slot, ...], floats: tuple[tuple[int, str], ...] = ()
    ) -> None:
        self.inner = inner
        self.kept = kept
        self._floats = floats
        self._binding = Binding(STORE, slots)

    def __call__(self, *arguments: Any) -> Any:
        """Call it with the weights that the arguments of this very call have."""
        return self.inner(*self.operands(arguments))

    def operands(self, arguments: Sequence[Any]) -> list[Any]:
        """What ``inner`` takes for ``arguments``: those kept, in order, and packed weights.

        Raises:
            ReleasedWeightError: a float weight that is read has been freed.
        """
        for position, name in self._floats:
            if is_released(arguments[position]):
                raise ReleasedWeightError(
                    f"this graph reads the float weight of layer {name!r}, freed by release_weights=True; {MEND}"
                )
        return [*[arguments[i] for i in self.kept], *self._binding.operands(arguments)]


def raiser(error: KbitError) -> Compiled:
    """A callable that raises ``error`` when it is called."""

    def call(*arguments: Any) -> Any:
        raise error

    return call


def _log_matches(context: Context, inputs: Sequence[Any]) -> None:
    log.info("matched %d products and look-ups on %d packed weights", len(context.uses), len(context.slots))
    if context.fusions:
        log.info("fused %s", ", ".join(f"{kind} {count}" for kind, count in sorted(context.fusions.items())))
    for use, choice in context.choices:
        kernel_log.debug("%s: %s, %d x %d, kernel %s", use.weight.name, use.family, use.rows, use.columns, choice.kernel.name)
    for name, reasons in context.reasons.items():
        log.info("%s: %s", name, "; ".join(reasons))
    _log_fallbacks(context)
    for reason in dict.fromkeys(reason for slot in context.slots for reason in slot.lacks(inputs[slot.argument])):
        warn_lacking(reason)
    if torch.is_grad_enabled():
        _log_frozen({slot.name: inputs[slot.argument] for slot in context.slots})


def _log_fallbacks(context: Context) -> None:
    for use, choice in context.choices:
        if choice.kernel.name == "reference":
            why = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected)
            _warn_slow(f"{use.family}: {why}")
            return


@functools.cache
def _warn_slow(why: str) -> None:
    """Once for each reason, which all graphs of a model share."""
    kernel_log.warning("weights are read by the slow reference kernel. %s", why)


def _log_constants(gm: fx.GraphModule) -> None:
    """With ``torch._inductor.config.freezing`` Dynamo makes weights constants of the graph, where nothing can be bound to them."""
    constants = [str(node.target) for node in gm.graph.find_nodes(op="get_attr")]
    frozen = [name for name in constants if isinstance(tensor := getattr(gm, name, None), torch.Tensor) and tensor.dim() >= 2]
    if frozen:
        log.warning(
            "%d weights stay in float since they are constants of the graph (%s, …); set torch._inductor.config.freezing = False",
            len(frozen), frozen[0],
        )  # fmt: skip


def _log_frozen(weights: Mapping[str, Tensor]) -> None:
    frozen = STORE.newly_frozen(weights)
    if frozen:
        log.warning(
            "packed weights are frozen: %s require grad and get none (%d layers); call requires_grad_(False) on them, or skip them",
            frozen[0] + (" and others" if len(frozen) > 1 else ""), len(frozen),
        )  # fmt: skip
