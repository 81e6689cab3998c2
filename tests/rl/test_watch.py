"""A trained policy at work: pictures, a module, a file that PyTorch alone reads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from hypergrad_rl import (
    ConfigError,
    EnvironmentUnsupported,
    ObservationError,
    RunDirectoryError,
    evaluate,
    export,
    load_policy,
    make_config,
    train,
    watch,
)
from hypergrad_rl.checkpoint import load_checkpoint
from hypergrad_rl.envs import VectorEnv
from hypergrad_rl.rollout import Collector, normalize

SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 32, "epochs": 1, "hidden": (8, 8), "total_steps": 128,
}  # fmt: skip


class Walk(gym.Env[Any, Any]):
    """Three or four actions to the right; drawn as a bar, unless it cannot be."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space: gym.Space[Any] = gym.spaces.Box(-9, 9, (2, 3), np.float64)
    action_space: gym.Space[Any] = gym.spaces.Discrete(2, start=3)
    error: Exception | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = 0
        return np.full((2, 3), 0.0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (3, 4)
        self.at += 1
        return np.full((2, 3), self.at), 1.0, self.at == 9, False, {}

    def render(self) -> Any:
        if self.error is not None:
            raise self.error
        picture = np.zeros((8, 20, 3), np.uint8)
        picture[:, : 2 * self.at + 1] = 255
        return picture


pytestmark = pytest.mark.usefixtures("no_curve")


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    config = make_config("ppo", env="Walk", normalize_observations=True, **SMALL)
    train(config, tmp_path / "walk", env_fn=Walk)
    return tmp_path / "walk"


def test_episodes_become_a_gif(walk: Path) -> None:
    new = walk / "films" / "episode.gif"
    assert watch(walk, new, env_fn=Walk)[0] == new
    assert new.exists()
    path, returns = watch(walk, episodes=2, env_fn=Walk)
    assert (path, returns) == (walk / "episode.gif", [9.0, 9.0])
    with Image.open(path) as gif:
        assert gif.size == (20, 8)
        assert gif.info["duration"] == 40  # every second of 50 pictures a second
        assert gif.n_frames == 9  # type: ignore[attr-defined]
    assert evaluate(walk, 2, env_fn=Walk) == [9.0, 9.0]
    assert evaluate(walk, 11, env_fn=Walk) == [9.0] * 11  # of eight environments
    with pytest.raises(RunDirectoryError, match="environments of one's own"):
        evaluate(walk, 2)  # the registered environment of that name is another
    with pytest.raises(ConfigError, match=r"below 2\^63"):
        evaluate(walk, 2, seed=2**70, env_fn=Walk)


def test_what_cannot_be_drawn_is_said(
    walk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.gif or \.mp4"):
        watch(walk, "film.avi", env_fn=Walk)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ConfigError, match="a video needs imageio-ffmpeg"):
        watch(walk, tmp_path / "film.mp4", env_fn=Walk)
    with pytest.raises(OSError, match="cannot write"):
        watch(walk, walk / "config.json" / "x.gif", env_fn=Walk)
    monkeypatch.setattr(Walk, "error", gym.error.DependencyNotInstalled("pip install pygame"))
    with pytest.raises(EnvironmentUnsupported, match=r"cannot be drawn: .*pip install pygame"):
        watch(walk, env_fn=Walk)
    monkeypatch.setattr(Walk, "error", None)
    monkeypatch.setattr(Walk, "render", lambda self: None)
    with pytest.raises(EnvironmentUnsupported, match="no render mode"):
        watch(walk, env_fn=Walk)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_the_module_acts_as_the_agent(env_id: str, tmp_path: Path) -> None:
    normal = env_id == "Pendulum-v1"
    config = make_config("ppo", env=env_id, normalize_observations=normal, **SMALL)
    agent = train(config, tmp_path).agent
    policy = load_policy(tmp_path)
    env = VectorEnv(env_id, 2)
    collector = Collector(env, config, torch.Generator())
    if normal:
        state = load_checkpoint(tmp_path / "checkpoint.safetensors")
        collector.load_state_dict(state["collector"])
    obs = 3 * torch.randn(5, env.obs_dim, generator=torch.Generator().manual_seed(0))
    normalized = torch.from_numpy(normalize(collector.obs_moments, obs.numpy()))
    torch.testing.assert_close(policy(obs), agent.policy.act(agent.actor, normalized, None))
    torch.testing.assert_close(policy(obs[0]), policy(obs)[0])


def test_what_is_no_observation_is_said(walk: Path) -> None:
    policy = load_policy(walk, env_fn=Walk)
    assert policy(torch.ones(4, 7, 2, 3)).shape[:2] == (4, 7)
    for obs, message in (
        (np.ones((2, 3), np.float32), r"obs is a ndarray.*torch\.from_numpy"),
        (torch.ones(3, 2), r"obs has shape \(3, 2\), expected \(2, 3\)"),
        (torch.ones(3), r"obs has shape \(3,\), expected \(2, 3\)"),
    ):
        with pytest.raises(ObservationError, match=message):
            policy(obs)


def test_the_exported_file_needs_pytorch_alone(walk: Path) -> None:
    path = export(walk, walk / "exported" / "policy.pt2", env_fn=Walk)  # in a new directory
    code = (
        "import sys, torch; policy = torch.export.load(sys.argv[1]).module();"
        "print(policy(torch.ones(7, 2, 3)).tolist(), 'hypergrad_rl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True,
                          cwd=walk, check=True)  # fmt: skip
    assert done.stdout == f"{load_policy(walk, env_fn=Walk)(torch.ones(7, 2, 3)).tolist()} False\n"
