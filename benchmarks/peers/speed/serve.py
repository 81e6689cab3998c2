"""A package's process: it solves what it is told to, over a pipe, and says how long it took.

    python -m benchmarks.peers.speed.serve ADAPTER problems.npz

Reads one JSON object a line, answers with one a line; what the package itself prints goes to
stderr.  Errors against the reference are computed here, outside the time.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .contenders import Contender, Solve, Team, team
from .problems import Problem, load


class Server:
    """One package and the problems; keeps what it has prepared of the problem at hand."""

    def __init__(self, members: Team, problems: dict[str, Problem]) -> None:
        self.members, self.problems = members, problems
        self.contenders = {one.name: one for one in members.contenders}
        self.at: tuple[str, str] | None = None
        self.ready: dict[str, Solve] = {}
        self.problem: Problem | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "members":
            return self._members(request["problem"])
        if request["do"] == "products":
            return self._products(request)
        return self._solve(request)

    def _members(self, name: str) -> dict[str, Any]:
        facts = self.problems[name].facts
        return {
            "owner": self.members.owner,
            "members": [
                {"name": one.name, "knob": one.knob, "left out": one.suits(facts)}
                for one in self.members.contenders
            ],
            "missing": dict(self.members.missing),
        }

    def _go_to(self, name: str, dtype: str) -> Problem:
        if self.at != (name, dtype) or self.problem is None:
            self.problem, self.ready = self.problems[name].as_dtype(dtype), {}
            self.at = (name, dtype)
        return self.problem

    def _solve(self, request: dict[str, Any]) -> dict[str, Any]:
        problem = self._go_to(request["problem"], request["dtype"])
        contender: Contender = self.contenders[request["solver"]]
        work, first = int(request["work"]), 0.0
        try:
            if contender.name not in self.ready:
                self.ready[contender.name] = contender.prepare(problem)
                start = time.process_time()
                self.ready[contender.name](work)  # what is compiled or cached at a first call
                first = time.process_time() - start
            solve = self.ready[contender.name]
            seconds, answer = timed(lambda: solve(work), int(request["times"]))
        except Exception as error:  # whatever it raises is a result
            words = " ".join(str(error).split())[:120]
            return {"failed": f"{type(error).__name__}: {words}"}
        distance = problem.relative_error(np.asarray(answer.x).reshape(-1))
        return {"seconds": seconds, "error": distance, "hvps": answer.hvps, "first": first}

    def _products(self, request: dict[str, Any]) -> dict[str, Any]:
        """The time of so many products by plain PyTorch, with what making them costs."""
        from .torch_problems import Given

        given = Given(self._go_to(request["problem"], request["dtype"]))

        def run() -> None:
            product = given.product()
            for _ in range(int(request["count"])):
                product(given.v)

        return {"seconds": timed(run, int(request["times"]))[0]}


def timed(run: Callable[[], Any], times: int) -> tuple[list[float], Any]:
    """Processor seconds of each of several runs, and what the last one gave."""
    seconds, result = [], None
    for _ in range(times):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
    return seconds, result


def serve(members: Team, problems: dict[str, Problem], lines: Iterable[str], out: TextIO) -> None:
    """Answer every request until there are no more."""
    server = Server(members, problems)
    for line in lines:
        out.write(json.dumps(server.answer(json.loads(line))) + "\n")
        out.flush()


def main(adapter: str, problems: Path) -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # a warning a solve would be counted in its time
    serve(team(adapter), load(problems), sys.stdin, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
