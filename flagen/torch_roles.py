"""The role expressions of a span of tokens, as the torch chunks want them, and the chain rule back to the inputs.

Inside a span every tensor is [n, B, H, C, D]: n chunks of C tokens; the last axis is the key or the value channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .expr import AXES, Expr, Input, Number
from .functions import evaluate, l2norm
from .torch_chunk import Gradients, Piece, ScalarPiece, wide_dtype
from .torch_delta import ErasePiece
from .torch_tree import KeyPiece, ValuePiece

if TYPE_CHECKING:
    from .analysis import Analysis

DIMENSIONS = ("b", "t", "h", "kv")  # of an input with all axes
PIECES = {"none": ScalarPiece, "scalar": ScalarPiece, "key": KeyPiece, "value": ValuePiece}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the axes, heads expanded, and the dtype to compute in: fp64 if any input is, else fp32."""

    batch: int
    time: int
    heads: int
    key: int
    value: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, declared: tuple[Input, ...], inputs: tuple[Tensor, ...]) -> Sizes:
        found = dict.fromkeys(AXES, 1)
        for one, tensor in zip(declared, inputs, strict=True):
            for axis, size in zip(one.axes, tensor.shape, strict=True):
                # without a time axis b counts sequences, which with cu_seqlens are not the batch
                if axis == "h":
                    found[axis] = max(found[axis], size)
                elif axis != "b" or "t" in one.axes:
                    found[axis] = size
        wide = any(tensor.dtype == torch.float64 for tensor in inputs)
        return cls(*found.values(), torch.float64 if wide else torch.float32, inputs[0].device)

    @property
    def options(self) -> dict[str, torch.dtype | torch.device]:
        return {"dtype": self.dtype, "device": self.device}


@dataclass(frozen=True, slots=True)
class Span:
    """`chunks` chunks of `size` tokens from token `begin`. `row`: which of the sequences of cu_seqlens; None without.
    first, last: whether its sequence begins, ends with it. An empty sequence is a span of no chunks.
    """

    row: int | None
    begin: int
    chunks: int
    size: int
    first: bool
    last: bool

    def tokens(self, tensor: Tensor) -> Tensor:
        """Its tokens of [B, T, H, D] as [n, B, H, C, D], a view."""
        part = tensor[:, self.begin : self.begin + self.chunks * self.size]
        return part.unflatten(1, (self.chunks, self.size)).permute(1, 0, 3, 2, 4)

    def of_input(self, tensor: Tensor, declared: Input) -> Tensor:
        """Its part of an input as [n, B, H, C, D], a view, with 1 for the axes that it lacks."""
        for i, axes in enumerate(DIMENSIONS):
            if not set(axes) & set(declared.axes):
                tensor = tensor.unsqueeze(i)
        if "t" in declared.axes:
            return self.tokens(tensor)
        if self.row is not None and "b" in declared.axes:
            tensor = tensor[self.row : self.row + 1]
        return tensor.unsqueeze(0).transpose(2, 3)


