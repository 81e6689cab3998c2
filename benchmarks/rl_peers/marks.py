"""Times between the updates of a training.  The standard library only: this runs everywhere."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import time


def now() -> tuple[float, float]:
    """CPU seconds (user and system, with those of compilers that have ended), wall seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()


class Marks:
    """The clocks at the beginning, when a program's packages are imported, and after updates."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float, float]] = []
        self.begin = now()

    def at(self, steps: int) -> None:
        """``steps`` environment steps are made and learnt from; counted once."""
        if not self.marks or steps > self.marks[-1][0]:
            self.marks.append((steps, *now()))

    def report(self, *packages: str) -> None:
        """Print all of it as the last line, with the versions of ``packages``."""
        versions = {name: importlib.metadata.version(name) for name in packages}
        record = {"begin": self.begin, "marks": self.marks, "versions": versions}
        print("\n" + json.dumps(record), flush=True)
