"""A trained policy at work: as a module, evaluated, watched, exported."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from hypergrad_rl.agent import check_parameters
from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.envs import VectorEnv, make_vector_env
from hypergrad_rl.errors import (
    ConfigError,
    EnvironmentUnsupported,
    ObservationError,
    RunDirectoryError,
)
from hypergrad_rl.functional import shapes_of
from hypergrad_rl.networks import DEFAULT_NETWORKS, Networks
from hypergrad_rl.place import on_the_cpu
from hypergrad_rl.rollout import NORMALIZED_LIMIT
from hypergrad_rl.run_directory import CHECKPOINT, check_environment, check_networks, load_config
from hypergrad_rl.trainer import EnvFn

MAX_FPS = 25  # of pictures: half of what CartPole is stepped at, for half the file


class TrainedPolicy(torch.nn.Module):
    """Observations, of any leading dimensions, to actions as the environment takes them.

    All that is needed is inside: the normalisation, the network, the bounds or the first index of
    the actions.

    Raises:
        ObservationError: at a call, something else than a tensor of observations.
    """

    mean: Tensor
    std: Tensor
    start: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, env: VectorEnv, state: dict[str, Any]) -> None:
        super().__init__()
        actor, moments = state["agent"]["actor"], state["collector"]
        self.names, self.act, self.shape = list(actor), env.policy.act, env.obs_shape
        buffers = {f"parameter{i}": leaf for i, leaf in enumerate(actor.values())}
        if "obs_moments.mean" in moments:
            variance = moments["obs_moments.squares"] / moments["obs_moments.count"]
            buffers |= {"mean": moments["obs_moments.mean"], "std": (variance + 1e-8).sqrt()}
        if isinstance(env.action_space, gym.spaces.Box):
            buffers["low"] = torch.from_numpy(env.action_space.low)
            buffers["high"] = torch.from_numpy(env.action_space.high)
        elif isinstance(env.action_space, gym.spaces.Discrete):
            buffers["start"] = torch.tensor(int(env.action_space.start))
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The most likely actions; with ``noise`` of the policy, drawn ones."""
        if not isinstance(obs, Tensor):
            raise ObservationError(
                f"obs is a {type(obs).__name__}, expected a torch.Tensor; of an array, "
                "torch.from_numpy(obs)"
            )
        if tuple(obs.shape[max(0, obs.dim() - len(self.shape)) :]) != self.shape:
            raise ObservationError(
                f"obs has shape {tuple(obs.shape)}, expected {self.shape}, or that behind any "
                "leading dimensions"
            )
        obs = obs.float()  # as in training; booleans too
        obs = obs.reshape(*obs.shape[: obs.dim() - len(self.shape)], math.prod(self.shape))
        if hasattr(self, "mean"):
            obs = ((obs - self.mean) / self.std).clamp(-NORMALIZED_LIMIT, NORMALIZED_LIMIT)
        actor = {name: getattr(self, f"parameter{i}") for i, name in enumerate(self.names)}
        action = self.act(actor, obs.float(), noise)
        if hasattr(self, "start"):
            return action + self.start
        return torch.minimum(torch.maximum(action, self.low), self.high)


def _load(
    run_dir: str | Path,
    env_fn: EnvFn | None,
    networks: Networks,
    num_envs: int = 1,
    render_mode: str | None = None,
) -> tuple[VectorEnv, TrainedPolicy]:
    config = load_config(run_dir)
    check_networks(Path(run_dir), networks, ["actor"])
    check_environment(Path(run_dir), env_fn)
    state = load_checkpoint(Path(run_dir) / CHECKPOINT)
    # Pictures are Gymnasium's to draw, and array code has no environments.
    pool = config.env_backend == "envpool" and render_mode is None
    backend = "envpool" if pool else "gymnasium"
    env = make_vector_env(config.env, num_envs, backend, render_mode, env_fn)
    env.policy.network.make_module = networks.actor
    actor = env.policy.init(env.obs_dim, config.hidden, torch.Generator())
    check_parameters("actor", state["agent"]["actor"], shapes_of(actor))
    return env, TrainedPolicy(env, state)


@on_the_cpu
def load_policy(
    run_dir: str | Path, *, env_fn: EnvFn | None = None, networks: Networks = DEFAULT_NETWORKS
) -> TrainedPolicy:
    """The policy of a run's last checkpoint as a module: observations to the most likely actions.

    Args:
        run_dir: a run directory with a checkpoint.
        env_fn: as for :func:`train`.
        networks: as for :func:`train`; only the actor is needed.

    Raises:
        RunDirectoryError, CheckpointError: a directory without a run, or a damaged checkpoint.
    """
    env, policy = _load(run_dir, env_fn, networks)
    env.close()
    return policy


@on_the_cpu
def export(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    env_fn: EnvFn | None = None,
    networks: Networks = DEFAULT_NETWORKS,
) -> Path:
    """Write the policy to a file that PyTorch alone reads, without this package and Gymnasium.

    ``torch.export.load(path).module()`` takes a batch of observations, float32, to the
    most likely actions.

    Args:
        run_dir: a run directory with a checkpoint.
        output: default: policy.pt2 in it.
        env_fn: as for :func:`train`.
        networks: as for :func:`train`; only the actor is needed.

    Raises:
        RunDirectoryError, CheckpointError: a directory without a run, or a damaged checkpoint.
    """
    policy = load_policy(run_dir, env_fn=env_fn, networks=networks)
    path = Path(output or Path(run_dir) / "policy.pt2")
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        policy, (torch.zeros(2, *policy.shape),), dynamic_shapes={"obs": {0: batch}}
    )
    _make_parent(path)
    try:
        torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise RunDirectoryError(f"cannot write {path}: {error}") from error
    return path


