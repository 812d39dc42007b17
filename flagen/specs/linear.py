"""Linear attention with positive features, normalised. Katharopoulos et al., 2020 (arXiv 2006.16236).

o_t = scale f(q_t)^T S_t / (scale f(q_t)^T z_t + eps)
S_t = sum f(k_s) v_s^T,    z_t = sum f(k_s),    s <= t,    f = elu + 1
"""

from ..expr import elu
from ..spec import Spec

linear = Spec("linear", feature_map=lambda x: elu(x) + 1, normalize=True)
