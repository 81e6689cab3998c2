"""Gymnasium's classic control tasks."""

from typing import Any

CLASSIC_CONTROL: dict[str, dict[str, dict[str, Any]]] = {
    "CartPole-v1": {"all": {"total_steps": 500_000}},
    "Acrobot-v1": {
        "all": {"total_steps": 400_000},
        # Values of -60 make a curvature ten times CartPole's, with a slowly decaying spectrum.
        # Without a bonus for entropy one run in three never found the goal in time: every step is
        # rewarded alike until then, and the policy settles on nothing in particular.
        "blpo": {"damping": 30.0, "rank": 64, "entropy_bonus": 0.01},
    },
    "Pendulum-v1": {
        # Rewards of -16 to 0 a step and a short horizon: normalised rewards, gamma 0.9.
        "all": {
            "total_steps": 300_000,
            "num_steps": 256,
            "gamma": 0.9,
            "epochs": 10,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "normalize_observations": True,
            "normalize_rewards": True,
        },
        "ppo": {"entropy_bonus": 0.0, "num_minibatches": 16},
    },
}

#: CartPole: one epoch with longer steps of the actor, half the nested steps, and five iterations of
#: CG in sample space, where the system has 128 unknowns. Acrobot: half the nested steps and exact
#: solves there; in one epoch a run of six never found the goal (docs/rl.md).
_FEWER: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "epochs": 1,
        "learning_rate": 1.5e-3,
        "nested_steps": 5,
        "critic_learning_rate": 2e-3,
        "solver": "cg",
        "cg_iters": 5,
        "cg_rtol": 0.0,
    },
    "Acrobot-v1": {"nested_steps": 5, "solver": "exact"},
}

FAST: dict[str, dict[str, dict[str, Any]]] = {
    env: {
        "all": CLASSIC_CONTROL[env].get("all", {}),
        "blpo": {**CLASSIC_CONTROL[env].get("blpo", {}), **fewer},
    }
    for env, fewer in _FEWER.items()
}
