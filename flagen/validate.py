"""The rules of the language: what a spec may say. Each mistake has its own message; spec.py applies them in order."""

from __future__ import annotations

import builtins
import keyword
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import SpecError, shown
from .expr import (
    DERIVATIVE_FUNCTIONS,
    FEATURE,
    FUNCTION_ARITY,
    MAX_DEPTH,
    MAX_NODES,
    MAX_TEXT,
    NORM,
    ROW_FUNCTIONS,
    VECTOR,
    Call,
    Expr,
    Input,
    Number,
    Scalar,
    Taylor,
    as_expr,
    is_finite_number,
    to_text,
)
from .functions import fold, triton_text
from .intervals import interval

if TYPE_CHECKING:
    from .spec import Spec

EPS = 1e-6
MAX_INPUTS = 16
MAX_POWER = 16  # of a tensor: x ** n is a product in a kernel
MAX_HOST_POWER = 1024

OP_KEYWORDS = ("scale", "initial_state", "output_final_state", "cu_seqlens", "state")
# names that kernels, launchers and their arguments have in generated text
_KERNEL_NAMES = """o den do h h0 ht hc hs hp dh dh0 dht dhp z z0 zt zc zs zp dz dz0 dzt dzp gt at monomial bos eos
    tl torch triton self i s t like rows chunks make common needs initial final save gradient gradients sums fwd bwd
    scan sizes pieces monomials num_warps num_stages is_first is_last n_c n_l n_p n_s n_t locate sum_steps plus
    select scatter tree_level tree_scores tree_apply tree_apply_complex device float64 qdq kdk hdh parts count alone
    kept need_decay adjoints shape block prepare far n_far pairs grid by_key by_query qd kd gn A dqd dkd values
    segments need_query need_key need_value peak rise peaks m m0 mt through last falls tops into rises passes
    compose read_rows dense dden summed factors hw dhw dhs intra run unit_inverse erase_level erase_scores
    erase_apply turn turned sigmoid_of_minus rq ra rb rk fs fn en made decays gsum packed columns fork join sides
    store_columns COLUMNS starts of_value times place span states slots given table inv dzs FACTORS
    sum_columns from_rows to_rows nearest join_blocks block_inverses ends run_adjoints carry begun"""
KERNEL_NAMES = frozenset(_KERNEL_NAMES.split())
AXES_OF = dict.fromkeys(("query", "key", "phase", "bonus", "erase_a", "erase_b"), "bthk") | {"value": "bthv"}


class SpecWarning(UserWarning):
    """A spec that means something, but probably not what was intended."""


