"""compile: the stages in order, what is remembered, options, and a warm start without SymPy and Jinja."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import flagen
from flagen import cache, compiler, logs, specs, tuned_tables
from flagen.analysis import Analysis, analyse, derivative_texts, restored
from flagen.cache import CacheWarning
from flagen.errors import CacheError, ConfigError, PlanError, SpecError
from flagen.expr import Input, logsigmoid, softplus, v
from flagen.plan import Plan, make_plan
from flagen.spec import Spec

TEXT = "# generated from {}\nLOADED = True\n"
g = Input("g", "b t h k")


class StandIn:
    """In place of Op: keeps what it is given."""

    made = 0

    def __init__(self, **given) -> None:
        self.__dict__ |= given
        StandIn.made += 1


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new process, as far as compile can tell, with an empty cache and a short text in place of the kernels."""
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLAGEN_CACHE", raising=False)
    monkeypatch.setattr("flagen.render.render", lambda plan: TEXT.format(plan.name))
    stand_in = types.ModuleType("flagen.op")
    stand_in.Op = StandIn
    monkeypatch.setitem(sys.modules, "flagen.op", stand_in)
    monkeypatch.setattr(compiler, "_ops", {})
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(StandIn, "made", 0)
    return tmp_path / "cache"


def new_process() -> None:
    compiler._ops.clear()
    cache._memory.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that run, in order."""
    found: list[str] = []
    for module, name in ((compiler, "analyse"), (compiler, "restored"), (compiler, "make_plan"), (cache, "find"),
                         (cache, "store"), (sys.modules["flagen.render"], "render")):  # fmt: skip
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, _name=name, _function=function: (found.append(_name), _function(*given))[1]
        )
    return found


# --- what an op is made of


def test_the_parts_of_an_op(place):
    op = compiler.compile("gla", chunk_size=32, input_precision="tf32")
    gla = specs.get("gla")
    assert op.spec is gla
    assert (op.analysis, op.plan) == (analyse(gla), make_plan(analyse(gla)))
    assert op.plan.analysis is op.analysis
    assert op.backend == "auto"
    assert op.source == Path(op.path).read_text() == TEXT.format("gla")
    assert Path(op.path).parent.parent == place / "v1"
    assert op.torch_backend().chunk_size == 32


def test_the_kernels_are_loaded_when_they_are_first_wanted(place, monkeypatch):
    importlib.import_module("flagen.triton_vector")  # whose class is made of the one that is replaced here
    given = []
    module = types.ModuleType("flagen.triton_backend")
    module.TritonBackend = lambda *arguments, **options: given.append((arguments, options))
    monkeypatch.setitem(sys.modules, "flagen.triton_backend", module)
    op = compiler.compile(Spec("loaded_late"), chunk_size=64, input_precision="ieee")
    assert not any("loaded_late" in name for name in sys.modules)
    op.triton_backend()
    (((plan, kernels, chunk_size, input_precision), options),) = given
    assert (plan, chunk_size, input_precision) == (op.plan, 64, "ieee")
    assert options == {"chosen": None}  # nothing is tuned beside what the user has fixed
    compiler.compile(Spec("loaded_late")).triton_backend()
    assert given[1][1] == {"chosen": tuned_tables.chosen}
    assert kernels.LOADED
    assert kernels.__file__ == op.path
    del sys.modules[kernels.__name__]


def test_a_spec_of_ones_own(place):
    spec = Spec("mine", key=softplus(flagen.k), log_decay=logsigmoid(g) / 16)
    op = compiler.compile(spec)
    assert (op.spec, op.source) == (spec, TEXT.format("mine"))


def test_the_torch_backend_has_plan_source_and_path_too(place):
    op = compiler.compile("gla", backend="torch")
    assert isinstance(op.plan, Plan)
    assert Path(op.path).read_text() == op.source


# --- what is remembered


def test_the_same_spec_and_options_give_the_same_object(place):
    op = compiler.compile("gla")
    same = [
        compiler.compile("gla"),
        compiler.compile(specs.get("gla")),
        compiler.compile(Spec.from_json(specs.get("gla").to_json())),
        compiler.compile("gla", chunk_size=None, backend="auto", input_precision=None),
    ]
    assert all(one is op for one in same)
    others = [
        compiler.compile("gla", chunk_size=32),
        compiler.compile("gla", backend="torch"),
        compiler.compile("gla", input_precision="ieee"),
        compiler.compile(specs.get("gla").replace("gla", scale=2.0)),
        compiler.compile(specs.get("gla").replace("gla2")),
    ]
    assert len({op, *others}) == 6
    assert StandIn.made == 6


def test_options_do_not_reach_the_text(place, calls):
    first = compiler.compile("gla")
    calls.clear()
    second = compiler.compile("gla", chunk_size=16, backend="torch", input_precision="ieee")
    assert (second.source, second.path) == (first.source, first.path)
    assert calls == ["find", "restored", "make_plan"]


def test_threads_get_one_op(place):
    found = []
    threads = [threading.Thread(target=lambda: found.append(compiler.compile("hgrn2"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == StandIn.made == 1


def test_a_failure_is_not_remembered(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flagen.render.render", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compiler.compile("gla")
    assert compiler.compile("gla").source


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_process_that_is_compiling_can_compile(place):
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with compiler._lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        acquired = compiler._lock.acquire(timeout=5)
        os._exit(0 if acquired else 1)
    release.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


# --- cold, warm, and the modes of the cache


def test_cold_and_warm(place, calls):
    cold = compiler.compile("mamba2")
    assert calls == ["find", "analyse", "make_plan", "render", "store"]
    new_process()
    calls.clear()
    warm = compiler.compile("mamba2")
    assert calls == ["find", "restored", "make_plan"]
    assert (warm.analysis, warm.source, warm.path) == (cold.analysis, cold.source, cold.path)


def test_off_writes_nothing(place, monkeypatch, calls):
    monkeypatch.setenv("FLAGEN_CACHE", "off")
    op = compiler.compile("gla")
    assert op.path is None
    assert not place.exists()
    calls.clear()
    assert compiler.compile("gla", chunk_size=32).source == op.source
    assert "render" not in calls


def test_readonly(place, monkeypatch):
    compiler.compile("gla")
    new_process()
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    assert Path(compiler.compile("gla").path).exists()
    with pytest.raises(CacheError, match="retnet: FLAGEN_CACHE=readonly"):
        compiler.compile("retnet")


def test_verify_generates_again_and_compares(place, monkeypatch, calls):
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    path = compiler.compile("gla").path
    new_process()
    calls.clear()
    assert compiler.compile("gla").path == path
    assert {"analyse", "render", "store"} <= set(calls)
    new_process()
    monkeypatch.setattr("flagen.render.render", lambda plan: TEXT.format("another"))
    with pytest.raises(CacheError, match="not what is cached"):
        compiler.compile("gla")


def test_verify_notices_other_derivatives(place, monkeypatch):
    compiler.compile("gla")
    new_process()
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    monkeypatch.setattr(compiler, "derivative_texts", lambda analysis: {"gradients": []})
    with pytest.raises(CacheError, match="facts beside the text differ"):
        compiler.compile("gla")


@pytest.mark.parametrize("texts", [None, {}, {"gradients": [], "normalizer_gradient": None}])
def test_derivatives_that_do_not_fit_are_a_miss(place, monkeypatch, calls, texts):
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "derivative_texts", lambda analysis: texts)
        compiler.compile("gla")
    new_process()
    calls.clear()
    op = compiler.compile("gla")
    assert calls == ["find", "restored", "analyse", "make_plan", "render", "store"]
    assert op.analysis == analyse(specs.get("gla"))
    new_process()
    calls.clear()
    assert compiler.compile("gla").path == op.path
    assert "analyse" not in calls


def test_sources_that_cannot_be_read(place, monkeypatch):
    def fails(*given):
        raise NotADirectoryError("a zip file")

    monkeypatch.setattr(compiler, "make_key", fails)
    with pytest.warns(CacheWarning, match="a zip file") as caught:
        op = compiler.compile("gla")
        compiler.compile("retnet")
    assert (len(caught), op.path, op.source) == (1, None, TEXT.format("gla"))
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    with pytest.raises(CacheError, match="a zip file"):
        compiler.compile("based")


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 48}, "gla: chunk_size=48 is not allowed; use one of None, 16, 32, 64, 128"),
        ({"chunk_size": 64.0}, "chunk_size=64.0"),
        ({"chunk_size": True}, "chunk_size=True"),
        ({"backend": "cuda"}, "backend='cuda' is not allowed; use one of 'auto', 'triton', 'torch'"),
        ({"backend": None}, "backend=None"),
        ({"input_precision": "fp32"}, "use one of None, 'ieee', 'tf32', 'tf32x3'"),
        ({"chunk_size": [64]}, "chunk_size="),
    ],
)
def test_options_that_are_not_allowed(place, options, message):
    with pytest.raises(PlanError) as caught:
        compiler.compile("gla", **options)
    assert message in str(caught.value)
    assert not place.exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gal", "did you mean 'gla'?"),
        (specs.get("gla").to_json(), "Spec.from_json"),
        (None, "got NoneType"),
        (Spec, "got type"),
        (logsigmoid(g), "got Call"),
    ],
)
def test_what_is_no_spec(place, spec, message):
    with pytest.raises(SpecError) as caught:
        compiler.compile(spec)
    assert message in str(caught.value)


# --- logs


@pytest.fixture
def _no_handlers():
    yield
    os.environ.pop("FLAGEN_LOGS", None)
    logs.setup()


@pytest.mark.usefixtures("_no_handlers")
def test_logs_tell_what_happens(place, monkeypatch, capsys):
    monkeypatch.setenv("FLAGEN_LOGS", "+cache, render,code")
    op = compiler.compile("gla")
    told = capsys.readouterr().err
    for part in ("[flagen.cache] miss: gla-", "nearest entry: none", "[flagen.render] gla: rendered 2 lines in",
                 f"[flagen.code] gla: kernels written to {op.path}"):  # fmt: skip
        assert part in told
    assert "analysed" not in told
    new_process()
    compiler.compile("gla")
    assert "hit: " in capsys.readouterr().err
    compiler.compile(specs.get("gla").replace("gla", scale=3.0))
    assert "nearest entry: spec.scale: None there, 3.0 now" in capsys.readouterr().err
    monkeypatch.setenv("FLAGEN_LOGS", "")
    compiler.compile("retnet")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_no_handlers")
def test_logs_of_an_application_are_left_alone(monkeypatch):
    for topic in ("cache", "render", "code"):
        logger = logging.getLogger(f"flagen.{topic}")
        assert (logger.handlers, logger.level) == ([], logging.NOTSET)
    assert [type(one) for one in logging.getLogger("flagen").handlers] == [logging.NullHandler]
    monkeypatch.setenv("FLAGEN_LOGS", "cache")
    logs.setup()
    logs.setup()
    assert len(logging.getLogger("flagen.cache").handlers) == 1
    assert logging.getLogger("flagen.render").handlers == []
    monkeypatch.delenv("FLAGEN_LOGS")
    logs.setup()
    assert logging.getLogger("flagen.cache").handlers == []


@pytest.mark.parametrize("value", ["caches", "cache;render", "-cache", "cache,,code", "++cache", "all"])
def test_logs_of_something_else(place, monkeypatch, value):
    monkeypatch.setenv("FLAGEN_LOGS", value)
    with pytest.raises(ConfigError, match="the topics are cache, render, code"):
        compiler.compile("gla")


# --- the real thing, in a process of its own

START = """
import builtins, json, sys
import torch  # may import what it likes
wanted = []
original = builtins.__import__
def watching(name, globals=None, *rest, **named):
    if name.split(".")[0] in ("sympy", "jinja2") and (globals or {}).get("__name__", "").startswith("flagen"):
        wanted.append(name)
    return original(name, globals, *rest, **named)
