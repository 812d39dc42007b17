"""The bodies of test_determinism.py with the Triton kernels under the interpreter."""

from __future__ import annotations

from hostile import BRIEF, FEWER, INTERPRETER
from test_determinism import SPANS, in_two_processes, the_same_call_twice


@FEWER
def test_the_same_call_twice(spec):
    the_same_call_twice(BRIEF, spec, SPANS, cut=True, heads=1)


def test_in_two_processes():
    in_two_processes(INTERPRETER, ["scalar", "gla"])
