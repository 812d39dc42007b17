"""RWKV-6 (Finch): a decay per key channel and a bonus for the current token. Peng et al., 2024 (arXiv 2404.05892).

o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),    S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T
"""

from ..expr import Input
from ..spec import Spec

r = Input("r", "b t h k")  # receptance, the query
w = Input("w", "b t h k")  # natural log of the decay per step, <= 0
u = Input("u", "h k")  # bonus

rwkv6 = Spec("rwkv6", query=r, log_decay=w, bonus=u, scale=1)
