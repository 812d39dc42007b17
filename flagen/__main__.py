"""The command line: `flagen COMMAND` or `python -m flagen COMMAND`. Each command is imported when it runs.

Exit status: 0 fine; 1 a check failed or generated files differ; 2 a wrong argument, or an error of flagen's. Results
go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence

from . import __version__
from .cli_bench_options import add_arguments, add_tune_arguments
from .errors import FlagenError

SPEC_HELP = "a shipped name, a JSON file, or module:attribute (which imports the module)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Errors of flagen are printed as their message alone."""
    arguments = parser().parse_args(argv)
    module, _, function = arguments.run.partition(":")
    try:
        status: int = getattr(importlib.import_module(f".{module}", __package__), function)(arguments)
        sys.stdout.flush()
    except FlagenError as error:
        return _failed(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # the reader of our output has gone, as `head` does; nothing more can be said to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        return 130
    return status


def _failed(message: str) -> int:
    sys.stdout.flush()
    print(f"flagen: {message}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="flagen", description="A compiler for causal linear attention.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"flagen {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    command("list", "cli_spec:list_specs", "list the shipped specs")
    show = command("show", "cli_spec:show", "show a spec: equations, inputs, decay, kernels, what a call costs")
    show.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    show.add_argument("--shape", type=_shape, default="1,4096,16,128,128", metavar="B,T,H,K,V",
                      help="sizes for the input shapes and the costs (default: %(default)s)")  # fmt: skip
    show.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the inputs with channels")
    show.add_argument(
        "--device", metavar="NAME", help="h100, h200, a100, b200 or mi300x (default: the GPU here, or h100)"
    )
    emit = command("emit", "cli_spec:emit_module", "write the kernels of a spec as a module of their own")
    emit.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    emit.add_argument("-o", "--output", metavar="FILE", help="where to write (default: stdout)")
    _check(command("check", "cli_check:check", "hold specs against their reference, forward, backward and decode"))
    _fuzz(command("fuzz", "cli_fuzz:fuzz", "hold specs drawn at random against their reference; needs flagen[fuzz]"))
    regen = command("regen", "cli_regen:regen", "write generated/ anew from the shipped specs")
    regen.add_argument("--check", action="store_true", help="write nothing; show what differs and exit with status 1")
    regen.add_argument("--directory", metavar="DIR", help="the directory (default: generated/ of the source checkout)")
    cache = command("cache", "cli_cache:cache", "the cache of generated modules")
    cache.add_argument("action", choices=("dir", "ls", "clear", "verify"),
                       help="print its directory; list its entries; remove them; check their checksums")  # fmt: skip
    add_arguments(
        command("bench", "cli_bench:bench", "time specs, against their floors and other libraries"), SPEC_HELP
    )
    add_tune_arguments(
        command("tune", "cli_tune:tune", "time a handful of schedules, remember what is better"), SPEC_HELP
    )
    command("env", "cli_cache:env", "print versions, devices and settings, for a bug report")
    demo = command("demo", "demo:demo", "compile the shipped specs and the README's, run them, show their errors")
    demo.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    demo.add_argument("--tokens", type=_positive, metavar="T", help="the length of the sequences (default: 4096)")
    return top


def _check(check: argparse.ArgumentParser) -> None:
    check.add_argument("specs", nargs="*", metavar="SPEC", help=SPEC_HELP)
    check.add_argument("--all", action="store_true", help="every shipped spec")
    check.add_argument("--device", default="cpu", help="cpu (a small grid, the torch backend) or cuda (default: cpu)")
    check.add_argument("--dtype", type=_dtypes, default=("bf16", "fp16", "fp32"), metavar="D[,D...]",
                       help="some of bf16, fp16, fp32 (default: all)")  # fmt: skip
    check.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only part I of N of the grid")
    check.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one per core, at most 16)")
    check.add_argument("--save", metavar="FILE", help="also write every result as a line of JSON, as it comes")
    check.add_argument("--table", nargs="+", metavar="FILE", help="run nothing; print the table of what --save wrote")
    check.add_argument(
        "--worst", type=_positive, default=20, metavar="N", help="failures to print singly (default: 20)"
    )


def _fuzz(fuzz: argparse.ArgumentParser) -> None:
    fuzz.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    fuzz.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto",
                      help="what runs the ops (default: auto, Triton on a GPU and torch elsewhere)")  # fmt: skip
    fuzz.add_argument("--minutes", type=_minutes, default=2.0, metavar="N", help="for how long (default: 2)")
    fuzz.add_argument("--seed", type=_natural, metavar="S", help="of what is drawn (default: a new one each time)")
    fuzz.add_argument("--max-specs", type=_positive, metavar="N", help="end after about N distinct specs")
    fuzz.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one per core, at most 16)")
    fuzz.add_argument("--save", metavar="FILE", help="also write every result and failure as a line of JSON")


def _shape(text: str) -> dict[str, int]:
    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not five sizes B,T,H,K,V such as 1,4096,16,128,128")
    return dict(zip("BTHKV", map(int, parts), strict=True))


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ("bf16", "fp16", "fp32")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no dtype of the check; choose among bf16, fp16, fp32")
    return names


def _shard(text: str) -> tuple[int, int]:
    part, _, count = text.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 1/4")
    return int(part), int(count)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _minutes(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return found


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
