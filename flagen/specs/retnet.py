"""RetNet: one constant decay per head. Sun et al., Retentive Network, 2023 (arXiv 2307.08621).

S_t = (1 - 2^(-5 - head)) S_{t-1} + k_t v_t^T,    o_t = scale q_t^T S_t
"""

from ..expr import head, log
from ..spec import Spec

retnet = Spec("retnet", log_decay=log(1 - 2 ** (-5 - head)))
