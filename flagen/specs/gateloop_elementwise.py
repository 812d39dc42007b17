"""GateLoop with a state of one number a channel: the form of its experiments. Katsch, 2023 (arXiv 2311.01927).

h_t = exp(g_t + i theta_t) h_{t-1} + k_t v_t,    o_t = Re(q_t h_t)
"""

from ..expr import Input
from ..spec import Spec

q, k, v = Input("q", "b t d"), Input("k", "b t d"), Input("v", "b t d")
g = Input("g", "b t d")  # natural log of the decay's magnitude per step, <= 0
theta = Input("theta", "b t d")  # its angle per step, in radians

gateloop_elementwise = Spec("gateloop_elementwise", query=q, key=k, value=v, log_decay=g, phase=theta)
