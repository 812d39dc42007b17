"""The names of a benchmark: shapes, groups of them, and what can be measured. Nothing is imported."""

from __future__ import annotations

# B, T, H, K, V
SHAPES = {
    "wide8k": (1, 8192, 96, 128, 128),
    "long16k": (2, 16384, 16, 128, 128),
    "mid": (4, 4096, 64, 128, 128),
    "short2k": (4, 2048, 16, 128, 128),
    "d256": (8, 2048, 32, 256, 256),
    "small1k": (8, 1024, 8, 64, 64),
    "lone": (1, 65536, 4, 128, 128),
    "million": (1, 1048576, 4, 128, 128),
    "decode": (128, 1, 32, 128, 128),
    **{f"t{1 << n}k": (1, 1024 << n, 16, 128, 128) for n in range(9)},
}
GROUPS = {
    "large": ("wide8k", "long16k", "mid"),
    "named": ("wide8k", "long16k", "mid", "short2k", "d256", "small1k", "lone"),
    "lengths": tuple(f"t{1 << n}k" for n in range(9)),
}
WHATS = ("fwd", "fwd+bwd", "memory", "graph", "decode", "cold", "warm")
DEFAULT_WHAT = ("fwd", "fwd+bwd", "memory")
