"""The emitted file: it needs only torch and triton, and computes what the reference does."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys

import pytest
import torch
from cases import ALL, SCALARS, SHIPPED, VECTORS, expected, make, make_states
from harness import narrow_states

import flagen
from flagen import compiler
from flagen.compare import kind_of, limit_of, measure
from flagen.expr import Scalar, exp, head, heads, log, maximum, minimum, sigmoid, softplus, sqrt
from flagen.functions import evaluate_host
from flagen.spec import Spec
from flagen.standalone import host_text

NAMED = {spec.name: spec for spec in ALL + VECTORS}
CHOSEN = [
    *SHIPPED,
    *(NAMED[name] for name in ("scalar", "taylor_2_row", "row_key", "phase_key_u", "shared", "hgrn", "shared_vector")),
]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """Spec -> the module in the file that `flagen emit` writes."""
    directory, modules = tmp_path_factory.mktemp("emitted"), {}

    def load(spec):
        if spec.name not in modules:
            file = directory / f"emitted_{spec.name}.py"
            file.write_text(compiler.emit(spec))
            found = importlib.util.spec_from_file_location(file.stem, file)
            modules[spec.name] = importlib.util.module_from_spec(found)
            sys.modules[file.stem] = modules[spec.name]  # where dataclasses look their annotations up
            found.loader.exec_module(modules[spec.name])
        return modules[spec.name]

    yield load
    for name in modules:
        del sys.modules[f"emitted_{name}"]


@pytest.mark.parametrize("cu", [None, [0, 21, 21, 40]], ids=["dense", "packed"])
@pytest.mark.parametrize("spec", CHOSEN, ids=lambda spec: spec.name)
def test_agrees_with_the_reference(spec, cu, emitted):
    function = getattr(emitted(spec), spec.name)
    key, rows = 6, 2 if cu is None else 3
    inputs = [x.float() for x in make(spec, 2 if cu is None else 1, 40, 2, key, 5, sequences=None if cu is None else 3)]
    initial = narrow_states(make_states(spec, rows, 2, key, 5))
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    scale = 0.4 if cu is None else spec.scale or (1.0 if spec.vector else key**-0.5)
    wide = tuple(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in initial)
    o, final, do, dfinal, gradients = expected(spec, tuple(inputs), scale, wide, cu_seqlens)

    leaves = [x.requires_grad_() for x in (*inputs, *initial)]
    state = tuple(leaves[len(inputs) :])
    scalars = {one.name: SCALARS[one.name] for one in spec.scalars}
    got, got_final = function(
        *leaves[: len(inputs)],
        **scalars,
        scale=scale if cu is None else None,
        initial_state=state if spec.normalizer is not None else state[0],
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    got_final = got_final if spec.normalizer is not None else (got_final,)
    loss = (got * do.float()).sum()
    loss = loss + sum((x * dx.to(x.dtype).conj()).real.sum() for x, dx in zip(got_final, dfinal, strict=False))
    found = torch.autograd.grad(loss, leaves)
    kinds = [*(kind_of(spec, one) for one in spec.inputs), "gradient", "gate"]
    assert measure(got, o).within(2e-5)
    assert all(measure(x, y).within(2e-5) for x, y in zip(got_final, final, strict=True))
    for x, y, kind in zip(found, gradients, kinds, strict=False):
        assert x.shape == y.shape and measure(x, y).within(limit_of(torch.float32, kind))


@pytest.mark.parametrize("spec", CHOSEN, ids=lambda spec: spec.name)
def test_decodes_as_it_reads(spec, emitted):
    module = emitted(spec)
    function, step = getattr(module, spec.name), getattr(module, f"{spec.name}_step")
    inputs = [x.float() for x in make(spec, 2, 1, 2, 6, 5)]
    initial = narrow_states(make_states(spec, 2, 2, 6, 5))
    state = initial if spec.normalizer is not None else initial[0]
    scalars = {one.name: SCALARS[one.name] for one in spec.scalars}
    o, final = function(*inputs, **scalars, initial_state=state, output_final_state=True)
    assert measure(step(*inputs, **scalars, state=state), o).within(2e-5)
    final = final if spec.normalizer is not None else (final,)
    assert all(measure(x, y).within(2e-5) for x, y in zip(initial, final, strict=True))


@pytest.mark.parametrize("spec", CHOSEN, ids=lambda spec: spec.name)
def test_has_the_ops_signature_and_imports_nothing_of_flagen(spec, emitted):
    function = getattr(emitted(spec), spec.name)
    op = inspect.signature(flagen.compile(spec, backend="torch")).parameters
    mine = inspect.signature(function).parameters
    assert [(x.name, x.kind, x.default) for x in mine.values()] == [(x.name, x.kind, x.default) for x in op.values()]
    imported = set()
    for node in ast.walk(ast.parse(compiler.emit(spec))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_a_spec_named_like_something_in_the_module(emitted):
    module = emitted(Spec("scan"))
    assert callable(module.scan_attention) and module.scan is not module.scan_attention


@pytest.mark.parametrize(
    "expr",
    [
        log(1 - 2 ** (-5 - head)),
        -(8 / heads) * (1 - Scalar("layer") / Scalar("layers")) * head,
        maximum(0.3, head) - minimum(head / 7, Scalar("layer")),
        -softplus(head - 3) * sigmoid(-(head**2)) - exp(-head) / sqrt(heads),
        (head - 1) - (heads - (2 - head)) / (head + 1) / 3,
    ],
    ids=str,
)
def test_host_text_is_what_the_host_evaluates(expr):
    names = {"head": torch.arange(4, dtype=torch.float64), "heads": torch.tensor(4.0, dtype=torch.float64)}
    names |= {name: torch.tensor(value, dtype=torch.float64) for name, value in SCALARS.items()}
    names |= {"torch": torch, "float64": lambda x: torch.as_tensor(x, dtype=torch.float64)}
    value = eval(host_text(expr), names)
    torch.testing.assert_close(
        value, torch.tensor(evaluate_host(expr, SCALARS, 4), dtype=torch.float64), rtol=1e-14, atol=0
    )
