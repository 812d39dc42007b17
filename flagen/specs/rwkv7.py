"""RWKV-7 (Goose): a diagonal and a matrix of rank one take the state on. Peng et al., 2025 (arXiv 2503.14456).

S_t = (diag(exp(w_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T,    o_t = r_t^T S_t    with the paper's -kappa, kappa * a as a, b
"""

from ..expr import Input
from ..spec import Spec

r = Input("r", "b t h k")  # receptance, the query
w = Input("w", "b t h k")  # natural log of the decay per step, <= 0
a, b = Input("a", "b t h k"), Input("b", "b t h k")  # what reads the state, and what is added with what was read

rwkv7 = Spec("rwkv7", query=r, log_decay=w, erase=(-a, b), erase_reads="previous", scale=1)
