"""Spec -> Op: every stage in order, by way of the cache. What a spec was compiled to before is found, not made again.

A spec that was seen before needs neither SymPy nor Jinja: its text is in the cache, with the derivatives beside it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from . import cache, config, logs, specs
from .analysis import Analysis, analyse, derivative_texts, restored
from .cache_key import Key, digest, make_key
from .errors import PlanError, SpecError
from .plan import Plan, make_plan
from .spec import Spec

if TYPE_CHECKING:
    from .op import Op

BACKENDS = ("auto", "triton", "torch")
CHUNK_SIZES = (16, 32, 64, 128)
PRECISIONS = ("ieee", "tf32", "tf32x3")

_ops: dict[tuple[Any, ...], Op] = {}
_lock = threading.RLock()  # held while an op is made, so that its operators are registered once
_render_logger = logging.getLogger("flagen.render")
_code_logger = logging.getLogger("flagen.code")


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # a thread that held it does not exist in the child


def compile(
    spec: Spec | str, *, chunk_size: int | None = None, backend: str = "auto", input_precision: str | None = None
) -> Op:
    """The function of a recurrence: forward, backward and decode.

    spec: a Spec, or the name of a shipped one such as "gla".
    chunk_size: tokens a chunk, one of 16, 32, 64, 128, or as many of them as a GPU's shared memory has room for; None
        lets each backend choose. It changes speed and rounding only.
    backend: "auto" runs the Triton kernels on CUDA tensors (and on CPU tensors if TRITON_INTERPRET=1 was set before
        Triton was imported) and chunkwise PyTorch elsewhere, call by call; "triton" and "torch" always run that. A spec
        that has no Triton kernels yet runs as chunkwise PyTorch everywhere; its op.plan is None.
    input_precision: of products of fp32 inputs in the Triton kernels: "ieee" and "tf32x3" are fp32-accurate, "tf32" is
        faster and has 10 bits; None chooses an fp32-accurate one.

    Returns an Op, the same one for an equal spec and equal options. Raises SpecError on an unknown name, PlanError on
    options that are not allowed, CacheError and ConfigError as FLAGEN_CACHE says.
    """
    logs.setup()
    spec = _spec(spec)
    _check_options(spec.name, chunk_size, backend, input_precision)
    wanted = (spec, chunk_size, backend, input_precision)
    with _lock:
        if wanted not in _ops:
            _ops[wanted] = _make(spec, chunk_size, backend, input_precision)
        return _ops[wanted]


def emit(spec: Spec | str) -> str:
    """The text of a module that needs only torch and triton: kernels, gradients, a function of the spec's name.

    spec: a Spec, or the name of a shipped one.
    """
    from .render import render_standalone

    return render_standalone(make_plan(analyse(_spec(spec))))


def prepare(spec: Spec) -> tuple[Plan | None, cache.Entry]:
    """The plan of a spec and the entry with its text, found in the cache or made and stored there. Without kernels
    (Analysis.without_kernels) the plan is None, and the text a comment that says why.
    """
    _, plan, entry = _prepared(spec)
    return plan, entry


def _prepared(spec: Spec) -> tuple[Analysis, Plan | None, cache.Entry]:
    key = _key(spec)
    entry = cache.find(key) if key else None
    analysis = None if entry is None else restored(spec, entry.facts.get("derivatives"))
    if entry is not None and analysis is not None and config.cache_mode() != "verify":
        return analysis, _planned(analysis), entry
    return _make_text(spec, key)


def _planned(analysis: Analysis) -> Plan | None:
    return None if analysis.without_kernels else make_plan(analysis)


def _make_text(spec: Spec, key: Key | None) -> tuple[Analysis, Plan | None, cache.Entry]:
    began = time.perf_counter()
    analysis = analyse(spec)
    plan = _planned(analysis)
    _render_logger.debug("%s: analysed and planned in %.0f ms\n%s", spec.name, _since(began), plan)
    began = time.perf_counter()
    source = _text(analysis, plan)
    _render_logger.info("%s: rendered %d lines in %.0f ms", spec.name, source.count("\n"), _since(began))
    facts = {"derivatives": derivative_texts(analysis)}
    if key is None:
        return analysis, plan, cache.Entry(spec.name, digest(source), source, facts)
    entry = cache.store(key, source, facts)
    _code_logger.info("%s: kernels written to %s", spec.name, entry.path or "memory only")
    return analysis, plan, entry


def _text(analysis: Analysis, plan: Plan | None) -> str:
    if plan is None:
        reason = analysis.without_kernels
        return f"# {analysis.spec.name}: {reason}; it runs as chunkwise PyTorch on every device.\n"
    from .render import render

    return render(plan)


def _make(spec: Spec, chunk_size: int | None, backend: str, input_precision: str | None) -> Op:
    from .op import Op

    analysis, plan, entry = _prepared(spec)
    if plan is None and backend == "triton":
        make_plan(analysis)  # raises, and says why

    def torch_backend() -> Any:
        if analysis.vector:
            from .torch_vector import VectorBackend

            return VectorBackend(analysis)
        from .torch_backend import TorchBackend

        return TorchBackend(analysis, chunk_size)

    def triton_backend() -> Any:
        from . import tuned_tables
        from .load import load
        from .triton_backend import TritonBackend
        from .triton_vector import VectorTritonBackend

        assert plan is not None, "the op asks for Triton where there are kernels alone"
        if plan.vector:
            return VectorTritonBackend(plan, load(entry))
        # what a user has fixed is not tuned
        chosen = tuned_tables.chosen if chunk_size is None and input_precision is None else None
        return TritonBackend(plan, load(entry), chunk_size, input_precision, chosen=chosen)

    return Op(
        spec=spec,
        analysis=analysis,
        plan=plan,
        backend=backend,
        torch_backend=torch_backend,
        triton_backend=triton_backend,
        source=entry.source,
        path=None if entry.path is None else str(entry.path),
        origin=(_again, (spec.to_json(), chunk_size, backend, input_precision)),
    )


def _again(spec_json: str, chunk_size: int | None, backend: str, input_precision: str | None) -> Op:
    """What pickle calls: the op that compile gives for these."""
    spec = Spec.from_json(spec_json)
    return compile(spec, chunk_size=chunk_size, backend=backend, input_precision=input_precision)


def _key(spec: Spec) -> Key | None:
    """The key of a spec; None, with a warning, where flagen's own sources cannot be read."""
    try:
        return make_key(spec.name, spec.to_json())
    except OSError as error:
        cache.unusable(spec.name, error)
        return None


def _spec(spec: Spec | str) -> Spec:
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, str):
        if spec.lstrip().startswith("{"):
            raise SpecError("compile takes no JSON text; give it flagen.Spec.from_json(text)")
        return specs.get(spec)
    raise SpecError(
        f"compile takes a Spec or the name of a shipped one ({', '.join(specs.names())}), "
        f"got {type(spec).__name__}: {str(spec)[:60]}"
    )


def _check_options(name: str, chunk_size: Any, backend: Any, input_precision: Any) -> None:
    options = (
        ("chunk_size", chunk_size, (None, *CHUNK_SIZES)),
        ("backend", backend, BACKENDS),
        ("input_precision", input_precision, (None, *PRECISIONS)),
    )
    for option, value, allowed in options:
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise PlanError(f"{name}: {option}={value!r} is not allowed; use one of {', '.join(map(repr, allowed))}")


def _since(began: float) -> float:
    return 1000 * (time.perf_counter() - began)
