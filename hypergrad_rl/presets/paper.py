"""The published settings of BLPO (arXiv 2505.11714), PPO's and Nested PPO's among them.

Simulators differ: the paper's continuous tasks are Brax's, these ids Gymnasium's of the same names.
Where a setting is not known to be published, a comment says what stands in for it.
"""

from typing import Any

Settings = dict[str, dict[str, Any]]

#: What BLPO is there in all tasks; Nested PPO shares it up to the solver.
_BLPO: dict[str, Any] = {
    "solver": "nystrom",
    "rank": 5,
    "sketch": "columns",
    "damping": 50.0,
    "curvature": "hessian",
    "cross_term": "paper",
    "outer_objective": "advantage",
    "cg_iters": 20,  # with solver="cg": BLPO-CG
    "cg_rtol": 0.0,
}

# Their environments do not tell a time limit from an end, and neither do these runs. A minibatch is
# one environment's trajectory, so there are as many as environments. Of PPO no more is known than a
# critic rate below BLPO's, annealing and clipping: one rate for both networks, the number of
# minibatches and the entropy bonus are the usual ones (Huang et al. 2022).
_DISCRETE: dict[str, Any] = {
    "bootstrap_truncated": False, "num_envs": 4, "num_steps": 128, "learning_rate": 2.5e-4,
}  # fmt: skip
_DISCRETE_PPO = {"critic_learning_rate": 2.5e-4, "num_minibatches": 4, "entropy_bonus": 0.01}
_CONTINUOUS: dict[str, Any] = {
    "bootstrap_truncated": False, "num_envs": 32, "num_steps": 640, "learning_rate": 3e-4,
    "normalize_observations": True, "normalize_rewards": True,
}  # fmt: skip
_CONTINUOUS_PPO = {"critic_learning_rate": 3e-4, "num_minibatches": 32, "entropy_bonus": 0.0}


def _task(
    common: dict[str, Any], ppo: dict[str, Any], steps: int, rate: float, nested: int, bound: float
) -> Settings:
    blpo = {"critic_learning_rate": rate, "nested_steps": nested, "correction_bound": bound}
    return {"all": {**common, "total_steps": steps}, "ppo": ppo, "blpo": {**_BLPO, **blpo}}


def _discrete(total_steps: int, nested_steps: int, bound: float) -> Settings:
    return _task(_DISCRETE, _DISCRETE_PPO, total_steps, 1e-3, nested_steps, bound)


def _continuous(nested_steps: int, bound: float, total_steps: int = 8_000_000) -> Settings:
    return _task(_CONTINUOUS, _CONTINUOUS_PPO, total_steps, 1.2e-3, nested_steps, bound)


PAPER: dict[str, Settings] = {
    "CartPole-v1": _discrete(500_000, nested_steps=10, bound=1.4),
    "Acrobot-v1": _discrete(400_000, nested_steps=10, bound=0.5),
    # Stand-ins: nested steps and bounds of the MinAtar tasks (Acrobot's) and of Ant and Swimmer
    # (Reacher's); which of 5e6 and 1e7 steps is which MinAtar task's; the 8e6 steps of Ant,
    # Swimmer, HumanoidStandup and InvertedPendulum (continuous tasks had 8e6 to 2e7).
    "MinAtar/SpaceInvaders-v1": _discrete(10_000_000, nested_steps=10, bound=0.5),
    "MinAtar/Breakout-v1": _discrete(5_000_000, nested_steps=10, bound=0.5),
    "Hopper-v5": _continuous(nested_steps=3, bound=0.8),
    "Walker2d-v5": _continuous(nested_steps=3, bound=0.8),
    "HalfCheetah-v5": _continuous(nested_steps=7, bound=1.4),
    "Humanoid-v5": _continuous(nested_steps=5, bound=1.0),
    "HumanoidStandup-v5": _continuous(nested_steps=5, bound=1.0),
    "Reacher-v5": _continuous(nested_steps=3, bound=1.0),
    "Pusher-v5": _continuous(nested_steps=3, bound=1.0),
    "InvertedPendulum-v5": _continuous(nested_steps=5, bound=1.0),
    "InvertedDoublePendulum-v5": _continuous(nested_steps=3, bound=1.0),
    "Ant-v5": _continuous(nested_steps=3, bound=1.0),
    "Swimmer-v5": _continuous(nested_steps=3, bound=1.0),
}
