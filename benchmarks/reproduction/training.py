"""Training of many runs, some of which may be finished or begun."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.reproduction.arms import Config
from hypergrad_rl import BLPO, HypergradRLError, RunDirectoryError, load_config, train
from hypergrad_rl.agent import Agent
from hypergrad_rl.envs import VectorEnv
from hypergrad_rl.functional import flatten
from hypergrad_rl.hypergradient import follower_gradient
from hypergrad_rl.inverse import draw_sketch, inverse_hvp
from hypergrad_rl.report import read_metrics
from hypergrad_rl.rollout import Collector

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "numpy", "gymnasium")


def steps_done(run_dir: Path) -> int:
    """Environment steps of the last whole row of a run's metrics."""
    try:
        return int(read_metrics(run_dir)["env_steps"][-1])
    except RunDirectoryError:  # nothing there yet
        return 0


def unfinished(runs: Mapping[Path, Config]) -> dict[Path, Config]:
    """Those of ``runs`` that are still to be trained, or trained to the end.

    A run is finished when its provenance is there, which is written last.

    Raises:
        RunDirectoryError: a directory holds a run with other settings, whose results would pass
            for the arm's.
    """
    for run_dir, config in runs.items():
        if (run_dir / "config.json").exists() and load_config(run_dir) != config:
            raise RunDirectoryError(
                f"{run_dir} holds a run with other settings than its arm has now; choose another "
                "--run-dir, or move it away"
            )
    return {path: config for path, config in runs.items() if not (path / PROVENANCE).exists()}


def train_all(runs: Mapping[Path, Config], jobs: int) -> None:
    """Train ``runs``, ``jobs`` at a time on one thread each, with one progress bar for all.

    A run that was begun goes on from its checkpoint, or anew where it has none yet. A run that
    fails is no reason to stop the others.

    Raises:
        HypergradRLError: some runs failed; they are named.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started now
    failed = []
    with (
        tqdm(total=sum(_steps(c) for c in runs.values()), unit="step", unit_scale=True) as bar,
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _end_with, (os.getpid(),)
        ) as pool,
    ):
        waiting = {pool.submit(_train, path, config): path for path, config in runs.items()}
        finished: set[Future[None]] = set()
        try:
            while len(finished) < len(waiting):
                time.sleep(0.5)
                for future in waiting.keys() - finished:
                    if future.done():
                        finished.add(future)
                        if error := future.exception():
                            failed.append(f"{waiting[future]}: {type(error).__name__}: {error}")
                            tqdm.write(failed[-1])
                bar.update(sum(steps_done(path) for path in runs) - bar.n)
                bar.set_postfix(finished=f"{len(finished)}/{len(runs)}", refresh=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise HypergradRLError(f"{len(failed)} runs failed:\n" + "\n".join(failed))


def _steps(config: Config) -> int:
    return config.num_updates * config.num_envs * config.num_steps


def _end_with(parent: int) -> None:
    """End this process when ``parent`` is no more: killed, it can tell its workers nothing.

    Otherwise a worker would go on writing into a run that the next command continues.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(run_dir: Path, config: Config) -> None:
    resume = any(file.suffix != ".tmp" for file in run_dir.glob("checkpoint.*"))
    if not resume and run_dir.exists():
        shutil.rmtree(run_dir)  # of this arm, and killed before its first checkpoint
    began, entry = time.process_time(), _versions()
    agent = train(config, run_dir, resume=resume, threads=1).agent
    torch.compiler.reset()  # the graphs of one run are of no use to the next
    entry |= {"cpu_seconds": round(time.process_time() - began, 1), "resumed": resume}
    entry["solver_effect"] = solver_effect(agent)
    temporary = run_dir / "provenance.tmp"
    temporary.write_text(json.dumps(entry, indent=1) + "\n")
    temporary.replace(run_dir / PROVENANCE)


def solver_effect(agent: Agent) -> float | None:
    """|damping x - v| / |v|, what solving changes: the median over the trajectories of one rollout.

    x is in the space of the critic's parameters. None where no such system is solved, and where
    observations are normalised, by statistics that the agent does not have.
    """
    config = agent.config
    if (
        not isinstance(agent, BLPO)
        or config.normalize_observations
        or agent.config.solver == "none"
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    env = VectorEnv(config.env, config.num_envs)
    batch = agent.make_batch(Collector(env, config, generator).collect(agent.actor)[0])
    env.close()
    # The system in the parameters, as for the published cross term: there the answer is x itself.
    whole = dataclasses.replace(agent.config, cross_term="paper")
    assert not isinstance(whole.damping, str)  # no arm has "auto"
    changes = []
    for i in range(config.num_envs):
        part = batch.select(torch.tensor([i]))
        # Right after a rollout the policy is the one that made it: log rho = 0.
        v = follower_gradient(agent.critic, torch.zeros_like(part.targets), part, whole)
        right = flatten(v)
        sketch = draw_sketch(whole, config.num_steps, len(right), generator)
        x = inverse_hvp(agent.critic, part, v, whole, sketch).value
        changes.append(float((whole.damping * x - right).norm() / right.norm()))
    return statistics.median(changes)


def _versions() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
        commit += "+changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    packages = {name: version(name) for name in PACKAGES}
    return {"commit": commit, "python": platform.python_version(), **packages}
