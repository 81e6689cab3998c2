"""Training: the loop over rollouts, the run directory, evaluation."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from hypergrad_rl.agent import Agent
from hypergrad_rl.blpo import BLPO
from hypergrad_rl.checkpoint import load_checkpoint, save_checkpoint
from hypergrad_rl.compiled import backend_of
from hypergrad_rl.config import BLPOConfig, PPOConfig, make_config
from hypergrad_rl.envs import VectorEnv
from hypergrad_rl.errors import ConfigError, EnvironmentUnsupported, RunDirectoryError
from hypergrad_rl.ppo import PPO
from hypergrad_rl.rollout import Collector, normalize
from hypergrad_rl.tensor_envs import TASKS, ArrayCollector

Config = PPOConfig | BLPOConfig
NARROW = 256  # widest layer of a network for which one thread is fastest
CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.csv", "checkpoint.pt"


def make_agent(
    config: Config,
    env: VectorEnv | Collector | ArrayCollector,
    generator: torch.Generator,
    backend: str | None = None,
) -> Agent:
    """The agent that ``config`` describes, with parameters drawn from ``generator``.

    ``backend``: of ``torch.compile``; None for an agent that runs eagerly.
    """
    kind = PPO if isinstance(config, PPOConfig) else BLPO
    return kind(config, env.policy, env.obs_dim, generator, backend)


def make_collector(
    config: Config, generator: torch.Generator, backend: str | None
) -> Collector | ArrayCollector:
    """What plays the rollouts: the task as array code where there is any and it is not refused.

    Raises:
        EnvironmentUnsupported: ``env_backend="tensor"`` for a task or settings without array code.
    """
    normalized = config.normalize_observations or config.normalize_rewards
    if config.env_backend != "gymnasium" and config.env in TASKS and not normalized:
        return ArrayCollector(TASKS[config.env], config, generator, backend)
    if config.env_backend == "tensor":
        raise EnvironmentUnsupported(
            f'env_backend="tensor" with env={config.env!r}: expected one of {", ".join(TASKS)}, '
            "without normalised observations or rewards; use the backend gymnasium"
        )
    return Collector(VectorEnv(config.env, config.num_envs), config, generator)


@dataclass
class TrainResult:
    """The trained agent and the metrics of every update (one dict of numbers each).

    ``compile_seconds``, what compiling took, counts in no time or rate of the metrics.
    """

    agent: Agent
    metrics: list[dict[str, float]]
    compile_seconds: float = 0.0


def train(
    config: Config,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    checkpoint_every: int = 100,
    threads: int | None = None,
) -> TrainResult:
    """Train an agent.

    Args:
        config: a :class:`PPOConfig` or :class:`BLPOConfig`.
        run_dir: where config.json, metrics.csv, checkpoint.pt, learning_curve.png and TensorBoard
            events go; nothing is written for None.
        resume: continue the run in ``run_dir`` from its checkpoint. Agent, optimisers, generator,
            normalisers, counters and environments go on as they were.
        progress: show a progress bar.
        tensorboard: write TensorBoard events.
        checkpoint_every: updates between checkpoints; the last update is always saved.
        threads: of PyTorch while training, put back afterwards. None for 1 if no layer is wider
            than 256, where more threads cost more than they bring, else for as many as are set.

    Returns:
        The agent and the metrics. The same config gives the same metrics on the same machine and
        build of PyTorch (time columns apart).

    Raises:
        RunDirectoryError: ``run_dir`` already holds a run, or holds none to resume.
        EnvironmentUnsupported, EnvironmentFault, CheckpointError: see ``hypergrad_rl.errors``.

    >>> config = make_config("ppo", env="CartPole-v1", total_steps=1024)
    >>> len(train(config).metrics)
    2
    """
    before = torch.get_num_threads()
    if threads is None:
        threads = 1 if max(config.hidden) <= NARROW else before
    torch.set_num_threads(threads)
    try:
        return _train(config, run_dir, resume, progress, tensorboard, checkpoint_every)
    finally:
        torch.set_num_threads(before)


def _train(
    config: Config,
    run_dir: str | Path | None,
    resume: bool,
    progress: bool,
    tensorboard: bool,
    checkpoint_every: int,
) -> TrainResult:
    generator = torch.Generator().manual_seed(config.seed)
    backend = backend_of(config)
    collector = make_collector(config, generator, backend)
    agent = make_agent(config, collector, generator, backend)
    first, elapsed = 0, 0.0
    directory = None if run_dir is None else Path(run_dir)
    if resume:
        if directory is None:
            raise RunDirectoryError("resume needs the run directory to continue")
        state = load_checkpoint(directory / CHECKPOINT)
        agent.load_state_dict(state["agent"])
        collector.load_state_dict(state["collector"])
        first, elapsed = state["update"], state["seconds"]
    elif directory is not None:
        claim_run_directory(directory, config)

    compile_seconds = (
        compile_agent(agent, collector, progress) if first < config.num_updates else 0.0
    )
    log = MetricsLog(directory, first, tensorboard)
    bar = tqdm(
        total=config.num_updates * config.num_envs * config.num_steps,
        initial=first * config.num_envs * config.num_steps,
        unit="step", unit_scale=True, disable=not progress, desc=f"{config.algo} {config.env}",
    )  # fmt: skip
    start = time.perf_counter() - elapsed
    metrics = []
    try:
        for update in range(first, config.num_updates):
            began = time.perf_counter()
            rollout, episodes = collector.collect(agent.actor)
            stats = agent.update(rollout, progress=update / config.num_updates)
            now = time.perf_counter()
            steps = rollout.rewards.numel()
            row = {
                "update": update + 1,
                "env_steps": (update + 1) * steps,
                "seconds": now - start,
                "steps_per_second": steps / (now - began),
                "episodes": len(episodes.returns),
                "episode_return": float(np.mean(episodes.returns)) if episodes.returns else np.nan,
                "episode_length": float(np.mean(episodes.lengths)) if episodes.lengths else np.nan,
                **stats,
            }
            metrics.append(row)
            log.write(row)
            bar.update(steps)
            if episodes.returns:
                bar.set_postfix(episode_return=f"{row['episode_return']:.1f}", refresh=False)
            last = update + 1 == config.num_updates
            if directory is not None and (last or (update + 1) % checkpoint_every == 0):
                save_checkpoint(
                    directory / CHECKPOINT,
                    {
                        "agent": agent.state_dict(),
                        "collector": collector.state_dict(),
                        "update": update + 1,
                        "seconds": now - start,
                    },
                )
    finally:
        bar.close()
        log.close()
        collector.close()
    if directory is not None:
        from hypergrad_rl.report import plot_run  # Matplotlib takes half a second to import

        plot_run(directory)
    return TrainResult(agent, metrics, compile_seconds)


def compile_agent(agent: Agent, collector: Collector | ArrayCollector, progress: bool) -> float:
    """Compile the agent's update, and the rollout, before the clock starts; the seconds it took."""
    if progress and agent.backend is not None:
        tqdm.write(
            "compiling the update: up to a minute, a few seconds once it is cached "
            "(--compile false goes without)",
            file=sys.stderr,
        )
    seconds = agent.warm_up() + collector.warm_up(agent.actor)
    if progress and agent.backend is not None:
        tqdm.write(f"compiled in {seconds:.0f} s", file=sys.stderr)
    return seconds


