"""Whether a trial fails, and how: a difference beyond the tolerances, an exception, or an answer that is not sharp.

A difference is no failure where the right answer itself is not sharp:
- it moves by half its limit when the values of query, key and value, the initial state and the log decays are changed
  by a rounding of the dtype in which kernels multiply them: no program that rounds could do better. That is so for the
  gradients of maximum(abs(n), 1) where n is 1 but for its rounding, which take one branch or the other, and for a
  gradient whose terms cancel nearly entirely, as what a normaliser divides out again. Where the output itself moves so,
  the gradients of decay and phase count as not sharp too: kernels take them as running sums of products with what is
  read, and the errors of these add up;
- it does not fit its dtype: the right answer, rounded to it, is beyond half the limit. That is so for gradients summed
  over all tokens in float16, which ends at 65504.
Both are computed from the reference alone, in fp64; what the op returned does not enter. Such trials count as ill.
"""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .compare import HEADER, WORST_ROW, Row
from .errors import SpecError
from .expr import Expr, Input
from .functions import evaluate
from .fuzz import Trial
from .samples import gates
from .testing import Case, Results, compared
from .validate import AXES_OF

# how far values are moved, relative to themselves: a rounding of a 16-bit operand; in fp32 and fp64, where sums of many
# terms are taken with the same precision, a few
MOVED = {torch.float64: 2.0**-49, torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
MOVES = 3
SHARE = 0.5  # of the limit


@dataclass(frozen=True, slots=True)
class Outcome:
    """status: "ok", "ill", "differs", "raised" or "died". what: its kind in few words, equal for equal failures; text:
    the table of what differs, or the exception. worst: the largest error in units of its limit. tensors: what differs.
    """

    status: str
    what: str = ""
    text: str = ""
    worst: float = 0.0

    @property
    def failed(self) -> bool:
        return self.status not in ("ok", "ill")


def judge(trial: Trial) -> Outcome:
    """Runs a trial. New tensors are full of NaN, so that one that was not written is seen."""
    try:
        with _quiet(), unwritten_is_nan():
            report = trial.check(raises=False)
            if report.ok:
                return Outcome("ok", worst=max(map(_ratio, report.rows), default=0.0))
            excused = unsharp(trial.case(), [row for row in report.failures if not row.fault])
    except Exception as error:  # whatever it is, it is what the trial found
        return Outcome("raised", _place(error), "".join(traceback.format_exception(error)[-12:]), float("inf"))
    wrong = [row for row in report.failures if row.tensor not in excused]
    worst = max((_ratio(row) for row in report.rows if row.tensor not in excused), default=0.0)
    shown = wrong or report.failures
    text = "\n".join([report.title, HEADER, *(f"{row}{_note(excused, row)}" for row in shown)])
    if not wrong:
        return Outcome("ill", "ill-conditioned: " + ", ".join(sorted(set(excused.values()))), text, worst)
    return Outcome("differs", ", ".join(sorted({_class(row.tensor) for row in wrong})), text, worst)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """torch.empty and the like are filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _ratio(row: Row) -> float:
    """The error in units of its limit; infinite for NaN and faults."""
    ratio = max(row.rms / row.limit, row.worst / (WORST_ROW * row.limit))
    return ratio if ratio == ratio and not row.fault else float("inf")


def _note(excused: dict[str, str], row: Row) -> str:
    return f" ({excused[row.tensor]})" if row.tensor in excused else ""


def _class(tensor: str) -> str:
    first, _, rest = tensor.partition(" ")
    return f"d {'initial_state' if rest.startswith('initial_state') else 'input'}" if first == "d" else first


def _place(error: Exception) -> str:
    """The exception's type and beginning, and where in flagen it came from."""
    frames = [
        one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename).parent == Path(__file__).parent
    ]
    where = f" in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{where}: {re.sub(r'[0-9]+', '#', str(error))[:80]}"


# --- answers that are not sharp


