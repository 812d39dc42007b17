"""What a benchmark compiles before it times: every kernel of its calls, here for a target without a GPU."""

from __future__ import annotations

import aot

from flagen import specs
from flagen.bench_compile import Unit, compile_unit


def test_every_launch_is_compiled():
    unit = Unit(specs.get("retnet").to_json(), (1, 2048, 2, 16, 16), "bfloat16", "meta")
    with aot.compiling("sm_90") as found:
        count, healthy = compile_unit(unit)
    assert healthy
    assert count == len(found) - 3  # one forward more, which makes the tables that launchers keep
    names = [kernel.metadata.name.removeprefix("retnet_") for kernel in found]
    # plain, plain and training forward in pieces; the backward in pieces; decode
    forward = ["fwd_kernel", "scan_kernel", "fwd_kernel"]
    backward = ["bwd_state_kernel", "scan_kernel", "dk_kernel", "dv_kernel", "dq_kernel"]
    assert names[-12:] == [*forward, *forward, *backward, "step_kernel"]
    assert all(kernel.asm["cubin"] for kernel in found)


def test_what_cannot_be_compiled_is_said():
    unit = Unit(specs.get("retnet").to_json(), (1, 2048, 2, 16, 16), "bfloat16", "meta")
    said, healthy = compile_unit(unit)  # there is no driver
    assert healthy
    assert isinstance(said, str)
    assert said
