"""mLSTM: the matrix memory of xLSTM, with an exponential input gate. Beck et al., 2024 (arXiv 2405.04517).

S_t = sigmoid(fg_t) S_{t-1} + exp(ig_t) k_t v_t^T,    o_t = scale q_t^T S_t / max(|n_t|, 1),    n = the numerator with
value 1; S and n are held times exp(-m_t), m_t = max(log sigmoid(fg_t) + m_{t-1}, ig_t)
"""

from ..expr import Input, abs, exp, k, logsigmoid, maximum
from ..spec import Spec

ig = Input("ig", "b t h")  # natural log of the input gate, any real number
fg = Input("fg", "b t h")  # its sigmoid is the forget gate

mlstm = Spec(
    "mlstm",
    key=exp(ig) * k,
    log_decay=logsigmoid(fg),
    normalize=lambda n: maximum(abs(n), 1),
    stabilize="max",
    inputs=("q", "k", "v", "ig", "fg"),
)