def check_spec_name(name: object) -> None:
    if type(name) is not str or not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name):
        raise SpecError(
            f"a spec's name must be 1 to 41 of a-z, 0-9 and _, a letter first, got {shown(name)}; it names the kernels"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise SpecError(f"a spec cannot be named {name!r}, a keyword of Python; choose another name")


def check_argument_name(spec: str, name: str) -> None:
    """A name that becomes an argument of the op and of kernels. Raises SpecError where it would clash."""
    where = f"{spec}: the name {name!r}"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise SpecError(f"{where} is a keyword of Python; choose another name")
    if name in OP_KEYWORDS:
        raise SpecError(f"{where} is an argument of every op ({', '.join(OP_KEYWORDS)}); choose another name")
    if name in ("head", "heads"):
        raise SpecError(
            f"{where} means the {'index' if name == 'head' else 'number'} of the heads; choose another name"
        )
    if name in (*FUNCTION_ARITY, *ROW_FUNCTIONS, *DERIVATIVE_FUNCTIONS, "taylor"):
        raise SpecError(f"{where} is a function of the language; choose another name")
    if name.startswith("_") or name.endswith("_"):
        raise SpecError(f"{where} begins or ends with _; such names are kept for generated code, choose another name")
    if not re.search("[a-z]", name):
        raise SpecError(
            f"{where} is all capitals, as kernels name sizes (B, T, BT); add a lower-case letter, as in A_log"
        )
    if _is_taken(name):
        raise SpecError(
            f"{where} is one that generated kernels use for themselves, as they do b_*, p_*, i_*, o_*, m_*, G_*, *_sb, "
            "*_st, *_sh, *_sp, *_kernel, c0, c1, ..., unit0, ..., h, z, o, s and t; choose another name"
        )
    if _is_taken(f"d{name}") or keyword.iskeyword(f"d{name}") or hasattr(builtins, f"d{name}"):
        raise SpecError(
            f"{where} would have the gradient d{name}, a name that generated code needs; choose another name"
        )
    if hasattr(builtins, name):
        raise SpecError(f"{where} is a built-in of Python, which generated code may need; choose another name")


def _is_taken(name: str) -> bool:
    """Whether generated text has the name, or names made like it."""
    made = re.match(r"(b[ns]?|[piom]|G)_|(c|unit)\d+\Z", name) or re.search(r"_(s[bthp]|kernel)$", name)
    return bool(made) or name in KERNEL_NAMES


def check_size(where: str, expr: Expr) -> None:
    """Bounds nodes and depth, without recursion: with shared subtrees a tree can be far larger than it looks."""
    nodes, stack = 0, [(expr, 1)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise SpecError(
                f"{where} has more than {MAX_NODES} nodes; simplify it, or compute part of it before the call"
            )
        if depth > MAX_DEPTH:
            raise SpecError(
                f"{where} is nested more than {MAX_DEPTH} deep; simplify it, or compute part of it before the call"
            )
        stack.extend((child, depth + 1) for child in node.children)


def check_expr(where: str, expr: Expr) -> Expr:
    """The limits of one expression. Returns it."""
    check_size(where, expr)
    for node in expr.walk():
        if isinstance(node, Number):
            as_expr(node.value)
        elif isinstance(node, Call):
            if node.function in DERIVATIVE_FUNCTIONS:
                raise SpecError(
                    f"{where} uses {node.function}, which only derivatives may; use relu, abs, minimum or maximum"
                )
            if node.function == "pow":
                _check_power(where, *node.args)
            if node.function in ("log", "sqrt") and interval(node.args[0]).is_negative:
                raise SpecError(f"{where}: {to_text(node)} is never a number, its argument is always negative")
    try:
        folded = fold(expr)
        rows = [node for node in folded.walk() if isinstance(node, Call) and node.function in ROW_FUNCTIONS]
        names = {node: f"b_{getattr(node, 'name', 'unit')}" for node in (*rows, *folded.walk())}
        for part in (folded, *(row.args[0] for row in rows)):
            triton_text(part, names)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    if any(isinstance(node, Call) and node.function == "div" and node.args[1] == Number(0) for node in folded.walk()):
        raise SpecError(f"{where}: {to_text(expr)} divides by 0, so it has no finite value")
    if len(text := to_text(expr)) > MAX_TEXT:
        raise SpecError(
            f"{where} is {len(text)} characters long, the limit is {MAX_TEXT}; use shorter names or simplify it"
        )
    return expr


def _check_power(where: str, base: Expr, exponent: Expr) -> None:
    whole = isinstance(exponent, Number) and float(exponent.value).is_integer()
    if isinstance(exponent, Number):
        limit = MAX_HOST_POWER if base.is_constant else MAX_POWER
        if abs(exponent.value) > limit:
            raise SpecError(
                f"{where}: an exponent must lie within -{limit} to {limit} here, got {exponent.value:g}; rescale"
            )
    if not whole and interval(base).is_negative:
        raise SpecError(
            f"{where}: {to_text(base)} is always negative and has no power {to_text(exponent)}; "
            "only a whole number will do there"
        )


def role_expr(spec: str, role: str, value: Any) -> Expr | None:
    """A role's argument as an expression within the limits."""
    if value is None:
        if role in ("query", "key", "value"):
            raise SpecError(f"{spec}: {role} cannot be None; leave it out for the default input")
        return None
    if callable(value):
        raise SpecError(f"{spec}: {role} must be an expression of inputs, got a function; apply it to an Input")
    try:
        expr = as_expr(value)
    except SpecError as error:
        raise SpecError(f"{spec}: {role}: {error}") from None
    return check_expr(f"{spec}: {role}", expr)


def _applied(where: str, function: Any, placeholder: Input, example: str) -> Expr:
    """The expression that `function` makes of a placeholder; an expression over the placeholder stands for itself."""
    if isinstance(function, Expr):
        expr = function
    elif callable(function):
        try:
            expr = as_expr(function(placeholder))
        except SpecError as error:
            raise SpecError(f"{where}: {error}; it must give an expression, as {example} does") from None
        except TypeError as error:
            raise SpecError(
                f"{where} must take one expression, as {example} does; it raised TypeError: {error}"
            ) from None
    else:
        raise SpecError(f"{where} must be a function of one expression such as {example}, got {shown(function)}")
    check_expr(where, expr)
    others = [one for one in expr.inputs if one != placeholder]
    if others:
        raise SpecError(f"{where} uses the input {others[0].name!r}; it may use its argument alone, as {example} does")
    if placeholder not in expr.inputs:
        raise SpecError(f"{where} ignores its argument, it is {to_text(expr)}; write something like {example}")
    return expr


def feature_map(spec: str, given: Any) -> Taylor | Expr | None:
    where = f"{spec}: feature_map"
    if given is None:
        return None
    if isinstance(given, Taylor):
        return given
    if not callable(given) and not isinstance(given, Expr):
        raise SpecError(
            f"{where} must be taylor(1), taylor(2) or a function such as lambda x: elu(x) + 1, got {shown(given)}"
        )
    expr = _applied(where, given, FEATURE, "lambda x: elu(x) + 1")
    if any(scalar.name == FEATURE.name for scalar in expr.scalars):
        raise SpecError(f"{where} uses the scalar 'x', the name of its argument; rename the scalar")
    return expr


def normalizer(spec: str, given: Any) -> bool | Expr:
    if isinstance(given, bool):
        return given
    where = f"{spec}: normalize"
    if not callable(given) and not isinstance(given, Expr):
        raise SpecError(
            f"{where} must be True, False or a function such as lambda n: maximum(abs(n), 1), got {shown(given)}"
        )
    expr = _applied(where, given, NORM, "lambda n: maximum(abs(n), 1)")
    leaves = [node for node in expr.walk() if not node.children and not isinstance(node, (Number, Input))]
    if leaves:
        raise SpecError(f"{where} uses {leaves[0]}; it may use n and numbers alone")
    return expr


def eps(spec: str, given: Any, normalize: Any) -> float:
    if not is_finite_number(given) or given < 0:
        raise SpecError(f"{spec}: eps must be a number >= 0, got {shown(given)}")
    if given != EPS and normalize is not True:
        raise SpecError(f"{spec}: eps={given!r} is used by normalize=True only; leave it out or set normalize=True")
    return float(given)


def scale(spec: str, given: Any) -> float | None:
    if given is None:
        return None
    if not is_finite_number(given):
        raise SpecError(f"{spec}: scale must be a finite number, or None for K ** -0.5, got {shown(given)}")
    return float(given)


def check_roles(spec: Spec) -> None:
    """Axes, names and combinations of a spec whose roles are set. Raises SpecError on the first fault."""
    _check_names(spec)
    for role, expr in spec.roles:
        check_expr(f"{spec.name}: {role}", expr)  # again: a feature map may have made query and key larger
        if VECTOR not in spec.value.axes:
            _check_axes(spec.name, role, expr)
    _check_combinations(spec)
    if spec.log_decay is not None and interval(spec.log_decay).is_positive:
        raise SpecError(
            f"{spec.name}: log_decay = {to_text(spec.log_decay)} is positive whatever its inputs, so the state grows "
            "without bound; it must be <= 0: is a minus sign missing, or logsigmoid meant?"
        )


def _check_names(spec: Spec) -> None:
    seen: dict[str, Input | Scalar] = {}
    for _, expr in spec.roles:
        named: tuple[Input | Scalar, ...] = (*expr.inputs, *expr.scalars)
        for leaf in named:
            other = seen.setdefault(leaf.name, leaf)
            if other == leaf:
                continue
            if isinstance(other, Scalar) or isinstance(leaf, Scalar):
                raise SpecError(f"{spec.name}: {leaf.name!r} is both an Input and a Scalar; rename one")
            if other.axes != leaf.axes:
                raise SpecError(
                    f"{spec.name}: the input {leaf.name!r} is used with two different axes, {' '.join(other.axes)!r} "
                    f"and {' '.join(leaf.axes)!r}; declare it once, or rename one"
                )
            raise SpecError(
                f"{spec.name}: the input {leaf.name!r} is declared with two different bounds; declare it once"
            )
    if len(seen) > MAX_INPUTS:
        raise SpecError(
            f"{spec.name}: {len(seen)} inputs and scalars, the limit is {MAX_INPUTS}; combine some before the call"
        )
    for name in seen:
        check_argument_name(spec.name, name)
    for name in seen:
        if f"d{name}" in seen:
            raise SpecError(f"{spec.name}: 'd{name}' would also name the gradient of {name!r}; rename one")
        if f"e{name}" in seen:
            raise SpecError(f"{spec.name}: 'e{name}' would also name a sum of {name!r} in generated code; rename one")
    for leaf in seen.values():
        if isinstance(leaf, Input) and not leaf.axes:
            raise SpecError(
                f"{spec.name}: the input {leaf.name!r} has no axes; give it some of b t h k v, "
                f"or use Scalar({leaf.name!r})"
            )


def _check_axes(spec: str, role: str, expr: Expr) -> None:
    axes, text = expr.axes, to_text(expr)
    if role == "log_decay":
        if "k" in axes and "v" in axes:
            raise SpecError(
                f"{spec}: log_decay = {text} varies over key and value channels (k and v); "
                "a decay has one of them or none"
            )
        return
    if role == "phase" and "k" in axes and "v" in axes:
        raise SpecError(f"{spec}: phase = {text} varies over key and value channels (k and v); it may have k, never v")
    allowed = AXES_OF[role]
    wrong = [axis for axis in axes if axis not in allowed]
    if wrong:
        reason = {
            "query": "query and state meet in the key channels",
            "key": "the key spans the state's rows, k; per value channel use value=",
            "value": "the value spans the state's columns, v; per key channel use key=",
            "phase": "a phase per value channel would rotate the output",
            "bonus": "the bonus weighs key channels",
        }.get(role, "erase reads and writes the state's rows, k")
        raise SpecError(f"{spec}: {role} = {text} has the axis {wrong[0]}, allowed are {' '.join(allowed)}: {reason}")
    if role in ("query", "key", "value", "erase_a", "erase_b") and axes != allowed:
        missing = " ".join(axis for axis in allowed if axis not in axes)
        raise SpecError(f"{spec}: {role} = {text} lacks the axes {missing}; it must vary over {' '.join(allowed)}")


def _check_combinations(spec: Spec) -> None:
    decay_axes = spec.log_decay.axes if spec.log_decay is not None else ""
    normalized = spec.normalize is not False
    refused = (
        (spec.taylor and spec.bonus is not None, "a bonus with taylor",
         "diag(bonus) has no meaning on expanded features"),
        (spec.taylor and "k" in decay_axes, "a decay per key channel with taylor",
         "the decay must be the same for all expanded features: use a scalar one"),
        (spec.taylor and spec.phase is not None, "a phase with taylor", "the expanded features cannot be rotated"),
        (normalized and "v" in decay_axes, "normalize with a decay per value channel",
         "the normaliser would need a state for every value channel"),
        (normalized and spec.phase is not None, "normalize with a phase", "the normaliser would not be positive"),
        (spec.phase is not None and "v" in decay_axes, "a phase with a decay per value channel",
         "one turns key channels, the other weighs value channels"),
    )  # fmt: skip
    for found, what, why in refused:
        if found:
            raise SpecError(f"{spec.name}: {what} is not supported: {why}; drop one of them")


def ordered_inputs(spec: str, used: tuple[Input, ...], given: Sequence[str | Input] | None) -> tuple[Input, ...]:
    """The inputs in the order `given`, which must name each of `used` once; or as they are used."""
    if given is None:
        return used
    if isinstance(given, (str, Input)) or not isinstance(given, Sequence):
        raise SpecError(f"{spec}: inputs must be a tuple of names or Inputs, got {shown(given)}")
    by_name = {one.name: one for one in used}
    names = []
    for one in given:
        if not isinstance(one, (str, Input)):
            raise SpecError(f"{spec}: inputs must hold names or Inputs, got {type(one).__name__}: {shown(one)}")
        name = one if isinstance(one, str) else one.name
        if name not in by_name:
            raise SpecError(f"{spec}: inputs has {shown(name)}, which no expression uses, unlike {', '.join(by_name)}")
        if isinstance(one, Input) and one != by_name[name]:
            raise SpecError(
                f"{spec}: inputs declares {name!r} unlike the expressions do; list the same Input, or its name"
            )
        if name in names:
            raise SpecError(f"{spec}: inputs lists {name!r} twice")
        names.append(name)
    missing = [name for name in by_name if name not in names]
    if missing:
        raise SpecError(f"{spec}: inputs leaves out {', '.join(missing)}; it must order all of {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)


def warn_about_normalizer(spec: Spec) -> None:
    if spec.normalizer is None or interval(spec.normalizer).is_positive:
        return
    features = spec.taylor == 2 or (not spec.taylor and all(interval(e).is_nonnegative for e in (spec.query, spec.key)))
    if features and (spec.bonus is None or interval(spec.bonus).is_nonnegative):
        return
    warnings.warn(
        f"{spec.name}: the normaliser may be zero or negative, because the features of query and key are not provably "
        ">= 0; use a feature map such as elu(x) + 1, exp, relu or taylor(2), declare bounds (Input(..., low=0)), or "
        "normalize=lambda n: maximum(abs(n), 1)",
        SpecWarning,
        stacklevel=3,
    )