builtins.__import__ = watching
import flagen
from flagen import compiler, specs
from flagen.load import load
plan, entry = compiler.prepare(specs.get("based"))
module = load(entry)
x = torch.rand(1, 5, 1, 4, requires_grad=True)
op = flagen.compile(flagen.Spec.from_json(specs.get("mamba2").to_json()))
o, _ = op(x, x, x, x[..., 0], x[0, 0, :, 0])
o.sum().backward()
print(json.dumps({
    "wanted": sorted(set(wanted)), "modules": sorted(m for m in sys.modules if m in ("flagen.derive", "flagen.render")),
    "path": str(entry.path), "file": module.__file__, "analysis": str(plan.analysis),
}))
"""


def test_a_warm_start_imports_neither_sympy_nor_jinja(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"FLAGEN_CACHE_DIR": str(tmp_path), "FLAGEN_CACHE": "on"}

    def start() -> dict:
        result = subprocess.run(
            [sys.executable, "-c", START],
            cwd=Path(flagen.__file__).parent.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    cold, warm = start(), start()
    assert cold["wanted"] == ["jinja2", "sympy", "sympy.core.sorting"]
    assert cold["modules"] == ["flagen.derive", "flagen.render"]
    assert (warm["wanted"], warm["modules"]) == ([], [])
    for name in ("path", "file", "analysis"):
        assert warm[name] == cold[name]
    assert warm["path"] == warm["file"]


@pytest.mark.parametrize("name", specs.names())
def test_the_shipped_specs_come_back_from_a_real_cache(name, tmp_path, monkeypatch):
    """Text and plan of a warm start are those of a cold one."""
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path))
    plan, entry = compiler.prepare(specs.get(name))
    cache._memory.clear()
    again, found = compiler.prepare(specs.get(name))
    assert (again, found) == (plan, entry)
    assert str(again) == str(plan)
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    assert compiler.prepare(specs.get(name))[1] == entry


def test_emit_is_a_module_of_its_own():
    text = compiler.emit("gla")
    assert compile(text, "<emitted>", "exec")
    assert "import flagen" not in text
    assert "from flagen" not in text


def test_a_compiled_spec_runs_forward_and_backward():
    """Every stage as it is, on the CPU."""
    spec = Spec("compiled_here", log_decay=logsigmoid(g) / 16, key=softplus(flagen.k))
    op = flagen.compile(spec)
    assert flagen.compile(spec) is op
    assert (op.spec, op.plan) == (spec, make_plan(analyse(spec)))
    assert Path(op.path).read_text(encoding="utf-8") == op.source
    generator = torch.Generator().manual_seed(0)
    q, k, v, gates = (torch.randn(2, 70, 2, 8, generator=generator, requires_grad=True) for _ in range(4))
    o, final = op(q, k, v, gates, output_final_state=True)
    found = torch.autograd.grad(o.sum() + final.sum(), (q, k, v, gates))
    expected, expected_final = op.reference(q, k, v, gates, output_final_state=True)
    wanted = torch.autograd.grad(expected.sum() + expected_final.sum(), (q, k, v, gates))
    for one, other in zip((o, final, *found), (expected, expected_final, *wanted), strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()


# --- analyses from text


def test_texts_that_do_not_fit_give_no_analysis():
    spec = Spec("s", value=v * softplus(g.__class__("h1", "b t h")), log_decay=logsigmoid(g))
    right = derivative_texts(analyse(spec))
    assert isinstance(restored(spec, right), Analysis)
    first = right["gradients"][0]
    for wrong in (
        None,
        [],
        {},
        right | {"gradients": right["gradients"][1:]},
        right | {"gradients": [*right["gradients"], ["query", "g", "1"]]},
        right | {"gradients": [[first[0], first[1], "unknown_name"], *right["gradients"][1:]]},
        right | {"gradients": [[first[0], first[1], "__import__('os')"], *right["gradients"][1:]]},
        right | {"gradients": [[first[0], first[1], 1], *right["gradients"][1:]]},
        right | {"gradients": [[first[0], first[1]], *right["gradients"][1:]]},
        right | {"gradients": [[first[0], first[1], "(" * 10_000], *right["gradients"][1:]]},
        right | {"normalizer_gradient": "1"},
    ):
        assert restored(spec, wrong) is None, wrong
