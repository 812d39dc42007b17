"""HGRN: a gated recurrence, channel by channel. Qin et al., 2023 (arXiv 2311.04823).

h_t = exp(g_t) h_{t-1} + x_t,    o_t = h_t        with (1 - exp(g_t)) times the candidate as x_t
"""

from ..expr import Input
from ..spec import Spec

x = Input("x", "b t d")  # what is added
g = Input("g", "b t d")  # natural log of the forget gate per step, <= 0

hgrn = Spec("hgrn", value=x, log_decay=g)
