"""Training is on the CPU, whatever PyTorch's default device.

``hypergrad_rl`` has no option for a device: its networks are small, and its environments run on
the CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import hypergrad_rl
from tests.elsewhere.device import DEVICE
from tests.elsewhere.problems import tensors

SMALL: dict[str, Any] = {
    "env": "CartPole-v1", "num_envs": 2, "num_steps": 16, "epochs": 2, "total_steps": 96,
    "hidden": (8,), "compile": False,
}  # fmt: skip
NESTED: dict[str, Any] = {**SMALL, "nested_steps": 2}
CONFIGS: dict[str, Any] = {
    "ppo": hypergrad_rl.PPOConfig(**SMALL, num_minibatches=2),
    "ppo, gymnasium": hypergrad_rl.PPOConfig(**SMALL, num_minibatches=2, env_backend="gymnasium"),
    "ppo, continuous": hypergrad_rl.PPOConfig(
        **{**SMALL, "env": "Pendulum-v1"}, normalize_observations=True, normalize_rewards=True
    ),
    **{
        f"blpo, {solver}": hypergrad_rl.BLPOConfig(**NESTED, solver=solver, rank=4)
        for solver in ("nystrom", "nystrom_pcg", "cg", "exact", "identity", "none")
    },
    "blpo, columns": hypergrad_rl.BLPOConfig(
        **NESTED, rank=4, sketch="columns", curvature="hessian", cross_term="paper"
    ),
    "blpo, diagonal": hypergrad_rl.BLPOConfig(
        **NESTED, rank=4, sketch="diagonal", cross_term="full", redraw_sketch=False
    ),
    "blpo, auto": hypergrad_rl.BLPOConfig(
        **NESTED, rank=4, damping="auto", curvature_batch="rollout", outer_objective="advantage"
    ),
}


def trained(config: Any, run_dir: Path) -> Any:
    """Half of a training, its other half after a restart, and what it has learnt."""

    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        hypergrad_rl.train(config, run_dir, checkpoint_every=0.0, callbacks=[stop])
    hypergrad_rl.train(config, run_dir, resume=True)
    returns = hypergrad_rl.evaluate(run_dir, episodes=2)
    policy = hypergrad_rl.load_policy(run_dir)
    exported = hypergrad_rl.export(run_dir)
    assert Path(exported).exists()
    return policy, returns


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_is_that_of_the_cpu(config: Any, tmp_path: Path) -> None:
    here, returns = trained(config, tmp_path / "here")
    with torch.device(DEVICE):
        there, the_same = trained(config, tmp_path / "there")
    assert {x.device.type for x in there.state_dict().values()} == {"cpu"}
    for name, value in here.state_dict().items():
        assert torch.equal(there.state_dict()[name], value)
    assert the_same == returns


def test_a_trained_policy_goes_where_it_is_taken(tmp_path: Path) -> None:
    hypergrad_rl.train(CONFIGS["ppo"], tmp_path / "run")
    policy = hypergrad_rl.load_policy(tmp_path / "run")
    obs = torch.zeros(3, 4)
    expected = policy(obs)
    found = policy.to(DEVICE)(obs.to(DEVICE))
    assert found.device == DEVICE
    assert torch.equal(found.cpu(), expected)


def network(obs_dim: int, out_dim: int = 1, device: Any = None) -> torch.nn.Module:
    return torch.nn.Linear(obs_dim, out_dim, device=device)


def test_networks_of_ones_own() -> None:
    """They are on the CPU, or refused; the generators of devices are left alone."""
    for device in ("cpu", DEVICE):
        state = torch.elsewhere.get_rng_state()  # type: ignore[attr-defined]
        with torch.device(device):
            result = hypergrad_rl.train(
                CONFIGS["ppo"], networks=hypergrad_rl.Networks(actor=network, critic=network)
            )
        assert {x.device.type for x in tensors(result.agent.state_dict())} == {"cpu"}
        assert torch.equal(torch.elsewhere.get_rng_state(), state)  # type: ignore[attr-defined]
    away = functools.partial(network, device=DEVICE)
    with pytest.raises(hypergrad_rl.ConfigError, match="on elsewhere:0: expected all on the CPU"):
        hypergrad_rl.train(CONFIGS["ppo"], networks=hypergrad_rl.Networks(actor=away))
