"""The kernels of a plan, for people: what they read and write, and when they are launched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plan_parts import Kernel

if TYPE_CHECKING:
    from .plan import Plan

# what is prepared for chunks with a decay per key channel, beside the weights of pairs, A
PREPARED = ("qd", "kd", "gn")


def kernels_of(plan: Plan) -> tuple[Kernel, ...]:
    """What is launched for a call, in order."""
    if plan.vector:
        return _of_vector(plan)
    names = tuple(one.name for one in plan.inputs)
    state = _state(plan)
    held = (*state, "m") if plan.stabilized else state
    scan = Kernel(name=f"{plan.name}_scan_kernel", direction="either", reads=state, writes=state,
                  when="the sequence is cut into pieces: their true first states")  # fmt: skip
    step = Kernel(name=f"{plan.name}_step_kernel", direction="one token", reads=(*names, *held), writes=("o", *held),
                  when="decode")  # fmt: skip
    if plan.intra:
        return (*_by_key_forward(plan), scan, *_by_key_backward(plan), step)
    if plan.tiled:
        return (*_tiled_forward(plan), scan, *_tiled_backward(plan), step)
    keys = tuple(one.name for one in plan.state_tensors if not one.is_constant)
    queries = tuple(one.name for one in plan.adjoint_tensors if not one.is_constant)
    decays = tuple(one.name for one in plan.decay_tensors if not one.is_constant) if plan.prepared else ()
    return (
        *((plan.held.kernel(plan.name),) if plan.stabilized else ()),
        *_prepared(plan, "gsum", decays, "the decay varies in time: its sums inside chunks"),
        Kernel(name=f"{plan.name}_fwd_kernel", direction="forward", reads=names, writes=("o", *state),
               when="always"),
        Kernel(name=f"{plan.name}_fwd_kernel", direction="forward", reads=keys, writes=state,
               when="the sequence is cut into pieces: their end states, from zero"),
        scan,
        *_prepared(plan, "norm", ("do", "o"), "a gradient is asked for: that of the normaliser"),
        Kernel(name=f"{plan.name}_bwd_state_kernel", direction="backward", reads=(*queries, "do"),
               writes=tuple(f"d{x}" for x in state), when="the backward is cut into pieces"),
        *_backward(plan),
        step,
    )  # fmt: skip


def _state(plan: Plan) -> tuple[str, ...]:
    return ("S", "z") if plan.normalized else ("S",)


def _backward(plan: Plan) -> tuple[Kernel, ...]:
    names = tuple(one.name for one in plan.inputs)
    state = _state(plan)
    if not plan.sweeps:
        whole = Kernel(name=f"{plan.name}_bwd_kernel", direction="backward", reads=(*names, "do", *state),
                       writes=tuple(f"d{name}" for name in names), when="a gradient is asked for")  # fmt: skip
        return (whole,)
    sweeps: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("dq", "forward", ("query", "bonus")), ("dk", "backward", ("key",)), ("dv", "backward", ("value",)),
        ("dg", "either", ("log_decay", "gate", "factor")),
    )  # fmt: skip
    gates = tuple(x.name for x in plan.gate_tensors)
    found = []
    for kernel, direction, roles in sweeps:
        writes = tuple(f"d{x.name}" for x in plan.gradients_of(*roles))
        if not writes:
            continue
        reads = gates if kernel == "dg" else (*names, "do", *state)
        when = f"a gradient of what {' or '.join(roles)} uses is asked for"
        found.append(Kernel(name=f"{plan.name}_{kernel}_kernel", direction=direction, reads=reads, writes=writes,
                            when=when))  # fmt: skip
    return tuple(found)


def _tiled_forward(plan: Plan) -> tuple[Kernel, ...]:
    state = _state(plan)
    keys = tuple(x.name for x in plan.state_tensors if not x.is_constant)
    names = tuple(x.name for x in plan.inputs)
    return (
        Kernel(name=f"{plan.name}_fwd_state_kernel", direction="forward", reads=keys, writes=state,
               when="always, and before the backward: states at the starts of spans of tokens"),
        Kernel(name=f"{plan.name}_fwd_kernel", direction="chunks", reads=(*names, *state), writes=("o",),
               when="always"),
    )  # fmt: skip


def _tiled_backward(plan: Plan) -> tuple[Kernel, ...]:
    state = _state(plan)
    adjoint = tuple(f"d{x}" for x in state)
    names = tuple(x.name for x in plan.inputs)
    queries = tuple(x.name for x in plan.adjoint_tensors if not x.is_constant)
    dn = Kernel(name=f"{plan.name}_dn_kernel", direction="chunks", reads=("do", "o"), writes=("dden",),
                when="a gradient is asked for: that of the normaliser")  # fmt: skip
    found = [dn] if plan.normalized else []
    for kernel, roles, given in (("dq", ("query",), state), ("dkv", ("key", "value"), adjoint)):
        when = f"a gradient of what {' or '.join(roles)} uses is asked for"
        if kernel == "dkv":
            found.append(Kernel(name=f"{plan.name}_bwd_state_kernel", direction="backward", reads=(*queries, "do"),
                                writes=adjoint, when=f"{when}: adjoints at the ends of spans"))  # fmt: skip
        writes = tuple(f"d{x.name}" for x in plan.gradients_of(*roles))
        found.append(Kernel(name=f"{plan.name}_{kernel}_kernel", direction="chunks", reads=(*names, "do", *given),
                            writes=writes, when=when))  # fmt: skip
    return tuple(found)


def _of_vector(plan: Plan) -> tuple[Kernel, ...]:
    names = tuple(one.name for one in plan.inputs)
    updates = tuple(one.name for one in plan.state_tensors if not one.is_constant)
    queries = tuple(one.name for one in plan.adjoint_tensors if not one.is_constant)
    return (
        Kernel(name=f"{plan.name}_fwd_kernel", direction="forward", reads=names, writes=("o", "h"), when="always"),
        Kernel(name=f"{plan.name}_fwd_kernel", direction="forward", reads=updates, writes=("h",),
               when="the sequence is cut into pieces: their end states, from zero"),
        Kernel(name=f"{plan.name}_scan_kernel", direction="either", reads=("h",), writes=("h",),
               when="the sequence is cut into pieces: their true first states"),
        Kernel(name=f"{plan.name}_bwd_state_kernel", direction="backward", reads=(*queries, "do"), writes=("dh",),
               when="the backward is cut into pieces"),
        Kernel(name=f"{plan.name}_bwd_kernel", direction="backward", reads=(*names, "do", "h"),
               writes=tuple(f"d{name}" for name in names), when="a gradient is asked for"),
        Kernel(name=f"{plan.name}_step_kernel", direction="one token", reads=(*names, "h"), writes=("o", "h"),
               when="decode"),
    )  # fmt: skip


def _by_key_forward(plan: Plan) -> tuple[Kernel, ...]:
    state = _state(plan)
    chunks = tuple(x.name for x in plan.intra_tensors if not x.is_constant)
    values = tuple(x.name for x in plan.value_tensors if not x.is_constant)
    return (
        Kernel(name=f"{plan.name}_prepare_kernel", direction="chunks", reads=chunks, writes=(*PREPARED, "A"),
               when="always, before the forward and before the backward"),
        Kernel(name=f"{plan.name}_pairs_kernel", direction="chunks", reads=chunks, writes=("A",),
               when="after it, for rows whose decays are too strong to be divided by"),
        Kernel(name=f"{plan.name}_fwd_kernel", direction="forward", reads=(*PREPARED, "A", *values),
               writes=("o", *state), when="always"),
        Kernel(name=f"{plan.name}_fwd_kernel", direction="forward", reads=("kd", "gn", *values), writes=state,
               when="the sequence is cut into pieces: their end states, from zero"),
    )  # fmt: skip


def _by_key_backward(plan: Plan) -> tuple[Kernel, ...]:
    state = _state(plan)
    values = tuple(x.name for x in plan.value_tensors if not x.is_constant)
    keyed = plan.intra_gradients
    return (
        Kernel(name=f"{plan.name}_dq_kernel", direction="forward", reads=("kd", "gn", *values, "do", *state),
               writes=("dqd",), when="a gradient of what query or decay use is asked for"),
        Kernel(name=f"{plan.name}_dk_kernel", direction="backward", reads=("qd", "gn", *values, "do", *state),
               writes=("dkd",), when="a gradient of what key or decay use is asked for"),
        Kernel(name=f"{plan.name}_dv_kernel", direction="backward", reads=(*PREPARED, "A", "do"),
               writes=tuple(f"d{x.name}" for x in plan.gradients_of("value")),
               when="a gradient of what value uses is asked for"),
        Kernel(name=f"{plan.name}_bwd_intra_kernel", direction="chunks",
               reads=(*(x.name for x in plan.inputs), "do", "dqd", "dkd"),
               writes=tuple(f"d{x.name}" for x in keyed),
               when="a gradient of what query, key, decay or bonus use is asked for"),
    )  # fmt: skip


def _prepared(plan: Plan, name: str, reads: tuple[str, ...], when: str) -> tuple[Kernel, ...]:
    writes = ("dden",) if name == "norm" else (name,)
    if writes[0] not in plan.before:
        return ()
    return (Kernel(name=f"{plan.name}_{name}_kernel", direction="either", reads=reads, writes=writes, when=when),)


def described(plan: Plan) -> str:
    """The plan as text of several lines."""
    lines = [f"plan of {plan.name}", f"  decay: {plan.decay}", f"  state: {' + '.join(plan.state_names)}"]
    lines += [f"  {role.name} = {role.text}" for role in plan.roles]
    for kernel in plan.kernels:
        lines.append(f"  {kernel.name} ({kernel.direction}): {kernel.when}")
        lines.append(f"    reads {', '.join(kernel.reads)}; writes {', '.join(kernel.writes)}")
    return "\n".join(lines)
