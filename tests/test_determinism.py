"""The same call gives the same bits: twice in a process, among other calls, and in two fresh processes.

The bodies run with PyTorch on a CPU, with the kernels on a GPU, and by test_interp_hostile_determinism.py with the
kernels under the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ALL, WITHOUT_KERNELS
from hostile import EVERYWHERE, FEW, GPU, PLACE, TORCH, Place, Run, digest, inputs_of, same

TOKENS = 40
SPANS = [0, 0, 11, 28, 33]
TESTS = Path(__file__).parent
ON_A_GPU = ["retnet", "gla", "rwkv6", "linear"]  # in fresh processes, which compile what no test before them did

PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from hostile import NAMED, digest
from test_determinism import place_of
for name in sys.argv[2:]:
    print(name, digest(place_of(sys.argv[1]), NAMED[name]))
"""


def place_of(text: str) -> Place:
    return next(one for one in PLACES if str(one) == text)


PLACES = [TORCH, Place("triton", "cpu"), *(one.values[0] for one in GPU)]


def the_same_call_twice(place, spec, cu, cut, heads=2):
    inputs = inputs_of(place, spec, 1 if cu else 2, TOKENS, cu, heads=heads)
    first = Run(place, spec, inputs, cu=cu, cut=cut).everything()
    Run(place, spec, inputs_of(place, spec, 1, 7), cut=cut).everything()  # something else in between
    same(Run(place, spec, inputs, cu=cu, cut=cut).everything(), first)


def in_two_processes(place, names):
    """Sets and dictionaries are ordered by another seed in each."""

    def run(seed: str) -> list[str]:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", PROGRAM, str(place), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()

    first, second = run("1"), run("2")
    assert len(first) == 2 * len(names) and first[::2] == list(names)
    assert first == second


@EVERYWHERE
@pytest.mark.parametrize("cu", [None, SPANS], ids=["dense", "packed"])
def test_the_same_call_twice(place, spec, cu):
    the_same_call_twice(place, spec, cu, cut=True)


@PLACE
def test_in_two_processes(place):
    in_two_processes(place, [spec.name for spec in ALL + WITHOUT_KERNELS] if place is TORCH else ON_A_GPU)


@FEW
def test_a_digest_is_of_the_numbers(spec):
    assert digest(TORCH, spec) == digest(TORCH, spec) != digest(TORCH, spec, seed=1)
