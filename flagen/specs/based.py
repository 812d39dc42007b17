"""Based: the exponential of softmax by its Taylor polynomial of degree two. Arora et al., 2024 (arXiv 2402.18668).

o_t = sum_s p(q_t, k_s) v_s / (sum_s p(q_t, k_s) + eps),    s <= t,    p(q, k) = 1 + x + x^2 / 2 with x = scale q^T k
"""

from ..spec import Spec, taylor

based = Spec("based", feature_map=taylor(2), normalize=True)
