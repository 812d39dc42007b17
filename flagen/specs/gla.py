"""Gated linear attention: a decay per key channel. Yang et al., 2023 (arXiv 2312.06635).

S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,    o_t = scale q_t^T S_t
"""

from ..expr import Input
from ..spec import Spec

g = Input("g", "b t h k")  # natural log of the decay per step, <= 0

gla = Spec("gla", log_decay=g)
