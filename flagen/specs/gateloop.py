"""GateLoop: a complex decay per key channel. Katsch, 2023 (arXiv 2311.01927).

S_t = diag(exp(g_t + i theta_t)) S_{t-1} + k_t v_t^T,    o_t = Re(q_t^T S_t)
"""

from ..expr import Input
from ..spec import Spec

g = Input("g", "b t h k")  # natural log of the decay's magnitude per step, <= 0
theta = Input("theta", "b t h k")  # its angle per step, in radians

gateloop = Spec("gateloop", log_decay=g, phase=theta, scale=1)
