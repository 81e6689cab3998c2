"""Training: the loop over rollouts and updates."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

import hypergrad
from hypergrad_rl import run_directory as runs
from hypergrad_rl.agent import Agent
from hypergrad_rl.blpo import BLPO
from hypergrad_rl.checkpoint import save_checkpoint
from hypergrad_rl.compiled import backend_of, compiled_here
from hypergrad_rl.config import BLPOConfig, PPOConfig
from hypergrad_rl.envs import VectorEnv, make_vector_env
from hypergrad_rl.errors import (
    ConfigError,
    EnvironmentUnsupported,
    RunDirectoryError,
    TrainingDiverged,
)
from hypergrad_rl.networks import DEFAULT_NETWORKS, Networks
from hypergrad_rl.place import on_the_cpu
from hypergrad_rl.ppo import PPO
from hypergrad_rl.rollout import Collector, Rollout
from hypergrad_rl.run_directory import CHECKPOINT, Config, RunLog
from hypergrad_rl.tensor_envs import TASKS, ArrayCollector

NARROW = 256  # widest layer of a network for which one thread is fastest
RECENT = 20  # episodes whose mean return is compared with stop_at_return
EnvFn = Callable[[], gym.Env[Any, Any]]
Callback = Callable[[int, dict[str, float], Agent], bool | None]


def make_agent(
    config: Config,
    env: VectorEnv | Collector | ArrayCollector,
    generator: torch.Generator,
    backend: str | None = None,
    networks: Networks = DEFAULT_NETWORKS,
) -> Agent:
    """The agent that ``config`` describes, with parameters drawn from ``generator``.

    ``backend``: of ``torch.compile``; None for an agent that runs eagerly. The policy of ``env``
    gets the actor's network.
    """
    kind = PPO if isinstance(config, PPOConfig) else BLPO
    env.policy.network.make_module = networks.actor
    return kind(config, env.policy, env.obs_dim, generator, backend, networks.critic)


def make_collector(
    config: Config, generator: torch.Generator, backend: str | None, env_fn: EnvFn | None = None
) -> Collector | ArrayCollector:
    """What plays the rollouts: the task as array code where there is any and it is not refused.

    Raises:
        EnvironmentUnsupported: ``env_backend="tensor"`` for a task or settings without array code.
    """
    normalized = config.normalize_observations or config.normalize_rewards
    known = env_fn is None and config.env in TASKS and not normalized
    if known and config.env_backend in ("auto", "tensor"):
        return ArrayCollector(TASKS[config.env], config, generator, backend)
    if config.env_backend == "tensor":
        raise EnvironmentUnsupported(
            f'env_backend="tensor" with env={config.env!r}: expected one of {", ".join(TASKS)}, '
            "without normalised observations or rewards; use the backend gymnasium"
        )
    env = make_vector_env(config.env, config.num_envs, config.env_backend, env_fn=env_fn)
    return Collector(env, config, generator)


@dataclass
class TrainResult:
    """The trained agent and the metrics of every update made (one dict of numbers each).

    ``compile_seconds``, what compiling took, counts in no time or rate of the metrics; ``ended``
    says why the training ended.
    """

    agent: Agent
    metrics: list[dict[str, float]]
    compile_seconds: float = 0.0
    ended: str = ""


@on_the_cpu
def train(
    config: Config,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
    checkpoint_every: float = 10.0,
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
    stop_at_return: float | None = None,
    env_fn: EnvFn | None = None,
    networks: Networks = DEFAULT_NETWORKS,
) -> TrainResult:
    """Train an agent.

    Args:
        config: a :class:`PPOConfig` or :class:`BLPOConfig`.
        run_dir: where config.json, run_info.json, metrics.csv, checkpoint.safetensors,
            learning_curve.png and TensorBoard events go; nothing is written for None.
        resume: continue the run in ``run_dir`` from its checkpoint, or from the beginning where it
            was killed before the first one. The finished run is that of an uninterrupted one, to
            the last bit, on the same machine and build of PyTorch, on CPU (times apart), as far
            as callbacks keep no state of their own. ``wandb`` and ``stop_at_return`` are the
            run's own.
        progress: show a progress bar.
        tensorboard: write TensorBoard events.
        wandb: a project of Weights & Biases to log to.
        checkpoint_every: seconds between checkpoints, 0 for one after every update. The last
            update is always saved, and the last one that was completed before an exception.
        threads: of PyTorch while training, put back afterwards. None for 1 if no layer is wider
            than 256, where more threads cost more than they bring, else (and for networks of one's
            own) for as many as are set.
        callbacks: called after every update as ``callback(update, metrics, agent)``, update 1
            first; one that returns True ends the training.
        stop_at_return: end when the mean return of the last 20 episodes reaches it.
        env_fn: makes one environment, in place of ``config.env``, which then only names it.
        networks: modules of one's own as actor, critic or both. A run is resumed with the same
            ones: parameters are saved, not code.

    Returns:
        The agent and the metrics. The same config gives the same metrics on the same machine and
        build of PyTorch (time columns apart).

    Raises:
        RunDirectoryError: ``run_dir`` already holds a run, is in use, holds none to resume, or
            cannot be written; ``config`` is not that of the run to resume; it was trained with
            networks of one's own and ``networks`` lacks them. What was completed is kept.
        ConfigError: an argument of another kind, a module that cannot serve, ``threads`` below 1,
            a negative ``checkpoint_every``, or a ``stop_at_return`` that is not finite.
        EnvironmentUnsupported, EnvironmentFault, TrainingDiverged, CheckpointError: see
            ``hypergrad_rl.errors``.

    >>> from hypergrad_rl import make_config
    >>> config = make_config("ppo", env="CartPole-v1", total_steps=1024)
    >>> len(train(config, callbacks=[lambda update, metrics, agent: update == 1]).metrics)
    1
    """
    _check_kinds(config=config, networks=networks, callbacks=callbacks)
    directory = None if run_dir is None else Path(run_dir)
    if directory is None and (resume or wandb):
        raise RunDirectoryError("resume and wandb need a run directory")
    if directory is not None and resume:
        runs.check_config(directory, config)
        runs.check_environment(directory, env_fn)
    if wandb:
        runs.import_wandb()  # before anything is made
    info: dict[str, Any] = {
        "ended": None,
        "stop_at_return": stop_at_return,
        "own_networks": networks.own,
        "own_environment": env_fn is not None,
        "wandb": wandb and {"project": wandb, "name": str(run_dir), "id": uuid.uuid4().hex},
    }
    before = torch.get_num_threads()
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise ConfigError(f"threads={threads!r}: expected an integer >= 1, or None")
    if not checkpoint_every >= 0:  # nan is none either
        raise ConfigError(f"checkpoint_every={checkpoint_every!r}: expected a number >= 0")
    if stop_at_return is not None and not math.isfinite(stop_at_return):
        raise ConfigError(
            f"stop_at_return={stop_at_return!r}: expected a finite number or None for no goal"
        )
    if threads is None:
        threads = 1 if max(config.hidden) <= NARROW and not networks.own else before
    torch.set_num_threads(threads)
    _keep_freed_memory()
    try:
        with contextlib.ExitStack() as stack:
            backend = backend_of(config)
            generator = torch.Generator().manual_seed(config.seed)
            collector = make_collector(config, generator, backend, env_fn)
            stack.enter_context(contextlib.closing(collector))
            if directory is not None:
                stack.enter_context(runs.held(directory))
                if resume:
                    info = {**info, **runs.load_info(directory)}
                    runs.check_networks(directory, networks, ("actor", "critic"))
                else:
                    runs.begin(directory, config, info)
            result = _train(
                config, collector, backend, networks, directory, info, resume, progress,
                tensorboard, checkpoint_every, callbacks,
            )  # fmt: skip
            if directory is not None:
                runs.write_info(directory, {**info, "ended": result.ended})
                _draw(directory)
            return result
    finally:
        torch.set_num_threads(before)


#: What arguments are that are easily taken for something else, and what they are made by.
_KINDS: dict[str, tuple[Any, str]] = {
    "config": (PPOConfig | BLPOConfig, "a PPOConfig or BLPOConfig, as make_config returns"),
    "networks": (Networks, "Networks(actor=..., critic=...) of functions that make modules"),
    "callbacks": (Sequence, "a list of functions"),
}


def _check_kinds(**arguments: Any) -> None:
    for name, value in arguments.items():
        kind, words = _KINDS[name]
        if not isinstance(value, kind):
            raise ConfigError(f"{name} is a {type(value).__name__}, expected {words}")


def _keep_freed_memory() -> None:
    """Let the C library keep what an update frees for the next one: a twentieth of its time.

    glibc gives memory back to the system, and asks for it again, until a block as large as this one
    (its limit is 32 MiB) was freed once; see M_MMAP_THRESHOLD in mallopt(3).  Elsewhere, and under
    other allocators, it is one allocation.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)


