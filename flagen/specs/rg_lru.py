"""RG-LRU, the recurrence of Griffin and RecurrentGemma. De et al., 2024 (arXiv 2402.19427).

h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),    o_t = h_t
log a_t = -8 softplus(lam) sigmoid(recurrence_gate_t),    i = sigmoid(input_gate)
"""

from ..expr import Input, exp, sigmoid, softplus, sqrt
from ..spec import Spec

x = Input("x", "b t d")
input_gate, recurrence_gate = Input("input_gate", "b t d"), Input("recurrence_gate", "b t d")  # before their sigmoids
lam = Input("lam", "d")  # sets how slow a channel is

log_a = -8 * softplus(lam) * sigmoid(recurrence_gate)
rg_lru = Spec(
    "rg_lru",
    value=sqrt(1 - exp(2 * log_a)) * sigmoid(input_gate) * x,
    log_decay=log_a,
    inputs=("x", "input_gate", "recurrence_gate", "lam"),
)
