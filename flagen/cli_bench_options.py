"""The options of `flagen bench` and `flagen tune`, without what they run: the command line is parsed before torch is
imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .bench_shapes import DEFAULT_WHAT, GROUPS, SHAPES, WHATS
from .peers import LIBRARIES


def add_arguments(bench: argparse.ArgumentParser, spec_help: str) -> None:
    """The options of `flagen bench`."""
    bench.add_argument("specs", nargs="*", metavar="SPEC", help=f"{spec_help} (default: every shipped spec)")
    names = f"{', '.join(SHAPES)}; or groups: {', '.join(GROUPS)} (default: large)"
    bench.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"B,T,H,K,V, or names: {names}")
    bench.add_argument("--against", type=_some(LIBRARIES), default=(), metavar="P[,P...]",
                       help=f"peers to time as well, where installed: {', '.join(LIBRARIES)}")  # fmt: skip
    bench.add_argument("--what", type=_some(WHATS), default=DEFAULT_WHAT, metavar="W[,W...]",
                       help=f"of {', '.join(WHATS)} (default: {','.join(DEFAULT_WHAT)})")  # fmt: skip
    bench.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the inputs (default: bf16, on a CPU fp32)")
    bench.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    bench.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="as for flagen.compile")
    bench.add_argument("--jobs", type=_above_zero, default=1, metavar="N", help="compile in N processes before")
    bench.add_argument("--time-limit", type=_above_zero, metavar="SECONDS", help="begin nothing after so long")
    bench.add_argument("--out", metavar="DIR", help="where rows.csv and the pictures go (default: benchmarks/results)")
    bench.add_argument("--plot", nargs="+", metavar="CSV", help="run nothing; the table and pictures of stored rows")
    bench.add_argument("--markdown", nargs="+", metavar="CSV", help="run nothing; the README's table of stored rows")


def add_tune_arguments(tune: argparse.ArgumentParser, spec_help: str) -> None:
    """The options of `flagen tune`."""
    tune.add_argument("specs", nargs="+", metavar="SPEC", help=spec_help)
    tune.add_argument("--shapes", nargs="+", default=["wide8k"], metavar="SHAPE", help="as for bench (default: wide8k)")
    tune.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the inputs (default: bf16)")
    tune.add_argument("--rounds", type=_above_zero, default=5, metavar="N", help="in each of which a choice must win")
    tune.add_argument("--out", metavar="DIR", help="a folder for the table (default: beside the cache)")


def _some(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names among `allowed` with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among {', '.join(allowed)}")
        return names

    return parse


def _above_zero(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
