"""Modules on packed weights, which take the places of ``nn.Linear`` and ``nn.Embedding``.

The weight is a module of its own, :class:`PackedMatrix`, in the place of the float parameter, so that tied layers can share it. In
memory it has the layout that the kernel of its device reads, and no other. In a state dict it has the storage format
(docs/format.md), on every device: ``fc.weight.planes``, ``fc.weight.scale``, ``fc.weight.offset``, ``fc.weight.global_scale``,
``fc.weight.codebook``, ``fc.weight.order``, and the parts of a side term (:mod:`kbit_inductor.side`), ``fc.weight.side_up`` and so
on. The offset, the codebook, the order and the side term are there only where there are any.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from kbit_inductor._compat import is_transformed
from kbit_inductor.errors import UnsupportedDtypeError
from kbit_inductor.kernels.layout import TILED_LAYOUTS
from kbit_inductor.logs import logger
from kbit_inductor.lowering import ops
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import choose
from kbit_inductor.packing import STORED, PackedWeight, plane_operands, specs_by_name
from kbit_inductor.side import SIDE, Side, with_shift, with_term

log = logger("pack")
INTEGERS = {torch.float16: torch.int16, torch.float32: torch.int32}  # of the same bytes, which no conversion casts


class PackedMatrix(nn.Module):
    """A matrix ``[N, K]`` of k-bit codes in the place of a float parameter.

    ``to()`` moves it, and lays it out anew where the kernels of the other device want that. A cast changes :attr:`dtype` alone.

    Args:
        packed: one matrix, in any layout.
        rows: N.
        dtype: of the float weight that it stands for, and of the rows of an embedding.
        order: int32 ``[K]``: column ``j`` of ``packed`` is column ``order[j]`` of the matrix, so that columns that share a scale
            are neighbours (GPTQ's ``desc_act``). None for the same order.
    """

    like: Tensor
    order: Tensor | None

    def __init__(self, packed: PackedWeight, rows: int, dtype: torch.dtype, order: Tensor | None = None) -> None:
        super().__init__()
        self.config = packed.config
        self.rows = rows
        self.columns = packed.columns
        self.group_size = packed.config.group_columns(packed.columns)
        self.error = packed.error
        for name in ("tiled", *STORED, *SIDE):
            self.register_buffer(name, None, persistent=False)
        # Without elements. It follows every to(), and so knows device and dtype.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.operands[0].device), persistent=False)
        self.register_buffer("order", order)
        self._hold(packed)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be a tensor. Its being there keeps ``nn.TransformerEncoderLayer`` from a fast path that reads floats."""
        raise TypeError(f"{function.__name__} was given a packed weight, which is no tensor; call dequantize() of it for one")

    @property
    def shape(self) -> torch.Size:
        """``[N, K]``."""
        return torch.Size((self.rows, self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the float weight that it stands for."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.like.device

    @property
    def packed(self) -> PackedWeight:
        """The operands as they are in memory."""
        names = ("tiled",) if self.layout in TILED_LAYOUTS else STORED
        operands = tuple(tensor for name in names if (tensor := getattr(self, name)) is not None)
        return PackedWeight(operands, self.config, self.columns, self.error, self.layout, side=self.side)

    @property
    def side(self) -> Side | None:
        """What floats add to the product of the codes, in :attr:`dtype`."""
        return Side.of({name: part for name in SIDE if (part := getattr(self, name)) is not None})

    def dequantize(self) -> Tensor:
        """The float weight ``[N, K]`` of :attr:`dtype` that the codes stand for."""
        return self._in_order(self.packed.dequantize(self.dtype))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias`` for ``x`` ``[..., K]``."""
        device = self.device.type  # of the weight: x may be a proxy of torch.fx
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        given, bias = x, with_shift(run, bias, self.side_shift)
        compiling = torch.compiler.is_compiling()
        if not compiling and (_is_derived(x) or _is_derived(bias)):
            return functional.linear(x, self.dequantize().to(x.dtype), bias)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        product: Tensor
        if self.tiled is not None:
            told = (x, self.tiled, bias, self.rows, self.activation_bits)
            if compiling:
                product = torch.ops.kbit.tiled_linear_cpu.default(*told, self.group_size)
            else:
                product = torch.ops.kbit.linear_cpu.default(*told)
        else:
            packed = (self.planes, self.scale, self.offset, self.global_scale)
            product = ops.overload("linear", self.suffix)(x, *packed, bias, *self._form, self.codebook)
        product = with_term(run, product, given, self.side_down, self.side_columns, self.side_up)
        return product

    def embedding(self, indices: Tensor) -> Tensor:
        """Rows ``indices``, ``[...]`` of int32 or int64, as ``[..., K]`` of :attr:`dtype`."""
        rows: Tensor
        if self.tiled is not None:
            rows = torch.ops.kbit.embedding_cpu.default(indices, self.tiled, self.columns, self.dtype)
        else:
            packed = (self.planes, self.scale, self.offset, self.global_scale)
            told = (self.columns, *self._form, self.dtype, self.codebook)
            rows = ops.overload("embedding", self.suffix)(indices, *packed, *told)
        return self._in_order(rows)

    def _in_order(self, rows: Tensor) -> Tensor:
        """``rows`` ``[..., K]`` of the packed matrix with their columns where the matrix has them."""
        return rows if self.order is None else rows.index_select(-1, self.order.argsort())

    @property
    def _form(self) -> tuple[int, ...]:
        """How the codes are packed, as the operators of the layout are told."""
        return (self.config.bits, self.group_size) if self.layout == "words" else (self.group_size,)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"{self.rows}, {self.columns}, bits={self.config.bits}, group_size={self.group_size}, kernel={self.kernel}"

    def _hold(self, packed: PackedWeight) -> None:
        """Take ``packed`` for one's own, laid out for the kernel that is chosen for this device and dtype."""
        self.activation_bits = self.config.activation_bits_on(self.device.type)
        sizes = (self.rows, self.columns, self.config.bits, self.group_size, self.config.levels() is None)
        self.problem = Problem(
            "linear", self.device.type, self.dtype, *sizes, self.activation_bits,
            device_index=self.device.index or 0, symmetric=self.config.symmetric, cascade=self.config.cascade,
        )  # fmt: skip
        choice = choose(self.problem)
        self.kernel, self.suffix, self.rejected = choice.kernel.name, choice.kernel.suffix, choice.rejected
        if self.config.cascade and choice.kernel.layout != "tiled":
            log.warning("a cascade has become a weight of %d bits: kernel %s reads no first planes", self.config.bits, self.kernel)
            packed = packed.plain
            self.config = packed.config
        self._set(packed.laid_out(choice.kernel.layout))

    def _set(self, packed: PackedWeight) -> None:
        self.layout = packed.layout
        tiled = packed.layout in TILED_LAYOUTS
        self.tiled = packed.operands[0] if tiled else None
        stored = (None,) * len(STORED) if tiled else plane_operands(packed.operands, self.config)
        for name, tensor in zip(STORED, stored, strict=True):
            setattr(self, name, tensor)
        parts = {} if packed.side is None else packed.side.parts
        for name in SIDE:
            setattr(self, name, parts.get(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        like = fn(self.like)
        if like.device.type != self.device.type:
            self._set(self.packed.laid_out("planes"))
        for name in ("tiled", *STORED, "order"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, _converted(tensor, fn))
        for name in SIDE:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, fn(tensor))
        self.like = like
        self._hold(self.packed)
        return self

    def stored(self) -> dict[str, Tensor]:
        """The operands by name in the storage format: those in memory where it has that layout, else made when asked for.

        While somebody holds what was made, it is given out again, so that tied weights are one tensor in a state dict too.
        """
        if self.layout == "planes":
            operands: tuple[Tensor, ...] = self.packed.operands
        else:
            source, made = self.__dict__.get("_made", (None, ()))
            known, held = tuple(reference() for reference in made), self.packed.operands[0]
            if source is None or source() is not held or None in known:
                known = self.packed.laid_out("planes").operands
                self.__dict__["_made"] = weakref.ref(held), tuple(map(weakref.ref, known))
            operands = known
        named = dict(zip(STORED, plane_operands(operands, self.config), strict=True))
        named |= {name: getattr(self, name) for name in (*SIDE, "order")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of :meth:`stored`."""
        return specs_by_name(self.rows, self.columns, self.config, self.dtype, reordered=self.order is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        specs = self.specs
        given = {name: state_dict[prefix + name] for name in specs if prefix + name in state_dict}
        missing_keys += [prefix + name for name in specs if name not in given]
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in specs]
        wrong = [name for name, tensor in given.items() if (tuple(tensor.shape), tensor.dtype) != specs[name]]
        for name in wrong:
            shape, dtype = specs[name]
            found = f"{tuple(given[name].shape)} of {given[name].dtype}"
            error_msgs.append(f"{prefix + name} is {found}; this layer, of {self.config}, has {shape} of {dtype}")
        if given.keys() == specs.keys() and not wrong:
            copies = {name: given[name].detach().to(self.device, copy=True) for name in specs}
            self.order = copies.pop("order", None)
            side = Side.of({name: copies.pop(name) for name in SIDE if name in copies})
            self._hold(PackedWeight(tuple(copies.values()), self.config, self.columns, self.error, side=side))


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``."""
    return function(*arguments)


def _converted(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``tensor`` where ``fn`` puts tensors, and not cast."""
    bits = tensor.view(INTEGERS.get(tensor.dtype, tensor.dtype))
    moved = fn(bits)
    if moved.dtype != bits.dtype:
        raise UnsupportedDtypeError(f"a packed weight cannot be cast to {moved.dtype}; use to(), half(), float() or bfloat16()")
    return moved.view(tensor.dtype)


class PackedLinear(nn.Linear):
    """``nn.Linear`` with a packed weight. It is one for whoever asks by ``isinstance``; its ``weight`` is no tensor.

    Args:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
    """

    def __init__(self, weight: PackedMatrix, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = weight.columns, weight.rows
        self.weight = weight  # type: ignore[assignment]
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ W.T + bias`` for ``input`` ``[..., in_features]``."""
        return self.weight.linear(input, self.bias)  # type: ignore[attr-defined, no-any-return]


class PackedEmbedding(nn.Embedding):
    """``nn.Embedding`` with a packed table. It is one for whoever asks by ``isinstance``; its ``weight`` is no tensor.

    Args:
        weight: ``[num_embeddings, embedding_dim]``.
        padding_idx: as in ``nn.Embedding``.
    """

    def __init__(self, weight: PackedMatrix, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.rows, weight.columns
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = weight  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """Rows ``input`` of the table, ``[..., embedding_dim]``."""
        return self.weight.embedding(input)  # type: ignore[attr-defined, no-any-return]


def _is_derived(operand: Any) -> bool:
    """Whether ``operand`` is inside a torch.func transform or has a tangent: operators know the reverse mode alone."""
    return isinstance(operand, Tensor) and (is_transformed(operand) or forward_ad.unpack_dual(operand).tangent is not None)


def matrix_of(module: nn.Module) -> PackedMatrix | None:
    """The packed weight of ``module``, where it is one of the modules above."""
    return module._modules["weight"] if isinstance(module, (PackedLinear, PackedEmbedding)) else None  # type: ignore[return-value]