@on_the_cpu
def evaluate(
    run_dir: str | Path,
    episodes: int = 20,
    *,
    seed: int = 1_000_000,
    deterministic: bool = True,
    env_fn: EnvFn | None = None,
    networks: Networks = DEFAULT_NETWORKS,
) -> list[float]:
    """Returns of ``episodes`` fresh episodes of the checkpointed policy, on separate environments.

    Every environment plays to the end as many episodes as it was given beforehand, so that short
    ones are not over-represented.

    Args:
        run_dir: a run directory with a checkpoint.
        episodes: how many, shared out among up to 8 environments.
        seed: of the environments and of sampled actions.
        deterministic: take the most likely action (the mean) instead of sampling.
        env_fn: as for :func:`train`.
        networks: as for :func:`train`; only the actor is needed.

    Raises:
        ConfigError: ``episodes`` below 1 or a negative ``seed``.
        RunDirectoryError, CheckpointError: a directory without a run, or a damaged checkpoint.
    """
    _check(episodes, seed)
    env, policy = _load(run_dir, env_fn, networks, min(8, episodes))
    shares = [len(range(i, episodes, env.num_envs)) for i in range(env.num_envs)]
    finished: list[list[float]] = [[] for _ in shares]
    with closing(env):
        for ended in _play(env, policy, seed, deterministic):
            for i, value, _ in ended:
                finished[i].append(value)
            if all(len(done) >= share for done, share in zip(finished, shares, strict=True)):
                break
    return [x for done, share in zip(finished, shares, strict=True) for x in done[:share]]


def _play(
    env: VectorEnv, policy: TrainedPolicy, seed: int, deterministic: bool
) -> Iterator[list[tuple[int, float, int]]]:
    """Step forever; after the reset and each step, the episodes that ended in it."""
    generator = torch.Generator().manual_seed(seed)
    obs = env.reset(seed)
    first = getattr(env.action_space, "start", 0)
    yield []
    while True:
        noise = None if deterministic else env.policy.noise(1, env.num_envs, generator)[0]
        with torch.inference_mode():
            actions = policy(torch.from_numpy(obs.reshape(-1, *env.obs_shape)), noise)
        step = env.step(actions.numpy() - first)  # which adds it
        obs = step.obs
        yield step.ended


@on_the_cpu
def watch(
    run_dir: str | Path,
    output: str | Path | None = None,
    episodes: int = 1,
    *,
    seed: int = 1_000_000,
    deterministic: bool = True,
    env_fn: EnvFn | None = None,
    networks: Networks = DEFAULT_NETWORKS,
) -> tuple[Path, list[float]]:
    """Play episodes and write what is seen as a GIF or, with imageio-ffmpeg, as a video.

    Args:
        run_dir: a run directory with a checkpoint.
        output: a .gif or .mp4; default: episode.gif in it.
        episodes: how many, one after another.
        seed: of the environment and of sampled actions.
        deterministic: take the most likely action (the mean) instead of sampling.
        env_fn: as for :func:`train`; its environments draw in render mode "rgb_array".
        networks: as for :func:`train`; only the actor is needed.

    Returns:
        The file and the returns of the episodes.

    Raises:
        EnvironmentUnsupported: the environment draws no pictures, or lacks what it draws with.
        ConfigError: another ending of ``output``, or no imageio-ffmpeg for a video.
        RunDirectoryError, CheckpointError: a directory without a run, or a damaged checkpoint; a
            file that cannot be written.
    """
    _check(episodes, seed)
    path = Path(output or Path(run_dir) / "episode.gif")
    if path.suffix not in (".gif", ".mp4"):
        raise ConfigError(f"{path}: expected a name that ends in .gif or .mp4")
    env, policy = _load(run_dir, env_fn, networks, render_mode="rgb_array")
    _make_parent(path)  # of a place that cannot be, before anything is played
    if not hasattr(env, "envs"):
        raise EnvironmentUnsupported(f"{env.env_id} is simulated without pictures")
    returns: list[float] = []
    pictures: list[Any] = []
    fps = env.envs[0].metadata.get("render_fps", 30)
    stride = math.ceil(fps / MAX_FPS)
    with closing(env):
        for i, ended in enumerate(_play(env, policy, seed, deterministic)):
            returns += [value for _, value, _ in ended]
            if len(returns) == episodes:
                break
            if i % stride == 0:
                pictures.append(_picture(env))
    try:
        _write_pictures(path, pictures, fps / stride)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error}") from error
    return path, returns


def _picture(env: VectorEnv) -> Any:
    try:
        picture: Any = env.envs[0].render()
    except Exception as error:  # each environment has its own
        raise EnvironmentUnsupported(
            f"{env.env_id} cannot be drawn: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if picture is None:
        raise EnvironmentUnsupported(f'{env.env_id} has no render mode "rgb_array"')
    return picture


def _write_pictures(path: Path, pictures: list[Any], fps: float) -> None:
    if path.suffix == ".mp4":
        try:
            importlib.import_module("imageio_ffmpeg")
            video: Any = importlib.import_module("imageio")
        except ImportError as error:
            raise ConfigError(
                f"{path}: a video needs imageio-ffmpeg ({error}): pip install imageio "
                "imageio-ffmpeg, or give a name that ends in .gif"
            ) from error
        video.mimsave(path, pictures, fps=fps)
        return
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error}") from error


def _check(episodes: int, seed: int) -> None:
    for name, value, least in (("episodes", episodes, 1), ("seed", seed, 0)):
        if not least <= value < 2**63:
            raise ConfigError(f"{name}={value}: expected an integer >= {least} and below 2^63")
