"""A progress bar on stderr, for work that may take longer than a second."""

from __future__ import annotations

import sys
import time

WIDTH = 24
PATIENCE = 1.0  # seconds before anything is shown


class Progress:
    """`with Progress(total, "checking") as bar: ... bar.step(label)`. Silent on quick work and off a terminal."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title, self.done = total, title, 0
        self.begin, self.shown = time.monotonic(), False

    def __enter__(self) -> Progress:
        return self

    def step(self, label: str = "", *, advance: int = 1) -> None:
        """One more of the total is done; `label` says what comes or came."""
        self.done += advance
        seconds = time.monotonic() - self.begin
        if not sys.stderr.isatty() or (seconds < PATIENCE and not self.shown):
            return
        self.shown = True
        filled = WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + "." * (WIDTH - filled)
        text = f"{self.title} [{bar}] {self.done}/{self.total} {seconds:.0f} s {label}"
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Makes room for a line on stdout; the bar comes back with the next step."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self.clear()
