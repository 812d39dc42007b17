"""HGRN2: a decay per key channel whose complement is the key. Qin et al., 2024 (arXiv 2404.07904).

S_t = diag(exp(g_t)) S_{t-1} + (1 - exp(g_t)) v_t^T,    o_t = scale q_t^T S_t
"""

from ..expr import Input, exp
from ..spec import Spec

g = Input("g", "b t h k")  # natural log of the forget gate per step, <= 0

hgrn2 = Spec("hgrn2", key=1 - exp(g), log_decay=g)
