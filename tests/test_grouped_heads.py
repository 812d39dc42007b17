"""Heads in groups: q and k with fewer heads than v and its gates, and the reverse; forward, every gradient, states,
packed sequences and decode, and no input repeated on the way to the kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import flagen
from flagen import specs
from flagen.samples import make_inputs, make_scalars
from flagen.testing import check

# of every kind of state and of decay; the inputs beside query and key have the heads of the value
NAMES = (
    "retnet", "mamba2", "gla", "rwkv6", "gateloop", "based", "linear", "mlstm", "hgrn2",
    "delta_net", "gated_delta_net", "kda", "rwkv7", "comba",
)  # fmt: skip
H = 6


def groups(spec, few):
    """Head counts by which the inputs of query and key ("keys") or of value ("values") have a third of the heads."""
    roles = ("query", "key", "erase_a", "erase_b") if few == "keys" else ("value",)
    chosen = {one for role, expr in spec.roles if role in roles for one in expr.inputs if set("kv") & set(one.axes)}
    others = {one for role, expr in spec.roles if role not in roles for one in expr.inputs}
    counts = {one.name: 2 for one in chosen - others if "h" in one.axes}
    return counts if len(counts) < len(spec.inputs) else {}


@pytest.mark.parametrize("few", ["keys", "values"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_reference(name, packed, few):
    spec = specs.get(name)
    heads = groups(spec, few)
    assert heads
    sizes = {"K": 8, "V": 12, "cu_seqlens": [0, 21, 21, 70] if packed else None, "T": 75, "B": None if packed else 2}
    check(spec, backend="torch", H=H, heads=heads, dtype=torch.float64, **sizes)


@pytest.mark.parametrize("few", ["keys", "values"])
def test_one_head_beside_many_and_divisors_of_many(few):
    spec = specs.get("gated_delta_net")
    heads = {"q": 1, "k": 2, "beta": 3} if few == "keys" else {"v": 2, "g": 3, "beta": 1}
    check(spec, backend="torch", H=H, heads=heads, dtype=torch.float64, B=1, T=40, K=8, V=5)


@pytest.mark.parametrize("name", ["mamba2", "gla", "mlstm"])
def test_kernels_are_given_inputs_as_they_are(name):
    """The launchers of the Triton kernels get the tensors of a call, whose heads they count."""
    from flagen.compiler import prepare
    from flagen.load import load
    from flagen.triton_backend import TritonBackend

    plan, entry = prepare(specs.get(name))
    backend = TritonBackend(plan, load(entry))
    inputs = tuple(make_inputs(plan.spec, B=1, T=32, H=H, K=16, V=16, heads=groups(plan.spec, "keys")).values())
    given = []

    class Seen(Exception):
        pass

    def fwd(*arguments, **options):
        given.extend(arguments[: len(inputs)])
        raise Seen

    held = [torch.zeros(1, 32, H)] * 2 + [torch.zeros(1, H)]
    launchers = SimpleNamespace(fwd=fwd, peaks=lambda *arguments: held)
    constants = (torch.zeros(H),) * len(plan.analysis.constants)
    with pytest.raises(Seen):
        backend._forward(launchers, inputs, constants, 1.0, (), None, False, True)
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in inputs]
    assert [x.shape for x in given] == [x.shape for x in inputs]


@pytest.mark.parametrize("name", ["mamba2", "gla", "mlstm", "gated_delta_net"])
def test_groups_are_what_a_repeat_would_be(name):
    spec = specs.get(name)
    op, scalars = flagen.compile(spec, backend="torch"), make_scalars(spec)
    few = make_inputs(spec, B=1, T=50, H=H, K=8, V=8, heads=groups(spec, "keys"))
    many = [
        x.repeat_interleave(H // x.shape[one.axes.index("h")], one.axes.index("h"))
        for one, x in zip(spec.inputs, few.values(), strict=True)
    ]
    o, state = op(*few.values(), **scalars, output_final_state=True)
    want, last = op(*many, **scalars, output_final_state=True)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(state, last)
