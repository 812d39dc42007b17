"""TransNormerLLM (Lightning Attention): one constant decay per head and layer. Qin et al., 2023 (arXiv 2307.14995).

S_t = exp(-(8 / heads) (1 - layer / layers) head) S_{t-1} + k_t v_t^T,    o_t = scale q_t^T S_t
"""

from ..expr import Scalar, head, heads
from ..spec import Spec

layer, layers = Scalar("layer"), Scalar("layers")  # this layer's index and the number of layers

transnormer = Spec("transnormer", log_decay=-(8 / heads) * (1 - layer / layers) * head)
