"""The spec that the README declares, for the demo: what follows stands there word for word."""

from flagen import Input, Spec, k, logsigmoid, softplus

gate = Input("gate", "b t h v")  # any real number; its log-sigmoid is fused into the kernels
u = Input("u", "h k")  # the weight of a token's own value
my_attention = Spec("my_attention", key=softplus(k), log_decay=logsigmoid(gate) / 16, bonus=u)
