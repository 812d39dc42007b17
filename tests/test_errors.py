"""Every wrong call of an op, by the text of its error: what is wrong, what was given, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flagen
from flagen import specs
from flagen.analysis import analyse
from flagen.checks import Checks
from flagen.expr import Input, Scalar, log, logsigmoid
from flagen.op import Op
from flagen.spec import Spec, SpecWarning, taylor
from flagen.testing import make_inputs, make_scalars

B, T, H, K, V = 2, 12, 4, 6, 5
rows = Spec("rows", log_decay=logsigmoid(Input("gb", "b h")))
S = [B, H, K, V]


def op_of(name: str | Spec) -> Op:
    return flagen.compile(name, chunk_size=16, backend="torch")


def inputs(name: str | Spec, **changes: Any) -> list[Tensor]:
    spec = specs.get(name) if isinstance(name, str) else name
    return list(make_inputs(spec, **{"B": B, "T": T, "H": H, "K": K, "V": V, **changes}).values())


def call(name: str | Spec, change: Callable[[list[Tensor]], Any] = lambda x: None, **options: Any) -> Callable[[], Any]:
    """A call of an op with right inputs, but for what `change` does to their list, and these options."""

    def run() -> Any:
        x = inputs(name)
        change(x)
        spec = specs.get(name) if isinstance(name, str) else name
        return op_of(name)(*x, **(make_scalars(spec) | options))

    return run


def step(name: str | Spec, state: Any, tokens: int = 1, **options: Any) -> Callable[[], Any]:
    return lambda: op_of(name).step(*inputs(name, T=tokens), state=state, **options)


def put(index: int, make: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], None]:
    """A change: one input becomes what `make` makes of it."""

    def change(x: list[Any]) -> None:
        x[index] = make(x[index])

    return change


def packed(bounds: Any, **options: Any) -> Callable[[], Any]:
    """A call of gla with cu_seqlens."""
    return lambda: op_of("gla")(*inputs("gla", B=1), cu_seqlens=bounds, **options)


def drop(x: list[Any]) -> None:
    x.pop()


def twice(x: list[Any]) -> None:
    x.append(x[0])


def heads_first(x: list[Any]) -> None:
    x[1] = x[1].transpose(1, 2)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # shapes
    "axes": (
        call("gla", put(3, lambda g: g[..., 0])),
        ValueError,
        "gla: g must have shape [B, T, H, K] = (2, 12, 4, 6), got (2, 12, 4).\n    It is declared as Input('g', 'b t "
        "h k'), a value per key channel; for one per head write a spec in which it has no axis k, or repeat it: "
        "g.unsqueeze(-1).expand(...).",
    ),
    "more axes": (
        call("mamba2", put(3, lambda dt: dt[..., None])),
        ValueError,
        "mamba2: dt must have shape [B, T, H] = (2, 12, 4), got (2, 12, 4, 1).\n    It is declared as Input('dt', "
        "'b t h'): 3 axes, not 4.",
    ),
    "heads first": (
        call("gla", heads_first),
        ValueError,
        "gla: k must have shape [B, T, H, K] = (2, 12, 4, 6), got (2, 4, 12, 6).\n    The sequence comes before the "
        "heads: k.transpose(1, 2).",
    ),
    "length": (
        call("gla", put(0, lambda q: q[:, :9])),
        ValueError,
        "gla: q must have shape [B, T, H, K] = (2, 12, 4, 6), got (2, 9, 4, 6).\n    It is declared as Input('q', "
        "'b t h k'); its T differs from the others'.",
    ),
    "channels": (
        call("gla", put(1, lambda k: k[..., :3])),
        ValueError,
        "gla: k must have shape [B, T, H, K] = (2, 12, 4, 6), got (2, 12, 4, 3).\n    It is declared as Input('k', "
        "'b t h k'); its K differs from the others'.",
    ),
    "batch": (
        call(rows, put(3, lambda g: g[:1])),
        ValueError,
        "rows: gb must have shape [N, H] = (2, 4), got (1, 4).\n    It is declared as Input('gb', 'b h'); its N "
        "differs from the others'. N is B, or the number of sequences of cu_seqlens.",
    ),
    "rows": (
        lambda: op_of(rows)(*inputs(rows, B=1), cu_seqlens=torch.tensor([0, 3, 12])),
        ValueError,
        "rows: gb must have shape [N, H] = (2, 4), got (1, 4).\n    It is declared as Input('gb', 'b h'); its N "
        "differs from the others'. N is B, or the number of sequences of cu_seqlens.",
    ),
    "heads": (
        call("gla", put(1, lambda k: k[:, :, :3])),
        ValueError,
        "gla: k has 3 heads, which do not divide the 4 of q, got shape (2, 12, 3, 6); it may have 1, 2, 4",
    ),
    "no heads": (
        call("gla", put(3, lambda g: g[:, :, :0])),
        ValueError,
        "gla: g has 0 heads, which do not divide the 4 of q, got shape (2, 12, 0, 6); it may have 1, 2, 4",
    ),
    "empty": (
        lambda: op_of("gla")(*(x[:0] for x in inputs("gla"))),
        ValueError,
        "gla: q is empty: [B, T, H, K] = (0, 12, 4, 6); only T may be 0",
    ),
    # sizes
    "key channels": (
        lambda: op_of("gla")(*inputs("gla", K=257)),
        ValueError,
        "gla: K = 257 key channels, at most 256 are supported; use more heads of fewer channels",
    ),
    "value channels": (
        lambda: op_of("gla")(*inputs("gla", V=300)),
        ValueError,
        "gla: V = 300 value channels, at most 256 are supported; split them over several calls, or over more heads",
    ),
    "taylor": (
        lambda: op_of("based")(*inputs("based", K=33)),
        ValueError,
        "based: K = 33 key channels, at most 32 are supported with taylor(2); project q and k to fewer channels",
    ),
    "phase": (
        lambda: op_of("gateloop")(*inputs("gateloop", K=129)),
        ValueError,
        "gateloop: K = 129 key channels, at most 128 are supported with a phase; use more heads of fewer channels",
    ),
    # kinds of tensors
    "no tensor": (
        call("gla", put(3, lambda g: 0.5)),
        TypeError,
        "gla: g must be a tensor of shape [B, T, H, K], got float; the tensors are q, k, v, g, in this order",
    ),
    "integers": (
        call("gla", put(2, lambda v: v.long())),
        ValueError,
        "gla: v must be float16, bfloat16, float32 or float64, got int64; convert it: v.float()",
    ),
    "complex": (
        call("gla", put(0, lambda q: q.to(torch.complex64))),
        ValueError,
        "gla: q must be float16, bfloat16, float32 or float64, got complex64; only the state can be complex: give the "
        "angle of a decay as the phase of a spec",
    ),
    "numpy": (
        call("gla", put(0, lambda q: q.numpy())),
        TypeError,
        "gla: q must be a tensor of shape [B, T, H, K], got ndarray; the tensors are q, k, v, g, in this order",
    ),
    "none": (
        call("gla", put(3, lambda g: None)),
        TypeError,
        "gla: g must be a tensor of shape [B, T, H, K], got NoneType; the tensors are q, k, v, g, in this order",
    ),
    "8 bits": (
        call("gla", put(2, lambda v: v.to(torch.float8_e4m3fn))),
        ValueError,
        "gla: v must be float16, bfloat16, float32 or float64, got float8_e4m3fn; convert it: v.float()",
    ),
    "sparse": (
        call("gla", put(1, Tensor.to_sparse)),
        ValueError,
        "gla: k must be a dense tensor, got a sparse_coo one; convert it: .to_dense()",
    ),
    "of another library": (
        call("gla", put(1, Tensor.to_mkldnn)),
        ValueError,
        "gla: k must be a dense tensor, got a mkldnn one; convert it: .to_dense()",
    ),
    "nested": (
        call("gla", put(0, lambda q: torch.nested.nested_tensor(list(q)))),
        ValueError,
        "gla: q must be a dense tensor, got a nested one; pack its sequences into one row, with their bounds as "
        "cu_seqlens",
    ),
    "a number": (
        call("gla", put(0, Tensor.sum)),
        ValueError,
        "gla: q must have shape [B, T, H, K] = (2, 12, 4, 6), got ().\n    It is declared as Input('q', 'b t h k'): 4 "
        "axes, not 0.",
    ),
    "heads: of a gate": (
        call("mamba2", put(4, lambda A_log: A_log[:3])),
        ValueError,
        "mamba2: A_log has 3 heads, which do not divide the 4 of q, got shape (3,); it may have 1, 2, 4",
    ),
    "devices": (
        call("gla", put(2, lambda v: v.to("meta"))),
        ValueError,
        "gla: v is on meta and q on cpu; all tensors must be on one device: v.to(q.device)",
    ),
    # arguments, by Python's own words
    "missing": (
        call("gla", drop),
        TypeError,
        "gla: missing a required argument: 'g'; it is called as gla(q, k, v, g, *, scale=None, initial_state=None, "
        "output_final_state=False, cu_seqlens=None)",
    ),
    "too many": (
        call("gla", twice),
        TypeError,
        "gla: too many positional arguments; it is called as gla(q, k, v, g, *, ",
    ),
    "unknown": (
        call("gla", head_first=True),
        TypeError,
        "gla: got an unexpected keyword argument 'head_first'; it is called as gla(q, k, v, g, *, ",
    ),
    "given twice": (
        call("gla", q=torch.zeros(1)),
        TypeError,
        "gla: multiple values for argument 'q'; it is called as gla(q, k, v, g, *, ",
    ),
    "nothing": (
        lambda: op_of("gla")(),
        TypeError,
        "gla: missing a required argument: 'q'; it is called as gla(q, k, v, g, *, ",
    ),
    "a scalar is unknown": (
        call("transnormer", depth=3),
        TypeError,
        "transnormer: got an unexpected keyword argument 'depth'; it is called as transnormer(q, k, v, *, layer, ",
    ),
    "step: too many": (
        lambda: op_of("gla").step(*inputs("gla", T=1), torch.zeros(S)),
        TypeError,
        "gla.step: too many positional arguments; it is called as gla.step(q, k, v, g, *, state, scale=None)",
    ),
    "step: sequences": (
        step("gla", torch.zeros(S), cu_seqlens=torch.tensor([0, 1])),
        TypeError,
        "gla.step: got an unexpected keyword argument 'cu_seqlens'; it is called as gla.step(q, k, v, g, *, ",
    ),
    "a scalar is missing": (
        lambda: op_of("transnormer")(*inputs("transnormer"), layer=1),
        TypeError,
        "transnormer: missing a required argument: 'layers'; it is called as transnormer(q, k, v, *, layer, layers, "
        "scale=None, ",
    ),
    "a scalar by position": (
        lambda: op_of("transnormer")(*inputs("transnormer"), 1, layers=2),
        TypeError,
        "transnormer: too many positional arguments; it is called as transnormer(q, k, v, *, layer, layers, ",
    ),
    "step: unknown": (
        step("gla", torch.zeros(S), output_final_state=True),
        TypeError,
        "gla.step: got an unexpected keyword argument 'output_final_state'; it is called as gla.step(q, k, v, g, *, "
        "state, scale=None)",
    ),
    # numbers
    "scale": (
        call("gla", scale=torch.tensor(0.5)),
        TypeError,
        "gla: scale must be a number, or None for the default, got a tensor of shape (); it multiplies the query: a "
        "scale that is a tensor can be multiplied into it",
    ),
    "scale is a bool": (
        call("gla", scale=True),
        TypeError,
        "gla: scale must be a number, or None for the default, got bool",
    ),
    "scale is nan": (call("gla", scale=float("nan")), ValueError, "gla: scale must be finite, got nan"),
    "scale is infinite": (call("gla", scale=float("-inf")), ValueError, "gla: scale must be finite, got -inf"),
    "scale is beyond floats": (
        call("gla", scale=-(10**400)),
        ValueError,
        "gla: scale must be finite, got an integer beyond any float",
    ),
    "scale is complex": (
        call("gla", scale=1j),
        TypeError,
        "gla: scale must be a number, or None for the default, got complex '1j'",
    ),
    "final state": (
        call("gla", output_final_state="no"),
        TypeError,
        "gla: output_final_state must be True or False, got str 'no'; it decides on the host what is computed",
    ),
    "final state: a tensor": (
        call("gla", output_final_state=torch.zeros(2)),
        TypeError,
        "gla: output_final_state must be True or False, got a tensor of shape (2,)",
    ),
    "scalar: a tensor": (
        call("transnormer", layer=torch.tensor(1.0)),
        TypeError,
        "transnormer: layer must be a number, got a tensor of shape (); pass a float: it is part of the recurrence",
    ),
    "scalar: none": (call("transnormer", layer=None), TypeError, "transnormer: layer must be a number, got None; "),
    "scalar: beyond floats": (
        call("transnormer", layers=10**400),
        ValueError,
        "transnormer: layers must be finite, got an integer beyond any float",
    ),
    "scalar: division by zero": (
        call("transnormer", layers=0),
        ValueError,
        "transnormer: -(8 / heads) * (1 - layer / layers) * head is not a number for layer=1, layers=0; it must be one "
        "for every head",
    ),
    "scalar": (
        call("transnormer", layer="1"),
        TypeError,
        "transnormer: layer must be a number, got str '1'; pass a float: it is part of the recurrence, has no "
        "gradient and is read on the host",
    ),
    "decay": (
        call("transnormer", layer=9.0, layers=3.0),
        ValueError,
        "transnormer: log_decay = -(8 / heads) * (1 - layer / layers) * head is 4 > 0 in head 1 for layer=9, "
        "layers=3, so that the state would grow; it must be <= 0",
    ),
    "not a number": (
        call(Spec("roots", log_decay=-(log(Scalar("base")) ** 2)), base=-1.0),
        ValueError,
        "roots: -log(base) ** 2 is not a number for base=-1; it must be one for every head",
    ),
    # sequences
    "cu_seqlens: a list": (
        packed([0, 12]),
        TypeError,
        "gla: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences, got list; use "
        "torch.tensor(cu_seqlens, dtype=torch.int32, device=q.device)",
    ),
    "cu_seqlens: shape": (
        packed(torch.zeros(1, 3, dtype=torch.int32)),
        ValueError,
        "gla: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences, got shape (1, "
        "3); one sequence of 100 tokens is [0, 100]",
    ),
    "cu_seqlens: one bound": (
        packed(torch.tensor([0])),
        ValueError,
        "gla: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences, got shape (1,)",
    ),
    "cu_seqlens: dtype": (
        packed(torch.tensor([0.0, 12.0])),
        ValueError,
        "gla: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences, got dtype "
        "float32; convert it: cu_seqlens.to(torch.int32)",
    ),
    "cu_seqlens: device": (
        packed(torch.zeros(2, dtype=torch.int32, device="meta")),
        ValueError,
        "gla: cu_seqlens is on meta and q on cpu; all tensors must be on one device",
    ),
    "cu_seqlens: batch": (
        call("gla", cu_seqlens=torch.tensor([0, 12])),
        ValueError,
        "gla: with cu_seqlens the sequences lie one after the other in one row, B = 1, got B = 2; flatten what has a "
        "time axis, as in q.flatten(0, 1).unsqueeze(0)",
    ),
    "cu_seqlens: numpy": (
        packed(torch.tensor([0, 12]).numpy()),
        TypeError,
        "gla: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences, got ndarray; "
        "use torch.tensor(cu_seqlens, dtype=torch.int32, device=q.device)",
    ),
    "cu_seqlens: empty": (
        packed(torch.zeros(0, dtype=torch.int32)),
        ValueError,
        "gla: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences, got shape (0,)",
    ),
    "cu_seqlens: negative": (
        packed(torch.tensor([0, -3, 12])),
        ValueError,
        "gla: cu_seqlens must rise from 0 to at most T = 12, got [0, -3, 12], which falls from 0 to -3 at 1",
    ),
    "cu_seqlens: beyond int32": (
        packed(torch.tensor([0, 2**32 + 12])),
        ValueError,
        "gla: cu_seqlens must rise from 0 to at most T = 12, got [0, 2147483647], which ends at 2147483647; drop what "
        "is past T or pad the tensors",
    ),
    "cu_seqlens: begin": (
        packed(torch.tensor([3, 12])),
        ValueError,
        "gla: cu_seqlens must rise from 0 to at most T = 12, got [3, 12], which begins with 3; put a 0 first",
    ),
    "cu_seqlens: lengths": (
        packed(torch.tensor([0, 7, 5])),
        ValueError,
        "gla: cu_seqlens must rise from 0 to at most T = 12, got [0, 7, 5], which falls from 7 to 5 at 2; it holds the "
        "running sum of the lengths, not the lengths",
    ),
    "cu_seqlens: end": (
        packed(torch.arange(20)),
        ValueError,
        "gla: cu_seqlens must rise from 0 to at most T = 12, got [0, 1, 2, 3, 4, 5, ..., 19], which ends at 19; drop "
        "what is past T or pad the tensors",
    ),
    # states
    "state: shape": (
        call("gla", initial_state=torch.zeros(B, H, V, K)),
        ValueError,
        "gla: initial_state must have shape [N, H, K, V] = (2, 4, 6, 5), got (2, 4, 5, 6).\n    N is the batch size, "
        "or the number of sequences of cu_seqlens, H the largest number of heads.",
    ),
    "state: sequences": (
        packed(torch.tensor([0, 5, 12]), initial_state=torch.zeros(1, H, K, V)),
        ValueError,
        "gla: initial_state must have shape [N, H, K, V] = (2, 4, 6, 5), got (1, 4, 6, 5).\n    N is the batch size",
    ),
    "state: features": (
        call("based", initial_state=(torch.zeros(S), torch.zeros(S[:3]))),
        ValueError,
        "based: initial_state must have shape [N, H, F, V] = (2, 4, 28, 5), got (2, 4, 6, 5).\n    N is the batch "
        "size, or the number of sequences of cu_seqlens, H the largest number of heads, F the rows of taylor(2).",
    ),
    "state: dtype": (
        call("gla", initial_state=torch.zeros(S, dtype=torch.bfloat16)),
        ValueError,
        "gla: initial_state must be float32 with these inputs, got bfloat16; convert it: .to(torch.float32)",
    ),
    "state: wide": (
        call("gla", put(0, Tensor.double), initial_state=torch.zeros(S)),
        ValueError,
        "gla: initial_state must be float64 with these inputs, got float32; convert it: .to(torch.float64)",
    ),
    "state: real": (
        call("gateloop", initial_state=torch.zeros(S)),
        ValueError,
        "gateloop: initial_state must be complex64 with these inputs, got float32; convert it: .to(torch.complex64)",
    ),
    "state: complex": (
        call("gla", initial_state=torch.zeros(S, dtype=torch.complex64)),
        ValueError,
        "gla: initial_state must be float32 with these inputs, got complex64; pass a state of this op",
    ),
    "state: device": (
        call("gla", initial_state=torch.zeros(S, device="meta")),
        ValueError,
        "gla: initial_state is on meta and q on cpu; all tensors must be on one device",
    ),
    "state: axes": (
        call("gla", initial_state=torch.zeros(H, K, V)),
        ValueError,
        "gla: initial_state must have shape [N, H, K, V] = (2, 4, 6, 5), got (4, 6, 5).",
    ),
    "state: heads": (
        call("gla", initial_state=torch.zeros(B, 1, K, V)),
        ValueError,
        "gla: initial_state must have shape [N, H, K, V] = (2, 4, 6, 5), got (2, 1, 6, 5).",
    ),
    "state: sparse": (
        call("gla", initial_state=torch.zeros(S).to_sparse()),
        ValueError,
        "gla: initial_state must be a dense tensor, got a sparse_coo one; convert it: .to_dense()",
    ),
    "state: a flag": (
        call("gla", initial_state=True),
        TypeError,
        "gla: initial_state must be a tensor, got bool 'True'",
    ),
    "state: half a pair": (
        call("linear", initial_state=(torch.zeros(S), None)),
        TypeError,
        "linear: initial_state must be a tensor, got None",
    ),
    "state: three": (
        call("linear", initial_state=(torch.zeros(S),) * 3),
        TypeError,
        "linear: initial_state must be a pair (S, z), as linear returns it, got a tuple of 3; z is the running sum",
    ),
    "state: no pair": (
        call("linear", initial_state=torch.zeros(S)),
        TypeError,
        "linear: initial_state must be a pair (S, z), as linear returns it, got a tensor of shape (2, 4, 6, 5); z is "
        "the running sum of the keys' features",
    ),
    "state: a pair": (
        call("gla", initial_state=(torch.zeros(S), torch.zeros(S[:3]))),
        TypeError,
        "gla: initial_state must be a tensor, got a tuple of 2",
    ),
    "state: sums": (
        call("linear", initial_state=(torch.zeros(S), torch.zeros(B, H, V))),
        ValueError,
        "linear: initial_state[1], the sum z, must have shape [N, H, K] = (2, 4, 6), got (2, 4, 5).",
    ),
    # step
    "step: tokens": (
        step("gla", torch.zeros(S), tokens=3),
        ValueError,
        "gla.step: takes one token, T = 1, got T = 3; call gla(...) for more tokens, with output_final_state=True for "
        "the state after them",
    ),
    "step: no token": (
        step("gla", torch.zeros(S), tokens=0),
        ValueError,
        "gla.step: takes one token, T = 1, got T = 0; call gla(...)",
    ),
    "step: no state": (
        step("gla", None),
        TypeError,
        "gla.step: state is None; step updates a state in place: pass the final_state of gla(..., "
        "output_final_state=True), or zeros",
    ),
    "step: left out": (
        lambda: op_of("gla").step(*inputs("gla", T=1)),
        TypeError,
        "gla.step: missing a required argument: 'state'; it is called as gla.step(q, k, v, g, *, state, scale=None)",
    ),
    "step: channels": (
        lambda: op_of("gla").step(*inputs("gla", T=1, K=300), state=torch.zeros(B, H, 300, V)),
        ValueError,
        "gla: K = 300 key channels, at most 256 are supported; use more heads of fewer channels",
    ),
    "step: dtype": (
        step("gla", torch.zeros(S, dtype=torch.float64)),
        ValueError,
        "gla: state must be float32 with these inputs, got float64; convert it: .to(torch.float32)",
    ),
    "step: device": (
        step("gla", torch.zeros(S, device="meta")),
        ValueError,
        "gla: state is on meta and q on cpu; all tensors must be on one device",
    ),
    "step: gradient of the sums": (
        step("linear", (torch.zeros(S), torch.zeros(S[:3], requires_grad=True))),
        ValueError,
        "linear.step: state requires a gradient, and step has none and updates it in place; pass state.detach()",
    ),
    "step: shape": (
        step("gla", torch.zeros(B, H, K, K)),
        ValueError,
        "gla: state must have shape [N, H, K, V] = (2, 4, 6, 5), got (2, 4, 6, 6).",
    ),
    "step: gradient": (
        step("gla", torch.zeros(S, requires_grad=True)),
        ValueError,
        "gla.step: state requires a gradient, and step has none and updates it in place; pass state.detach(), or call "
        "it under torch.no_grad()",
    ),
    "step: expanded": (
        step("gla", torch.zeros(1, H, K, V).expand(S)),
        ValueError,
        "gla.step: state is an expanded view, strides (0, 30, 5, 1)",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call(wrong):
    run, kind, text = WRONG[wrong]
    with pytest.raises(kind, match="^" + re.escape(text)) as caught:
        run()
    assert type(caught.value) is kind
    assert all(len(line) < 300 for line in str(caught.value).splitlines())


def test_right_sizes_at_the_limits():
    for name, limits in (("gla", (256, 256)), ("based", (32, 256)), ("gateloop", (128, 4))):
        op = op_of(name)
        o, _ = op(*inputs(name, B=1, T=2, H=1, K=limits[0], V=limits[1]))
        assert o.shape[-1] == limits[1]
    with pytest.warns(SpecWarning):
        first = Spec("first", feature_map=taylor(1), normalize=True)
    assert op_of(first)(*inputs(first, B=1, T=2, H=1, K=255, V=2))[0].isfinite().all()
    with pytest.raises(ValueError, match=r"first: K = 256 key channels, at most 255 are supported with taylor\(1\)"):
        op_of(first)(*inputs(first, B=1, T=2, H=1, K=256, V=2))


def test_the_reference_and_the_op_refuse_the_same():
    op = op_of("gla")
    for change in (drop, heads_first, put(3, lambda g: g[..., 0])):
        x = inputs("gla")
        change(x)
        with pytest.raises((TypeError, ValueError)) as first:
            op(*x)
        with pytest.raises(type(first.value), match="^" + re.escape(str(first.value))):
            op.reference(*x)


def test_no_kernels_for_a_device():
    op = flagen.compile("gla", backend="triton")
    text = (
        "gla: was compiled with backend='triton', and there are no Triton kernels for tensors on cpu; move them to a "
        "CUDA device, or compile with backend='auto' or 'torch'"
    )
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        op(*inputs("gla"))
    with pytest.raises(ValueError, match=r"^gla: was compiled with backend='triton'"):
        op.step(*inputs("gla", T=1), state=torch.zeros(S))


def test_fp64_and_triton():
    x = [y.double() for y in inputs("gla")]
    checks = Checks(analyse(specs.get("gla")), frozenset(("cpu",)))
    with pytest.raises(ValueError, match=r"^gla: q is float64, which the Triton kernels do not take; use float32, or "
                       r"compile with backend='torch' for float64"):  # fmt: skip
        checks.tensors(x, None)
    assert Checks(analyse(specs.get("gla"))).tensors(x, None).wide


def test_what_passed_once_is_still_told_from_what_is_wrong():
    """Forms of calls that passed are remembered; these differ from one by what has no shape, dtype or device."""
    op, right = op_of("gla"), inputs("gla")
    op(*right)
    for wrong, text in (
        (right[0].to_sparse(), "q must be a dense tensor"),
        (right[0].to("meta"), "k is on cpu and q on meta"),
        (right[0].numpy(), "q must be a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            op(wrong, *right[1:])
    with pytest.raises(ValueError, match="B = 1, got B = 2"):
        op(*right, cu_seqlens=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="takes one token"):
        op.step(*right, state=torch.zeros(S))
    assert op(*right)[0].isfinite().all()


def test_a_flag_may_be_a_number():
    assert op_of("gla")(*inputs("gla"), output_final_state=1)[1] is not None
    assert op_of("gla")(*inputs("gla"), output_final_state=0)[1] is None


def test_a_wrong_call_leaves_the_state_alone():
    state = torch.randn(S)
    before = state.clone()
    with pytest.raises(ValueError, match="T = 1"):
        step("gla", state, tokens=2)()
    assert torch.equal(state, before)
