"""Gated DeltaNet: the delta rule with a scalar decay. Yang et al., 2024 (arXiv 2412.06464).

S_t = exp(g_t) (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale q_t^T S_t
"""

from ..expr import Input, k, l2norm, q
from ..spec import Spec

g = Input("g", "b t h")  # natural log of the decay per step, <= 0
beta = Input("beta", "b t h")  # how much is replaced, from 0 to 1

gated_delta_net = Spec(
    "gated_delta_net",
    query=l2norm(q),
    key=beta * l2norm(k),
    log_decay=g,
    erase=(l2norm(k), beta * l2norm(k)),
    inputs=("q", "k", "v", "g", "beta"),
)
