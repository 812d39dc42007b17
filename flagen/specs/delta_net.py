"""DeltaNet: a key first takes away what the state answers to it. Yang et al., 2024 (arXiv 2406.06484).

S_t = (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale q_t^T S_t        with q, k made of unit norm
"""

from ..expr import Input, k, l2norm, q
from ..spec import Spec

beta = Input("beta", "b t h")  # how much is replaced, from 0 to 1, or to 2 for reflections

delta_net = Spec(
    "delta_net",
    query=l2norm(q),
    key=beta * l2norm(k),
    erase=(l2norm(k), beta * l2norm(k)),
    inputs=("q", "k", "v", "beta"),
)
