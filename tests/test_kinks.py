"""kinks: which tokens' gradients rounding decides."""

from __future__ import annotations

import warnings

import pytest
import torch

from flagen.expr import Input, exp, k, logsigmoid, maximum
from flagen.expr import abs as absolute
from flagen.kinks import settled
from flagen.spec import Spec, SpecWarning
from flagen.testing import check

gate, forget = Input("gate", "b t h"), Input("forget", "b t h")


def edge(**arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        return Spec("edge", scale=1, **({"normalize": lambda n: maximum(absolute(n), 1)} | arguments))


def inputs(n):
    """q = 1 and k so that the sums are n, [T] each, in one head; 7 in another."""
    rises = torch.tensor(n, dtype=torch.float64).diff(prepend=torch.zeros(1, dtype=torch.float64))
    keys = torch.stack((rises, torch.tensor([7.0, *(0.0 for _ in n[1:])], dtype=torch.float64)), -1)
    values = torch.randn(1, len(n), 2, 3, generator=torch.Generator().manual_seed(3))
    return torch.ones(1, len(n), 2, 1, dtype=torch.float64), keys[None, ..., None], values


def at(spec, n, error=1e-3, states=(), options=None):
    x = inputs(n)
    given = {
        "q": x[0],
        "k": x[1],
        "v": x[2],
        "gate": torch.zeros(1, len(n), 2),
        "forget": torch.full((1, len(n), 2), 99.0),
    }
    options = {"cu_seqlens": None, "scale": None} | (options or {})
    return settled(spec, [given[one.name] for one in spec.inputs], states, {}, options, (1, len(n), 2), error)


@pytest.mark.parametrize(
    "spec",
    [
        edge(),
        edge(log_decay=logsigmoid(forget)),
        edge(key=exp(gate) * k, log_decay=logsigmoid(forget), stabilize="max"),
    ],
    ids=lambda spec: str(spec.inputs[-1].name) + str(spec.stabilize),
)
def test_tokens_next_to_a_kink(spec):
    found = at(spec, [0.5, 1.0, 1.5, -1.0, 0.9999, 0.9])
    assert found[0, :, 0].tolist() == [True, False, True, False, False, True]
    assert found[0, :, 1].all()


def test_a_state_counts():
    state = torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1)
    assert at(edge(), [0.0, 0.5], states=state)[0, :, 0].tolist() == [False, True]
    held = edge(key=exp(gate) * k, stabilize="max")
    state = (*state, torch.full((1, 2), 0.5).log())
    assert at(held, [0.5, 0.6], states=state)[0, :, 0].tolist() == [False, True]


def test_a_smooth_normaliser_has_none():
    assert at(edge(normalize=lambda n: 1 + n * n), [1.0]) is None
    assert at(edge(normalize=False), [1.0]) is None


def test_a_check_passes_where_every_token_stands_at_a_kink():
    """Half of the tokens: at n = 1, where bf16 decides, and at n = 3."""
    spec = edge(log_decay=logsigmoid(forget))
    q_, k_, v_ = inputs([1.0, 3.0] * 20)
    given = {"q": q_, "k": k_, "v": v_, "forget": torch.full((1, 40, 2), 99.0)}
    check(spec, inputs={name: x.bfloat16() for name, x in given.items()}, backend="torch")
