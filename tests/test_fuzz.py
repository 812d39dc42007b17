"""What `flagen fuzz` is made of: trials as values, the strategy, the judge, the hunt and its shrinking, the command."""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import math
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from random_specs import found_trials
from test_generated import pass_the_linter

import flagen
from flagen import cli_fuzz, compiler, fuzz_exprs, fuzz_hunt, fuzz_judge, specs, testing
from flagen.__main__ import main, parser
from flagen.errors import FlagenError
from flagen.expr import (
    FUNCTION_ARITY,
    ROW_FUNCTIONS,
    Call,
    Input,
    elu,
    exp,
    k,
    logsigmoid,
    maximum,
    q,
    v,
)
from flagen.expr import abs as absolute
from flagen.functions import evaluate
from flagen.fuzz import Trial, decay_kind, features, source
from flagen.fuzz_hunt import Finding, Hunt, Line, Round, judge_apart
from flagen.fuzz_judge import Outcome, judge, unsharp
from flagen.fuzz_specs import PROFILES, trials
from flagen.intervals import interval
from flagen.samples import make_inputs
from flagen.spec import Spec, default_inputs

gs, gk, u, th = Input("gs", "b t h"), Input("gk", "b t h k"), Input("u", "h k"), Input("th", "b t h k")
SMALL = {"B": 1, "T": 17, "H": 2, "K": 5, "V": 3}


def drawn(count: int, profile: str = "cpu") -> list[Trial]:
    """Trials of so many draws, the same ones each time."""
    found: list[Trial] = []
    for start in range(0, count, fuzz_hunt.EXAMPLES):

        @seed(start)
        @settings(
            max_examples=fuzz_hunt.EXAMPLES,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(trials(PROFILES[profile]))
        def each(one):
            found.extend(one)

        with fuzz_hunt.reproducible():
            each()
    return found


DRAWN = drawn(300)


# --- a trial is a value


def made_by(text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Spec, dict[str, object]]:
    """The spec and the arguments of testing.check in a snippet."""
    calls = []
    monkeypatch.setattr(testing, "check", lambda spec, **arguments: calls.append((spec, arguments)))
    exec(compile(text, "snippet", "exec"), {})
    return calls[0]


DEFAULTS = {name: one.default for name, one in inspect.signature(testing.check).parameters.items()}


@pytest.mark.filterwarnings("ignore::flagen.SpecWarning")
@pytest.mark.parametrize("trial", [*DRAWN[:120:3], *drawn(30, "cuda")[::3]], ids=lambda trial: trial.digest)
def test_a_trial_prints_as_a_snippet_that_makes_it(trial, monkeypatch):
    spec, arguments = made_by(repr(trial), monkeypatch)
    assert spec == trial.spec and spec.to_json() == trial.spec.to_json()
    wanted = trial.arguments()
    if wanted["cu_seqlens"] is not None:
        wanted["cu_seqlens"] = list(wanted["cu_seqlens"])
    ignored = ("spec_or_op", "raises", "scalars", "inputs", "segment")
    defaults = {name: value for name, value in DEFAULTS.items() if name not in ignored}
    assert defaults | arguments == defaults | wanted
    assert repr(trial) == str(trial) and all(len(line) < 400 for line in repr(trial).splitlines())


@pytest.mark.parametrize("name", specs.names())
def test_a_shipped_spec_prints_as_a_snippet(name, monkeypatch):
    spec = specs.get(name)
    assert made_by(repr(Trial(spec, **SMALL)), monkeypatch)[0] == spec


def test_a_snippet_with_everything(monkeypatch):
    own, bound = Input("q", "b t h k", low=-1), Input("w", "b t h", low=-2, high=0)
    spec = Spec("all", query=own * 2, log_decay=bound, feature_map=lambda x: elu(x) + 1, normalize=True, eps=1e-3,
                scale=2, inputs=["w", "v", "k", own])  # fmt: skip
    text = source(spec)
    assert 'q = Input("q", "b t h k", low=-1.0)' in text and "inputs=('w', 'v', 'k', 'q')" in text
    assert made_by(repr(Trial(spec, **SMALL)), monkeypatch)[0] == spec
    assert "from flagen import Spec\n" in source(Spec("plain")) and "Input" not in source(Spec("plain"))


def test_a_trial_survives_json_and_is_hashable():
    for trial in DRAWN:
        again = Trial.from_json(trial.to_json())
        assert again == trial and hash(again) == hash(trial) and again.digest == trial.digest
        assert "\n" not in trial.to_json()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "a trial is JSON text"),
        ("[]", "with flagen_trial: 1 and a spec"),
        ('{"flagen_trial": 2}', "with flagen_trial: 1 and a spec"),
        ('{"flagen_trial": 1, "spec": {"name": "x"}}', "lacks the field"),
        (Trial(Spec("a")).to_json()[:-1] + ', "Q": 1}', "a trial has no field 'Q'; the fields are B, T, H,"),
        (Trial(Spec("a")).to_json()[:-1] + ', "T": "x"}', "the field 'T' must be int, got 'x'"),
        (Trial(Spec("a")).to_json()[:-1] + ', "T": true}', "the field 'T' must be int, got 'True'"),
    ],
)
def test_wrong_json_is_refused(text, said):
    with pytest.raises(FlagenError) as error:
        Trial.from_json(text)
    assert said in str(error.value)


