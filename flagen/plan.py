"""Analysis -> Plan: what the kernels of a spec are made of, as names and Triton text. The plan has no shapes.

A template reads one Plan and decides nothing: every choice that removes an argument, a load or a product is a field
here. Choices that depend on shapes, dtypes or the device are launch-time constants, made by schedule.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from . import plan_rows
from .analysis import Analysis
from .errors import PlanError
from .expr import Expr, Input, Number
from .plan_erase import ErasePlan
from .plan_kernels import described, kernels_of
from .plan_parts import Gradient, Held, Kernel, Role, TensorArg, Term, block_name, block_text, held, leaves, row_text
from .plan_vector import decay_text, kept, shared, shared_by, text_of

if TYPE_CHECKING:
    from .spec import Spec

ROLE_CHANNEL = {"query": "k", "key": "k", "value": "v", "phase": "k", "bonus": "k", "gate": "", "factor": ""}
ROLE_CHANNEL |= {"erase_a": "k", "erase_b": "k", "erase": ""}
# the accumulated decay of a step is clamped here (natural log; exact in bf16): exp(-128) is 0 in fp32
DECAY_FLOOR = -128.0


@dataclass(frozen=True)
class Plan(ErasePlan):
    """The decisions that give the text of a spec's kernels."""

    analysis: Analysis

    @property
    def spec(self) -> Spec:
        return self.analysis.spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def recurrence(self) -> str:
        return self.spec.recurrence

    @cached_property
    def tensors(self) -> tuple[TensorArg, ...]:
        """The inputs in order, then the host constants, then the gauges."""
        return self.given + tuple(TensorArg(one.name, one.axes, True, "") for one in self.analysis.gauges)

    @cached_property
    def given(self) -> tuple[TensorArg, ...]:
        """Those that a call has: the inputs and the host constants."""
        # those of a vector state have no head to depend on
        axes = "" if self.vector else "h"
        constants = tuple(TensorArg(one.name, axes, True, "") for one, _ in self.analysis.constants)
        return (
            tuple(TensorArg(one.name, one.axes, False, self.cast_of(one)) for one in self.analysis.inputs) + constants
        )

    @cached_property
    def inputs(self) -> tuple[TensorArg, ...]:
        return tuple(tensor for tensor in self.tensors if not tensor.is_constant)

    def block_of(self, role: str, expr: Expr) -> Expr:
        """What of a role's expression is evaluated as a block."""
        return plan_rows.split_value(self)[1] if role == "value" else expr

    # --- decay

    @property
    def decay(self) -> str:
        """none, constant (a scalar without time), scalar, key or value."""
        if self.analysis.decay == "scalar" and not self.analysis.decay_varies:
            return "constant"
        return self.analysis.decay

    @property
    def channel_decay(self) -> str:
        """'k' or 'v' for a decay per channel, else ''."""
        return {"key": "k", "value": "v"}.get(self.decay, "")

    @property
    def tree(self) -> bool:
        return bool(self.channel_decay)

    @property
    def serial_tree(self) -> bool:
        """Whether the serial kernels take pairs by the product tree."""
        return self.tree and not self.intra

    @property
    def intra(self) -> bool:
        """Whether all that a chunk needs no state for has kernels of its own, which are parallel over chunks: with a
        decay per key channel it costs more than all the rest."""
        return self.decay == "key" and not self.erase

    @property
    def sweeps(self) -> bool:
        """Whether the backward has the form of three sweeps, one each for query, key and value."""
        return not self.tree and not self.complex and not self.taylor

    @property
    def tiled(self) -> bool:
        """Whether the features of a Taylor map of order 2 have kernels of their own, which hold them in tiles."""
        return self.taylor == 2 and self.decay == "none"

    @property
    def row_decay(self) -> bool:
        """Whether a chunk's decay is one number a token."""
        return self.decay in ("constant", "scalar")

    @property
    def fixed_weights(self) -> bool:
        """Whether the weights of the pairs inside a chunk, but for their scores, are the same for all chunks."""
        return self.decay not in ("scalar", "key")

    @property
    def late_read(self) -> bool:
        """Whether decay or scale multiply what a row has read from the state, beside the query."""
        return self.decay != "key" and not (self.taylor and self.decay == "none")

    @property
    def exclusive(self) -> bool:
        return self.analysis.exclusive

    @property
    def own_term(self) -> bool:
        """Whether a token's own pair is added apart, in fp32: with a bonus, and where the tree does not meet it."""
        return self.exclusive or self.decay == "key"

    @property
    def vector(self) -> bool:
        return self.analysis.vector

    @property
    def complex(self) -> bool:
        return self.analysis.is_complex

    @property
    def taylor(self) -> int:
        return self.analysis.taylor

    @property
    def normalized(self) -> bool:
        return self.analysis.normalizer is not None

    @property
    def normalizer(self) -> str:
        """f(n) as text over b_n."""
        return row_text(self.analysis.normalizer)

    @property
    def normalizer_gradient(self) -> str:
        return row_text(self.analysis.normalizer_gradient)

    @property
    def stabilized(self) -> bool:
        return self.analysis.stabilizer is not None

    @cached_property
    def held(self) -> Held:
        """What a stabilised state is held divided by."""
        return held(self.analysis.stabilizer, self.given)

    @property
    def decay_floor(self) -> float:
        return DECAY_FLOOR

    @property
    def range_sums(self) -> bool:
        """Whether sums over the steps between two rows are taken by products."""
        if self.vector:
            return False
        return self.tree or self.complex or self.decay == "scalar"

    @property
    def read_op(self) -> str:
        """Which steps r lie between the chunk's start and a row's read of the state."""
        return "<" if self.exclusive else "<="

    @property
    def pair_op(self) -> str:
        """Which pairs (t, s) the score tile holds."""
        return ">" if self.own_term else ">="

    @property
    def own_weight(self) -> str:
        """The bonus as a factor of query key, or nothing."""
        return f" * {self.bonus.text if self.bonus.identity else f'({self.bonus.text})'}" if self.bonus else ""

    # --- roles

    @cached_property
    def query(self) -> Role:
        return self._role("query")

    @cached_property
    def key(self) -> Role:
        return self._role("key")

    @cached_property
    def value(self) -> Role:
        return self._role("value")

    # what sweeps multiply weights by instead of blocks, and what kernels have prepared for them
    swept, turned, plain_sweeps = (property(x) for x in (plan_rows.swept, plan_rows.turned, plan_rows.plain_sweeps))
    prepared, before = property(plan_rows.prepared), property(plan_rows.before)
    value_rows, written = property(plan_rows.value_rows), property(plan_rows.written)
    packs, factored = property(plan_rows.packs), property(plan_rows.factored)
    summed, telescopes = property(plan_rows.summed), property(plan_rows.telescopes)
    sum_column, keeps, places = (property(x) for x in (plan_rows.sum_column, plan_rows.keeps, plan_rows.places))
    early_factor, decay_tensors = property(plan_rows.early_factor), property(plan_rows.decay_tensors)
    gate_tensors, intra_gradients = property(plan_rows.gate_tensors), property(plan_rows.intra_gradients)
    decay_text, shared, shared_by = property(decay_text), cached_property(shared), shared_by
    kept = cached_property(kept)
    kept_forward = cached_property(lambda self: kept(self, "query", "update", "decay"))

    @cached_property
    def value_block(self) -> Role:
        """The value without that factor."""
        return self._role_of("value", plan_rows.split_value(self)[1])

    @cached_property
    def log_decay(self) -> Role | None:
        return self._role_if_given("log_decay")

    @cached_property
    def gate(self) -> Role | None:
        return self._role_if_given("gate")

    @cached_property
    def phase(self) -> Role | None:
        return self._role_if_given("phase")

    @cached_property
    def bonus(self) -> Role | None:
        return self._role_if_given("bonus")

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(self._role(name) for name, _ in self.analysis.roles)

    def _role_if_given(self, name: str) -> Role | None:
        return None if self.analysis.role(name) is None else self._role(name)

    def _role(self, name: str) -> Role:
        expr = self.analysis.role(name)
        assert expr is not None, name
        return self._role_of(name, expr)

    def _role_of(self, name: str, expr: Expr) -> Role:
        channel, time = self._role_block(name)
        identity = (
            block_name(expr.name)
            if isinstance(expr, Input) and "t" in expr.axes and (not channel or channel in expr.axes)
            else ""
        )
        names: dict[Expr, str] = {leaf: block_text(leaf, time, channel) for leaf in leaves(expr)}
        return Role(name, text_of(self, expr, names), identity, expr.axes, tuple(one.name for one in expr.inputs))

    def _role_block(self, role: str) -> tuple[str, bool]:
        """The channel axis and whether there is a time axis of the block in which a role is evaluated."""
        if self.vector:
            return "d", True
        if role == "log_decay":
            return self.channel_decay, self.decay != "constant"
        # a unit's name stands for what it is the l2norm of
        return ROLE_CHANNEL.get(role, "k"), True

    # --- gradients

    @cached_property
    def gradients(self) -> tuple[Gradient, ...]:
        """How the gradient of each input comes from those of the roles, in the order of the inputs."""
        found = []
        for tensor in self.inputs:
            terms = [(role, diff) for role, one, diff in self.analysis.gradients if one.name == tensor.name]
            found.append(Gradient(tensor, tuple(self._term(tensor, role, diff) for role, diff in terms)))
        return tuple(found)

    def _term(self, tensor: TensorArg | None, role: str, diff: Expr) -> Term:
        """tensor: None for a unit, whose blocks have key channels."""
        role, diff, text = plan_rows.chained(self, role, diff, tensor is not None and tensor.time)
        channel, _ = self._role_block(role)
        if diff != Number(1):
            names: dict[Expr, str] = {leaf: block_text(leaf, True, channel) for leaf in leaves(diff)}
            text = f"{text} * ({text_of(self, diff, names)})"
        if role == "log_decay" and not (self.vector and diff == Number(1)):
            # where the decay is zero so is its gradient, whatever the gate's derivative is there
            text = f"tl.where({'b_en > 0.0' if self.vector else 'b_ld > DECAY_FLOOR'}, {text}, 0.0)"
        return Term(role, text, bool(channel) and tensor is not None and not tensor.channel)

    def gradients_after(self, stage: str) -> tuple[Gradient, ...]:
        """The gradients that are whole once the role `stage` has its own: kernels store them there."""
        return self.whole_after(stage, self.gradients)

    def whole_after(self, stage: str, gradients: tuple[Gradient, ...]) -> tuple[Gradient, ...]:
        """Those of `gradients` that are whole once the role `stage` has its own. What needs the decay's or the angle's
        gradient comes last, and a bonus has its own before the query."""
        order = {"bonus": 0, "query": 0, "key": 1, "value": 2, "log_decay": 3, "gate": 3, "phase": 3, "factor": 3}
        return tuple(x for x in gradients if x.terms and max(order[term.role] for term in x.terms) == order[stage])

    def gradients_of(self, *roles: str) -> tuple[Gradient, ...]:
        """The gradients by the named roles alone."""
        found = []
        for x in self.gradients:
            terms = tuple(term for term in x.terms if term.role in roles)
            if terms:
                found.append(Gradient(x.tensor, terms))
        return tuple(found)

    @cached_property
    def fixed_gradients(self) -> tuple[Gradient, ...]:
        """Those of inputs without a time axis, which a program sums over its tokens."""
        return tuple(one for one in self.gradients if not one.tensor.time)

    def alone(self, gradient: Gradient) -> bool:
        """Whether an input has its gradient from these terms alone."""
        return any(one.tensor == gradient.tensor and one.terms == gradient.terms for one in self.gradients)

    def need(self, *roles: str) -> str:
        """A Python expression over `needs`: whether the gradients of roles are needed for one that is asked for."""
        wanted = {"log_decay" if role == "decay" else role for role in roles}
        marks = [f"needs[{i}]" for i, x in enumerate(self.gradients) if any(term.role in wanted for term in x.terms)]
        return f"any(({', '.join(marks)},))" if marks else "False"

    def tensors_of(self, *roles: str) -> tuple[TensorArg, ...]:
        """The tensors that the named roles use."""
        used = {**dict(self.analysis.roles), "normalizer": self.analysis.normalizer}
        names = {
            leaf.name for role, expr in used.items() if role in roles and expr is not None for leaf in leaves(expr)
        }
        names |= {leaf.name for unit, expr in self.analysis.units if unit.name in names for leaf in leaves(expr)}
        return tuple(tensor for tensor in self.tensors if tensor.name in names)

    @cached_property
    def state_tensors(self) -> tuple[TensorArg, ...]:
        """What the state's update needs: no query."""
        return self.tensors_of("key", "value", "log_decay", "gate", "phase")

    @cached_property
    def adjoint_tensors(self) -> tuple[TensorArg, ...]:
        """What the adjoint's update needs: no key, no value."""
        return self.tensors_of("query", "log_decay", "phase", *(() if self.sweeps else ("normalizer",)))

    def sweep_tensors(self, role: str) -> tuple[TensorArg, ...]:
        """What the sweep for the gradient of query, key or value reads: the other two, the decay and a bonus, and its
        own role's where a derivative or the decay's gradient needs it."""
        roles = {"query", "key", "value", "log_decay", "gate", "bonus"} - {role}
        if role != "value" and (self.own_term or self.gradients_of("log_decay", "gate")):
            roles.add(role)
        names = {one.name for one in self.tensors_of(*roles)}
        names |= {leaf.name for diff in plan_rows.derivatives(self, role) for leaf in leaves(diff)}
        return tuple(tensor for tensor in self.tensors if tensor.name in names)

    @cached_property
    def value_tensors(self) -> tuple[TensorArg, ...]:
        """What values need."""
        return self.tensors_of("value")

    @cached_property
    def intra_tensors(self) -> tuple[TensorArg, ...]:
        """What the weights of the pairs inside a chunk need."""
        roles = "query", "key", "log_decay", "phase", "bonus", "erase", "erase_a", "erase_b"
        return plan_rows.with_value_rows(self, self.tensors_of(*roles)) if self.erase else self.tensors_of(*roles)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The blocks that make up a state."""
        return ("h", *(("hi",) if self.complex else ()))

    # --- for people

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What is launched for a call, in order."""
        return self.erase_kernels if self.erase else kernels_of(self)

    def __str__(self) -> str:
        return described(self)


def make_plan(analysis: Analysis) -> Plan:
    """The plan of an analysed spec. Pure: the same analysis gives the same plan and text.

    Raises PlanError where analysis.without_kernels says why there is none.
    """
    if reason := analysis.without_kernels:
        raise PlanError(
            f"{analysis.spec.name}: {reason}; compile it with backend='auto' or 'torch', which run it as chunkwise "
            "PyTorch on any device"
        )
    return Plan(analysis)
