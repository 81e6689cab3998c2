"""The authors' own program (JAX), run as it is from a checkout that the user has: authors.csv.

    python -m benchmarks.reproduction.authors --path CHECKOUT --python JAX_PYTHON

None of it is here: it has no licence. Each run is its ``main.py`` with the flags of ``RUNS`` in a
process of its own, in an interpreter with jax, flax, optax, distrax, gymnax and brax. Two things
are supplied from outside: the experiment trackers that it imports (Weights & Biases and
tensorboardX) are stand-ins, the first of which keeps the episode returns that the program logs,
from NumPy arrays; and environments of gymnax 1.0, whose step has six results, return the five that
the program expects, where a time limit ends an episode as a termination does, as it did before.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import itertools
import json
import os
import runpy
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: The flags of a task and an algorithm: 4 environments x 128 steps, as main.py has it.
TASKS = {
    "CartPole-v1": ["--task=cartpole", "--steps=5e5"],
    "Acrobot-v1": ["--task=acrobot", "--steps=4e5"],
}
BOUNDS = {
    "CartPole-v1": ["--ihvp_bound=1.4", "--clipf=1.0"],
    "Acrobot-v1": ["--ihvp_bound=0.5", "--clipf=0.8"],
}
ALGORITHMS = ("ppo", "nested", "nystrom", "cg")
SEEDS = (0, 10, 20, 30, 40)  # those of its scripts
ROLLOUT = 512
OUTPUT = Path(__file__).with_name("authors.csv")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what authors.csv lacks, one process at a time, and add a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--path", type=Path, required=True, help="a checkout of the program")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with JAX")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if not (args.path / "main.py").is_file():
        print(f"skipped: {args.path} has no main.py; give --path a checkout of the authors' code")
        return
    done = set()
    if args.output.exists():
        with args.output.open(newline="") as file:
            done = {(r["task"], r["algorithm"], int(r["seed"])) for r in csv.DictReader(file)}
    for seed, task, algorithm in itertools.product(args.seeds, args.tasks, args.algorithms):
        if (task, algorithm, seed) not in done:
            row = run(args.path, args.python, task, algorithm, seed)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            new = not args.output.exists()
            with args.output.open("a", newline="") as file:
                table = csv.DictWriter(file, list(row), lineterminator="\n")
                if new:
                    table.writeheader()
                table.writerow(row)


def run(path: Path, python: str, task: str, algorithm: str, seed: int) -> dict[str, Any]:
    """One training, and its row."""
    from hypergrad_rl.report import summarize, to_metrics  # PyTorch: not in an interpreter for JAX

    flags = [*TASKS[task], f"--algo={algorithm}", f"--seed={seed}", "--cpu=True"]
    if algorithm != "ppo":
        flags += ["--nested=10", *BOUNDS[task]]
    one_thread = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [python, __file__, str(path), *flags], env=os.environ | one_thread, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    logged = json.loads(child.stdout.splitlines()[-1])
    updates: dict[int, list[float]] = {}
    for step, episode_return in logged["episodes"]:
        updates.setdefault(-(-step // ROLLOUT), []).append(episode_return)
    # As the runs of this project are read: a row an update.
    last = int(float(TASKS[task][1].split("=")[1])) // ROLLOUT
    rows = [
        {"env_steps": ROLLOUT * i, "seconds": 1.0, "episodes": len(updates.get(i, ())),
         "episode_return": sum(updates[i]) / len(updates[i]) if i in updates else float("nan")}
        for i in range(1, last + 1)
    ]  # fmt: skip
    summary = summarize(to_metrics(rows))
    return {
        "task": task, "algorithm": algorithm, "seed": seed,
        "final_return": round(summary.final_return, 3), "area": round(summary.area, 3),
        "cpu_seconds": round(logged["cpu_seconds"], 1), "flags": " ".join(flags),
        **logged["versions"],
    }  # fmt: skip


def run_program(path: str, flags: Sequence[str], log: Callable[[int, float], None]) -> None:
    """In the interpreter with JAX: ``main.py``, with ``log(step, return)`` of episodes that ended.

    It is called in the update for whose rollout the episode ended.
    """
    import jax
    import numpy as np

    def to_log(values: dict[str, Any], step: Any) -> None:
        log(int(step), float(values["Reward"]))

    def ignore(*_: Any, **__: Any) -> None:
        pass

    stand_in: Any = types.ModuleType("wandb")
    stand_in.init, stand_in.define_metric, stand_in.log = ignore, ignore, to_log
    tensorboard: Any = types.ModuleType("tensorboardX")
    tensorboard.SummaryWriter = ignore
    sys.modules |= {"wandb": stand_in, "tensorboardX": tensorboard}
    callback = jax.debug.callback

    def quickly(function: Any, *args: Any) -> None:
        # On JAX arrays the selection of ended episodes compiles anew for each number of them.
        callback(lambda *arrays: function(*jax.tree.map(np.asarray, arrays)), *args)

    jax.debug.callback = quickly
    five_results()
    sys.path.insert(0, path)
    sys.argv = ["main.py", *flags]
    runpy.run_path(str(Path(path) / "main.py"), run_name="__main__")
    jax.effects_barrier()


def five_results() -> None:
    """Steps of gymnax's environments return five results where its release returns six."""
    import gymnax

    make = gymnax.make

    def make_with_five(name: str) -> tuple[Any, Any]:
        env, params = make(name)
        step = env.step

        def ends(*args: Any) -> Any:
            results = step(*args)
            if len(results) == 6:
                obs, state, reward, terminated, truncated, info = results
                results = (obs, state, reward, terminated | truncated, info)
            return results

        env.step = ends
        return env, params

    gymnax.make = make_with_five


def _program(path: str, flags: list[str]) -> None:
    """In the interpreter with JAX: the program, then what it logged, as the last line printed."""
    episodes: list[tuple[int, float]] = []
    began: list[float] = []

    def log(step: int, episode_return: float) -> None:
        if not began:
            began.append(time.process_time())  # the first update is over: all is compiled
        episodes.append((step, episode_return))

    run_program(path, flags, log)
    packages = {name: importlib.metadata.version(name) for name in ("jax", "gymnax")}
    cpu = time.process_time() - began[0]
    print(json.dumps({"episodes": episodes, "cpu_seconds": cpu, "versions": packages}))


if __name__ == "__main__":
    # The interpreter with JAX runs this very file, with a directory as the first word.
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        _program(sys.argv[1], sys.argv[2:])
    else:
        main()
