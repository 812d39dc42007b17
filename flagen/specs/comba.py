"""Comba: a delta rule that reads the state before its decay. Hu et al., 2025 (arXiv 2506.02475).

S_t = (exp(g_t) - sigmoid(b) beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale (q_t - d k_t)^T S_t
"""

from ..expr import Input, k, l2norm, q, sigmoid
from ..spec import Spec

g, beta = Input("g", "b t h"), Input("beta", "b t h")  # natural log of the decay per step, <= 0; from 0 to 1
b, d = Input("b", "h"), Input("d", "h")  # how much of beta is taken away; of the key in the query

comba = Spec(
    "comba",
    query=l2norm(q) - d * l2norm(k),
    key=beta * l2norm(k),
    log_decay=g,
    erase=(l2norm(k), sigmoid(b) * beta * l2norm(k)),
    erase_reads="previous",
    inputs=("q", "k", "v", "g", "beta", "b", "d"),
)
