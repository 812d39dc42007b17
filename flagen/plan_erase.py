"""What an erase adds to a plan: what its rows read and write, and its kernels."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from .expr import L2NORM_EPS, Expr, Input
from .functions import triton_text
from .plan_parts import Kernel, Role, TensorArg, Unit, block_text, leaves

if TYPE_CHECKING:
    from .analysis import Analysis
    from .plan_parts import Gradient, Term


class ErasePlan:
    """What a row reads of the state is taken away as it is written; the part of a plan that says how."""

    if TYPE_CHECKING:
        # what Plan has
        analysis: Analysis

        @property
        def inputs(self) -> tuple[TensorArg, ...]: ...
        @property
        def intra_tensors(self) -> tuple[TensorArg, ...]: ...
        @property
        def gradients(self) -> tuple[Gradient, ...]: ...
        @property
        def key(self) -> Role: ...
        @property
        def value_block(self) -> Role: ...
        @property
        def name(self) -> str: ...
        @property
        def decay(self) -> str: ...
        @property
        def channel_decay(self) -> str: ...
        @property
        def row_decay(self) -> bool: ...
        def block_of(self, role: str, expr: Expr) -> Expr: ...
        def tensors_of(self, *roles: str) -> tuple[TensorArg, ...]: ...
        def _role(self, name: str) -> Role: ...
        def _role_if_given(self, name: str) -> Role | None: ...
        def _term(self, tensor: TensorArg | None, role: str, diff: Expr) -> Term: ...

    @property
    def erase(self) -> bool:
        return self.analysis.erase != "none"

    @property
    def delta(self) -> bool:
        """Whether one vector, the key, both reads what is taken away and is what is written."""
        return self.analysis.erase == "delta"

    @property
    def erase_previous(self) -> bool:
        """Whether it is read before the token's decay."""
        return self.analysis.erase_previous and self.decay != "none"

    @property
    def eraser(self) -> Role:
        """What reads the state for what is taken away."""
        return self.key if self.delta else self._role("erase_a")

    @property
    def erased(self) -> Role:
        """What is written with what was read."""
        return self.key if self.delta else self._role("erase_b")

    @property
    def strength(self) -> Role | None:
        """The number a token that what is read is multiplied by, with delta."""
        return self._role_if_given("erase")

    @property
    def l2norm_eps(self) -> float:
        return L2NORM_EPS

    @property
    def unit_roles(self) -> tuple[tuple[str, Expr], ...]:
        return tuple((unit.name, expr) for unit, expr in self.analysis.units)

    def cast_of(self, one: Input) -> str:
        """How an input's block is cast as it is loaded: blocks are fp32, but for those that go straight into
        products."""
        roles = (*self.analysis.roles, *self.unit_roles)
        used = [(role, self.block_of(role, expr)) for role, expr in roles if one in expr.inputs]
        products = ("query", "key", "value", "erase_a", "erase_b")
        plain = bool(used) and all(expr == one and role in products for role, expr in used)
        return "" if plain else ".to(tl.float32)"

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The normalised vectors that stand in roles, each with what its own gradient is made of."""
        found = []
        for unit, expr in self.analysis.units:
            text = triton_text(expr, {leaf: block_text(leaf, True, "k") for leaf in leaves(expr)})
            parts = ((role, diff) for role, one, diff in self.analysis.gradients if one.name == unit.name)
            users = frozenset(role for role, used in self.analysis.roles if unit in leaves(used))
            terms = tuple(self._term(None, role, diff) for role, diff in parts)
            found.append(Unit(unit.name, text, users, terms, isinstance(expr, Input)))
        return tuple(found)

    @property
    def unit_tensors(self) -> tuple[TensorArg, ...]:
        """What the normalised vectors are made of."""
        names = {leaf.name for _, expr in self.analysis.units for leaf in leaves(expr)}
        return tuple(one for one in self.intra_tensors if one.name in names)

    def late_unit(self, role: str) -> Unit | None:
        """The unit that the query or the key is, if it is nothing but the l2norm of an input: its norm is then a factor
        of products of the input as it lies, which need not be rounded. With delta, and no decay per channel."""
        if not self.delta or self.channel_decay:
            return None
        found = [(unit, expr) for unit, expr in self.analysis.units if self.analysis.role(role) == unit]
        if not found or not isinstance(found[0][1], Input):
            return None
        return next(unit for unit in self.units if unit.name == found[0][0].name)

    @staticmethod
    def only(unit: Unit | None, role: str) -> bool:
        """Whether there is such a unit, and its gradient is that of the role."""
        return unit is not None and [term.text for term in unit.terms] == [f"b_d{role}"]

    @property
    def early_gradients(self) -> tuple[str, ...]:
        """The inputs whose gradients are whole once the query has its own."""
        unit = self.late_unit("query")
        roles = {"query", *((unit.name,) if unit and self.only(unit, "query") else ())}
        return tuple(x.name for x in self.gradients if x.terms and roles.issuperset(term.role for term in x.terms))

    def uses_unit(self, role: str) -> bool:
        return any(role in unit.users for unit in self.units)

    @property
    def erase_rows(self) -> tuple[str, ...]:
        """Rows that the chunk-parallel kernel makes for the serial ones: of query, a, b and key. With delta a is the
        key times a number a token, a factor unless channels have decays of their own."""
        if not self.delta:
            return ("q", "a", "b", "k")
        return ("q", "a", "b") if self.channel_decay else ("q", "b")

    @property
    def late_norms(self) -> tuple[str, ...]:
        """The rows whose norms the forward keeps, after erase_factors: those that are inputs as they lie."""
        return tuple(row for row in ("q", "b") if row in self.erase_rows and self.direct_row(row))

    @property
    def row_numbers(self) -> tuple[str, ...]:
        """What the forward keeps a token, in fn: the norms of these rows, and the log decay since the chunk's start."""
        return (*self.late_norms, *(("c",) if self.erase and self.decay == "scalar" else ()))

    @property
    def row_numbers_text(self) -> str:
        norms = ("norms, as 1 over them",) if self.late_norms else ()
        decays = ("log decays since the chunk's start, of a row by itself in fp32",) if "c" in self.row_numbers else ()
        return "; ".join((*norms, *decays))

    def direct_row(self, row: str) -> TensorArg | None:
        """The input that rows of a role are as they lie, if they are one but for its norm."""
        unit = self.late_unit({"q": "query", "b": "key"}[row]) if row in ("q", "b") else None
        return next((one for one in self.unit_tensors if unit and unit.text == one.block), None)

    @property
    def direct_rows(self) -> tuple[TensorArg, ...]:
        """These inputs, which the serial kernels read themselves."""
        return tuple(dict.fromkeys(one for row in self.erase_rows if (one := self.direct_row(row))))

    @property
    def serial_values(self) -> tuple[TensorArg, ...]:
        """What the serial kernels make values of, but for the factor of rows."""
        return tuple(one for one in self.tensors_of("value") if one.name in self.value_block.inputs)

    @property
    def made_rows(self) -> tuple[str, ...]:
        """The rows that the chunk-parallel kernel has to make."""
        return tuple(row for row in self.erase_rows if not self.direct_row(row))

    @property
    def erase_kept(self) -> tuple[str, ...]:
        """What the training forward keeps beside states: pairs inside chunks, factors and decays of rows and chunks."""
        if not self.erase:
            return ()
        pairs = ("M", "A") if self.delta else ("M", "A", "B", "C")
        decay = ("en",) if self.decay != "none" else ()
        rows = (*(("fs",) if self.erase_factors else ()), *(("fn",) if self.row_numbers else ()))
        return (*pairs, *rows, *decay, *(("far",) if self.decay == "key" else ()))

    @property
    def chain_rows(self) -> tuple[str, ...]:
        """Those that carry the adjoint of the state."""
        return tuple(row for row in self.erase_rows if row != "k")

    @property
    def erase_factors(self) -> tuple[str, ...]:
        """The rows that have a factor a token: decay, scale and the number of delta."""
        if not self.erase:
            return ()
        if self.row_decay:
            return ("q", "a", "b")
        if not self.delta or self.channel_decay:
            return ()
        return (
            *(("q",) if self.late_unit("query") else ()), "a", *(("b",) if self.late_unit("key") else ())
        )  # fmt: skip

    @property
    def erase_kernels(self) -> tuple[Kernel, ...]:
        """What takes a state through a piece of a sequence is a matrix [K, K], so that few sequences alone are cut."""
        names = tuple(one.name for one in self.inputs)
        pairs = ("M", "A") if self.delta else ("M", "A", "B", "C")
        own = tuple(one.name for one in self.intra_tensors if not one.is_constant)
        again = "; again for rows whose decays are too strong to be divided by" if self.decay == "key" else ""
        gradients, adjoints = tuple(f"d{name}" for name in names), ("do", "dS", "dw")
        return (
            Kernel(name=f"{self.name}_intra_kernel", direction="either", reads=own, writes=pairs,
                   when=f"always{again}"),
            Kernel(name=f"{self.name}_fwd_kernel", direction="forward", reads=(*names, *pairs), writes=("o", "S"),
                   when="always"),
            Kernel(name=f"{self.name}_carry_kernel", direction="either", reads=("ends", "S"), writes=("S",),
                   when="few sequences are cut into pieces, after a pass for what becomes of these"),
            Kernel(name=f"{self.name}_fwd_kernel", direction="forward", reads=(*names, *pairs), writes=("S", "w"),
                   when="a gradient is asked for: the states before all chunks, again from those that were kept"),
            Kernel(name=f"{self.name}_bwd_state_kernel", direction="backward", reads=(*names, *pairs, "do"),
                   writes=("dS", "dw"), when="a gradient is asked for"),
            Kernel(name=f"{self.name}_bwd_kernel", direction="either", reads=(*names, *pairs, "S", "w", *adjoints),
                   writes=gradients, when=f"a gradient is asked for{again}"),
            Kernel(name=f"{self.name}_step_kernel", direction="one token", reads=(*names, "S"), writes=("o", "S"),
                   when="decode"),
        )  # fmt: skip
