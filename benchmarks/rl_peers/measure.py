"""One run of a program: its process, and what its marks say."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .contestants import Program
from .places import Place

ROOT = Path(__file__).parents[2]
LONGEST = 1800  # seconds of a run, of which the usual takes twenty

#: One thread, whichever library would start more; PyTorch compiles in this process too.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one run of a program took; times of a step in microseconds, the others in seconds.

    Attributes:
        steps: environment steps that were timed.
        start_cpu, start_wall: from the imports to the first timed step, without what the steps in
            it take once all is compiled: making environments, and compiling.
        versions: of what it is made of.
        processor: that it ran on, and what BLAS and compilers choose their code by.
    """

    round: int
    group: str
    program: str
    steps: int
    step_cpu: float
    step_wall: float
    start_cpu: float
    start_wall: float
    versions: str
    processor: str = ""


class ProgramError(RuntimeError):
    """A program that ended with an error, or without marks."""


def launch(program: Program, place: Place, core: int, directory: Path, number: int) -> Run:
    """Run a program on one core, in ``directory``, which keeps what PyTorch compiled.

    Raises:
        ProgramError: it failed; the last line of its stderr, and where all of it is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    module, *arguments = (word.replace("{checkout}", place.checkout) for word in program.command)
    kept = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor")}
    command = ["taskset", "-c", str(core), place.python, "-m", f"{__package__}.programs.{module}"]
    log = directory / "stderr.txt"
    with log.open("w", encoding="utf-8") as stderr:
        try:
            child = subprocess.run(
                [*command, *arguments], cwd=directory, env=os.environ | ONE_THREAD | kept,
                stdout=subprocess.PIPE, stderr=stderr, text=True, check=False, timeout=LONGEST,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"not finished after {LONGEST} s (its errors: {log})") from error
    if child.returncode:
        said = log.read_text("utf-8", errors="replace").strip().splitlines()
        raise ProgramError(f"{said[-1] if said else f'it ended with {child.returncode}'} ({log})")
    return read(program, number, child.stdout)


def read(program: Program, number: int, output: str) -> Run:
    """The run whose marks are the last line of ``output``.

    Raises:
        ProgramError: there are none, or fewer than two after the warming up.
    """
    lines = output.strip().splitlines()
    try:
        record = json.loads(lines[-1])
        begin, marks, versions = record["begin"], record["marks"], record["versions"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"no marks in its last line: {lines[-1:]}") from error
    timed = [mark for mark in marks if mark[0] >= program.warm_up]
    if len(timed) < 2:
        raise ProgramError(
            f"{len(timed)} marks after {program.warm_up} steps of warming up, expected 2 or more: "
            "a longer training is needed"
        )
    (first, *before), (last, *after) = timed[0], timed[-1]
    cpu, wall = ((b - a) / (last - first) for a, b in zip(before, after, strict=True))
    start = [a - b - first * step for a, b, step in zip(before, begin, (cpu, wall), strict=True)]
    return Run(
        number, program.group, program.name, last - first, 1e6 * cpu, 1e6 * wall,
        max(start[0], 0.0), max(start[1], 0.0),
        ", ".join(f"{name} {version}" for name, version in versions.items()), processor(),
    )  # fmt: skip


def processor() -> str:
    """The processor's name, and the widest vectors that it has; its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    about = dict(reversed([[word.strip() for word in x.partition(":")[::2]] for x in lines if x]))
    name = about.get("model name", platform.machine())
    flags = about.get("flags", "").split()
    vectors = next((word for word in ("avx512f", "avx2") if word in flags), "")
    return f"{name} ({vectors.rstrip('f').upper()})" if vectors else name


def write(runs: Sequence[Run], path: Path) -> None:
    """One row a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Run)], lineterminator="\n")
        table.writeheader()
        for run in runs:
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(run).items()}
            table.writerow(row)


def load(path: Path) -> list[Run]:
    """What :func:`write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(_rows(csv.DictReader(file)))


def _rows(rows: Iterable[dict[str, str]]) -> Iterable[Run]:
    kinds: dict[str, Any] = {"round": int, "steps": int}
    kinds |= dict.fromkeys(("group", "program", "versions", "processor"), str)
    for row in rows:
        yield Run(**{name: kinds.get(name, float)(value) for name, value in row.items()})
