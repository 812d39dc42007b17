"""minGRU: a GRU whose gate does not look at the state. Feng et al., Were RNNs all we needed?, 2024 (arXiv 2410.01201).

h_t = (1 - z_t) h_{t-1} + z_t x_t,    o_t = h_t,    z_t = sigmoid(gate_t)
"""

from ..expr import Input, sigmoid, softplus
from ..spec import Spec

gate = Input("gate", "b t d")  # before its sigmoid
x = Input("x", "b t d")  # the candidate

min_gru = Spec("min_gru", value=x * sigmoid(gate), log_decay=-softplus(gate), inputs=("x", "gate"))