def test_features_name_what_is_beyond_the_simplest():
    assert features(Trial(Spec("a"))) == set() and decay_kind(Spec("a")) == "none"
    spec = Spec("b", query=q * gs, log_decay=logsigmoid(gk), phase=th, bonus=u)
    found = features(Trial(spec, cu_seqlens=(0, 1), dtype="bfloat16", heads=(("u", 1),), layout="sliced"))
    assert found == {
        "decay key + phase", "phase", "bonus", "query", "packed", "grouped", "dtype bfloat16", "layout sliced"
    }  # fmt: skip
    kinds = {"constant": -0.1, "constant key": -exp(u), "scalar": logsigmoid(gs)}
    assert {kind: decay_kind(Spec("c", log_decay=expr)) for kind, expr in kinds.items()} == {
        kind: kind for kind in kinds
    }


# --- what is drawn


def functions_of(spec: Spec) -> set[str]:
    exprs = [expr for _, expr in spec.roles] + ([spec.normalizer] if spec.normalizer is not None else [])
    return {node.function for expr in exprs for node in expr.walk() if isinstance(node, Call)}


def test_the_draw_is_wide():
    every = {trial.spec for trial in DRAWN}
    assert len(every) > 200
    kinds = Counter(decay_kind(spec) for spec in every)
    assert set(kinds) >= {
        f"{kind}{phase}" for kind in ("none", "constant", "constant key", "scalar", "key") for phase in ("", " + phase")
    } | {"constant value", "value"}  # fmt: skip
    axes = {None if spec.log_decay is None else spec.log_decay.axes for spec in every}
    assert axes >= {None, "h", "hk", "hv", "bh", "bth", "bthk", "bthv"}
    written = set().union(*map(functions_of, every))
    assert written >= {*FUNCTION_ARITY, *ROW_FUNCTIONS}
    assert {"add", "sub", "mul", "div", "pow", "neg"} <= set().union(*map(functions_of, every))
    bonuses = {spec.bonus.axes for spec in every if spec.bonus is not None}
    extra = {one.axes for spec in every for one in spec.inputs if one.name not in "qkv"}
    assert len(bonuses) >= 8 and len(extra) >= 20
    assert {spec.taylor for spec in every} == {0, 1, 2} and {spec.scale for spec in every} == {None, 1.0, 0.3}
    assert {str(spec.normalizer) for spec in every} >= {
        "None",
        "n + 1e-06",
        "n + 0.001",
        "maximum(abs(n), 1)",
        "n + 0.5",
    }
    assert any(spec.inputs != default_inputs(spec) for spec in every) and any(spec.scalars for spec in every)
    assert any(one.high is not None for spec in every for one in spec.inputs)