def claim_run_directory(directory: Path, config: Config) -> None:
    """Make ``directory`` and its config.json, which two runs can never both succeed in.

    Raises:
        RunDirectoryError: it already holds a run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"algo": config.algo, **dataclasses.asdict(config)}
    try:
        with (directory / CONFIG).open("x") as file:
            json.dump(settings, file, indent=2)
    except FileExistsError as error:
        raise RunDirectoryError(
            f"{directory} already holds a run, which is left as it is; choose another --run-dir, "
            f"or continue it with `resume {directory}`"
        ) from error


def load_config(run_dir: str | Path) -> Config:
    """The configuration of a run.

    Raises:
        RunDirectoryError: ``run_dir`` holds no run.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise RunDirectoryError(f"{run_dir} holds no run: {path} is missing")
    settings = json.loads(path.read_text())
    return make_config(settings.pop("algo"), **settings)


class MetricsLog:
    """metrics.csv, flushed row by row, and TensorBoard events; nothing without a directory."""

    def __init__(self, directory: Path | None, first_update: int, tensorboard: bool) -> None:
        self.file: TextIO | None = None
        self.writer: Any = None
        self.write_header = first_update == 0
        if directory is None:
            return
        if first_update:  # rows after the checkpoint are computed again
            kept = (directory / METRICS).read_text().splitlines(keepends=True)[: first_update + 1]
            temporary = directory / "metrics.tmp"
            temporary.write_text("".join(kept))
            temporary.replace(directory / METRICS)
        self.file = (directory / METRICS).open("a", newline="")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self.writer = SummaryWriter(str(directory))

    def write(self, row: dict[str, float]) -> None:
        """Add the metrics of one update."""
        if self.file is None:
            return
        table = csv.DictWriter(self.file, list(row))
        if self.write_header:
            table.writeheader()
            self.write_header = False
        table.writerow({k: "" if np.isnan(v) else f"{v:.8g}" for k, v in row.items()})
        self.file.flush()
        if self.writer is not None:
            for name, value in row.items():
                if not np.isnan(value):
                    self.writer.add_scalar(name, value, int(row["env_steps"]))

    def close(self) -> None:
        """Close both files."""
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def evaluate(
    run_dir: str | Path, episodes: int = 20, *, seed: int = 1_000_000, deterministic: bool = True
) -> list[float]:
    """Returns of ``episodes`` fresh episodes of the checkpointed policy, on separate environments.

    Every environment plays its own episodes to the end and as many as any other, so that short
    episodes are not over-represented.

    Args:
        run_dir: a run directory with a checkpoint.
        episodes: how many, rounded up to a multiple of the environments (at most 8).
        seed: of the environments and of sampled actions.
        deterministic: take the most likely action (the mean) instead of sampling.

    Raises:
        ConfigError: ``episodes`` below 1 or a negative ``seed``.
        RunDirectoryError, CheckpointError: a directory without a run, or a damaged checkpoint.
    """
    for name, value, least in (("episodes", episodes, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value}: expected an integer >= {least}")
    config = load_config(run_dir)
    state = load_checkpoint(Path(run_dir) / CHECKPOINT)
    generator = torch.Generator().manual_seed(seed)
    env = VectorEnv(config.env, min(8, episodes))
    agent = make_agent(config, env, generator)
    agent.load_state_dict(state["agent"])
    generator.manual_seed(seed)
    collector = Collector(env, dataclasses.replace(config, num_envs=env.num_envs), generator)
    collector.load_statistics(state["collector"])
    obs, running = env.reset(seed), np.zeros(env.num_envs)
    finished: list[list[float]] = [[] for _ in range(env.num_envs)]
    per_env = -(-episodes // env.num_envs)
    with torch.inference_mode():
        while min(map(len, finished)) < per_env:
            normalized = torch.from_numpy(normalize(collector.obs_moments, obs))
            noise = None if deterministic else env.policy.noise(1, env.num_envs, generator)[0]
            step = env.step(env.policy.act(agent.actor, normalized, noise).numpy())
            running += step.rewards
            for i in np.flatnonzero(step.terminated | step.truncated):
                if len(finished[i]) < per_env:
                    finished[i].append(float(running[i]))
                running[i] = 0.0
            obs = step.obs
    env.close()
    return [r for returns in finished for r in returns]
