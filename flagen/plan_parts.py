"""The parts of a plan: what a kernel takes and makes, as names and Triton text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .analysis import Stabilizer
from .expr import NORM, Expr, Index, Input, Leaf
from .functions import triton_text
from .stabilize import LOWEST


@dataclass(frozen=True, slots=True)
class TensorArg:
    """An input or a host constant as a kernel sees it. `strided`: the axes whose strides are passed; channels have
    stride 1."""

    name: str
    axes: str
    is_constant: bool
    cast: str

    @property
    def batch(self) -> bool:
        return "b" in self.axes

    @property
    def time(self) -> bool:
        return "t" in self.axes

    @property
    def head(self) -> bool:
        return "h" in self.axes

    @property
    def channel(self) -> str:
        """'k', 'v', 'd' or ''"""
        return next((axis for axis in "kvd" if axis in self.axes), "")

    @property
    def strided(self) -> str:
        return "".join(axis for axis in "bth" if axis in self.axes)

    @property
    def row(self) -> str:
        """Which row of the batch axis: a tensor without time has one a sequence."""
        return "i_b" if self.time else "i_n"

    @property
    def block(self) -> str:
        return block_name(self.name)

    @property
    def rows(self) -> str:
        """What comes after bs and bn in the names of the tuples of a vector state's blocks."""
        return self.block[1:]

    @property
    def shape(self) -> str:
        """The block's shape, for comments."""
        parts = (["BT"] if self.time else []) + ([f"B{self.channel.upper()}"] if self.channel else [])
        return f"[{', '.join(parts)}]"


@dataclass(frozen=True, slots=True)
class Role:
    """A role's text over the blocks b_<input>. `identity`: the input it is, if it is nothing but one with all its
    axes."""

    name: str
    text: str
    identity: str
    axes: str
    inputs: tuple[str, ...]

    @property
    def fixed(self) -> bool:
        """Whether it is the same for all tokens."""
        return "t" not in self.axes


class Term(NamedTuple):
    """What a role gives to the gradient of an input: text over blocks. `reduced`: these have a channel axis that the
    input lacks, over which they are summed."""

    role: str
    text: str
    reduced: bool


class Unit(NamedTuple):
    """A normalised vector. text: what it is the l2norm of, over blocks [BT, BK]; users: the roles that it stands in;
    terms: what these give to its gradient; loaded: whether it is that of an input."""

    name: str
    text: str
    users: frozenset[str]
    terms: tuple[Term, ...]
    loaded: bool


@dataclass(frozen=True, slots=True)
class Gradient:
    """How a chunk's gradient of one input comes from those of the roles."""

    tensor: TensorArg
    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    def terms_over(self, channel: str) -> tuple[Term, ...]:
        """The terms whose blocks have key or value channels."""
        return tuple(term for term in self.terms if (term.role == "value") == (channel == "v"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of the plan, for people: its name, what it walks over, and what it reads and writes."""

    name: str
    direction: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    when: str


@dataclass(frozen=True, slots=True)
class Held:
    """What a stabilised state is held divided by: the log gate that it follows and the log decay that it falls by, as
    text over blocks [BT], the tensors in them, and where it begins.
    """

    gate: str
    fall: str
    tensors: tuple[TensorArg, ...]
    lowest: float = LOWEST

    def kernel(self, name: str) -> Kernel:
        """That of the spec of this name."""
        reads = tuple(one.name for one in self.tensors if not one.is_constant)
        return Kernel(
            name=f"{name}_peak_kernel",
            direction="forward",
            reads=reads,
            writes=("peak", "rise", "m"),
            when="always, before all else",
        )


# blocks that kernels make themselves; an input of such a name gets another block
OWN_BLOCKS = frozenset(
    """
    cq gn dqd dkd zr zl el mark c
    query key value ld turn angle h hi hr z ch chi cz er dnd dh dhi dhr dz A dA D s c ct n dn o do dod d dd ds own
    fk fq kd qd vd en ek eq cn sn ck sk cr sr cl sl qc qs kc ks x xl xq xk xqi xki y yl yqi yki all weight first
    second k1 k2 q1 q2 tree gt at dquery dkey dvalue dlog_decay dphase dbonus dfq dfk dvi dqr dqi dkr dki dqc dqs
    dkc dks sum part pick picked f yq m fall gate before lg dgate top Ai Ab Abi ci cb cbi si ei back backi after
    afteri gti dsi count df dh0 dh1 dh2 dot dpair h0 qr inv zq zt a b e hw dhw M B C E dB dC dD dar dbd dkd ea xa xw
    or ol late early corner rq ra rb rk fa fb za zb
    zkey ce vf rn wt nz kz ones dw row rest last sums even odd
    da db derase derase_a derase_b pA pB pC pD
    on ez nq nb xz rkey hd hwd qdi kdi tn aq ak ce se zri zli dqdr dqdi dkdr dkdi ally es one rows gn_ahead tn_ahead
    dfar qfar kfar kfari xlfar ylfar dfactor ow less kt qt half with vt h2 dh2 en2 rq2 ra2 rb2 rk2
    """.split()  # noqa: SIM905
)


def block_name(name: str) -> str:
    """The name of an input's block. Names of inputs do not end with _."""
    taken = name in OWN_BLOCKS or name.startswith(("sum_", "norm_unit", "dunit", "shared"))
    return f"b_{name}_" if taken else f"b_{name}"


def leaves(expr: Expr) -> tuple[Input, ...]:
    return tuple(dict.fromkeys(node for node in expr.walk() if isinstance(node, Input)))


def block_text(leaf: Expr, time: bool, channel: str) -> str:
    """The block of an input as it broadcasts in a block with or without a time and a channel axis."""
    assert isinstance(leaf, Leaf) and not isinstance(leaf, Index), "indices are constants by now"
    name = block_name(leaf.name)
    has_time, has_channel = "t" in leaf.axes, bool(set("kvd") & set(leaf.axes))
    if not (time and channel) or (has_time and has_channel):
        return name
    return f"{name}[:, None]" if has_time else f"{name}[None, :]" if has_channel else name


def row_text(expr: Expr | None) -> str:
    """An expression without channels over blocks [BT]."""
    assert expr is not None, "there is nothing of the kind in the spec"
    names: dict[Expr, str] = {leaf: block_text(leaf, True, "") for leaf in leaves(expr)}
    return triton_text(expr, names | {NORM: "b_n"})


def held(stabilizer: Stabilizer | None, given: tuple[TensorArg, ...]) -> Held:
    """Of a stabilised spec. given: the tensors that a call has."""
    assert stabilizer is not None, "the spec is not stabilised"
    gate, decay = stabilizer
    names = {leaf.name for expr in stabilizer if expr is not None for leaf in leaves(expr)}
    fall = "0.0" if decay is None else row_text(decay)
    return Held(row_text(gate), fall, tuple(tensor for tensor in given if tensor.name in names))