def test_arguments_are_drawn_of_every_kind():
    profile = PROFILES["cpu"]
    assert {trial.dtype for trial in DRAWN} == set(profile.dtypes)
    assert {trial.gate_dtype for trial in DRAWN} == set(profile.gate_dtypes)
    assert {trial.layout for trial in DRAWN} == set(testing.LAYOUTS)
    assert {trial.chunk_size for trial in DRAWN} == set(profile.chunks)
    assert {trial.initial_state for trial in DRAWN} == {trial.final_state for trial in DRAWN} == {True, False}
    assert {(trial.T == 1, trial.T > 32) for trial in DRAWN} >= {(True, False), (False, True), (False, False)}
    packed = [trial.cu_seqlens for trial in DRAWN if trial.cu_seqlens is not None]
    assert any(a == b for bounds in packed for a, b in itertools.pairwise(bounds))  # an empty sequence
    assert any(trial.heads for trial in DRAWN) and any(trial.requires_grad == () for trial in DRAWN)
    assert any(trial.requires_grad and "initial_state" in trial.requires_grad for trial in DRAWN)
    assert len({(trial.K, trial.V) for trial in DRAWN}) > 20
    assert not any(trial.K == 1 and "l2norm" in features(trial) for trial in DRAWN)
    assert any(trial.K == 1 and trial.spec.taylor for trial in DRAWN) and any(
        "l2norm" in features(trial) for trial in DRAWN
    )
    for trial in drawn(40, "cuda"):
        assert trial.device == "cuda" and trial.backend == "auto" and trial.dtype != "float64"
        most = 24 if trial.spec.taylor == 2 else 128
        assert not most < trial.K


def test_decays_are_never_positive():
    """Whatever the inputs, but for a gate that is given as it is; and inputs are found for every spec."""
    generator = torch.Generator().manual_seed(0)
    for spec in {trial.spec for trial in DRAWN[::3]}:
        sizes = dict(zip("bthkv", (2, 9, 2, 3, 2), strict=True))
        made = make_inputs(spec, B=2, T=9, H=2, K=3, V=2)
        assert all(x.isfinite().all() for x in made.values())
        if spec.log_decay is None or spec.log_decay.is_constant:
            continue
        values = {"head": torch.arange(2.0).view(2, 1, 1)} | {one.name: 1.0 for one in spec.scalars}
        for one in spec.log_decay.inputs:
            given_ = one.name.startswith("g_") or one.high is not None
            x = made[one.name] if given_ else 3 * torch.randn(made[one.name].shape, generator=generator)
            values[one.name] = x.view([sizes[axis] if axis in one.axes else 1 for axis in "bthkv"])
            if "h" in one.axes:
                assert x.shape[one.axes.index("h")] == 2
        found = evaluate(spec.log_decay, values, 2)
        assert found.max() <= 0, str(spec.log_decay)


@pytest.mark.parametrize("name", ["SIGNED", "BOUNDED", "POSITIVE", "NEGATIVE"])
def test_forms_keep_what_their_list_promises(name):
    x = Input("x", "b t h")
    values = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    for form in getattr(fuzz_exprs, name):
        expr = form(x)
        found = evaluate(expr, {"x": values}, 1)
        assert found.isfinite().all() and found.abs().max() <= 40, str(expr)
        if name == "BOUNDED":
            assert found.abs().max() <= 1, str(expr)
        if name == "POSITIVE":
            assert found.min() > 0 and interval(expr).low >= 0, str(expr)
        if name == "NEGATIVE":
            assert found.max() <= 0, str(expr)


# --- the judge


def test_a_right_op_passes():
    found = judge(
        Trial(Spec("right", log_decay=logsigmoid(gs)), **SMALL, initial_state=True, final_state=True, decode=3)
    )
    assert found.status == "ok" and 0 < found.worst < 1 and not found.failed


def test_an_exception_is_a_failure_with_a_place():
    found = judge(Trial(specs.get("gla"), **SMALL | {"K": 300}))
    assert found.status == "raised" and found.failed and found.worst == math.inf
    assert found.what.startswith("ValueError in checks.py, _too_wide: gla: K = # key channels")
    assert "at most 256 are supported" in found.text
    unknown = judge(Trial(Spec("a"), **SMALL, requires_grad=("z",)))
    assert unknown.what.startswith("ValueError in samples.py")


