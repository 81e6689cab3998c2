"""The quickest setting of each contender, then rounds in which all take turns."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .problems import LEVELS

ROOT = Path(__file__).parents[3]
#: One thread for whatever a package computes with.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
#: The smallest amount of work that is tried, and the largest.
LEAST, MOST = 1, 20_000
#: An amount of work this close to the least that suffices will do.
CLOSE = 1.05


class Asked(Protocol):
    """Something that answers requests: a process, or a stand-in for it."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Worker:
    """A package's process, kept alive, on one core."""

    def __init__(self, python: str, adapter: str, problems: Path, core: int) -> None:
        def pin() -> None:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {core})

        # A file: nobody empties a pipe while a package talks.
        self.words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.speed.serve", adapter, str(problems)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.words, preexec_fn=pin, env={**os.environ, **ONE_THREAD},
        )  # fmt: skip

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ConnectionError: the process has ended; with its last words.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.words.seek(0)
            words = self.words.read().strip().splitlines()
            self.close()
            raise ConnectionError(words[-1] if words else f"it ended: {self.process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the process end."""
        for stream in (self.process.stdin, self.process.stdout, self.words):
            if stream is not None:
                with suppress(BrokenPipeError):  # what was not read by a process that is gone
                    stream.close()
        self.process.wait()


@dataclass(frozen=True)
class Trial:
    """One solve with an amount of work."""

    seconds: float
    error: float
    hvps: int | None = None


@dataclass
class Entry:
    """A contender on one problem in one dtype, with all that has been tried of it.

    Attributes:
        run: solves with an amount of work; None where the solver raised.
        trials: by amount of work.
        compiled: processor seconds of the first call beyond those of a later one.
        failed: what it raised.
    """

    owner: str
    solver: str
    knob: str
    worker: Asked
    trials: dict[int, Trial] = field(default_factory=dict)
    compiled: float = 0.0
    failed: str = ""

    def ask(self, problem: str, dtype: str, work: int, times: int) -> dict[str, Any]:
        request = {"do": "solve", "problem": problem, "dtype": dtype, "solver": self.solver,
                   "work": work, "times": times}  # fmt: skip
        return self.worker.ask(request)

    def attempt(self, problem: str, dtype: str, work: int) -> Trial | None:
        """One solve, remembered; None where it raised."""
        if work not in self.trials and not self.failed:
            answer = self.ask(problem, dtype, work, 1)
            if "failed" in answer:
                self.failed = answer["failed"]
                return None
            seconds = min(answer["seconds"])
            if not self.trials:
                self.compiled = max(0.0, answer["first"] - seconds)
            self.trials[work] = Trial(seconds, answer["error"], answer["hvps"])
        return self.trials.get(work)


def least_work(
    attempt: Callable[[int], Trial | None], level: float, limit: float, most: int = MOST
) -> int | None:
    """The least work that reaches an error, by doubling and halving; None where none does.

    It ends without one where a solve takes longer than ``limit`` seconds, or where twice the
    work, and twice that, changes nothing.
    """
    low, high = 0, LEAST
    before: list[Trial] = []
    while True:
        trial = attempt(high)
        if trial is None:
            return None
        if trial.error <= level:
            break
        before.append(trial)
        settled = len(before) > 2 and all(
            math.isclose(past.error, trial.error, rel_tol=1e-3) for past in before[-3:]
        )
        if trial.seconds > limit or high >= most or (settled and high >= 16):
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1 and high > CLOSE * low:
        middle = (low + high) // 2
        trial = attempt(middle)
        if trial is not None and trial.error <= level:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: of the quickest setting that reaches the level; 0 for direct solvers.
        seconds: the least processor time of a solve; infinite where the level is not reached.
        median: of the same runs.
        error: reached; for a level that is not, the best there was.
        hvps: products spent, where they can be counted.
        products: processor time of as many products by plain PyTorch, one by one, and of making
            them; of the library's rows only.
        compiled: processor seconds of compilation, not in ``seconds``.
        note: why there is no time.
    """

    problem: str
    level: float
    dtype: str
    owner: str
    solver: str
    knob: str
    work: int
    seconds: float
    median: float
    error: float
    hvps: int | None
    products: float
    compiled: float
    note: str


def _say(words: str) -> None:
    print(words, flush=True)


def compare(
    name: str, workers: Sequence[Asked], *, rounds: int, limit: float, patience: float,
    say: Callable[[str], None] = _say,
) -> list[Row]:  # fmt: skip
    """All rows of one problem."""
    rows: list[Row] = []
    for dtype in dict.fromkeys(LEVELS.values()):
        entries, left_out = _enter(name, workers)
        for level in (level for level, wanted in LEVELS.items() if wanted == dtype):
            rows += [_row(name, level, dtype, entry, note=why) for entry, why in left_out]
            found: list[tuple[Entry, int]] = []
            # Nobody is given more time than a multiple of what the first ones, ours, needed.
            allowed, best = limit, math.inf
            for entry in entries:
                work = _search(entry, name, dtype, level, allowed)
                if work is None:
                    rows.append(_row(name, level, dtype, entry, note=_why(entry, allowed)))
                    continue
                found.append((entry, work))
                best = min(best, entry.trials[work].seconds)
                allowed = min(limit, max(patience * best, 0.05))
            rows += _race(name, level, dtype, found, rounds)
            say(f"  {name}, error {level:.0e} ({dtype}): {len(found)} of {len(entries)} reach it")
    return rows


def _enter(name: str, workers: Sequence[Asked]) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    entries: list[Entry] = []
    left_out: list[tuple[Entry, str]] = []
    for worker in workers:
        answer = worker.ask({"do": "members", "problem": name})
        for member in answer["members"]:
            entry = Entry(answer["owner"], member["name"], member["knob"], worker)
            if member["left out"]:
                left_out.append((entry, member["left out"]))
            else:
                entries.append(entry)
        for solver, reason in answer["missing"].items():
            left_out.append((Entry(answer["owner"], solver, "", worker), reason))
    return entries, left_out


def _search(entry: Entry, name: str, dtype: str, level: float, limit: float) -> int | None:
    def attempt(work: int) -> Trial | None:
        return entry.attempt(name, dtype, work)

    if not entry.knob:
        trial = attempt(0)
        return 0 if trial is not None and trial.error <= level else None
    return least_work(attempt, level, limit)


def _why(entry: Entry, limit: float) -> str:
    if entry.failed:
        return entry.failed
    last = max(entry.trials.items())
    return (
        f"not reached: {min(trial.error for trial in entry.trials.values()):.1e} at best,"
        f" {last[1].seconds:.2f} s for the most work tried ({last[0]})"
    )


def _race(
    name: str, level: float, dtype: str, found: Sequence[tuple[Entry, int]], rounds: int
) -> list[Row]:
    """Interleaved rounds; each turn is two solves, the first of which warms the caches."""
    times: list[list[float]] = [[] for _ in found]
    bare: list[list[float]] = [[] for _ in found]
    for number in range(rounds):
        for (entry, work), seconds, products in zip(found, times, bare, strict=True):
            # What is slow needs no more than a few runs to be told apart.
            if number >= 2 and entry.trials[work].seconds * number > 1.0:
                continue
            answer = entry.ask(name, dtype, work, 2)
            if "failed" in answer:
                raise RuntimeError(f"{entry.owner} {entry.solver} on {name}: {answer['failed']}")
            seconds += answer["seconds"]
            hvps = entry.trials[work].hvps
            if entry.owner == "hypergrad" and hvps is not None and number < 3:
                request = {"do": "products", "problem": name, "dtype": dtype, "count": hvps,
                           "times": 1}  # fmt: skip
                products += entry.worker.ask(request)["seconds"]
    return [
        _row(
            name, level, dtype, entry, work=work, seconds=min(seconds),
            median=statistics.median(seconds), products=min(products, default=math.nan),
        )
        for (entry, work), seconds, products in zip(found, times, bare, strict=True)
    ]  # fmt: skip


def _row(
    name: str, level: float, dtype: str, entry: Entry, *, work: int | None = None,
    seconds: float = math.inf, median: float = math.inf, products: float = math.nan, note: str = "",
) -> Row:  # fmt: skip
    errors = [trial.error for trial in entry.trials.values()]
    trial = None if work is None else entry.trials[work]
    return Row(
        name, level, dtype, entry.owner, entry.solver, entry.knob, work or 0, seconds, median,
        min(errors, default=math.nan) if trial is None else trial.error,
        None if trial is None else trial.hvps, products, entry.compiled, note,
    )  # fmt: skip