def environment(
    analysis: Analysis, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], sizes: Sizes, span: Span,
    only: Container[Input] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Every input, constant and unit by name, broadcastable to [n, B, H, C, D], in the working dtype.

    constants: with the tensors of analysis.gauges after them, if there are any. only: the inputs, and no units.
    """
    found = {}
    gauges = constants[len(analysis.constants) :]
    for declared, tensor in zip((*analysis.inputs, *analysis.gauges), (*inputs, *gauges), strict=False):
        if only is not None and declared not in only:
            continue
        view = span.of_input(tensor, declared).to(sizes.dtype)
        if 1 < view.shape[2] < sizes.heads:
            view = view.repeat_interleave(sizes.heads // view.shape[2], dim=2)
        found[declared.name] = view
    for (declared, _), tensor in zip(analysis.constants, constants, strict=False):
        found[declared.name] = tensor.to(sizes.dtype).view(1, 1, -1, 1, 1)
    for unit, expr in analysis.units if only is None else ():
        found[unit.name] = l2norm(evaluated(expr, found, sizes))[0]
    return found


def evaluated(expr: Expr, values: dict[str, Tensor], sizes: Sizes) -> Tensor:
    value = evaluate(expr, values, sizes.heads)
    return value if isinstance(value, Tensor) else torch.full((1,) * 5, value, **sizes.options)


class Roles:
    """The roles of a span, each [n, B * H, C, D] and fresh: query (scaled), key, value (with a column of ones for the
    normaliser), log_decay, bonus, what erases, and the rotation by the phase, where the spec has them. Maps come first,
    then rows are filled up with zeros, where the decay needs chunks of a power of two.
    """

    def __init__(self, analysis: Analysis, values: dict[str, Tensor], sizes: Sizes, span: Span, scale: float) -> None:
        self.analysis, self.values, self.sizes, self.span, self.scale = analysis, values, sizes, span, scale
        normalized = analysis.normalizer is not None
        self.padded = padded_size(analysis, span.size)
        self.query = self._packed("query", sizes.key, factor=scale)
        self.key = self._packed("key", sizes.key)
        self.gate = self._packed("gate", 1)
        if self.gate is not None:
            self.key *= self.gate.exp_()
        self.value = self._packed("value", sizes.value, extra=int(normalized))
        if normalized:
            self.value[..., : span.size, -1] = 1
        width = {"key": sizes.key, "value": sizes.value}.get(analysis.decay, 1)
        self.log_decay = self._packed("log_decay", width)
        self.bonus = self._packed("bonus", sizes.key)
        self.erase = self._packed("erase", 1)
        self.erase_a, self.erase_b = self._packed("erase_a", sizes.key), self._packed("erase_b", sizes.key)
        phase = self._packed("phase", sizes.key)
        self.rotation = None if phase is None else Rotation(phase, analysis.exclusive)

    def _packed(self, role: str, channels: int, *, factor: float = 1.0, extra: int = 0) -> Tensor | None:
        expr = self.analysis.role(role)
        if expr is None:
            return None
        span, sizes = self.span, self.sizes
        out = torch.empty(span.chunks, sizes.batch, sizes.heads, self.padded, channels + extra, **sizes.options)
        value = evaluated(expr, self.values, sizes)
        inner = out[..., : span.size, :channels]
        torch.mul(value.expand(inner.shape), factor, out=inner)
        out[..., span.size :, :] = 0
        return out.flatten(1, 2)

    def piece(self) -> Piece | ErasePiece:
        query, key, log_decay, turn, diagonal = self.query, self.key, self.log_decay, None, None
        if self.bonus is not None:
            diagonal = (query * self.bonus).mul_(key).sum(-1)
        if self.rotation is not None:
            query, key, turn = self.rotation.query(query), self.rotation.key(key), self.rotation.turn
            if self.analysis.decay == "key":
                log_decay = torch.cat((log_decay, log_decay), -1)
        if self.analysis.decay == "scalar" and not self.analysis.decay_varies:
            log_decay = log_decay[:1]
        if self.analysis.erase != "none":
            erased = self.erase, self.erase_a, self.erase_b, self.analysis.erase_previous
            return ErasePiece(query, key, self.value, log_decay, *erased, self.analysis.decay == "key")
        return PIECES[self.analysis.decay](query, key, self.value, log_decay, diagonal, self.analysis.taylor, turn)

    def gradients(self, grads: Gradients, wants: Callable[[str], bool]) -> dict[str, Tensor]:
        """The gradients of the roles [n, B, H, C, D] from those of the piece; not of roles that nobody wants."""
        query, key, value, log_decay = grads.query, grads.key, grads.value, grads.log_decay
        found = {}
        if self.rotation is not None:
            if wants("phase"):
                found["phase"] = self.rotation.phase_gradient(grads, self)
            query, key = self.rotation.query_back(query), self.rotation.key_back(key)
            if self.analysis.decay == "key" and log_decay is not None:
                real, imag = log_decay.chunk(2, -1)
                log_decay = real + imag
        if grads.diagonal is not None:
            weight = grads.diagonal.unsqueeze(-1)
            if wants("bonus"):
                found["bonus"] = (self.query * self.key).mul_(weight)
            if query is not None:
                query.addcmul_(weight * self.bonus, self.key)
            if key is not None:
                key.addcmul_(weight * self.bonus, self.query)
        if self.gate is not None and key is not None:
            found["gate"] = (self.key * key).sum(-1, keepdim=True)
            key = key.mul_(self.gate)
        if query is not None:
            query = query.mul_(self.scale)
        if value is not None:
            value = value[..., : self.sizes.value]
        found |= {"query": query, "key": key, "value": value, "log_decay": log_decay} | (grads.erase or {})
        return {role: self.unpacked(x) for role, x in found.items() if x is not None}

    def unpacked(self, x: Tensor) -> Tensor:
        """[n, R, C, D] as [n, B, H, C, D] without the rows that were filled up."""
        return x[:, :, : self.span.size].unflatten(1, (self.sizes.batch, self.sizes.heads))


def padded_size(analysis: Analysis, size: int) -> int:
    """The rows of a chunk of `size` tokens: a power of two for a decay per channel."""
    return 1 << (size - 1).bit_length() if analysis.decay in ("key", "value") else size


class Rotation:
    """The phases of a span [n, R, C, K] as rotations of query and key, in a frame that starts with each chunk.

    Rotated tensors have the real and the imaginary parts as channels, 2K in all, so that their product is the real
    part.
    """

    def __init__(self, phase: Tensor, exclusive: bool) -> None:
        angle = phase.to(wide_dtype(phase)).cumsum(2)
        angle = angle.sub_((angle * (1 / math.tau)).round_(), alpha=math.tau).to(phase.dtype)
        self.exclusive = exclusive
        self.cos, self.sin = angle.cos(), angle.sin()
        self.turn = self.cos[:, :, -1:].mT.contiguous(), self.sin[:, :, -1:].mT.contiguous()
        self.query_cos, self.query_sin = self.cos, self.sin
        if exclusive:
            # the output reads the state before the token's own turn
            pad = torch.nn.functional.pad
            self.query_cos = pad(self.cos[:, :, :-1], (0, 0, 1, 0), value=1.0)
            self.query_sin = pad(self.sin[:, :, :-1], (0, 0, 1, 0))

    def query(self, x: Tensor) -> Tensor:
        return torch.cat((x * self.query_cos, x * self.query_sin), -1)

    def key(self, x: Tensor) -> Tensor:
        return torch.cat((x * self.cos, x * self.sin), -1)

    def query_back(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else _combined(gradient, self.query_cos, self.query_sin)

    def key_back(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else _combined(gradient, self.cos, self.sin)

    def phase_gradient(self, grads: Gradients, roles: Roles) -> Tensor:
        """Each token's angle is a sum of the phases up to it, so that the phase gets a sum from the chunk's end."""
        angle = _combined(grads.key, -self.sin, self.cos) * roles.key
        by_query = _combined(grads.query, -self.query_sin, self.query_cos) * roles.query
        if self.exclusive:
            angle[:, :, :-1] += by_query[:, :, 1:]
        else:
            angle += by_query
        angle[:, :, -1] += grads.angle
        angle = angle.flip(2).cumsum(2).flip(2)
        if roles.log_decay is not None:
            angle.masked_fill_(roles.log_decay.exp() == 0, 0.0)
        return angle


def _combined(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imag = gradient.chunk(2, -1)
    return (real * cos).addcmul_(imag, sin)


class ChainRule:
    """Collects the gradients of the inputs that `needs` marks, span by span, from those of the roles."""

    def __init__(self, analysis: Analysis, inputs: tuple[Tensor, ...], needs: tuple[bool, ...], sizes: Sizes) -> None:
        self.sizes = sizes
        self.inputs = dict(zip(analysis.inputs, inputs, strict=True))
        needed = {declared for declared, need in zip(analysis.inputs, needs, strict=True) if need}
        # a unit is needed where something that is needed stands in it
        self.units = {
            unit: expr
            for unit, expr in analysis.units
            if any(role == unit.name and one in needed for role, one, _ in analysis.gradients)
        }
        self.terms = [term for term in analysis.gradients if term[1] in needed or term[1] in self.units]
        self.roles = {role for role, _, _ in self.terms}
        if "gate" in self.roles:
            self.roles |= {"key"}
        if "phase" in self.roles:
            self.roles |= {"query", "key"}  # of which the phase's gradient is made
        # inputs with a time axis are written span by span, the others summed over the spans
        self.sums = {
            declared: torch.zeros(x.shape, dtype=x.dtype if "t" in declared.axes else sizes.dtype, device=x.device)
            for declared, x in self.inputs.items()
            if declared in needed
        }

    def wants(self, role: str) -> bool:
        """Whether the role's gradient is needed."""
        return role in self.roles

    def add(self, gradients: dict[str, Tensor], roles: Roles) -> None:
        totals: dict[Input, Tensor] = {}
        units = {unit.name for unit in self.units}
        self._add_terms(totals, gradients, roles, lambda role: role not in units)
        by_unit = {}
        for unit, expr in self.units.items():
            if (total := totals.pop(unit, None)) is not None:
                by_unit[unit.name] = _through_l2norm(total, evaluated(expr, roles.values, self.sizes))
        self._add_terms(totals, by_unit, roles, lambda role: role in by_unit)
        for declared, total in totals.items():
            view = roles.span.of_input(self.sums[declared], declared)
            if "t" in declared.axes:
                view.copy_(total)
            else:
                view.add_(total)

    def _add_terms(
        self, totals: dict[Input, Tensor], gradients: dict[str, Tensor], roles: Roles, chosen: Callable[[str], bool]
    ) -> None:
        """Adds to `totals` what the chosen roles give to inputs and units."""
        for role, declared, derivative in self.terms:
            if not chosen(role):
                continue
            term = gradients[role]
            if derivative != Number(1):
                term = term * evaluate(derivative, roles.values, self.sizes.heads)
            if role == "log_decay":
                # where the decay is zero so is its gradient, whatever the gate's derivative is there
                term = term.masked_fill(roles.unpacked(roles.log_decay).exp() == 0, 0.0)
            given = self.inputs.get(declared)
            heads = self.sizes.heads if given is None else given.shape[declared.axes.find("h")]
            term = _reduced(term, declared.axes, heads if "h" in declared.axes else 1)
            totals[declared] = totals[declared] + term if declared in totals else term

    def results(self) -> tuple[Tensor | None, ...]:
        """In the order, shapes and dtypes of the inputs; None where not needed."""
        return tuple(self.sums[x].to(tensor.dtype) if x in self.sums else None for x, tensor in self.inputs.items())


def _through_l2norm(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of its l2norm."""
    unit, factor = l2norm(x)
    return (gradient - unit * (gradient * unit).sum(-1, keepdim=True)).mul_(factor)


def _reduced(term: Tensor, axes: str, heads: int) -> Tensor:
    """term [n, B, H, C, D] summed over the axes that are not in `axes`, with 1 in their place, and over heads that
    share one of `heads`.
    """
    dims = [i for own, i in (("t", 0), ("b", 1), ("t", 3), ("kv", 4)) if not set(own) & set(axes)]
    term = term.sum(dims, keepdim=True) if dims else term
    return term.unflatten(2, (heads, -1)).sum(3) if heads < term.shape[2] else term
