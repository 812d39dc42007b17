"""Mamba-2: a scalar decay from the step size dt. Dao and Gu, Transformers are SSMs, 2024 (arXiv 2405.21060).

S_t = exp(-exp(A_log) dt_t) S_{t-1} + k_t (dt_t v_t)^T,    o_t = q_t^T S_t        with q, k, v the paper's C, B, x
"""

from ..expr import Input, exp, v
from ..spec import Spec

dt = Input("dt", "b t h")  # step size, > 0
A_log = Input("A_log", "h")  # natural log of the decay rate

mamba2 = Spec("mamba2", value=v * dt, log_decay=-exp(A_log) * dt, scale=1)