class Spoilt:
    """The op of a spec with a fault."""

    def __init__(self, spec, fault):
        self.spec, self.fault, self.op = spec, fault, flagen.compile(spec, backend="torch")

    def __call__(self, *inputs, **options):
        if self.fault == "gradient":
            inputs = [x + 0.01 * (x - x.detach()) for x in inputs]
        o, state = self.op(*inputs, **options)
        if self.fault == "nan" and o.shape[1] > 3:
            o = o + torch.where(torch.arange(o.shape[1]) == 3, math.nan, 0.0)[:, None, None].to(o.dtype)
        if self.fault == "unwritten" and o.shape[1] > 3:
            o = o + 0 * torch.empty(o.shape, dtype=o.dtype)
        if self.fault == "state":
            state = None if state is None else state * 1.01
        return o, state

    def step(self, *inputs, **options):
        return self.op.step(*inputs, **options)


@pytest.fixture
def spoil(monkeypatch):
    def with_fault(fault):
        monkeypatch.setattr(testing, "_compiled", lambda spec, backend, chunk_size: Spoilt(spec, fault))

    return with_fault


@pytest.mark.parametrize(
    ("fault", "what"),
    [("gradient", "d input"), ("nan", "o"), ("unwritten", "o"), ("state", "final_state")],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_fault_is_seen_and_not_excused(spoil, fault, what, dtype):
    spoil(fault)
    found = judge(Trial(Spec("wrong", log_decay=logsigmoid(gk)), **SMALL, dtype=dtype, final_state=True))
    assert found.status == "differs" and what in found.what.split(", "), found
    assert "DIFFERS" in found.text and found.worst > 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_answer_that_does_not_fit_its_dtype_is_ill():
    """The gradient of a number per head is a sum over all tokens and channels, here beyond float16."""
    spec = Spec("large", value=Input("v", "b t h v") * Input("a", "h") * 300, query=q * 30)
    found = judge(Trial(spec, B=2, T=200, H=1, K=16, V=16, dtype="float16"))
    assert found.status == "ill" and "does not fit its dtype" in found.what, found


def test_a_branch_taken_by_rounding_is_ill():
    """maximum(abs(n), 1) where n is 1 but for its rounding: the gradient of n is that of one branch or the other."""
    one = Input("one", "b t h k", low=1, high=1)
    spec = Spec("edge", query=q * 0 + one, key=one * (1 + 0 * Input("k", "b t h k")), scale=0.2,
                normalize=lambda n: maximum(absolute(n), 1))  # fmt: skip
    trial = Trial(spec, B=1, T=1, H=1, K=5, V=3, dtype="float32")
    assert not trial.case().settled.any()  # for which reason a check asks for no gradient there
    case = replace(trial.case(), settled=None)
    assert abs(float(case.inputs[1].sum()) * 0.2 - 1) < 1e-6
    rows = [testing.Row("d one", 0.5, 0.5, 2e-5), testing.Row("o", 0.5, 0.5, 2e-5)]
    assert unsharp(case, rows) == {"d one": "moves with a rounding of its operands"}
    # NaN is no rounding
    assert unsharp(case, [testing.Row("d one", math.nan, math.nan, 2e-5)]) == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_terms_that_cancel_are_ill(dtype):
    """A factor of the key that is taken from the value again: its gradient is zero, a difference of rounded terms."""
    x = Input("x", "b t h")
    case = Trial(Spec("none", key=k * exp(x), value=v * exp(-x)), **SMALL, dtype=dtype, final_state=True).case()
    rows = [testing.Row(name, 0.1, 0.1, 2e-2) for name in ("d x", "d k", "d v", "o", "final_state S")]
    assert set(unsharp(case, rows)) == {"d x"}


# --- the hunt


def fails_with(*needed: str, status: str = "differs", what: str = "o"):
    """A judge for whom a trial with these features fails."""
    calls = []

    def judged(trial: Trial) -> Outcome:
        calls.append(trial)
        bad = set(needed) <= features(trial)
        return Outcome(status, what, "so it does", 2.0) if bad else Outcome("ok", worst=0.5)

    judged.calls = calls
    return judged


def hunting(judged, **options) -> Hunt:
    return Hunt(PROFILES["cpu"], until=time.time() + 60, judge=judged, **options)


def first_finding(hunt: Hunt, searches: int = 60) -> Finding:
    for search in range(searches):
        if (found := hunt.searched(search)) is not None:
            return found
    raise AssertionError("nothing was found")


@pytest.mark.parametrize(
    "needed", [("phase",), ("bonus", "packed"), ("taylor(2)", "normalize"), ("decay value", "grouped")]
)
def test_a_failure_is_shrunk_to_the_smallest_spec(needed):
    found = first_finding(hunting(fails_with(*needed)))
    trial, drawn_trial = Trial.from_json(found.trial), Trial.from_json(found.drawn)
    assert set(needed) <= features(trial) <= set(needed) | {"decay none + phase"}
    assert trial.T == 1 and trial.dtype == "float32" and trial.decode == 0
    assert len(trial.to_json()) < len(drawn_trial.to_json()) and set(needed) <= features(drawn_trial)
    assert (found.status, found.what, found.text) == ("differs", "o", "so it does")
    spec = trial.spec
    assert spec.bare_query == q and spec.scale is None and spec.value == Input("v", "b t h v")


def test_the_same_search_finds_the_same():
    one, other = (first_finding(hunting(fails_with("bonus"))) for _ in range(2))
    assert one == other


def test_a_known_failure_is_counted_and_not_found_again():
    hunt = hunting(fails_with("phase"))
    known = first_finding(hunt)
    again = hunting(fails_with("phase"), known=[known])
    assert [again.searched(search) for search in range(20)] == [None] * 20
    assert sum(line.status == "differs" for line in again.lines) > 0
    # one with less is no other's explanation
    assert not known.explains("differs", "o", frozenset()) and not known.explains(
        "raised", "o", frozenset(known.features)
    )


def test_what_is_drawn_depends_on_no_loaded_module(tmp_path, monkeypatch):
    numbers = ", ".join(map(str, range(1000)))
    (tmp_path / "many_numbers.py").write_text(f"NUMBERS = [{numbers}]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = drawn(60)
    importlib.import_module("many_numbers")
    assert drawn(60) == before


def test_two_failures_are_two_findings():
    def judged(trial):
        had = features(trial)
        if "bonus" in had:
            return Outcome("raised", "ValueError in x.py, f: no", "text", math.inf)
        return Outcome("differs", "o", "", 3.0) if "packed" in had else Outcome("ok")

    hunt = hunting(judged, most=60)
    hunt.run(5)
    assert sorted((one.status, one.what) for one in hunt.findings) == [
        ("differs", "o"),
        ("raised", "ValueError in x.py, f: no"),
    ]
    assert {frozenset(one.features) & {"bonus", "packed"} for one in hunt.findings} == {
        frozenset({"bonus"}), frozenset({"packed"})
    }  # fmt: skip
    assert len(hunt.specs) >= 50


def test_a_hunt_ends_when_its_time_is_over():
    now = [0.0]

    def judged(trial):
        now[0] += 1.0
        return Outcome("ok")

    hunt = Hunt(PROFILES["cpu"], until=30.0, judge=judged, clock=lambda: now[0])
    hunt.run(1)
    assert now[0] == 30.0 and len(hunt.lines) == 30


def test_shrinking_ends_when_its_time_is_over():
    now = [0.0]
    inner = fails_with("phase")

    def judged(trial):
        now[0] += 1.0
        return inner(trial)

    hunt = Hunt(PROFILES["cpu"], until=500.0, judge=judged, clock=lambda: now[0], shrink_seconds=5.0)
    found = first_finding(hunt)
    assert "phase" in features(Trial.from_json(found.trial))
    at = inner.calls.index(Trial.from_json(found.drawn))
    assert 0 < len(inner.calls) - at <= 7


def test_as_many_specs_as_were_asked_for():
    hunt = hunting(fails_with("nothing"), most=12)
    hunt.run(3)
    assert len(hunt.specs) == len({line.digest for line in hunt.lines}) == 12


# --- processes that die


@pytest.mark.parametrize(("act", "what"), [("os.abort()", "died of SIGABRT"), ("1 / 0", "exit status 1"), ("None", "")])
def test_a_trial_in_a_process_of_its_own(tmp_path, monkeypatch, act, what):
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, flagen.testing\ndef check(spec, **arguments):\n    {act}\nflagen.testing.check = check\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = judge_apart(Trial(Spec("plain"), **SMALL))
    assert (found.status, found.what) == (("died", what) if what else ("ok", ""))
    assert found.failed == bool(what)


def test_deaths_have_names():
    assert fuzz_hunt.death(-signal.SIGSEGV) == "died of SIGSEGV" and fuzz_hunt.death(3) == "exit status 3"
    assert fuzz_hunt.death(-200) == "died of signal 200" and fuzz_hunt.death(None) == "exit status None"


def test_a_gpu_that_is_lost_ends_the_process_with_its_finding(monkeypatch):
    monkeypatch.setattr(fuzz_hunt, "usable", lambda: False)
    broken = fails_with("phase", status="raised", what="AcceleratorError: CUDA error")
    monkeypatch.setattr(fuzz_hunt, "judge", broken)
    profile = replace(PROFILES["cuda"], keys=(5,))
    hunt = Hunt(profile, until=time.time() + 60, judge=broken)
    with pytest.raises(fuzz_hunt.Lost):
        hunt.run(1)
    (found,) = hunt.findings
    assert found.lost and found.status == "died" and "phase" in found.features
    # who knows of it does not run the like
    smaller = replace(found, features=("phase",), lost=False)
    after = Hunt(profile, until=time.time() + 60, judge=broken, known=[smaller], most=30)
    after.run(1)
    assert not after.findings and not any("phase" in line.features for line in after.lines) and len(after.specs) == 30


# --- the command


def tally_of(lines=(), findings=(), tmp_path=Path()) -> cli_fuzz.Tally:
    tally = cli_fuzz.Tally("cpu", "auto", 1, 60.0, 1 << 60, 1, tmp_path)
    tally.take(Round(1, "cpu", "cpu", "auto", 0.0, 0.0, 1, (), "nowhere"), (list(lines), list(findings)))
    return tally


LINE = Line("d1", "scalar", ("bonus", "decay scalar"), "float32", "ok", "", 0.25)
FINDING = Finding("differs", "o", "o  1.0", ("bonus",), Trial(Spec("drawn", bonus=u)).to_json(),
                  Trial(Spec("drawn", bonus=u), T=9).to_json(), 1)  # fmt: skip


def test_the_table_counts_by_decay_and_feature():
    lines = [
        LINE,
        replace(LINE, dtype="bfloat16", worst=0.5),
        replace(LINE, digest="d2", kind="none", features=(), status="differs", worst=9.0),
        replace(LINE, digest="d3", status="ill", worst=0.75),
    ]
    text = {row[:26].strip(): row[26:].split() for row in cli_fuzz.table(lines)}
    assert text[""] == ["specs", "cases", "failed", "ill", "float32", "bfloat16"]
    assert text["all"] == ["3", "4", "1", "1", "0.75", "0.50"]
    assert text["decay: none"] == ["1", "1", "1", "0", "-", "-"]
    assert text["decay: scalar"] == ["2", "3", "0", "1", "0.75", "0.50"] == text["bonus"]
    assert "decay scalar" not in text


def test_a_finding_is_printed_once_with_its_snippet(capsys, tmp_path):
    tally = tally_of([LINE, replace(LINE, status="differs")], [FINDING, FINDING])
    out = capsys.readouterr().out
    assert out.count("# failure 1: differs: o") == 1 and "# failure 2" not in out
    assert "bonus=u," in out and "\n# o  1.0\n" in out
    assert tally.summary() == "1 specs, 2 cases, 1 failed, 1 distinct, 0 ill"
    assert next(tally).known == (FINDING,)


def run_with(monkeypatch, results, *arguments):
    def run(work, units, jobs, patience, devices):
        for result in results:
            if result is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield next(units), result

    monkeypatch.setattr(cli_fuzz.cli_pool, "run", run)
    return main(["fuzz", "--seed", "5", *arguments])


def test_the_status_is_that_of_the_findings(monkeypatch, capsys, tmp_path):
    log = tmp_path / "log.jsonl"
    assert run_with(monkeypatch, [([LINE], [])], "--save", str(log)) == 0
    assert [json.loads(text) for text in log.read_text().splitlines()] == [
        {"line": {"digest": "d1", "kind": "scalar", "features": ["bonus", "decay scalar"], "dtype": "float32",
                  "status": "ok", "what": "", "worst": 0.25}}
    ]  # fmt: skip
    assert run_with(monkeypatch, [([LINE], []), ([LINE], [FINDING])], "--save", str(log)) == 1
    assert Trial.from_json(json.loads(log.read_text().splitlines()[-1])["finding"]["trial"]) == Trial(
        Spec("drawn", bonus=u)
    )
    assert run_with(monkeypatch, []) == 1  # nothing was run
    out = capsys.readouterr().out
    assert (
        "fuzz: cpu, backend auto, seed 5, 120 s" in out
        and "1 specs, 2 cases, 0 failed, 1 distinct, 0 ill; seed 5" in out
    )


def test_a_run_of_the_command(capsys, monkeypatch, tmp_path):
    before = dict(os.environ)
    status = main(["fuzz", "--max-specs", "4", "--jobs", "1", "--seed", "3", "--minutes", "5", "--backend", "torch"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.splitlines()[-1].startswith(("4 specs", "5 specs")) and "0 failed" in out.splitlines()[-1]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "--device tpu: fuzz runs on cpu or cuda"),
        (["--backend", "triton"], "set TRITON_INTERPRET=1, or leave --backend out"),
    ],
)
def test_wrong_arguments_are_one_message(capsys, arguments, said):
    assert main(["fuzz", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_message(capsys):
    assert main(["fuzz", "--device", "cuda"]) == 2
    assert "finds no CUDA device here" in capsys.readouterr().err


def test_without_hypothesis_the_message_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(cli_fuzz, "find_spec", lambda name: None)
    assert main(["fuzz"]) == 2
    assert "needs Hypothesis" in (err := capsys.readouterr().err) and "flagen[fuzz]" in err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_minutes_are_above_zero(text, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["fuzz", "--minutes", text])
    assert "minutes above 0" in capsys.readouterr().err


def test_arguments_of_the_command():
    given_ = parser().parse_args(["fuzz", "--device", "cuda", "--minutes", "0.5", "--jobs", "3", "--max-specs", "7"])
    assert isinstance(given_, argparse.Namespace)
    assert (given_.device, given_.minutes, given_.jobs, given_.max_specs, given_.seed) == ("cuda", 0.5, 3, 7, None)


def test_what_is_known_is_printed_when_it_is_interrupted(monkeypatch, capsys):
    assert run_with(monkeypatch, [([LINE], [FINDING]), KeyboardInterrupt]) == 1
    assert "1 specs, 1 cases, 0 failed, 1 distinct, 0 ill; seed 5" in capsys.readouterr().out


FOUND = found_trials()


@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
def test_modules_name_nothing_that_is_not_there(tmp_path):
    """Kernels of specs at random, which no test here compiles, and of those found before."""
    chosen = {trial.spec.to_json(): trial.spec for trial in (*FOUND.values(), *drawn(120, "cuda"))}
    for i, spec in enumerate(chosen.values()):
        (tmp_path / f"drawn_{i}.py").write_text(compiler.prepare(spec)[1].source, encoding="utf-8")
    assert len(chosen) > 60
    pass_the_linter(tmp_path)


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_what_was_found_before(found, device):
    outcome = judge(replace(found, device=device, backend="auto"))
    assert outcome.status in ("ok", "ill"), outcome.text


def test_a_number_as_decay_has_a_value_for_every_token():
    """Where a trial differs its values are moved, those of a decay that is a number too."""
    trial = Trial(Spec("number", log_decay=-0.05), T=4, K=3, V=2, cu_seqlens=(0, 3, 4))
    found = fuzz_judge._value(trial.case(), trial.spec.log_decay)
    assert found.shape == (1, 4, 1, 1) and found[0, :, 0, 0].tolist() == [-0.05] * 4
    assert fuzz_judge._moved(trial.case(), 0) is not None


@pytest.mark.gpu
def test_a_run_on_a_gpu(capsys):
    status = main(["fuzz", "--device", "cuda", "--max-specs", "3", "--jobs", "1", "--seed", "3", "--minutes", "3"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "0 failed" in out.splitlines()[-1]