def _train(
    config: Config,
    collector: Collector | ArrayCollector,
    backend: str | None,
    networks: Networks,
    directory: Path | None,
    info: dict[str, Any],
    resume: bool,
    progress: bool,
    tensorboard: bool,
    checkpoint_every: float,
    callbacks: Sequence[Callback],
) -> TrainResult:
    agent = make_agent(config, collector, collector.generator, backend, networks)
    first, elapsed, ended, goal = 0, 0.0, None, info["stop_at_return"]
    settings = runs.settings_of(config)
    recent: deque[float] = deque(maxlen=RECENT)
    state = runs.last_state(directory, config) if resume and directory is not None else None
    if state is not None:
        agent.load_state_dict(state["agent"])
        collector.load_state_dict(state["collector"])
        first, elapsed, ended = state["update"], state["seconds"], state["ended"]
        recent.extend(state["recent_returns"])
    saved = first
    compile_seconds = 0.0 if ended else compile_agent(agent, collector, progress)
    log = RunLog(
        directory, config, first, tensorboard and not ended, None if ended else info["wandb"]
    )
    steps = config.num_envs * config.num_steps
    bar = tqdm(
        total=config.num_updates * steps, initial=first * steps, unit="step", unit_scale=True,
        disable=not progress, desc=f"{config.algo} {config.env}",
    )  # fmt: skip

    def save() -> None:
        nonlocal saved
        if directory is not None and state is not None and saved < state["update"]:
            log.sync()
            save_checkpoint(directory / CHECKPOINT, state)
            saved = state["update"]

    metrics: list[dict[str, float]] = []
    start = time.perf_counter() - elapsed
    due = time.perf_counter() + checkpoint_every
    try:
        while not ended:
            began = time.perf_counter()
            update = first + len(metrics)
            rollout, episodes = collector.collect(agent.actor)
            stats = _improve(agent, rollout, update, config.num_updates)
            now = time.perf_counter()
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
            log.write(row)
            recent.extend(episodes.returns)
            stopped = [callback(update + 1, row, agent) for callback in callbacks]
            if update + 1 == config.num_updates:
                ended = "all steps are made"
            elif goal is not None and len(recent) == RECENT and np.mean(recent) >= goal:
                ended = f"mean return of {RECENT} episodes {np.mean(recent):.6g} >= {goal:.6g}"
            elif True in stopped:
                ended = "a callback ended it"
            metrics.append(row)
            # What an exception in the next update goes back to.
            state = {
                "agent": agent.state_dict(), "collector": collector.state_dict(),
                "update": update + 1, "seconds": now - start, "ended": ended,
                "recent_returns": list(recent), "settings": settings,
            }  # fmt: skip
            if ended or now >= due:
                save()
                due = time.perf_counter() + checkpoint_every
            bar.update(steps)
            if recent:
                bar.set_postfix({"return": f"{np.mean(recent):.1f}"}, refresh=False)
    except BaseException:
        save()
        raise
    finally:
        bar.close()
        log.close()
    return TrainResult(agent, metrics, compile_seconds, ended)


def _improve(agent: Agent, rollout: Rollout, update: int, num_updates: int) -> dict[str, float]:
    reason = "its parameters are not finite"
    cause: Exception | None = None
    try:
        stats = agent.update(rollout, progress=update / num_updates)
        states = agent.actor_state, agent.critic_state
        if all(bool(state.params.isfinite().all()) for state in states):
            return stats
    except (
        hypergrad.NonFiniteError,
        torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    ) as error:
        reason, cause = str(error), error
    raise TrainingDiverged(
        f"update {update + 1} diverged ({reason}), so training stopped at the last one before; "
        "smaller learning rates, or normalised observations and rewards, may help"
    ) from cause


def _draw(directory: Path) -> None:
    from hypergrad_rl.report import plot_run  # Matplotlib takes half a second to import

    try:
        plot_run(directory)
    except OSError as error:
        raise RunDirectoryError(f"cannot draw into {directory}: {error}") from error


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
        done = "compiled" if compiled_here(agent) or compiled_here(collector) else "loaded"
        tqdm.write(f"{done} in {seconds:.0f} s", file=sys.stderr)
    return seconds
