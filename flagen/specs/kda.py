"""Kimi Delta Attention: the delta rule with a decay per key channel. Kimi Team, 2025 (arXiv 2510.26692).

S_t = (1 - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = scale q_t^T S_t
"""

from ..expr import Input, k, l2norm, q
from ..spec import Spec

g = Input("g", "b t h k")  # natural log of the decay per step, <= 0
beta = Input("beta", "b t h")  # how much is replaced, from 0 to 1

kda = Spec(
    "kda",
    query=l2norm(q),
    key=beta * l2norm(k),
    log_decay=g,
    erase=(l2norm(k), beta * l2norm(k)),
    inputs=("q", "k", "v", "g", "beta"),
)