def unsharp(case: Case, rows: list[Row]) -> dict[str, str]:
    """Why an error in a tensor is no fault, by the names of those of `rows` for which there is a reason."""
    if not rows:
        return {}
    narrow = case.inputs
    case = replace(case, inputs=tuple(map(_widened, case.inputs)), states=tuple(map(_widened, case.states)))
    want = case.reference(None)
    unfit = _beyond(compared(case, _rounded(want, narrow, case), want))
    found = dict.fromkeys(unfit, "does not fit its dtype")
    finite = {row.tensor for row in rows if row.rms == row.rms and row.rms != float("inf")}
    for move in range(MOVES):
        moved = _moved(case, move)
        if moved is None:
            break
        results = moved.reference(None)
        results = replace(results, d_inputs=results.d_inputs[: len(case.inputs)])
        turned = _beyond(compared(case, results, want))
        found |= {name: "moves with a rounding of its operands" for name in turned if name not in found}
    if "o" in found:  # the gradient of a decay is a running sum of products with what is read, and adds its errors up
        found = {f"d {one.name}": "sums what moves with a rounding" for one in gates(case.spec)} | found
    names = {row.tensor: _STEPS.get(row.tensor, row.tensor) for row in rows}
    return {
        name: found[same] for name, same in names.items() if same in found and (name in finite or "fit" in found[same])
    }


_STEPS = {"step o": "o", "step state S": "final_state S", "step state z": "final_state z"}


def _beyond(rows: list[Row]) -> list[str]:
    return [row.tensor for row in rows if not _ratio(row) <= SHARE]


def _widened(x: Tensor) -> Tensor:
    wide = x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
    return wide.requires_grad_(x.requires_grad)


def _rounded(want: Results, inputs: tuple[Tensor, ...], case: Case) -> Results:
    """The right answers in the dtypes in which an op returns them."""
    output = inputs[case.spec.inputs.index(case.spec.value.inputs[0])].dtype
    d_inputs = tuple(
        None if d is None else d.to(x.dtype).to(d.dtype) for d, x in zip(want.d_inputs, inputs, strict=True)
    )
    return replace(want, o=want.o.to(output).to(want.o.dtype), d_inputs=d_inputs)


def _moved(case: Case, seed: int) -> Case | None:
    """The same spec with noise added to query, key and value and multiplied into log_decay and phase, which for the
    reference are further inputs; None where a spec has too many as it is. A gradient still goes by the exact values.
    """
    spec, generator = case.spec, torch.Generator().manual_seed(seed)

    def share(like: Tensor, dtype: torch.dtype) -> Tensor:
        return (MOVED[dtype] * (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1)).to(
            like.device
        )

    changed: dict[str, Any] = {"feature_map": spec.feature_map if spec.taylor else None}
    erase: list[Expr] = []
    tensors: list[Tensor] = []
    extra: list[Input] = []
    with torch.no_grad():
        for role, expr in spec.roles:
            value = _value(case, expr)
            value = value[..., 0] if spec.vector else value
            if role in ("query", "key", "value"):
                own = Input(f"noise_{role}", "btd" if spec.vector else AXES_OF[role])
                changed[role], noise = expr + own, value * share(value, case.dtype)
            elif role in ("erase_a", "erase_b"):
                own = Input(f"noise_{role}", AXES_OF[role])
                erase.append(expr + own)
                noise = value * share(value, case.dtype)
            elif role in ("log_decay", "phase") and expr.inputs:
                # in kernels these are fp32, or fp64
                channels = "".join(axis for axis in expr.axes if axis in "kv")
                own = Input(f"noise_{role}", "btd" if spec.vector else f"bth{channels}")
                wide = torch.float64 if case.dtype == torch.float64 else torch.float32
                changed[role], noise = expr * own, 1 + share(value, wide)
                noise = noise if own.axes != "bth" else noise[..., 0]
            else:
                continue
            extra.append(own)
            tensors.append(noise)
        states = tuple((x * (1 + share(x, case.dtype))).requires_grad_(x.requires_grad) for x in case.states)
    if erase:
        changed["erase"] = tuple(erase)
    try:
        noisy = spec.replace("noisy", **changed, inputs=[*spec.inputs, *extra])
    except SpecError:
        return None
    return replace(case, spec=noisy, inputs=(*case.inputs, *tensors), states=states)


def _value(case: Case, expr: Expr) -> Tensor:
    """The value of a role for each token, [B, T, H, D]."""
    limits = case.options["cu_seqlens"]
    limits = None if limits is None else limits.tolist()
    sizes = reference._sizes(case.spec, case.inputs, limits)
    values: Any = reference._values(case.spec, case.inputs, case.scalars, sizes, limits, torch.float64)
    found = torch.as_tensor(evaluate(expr, values, sizes["h"]), dtype=torch.float64, device=case.inputs[0].device)
    channels = [sizes[axis] for axis in expr.axes if axis in "kv"]
    batch, tokens = values[case.spec.value.inputs[0].name].shape[:2]
    found = found.expand(batch, tokens, sizes["h"], *(channels or [1]))
    return torch.nn.functional.pad(found, (0, 0, 0, 0, 0, sizes["t"] - tokens))
