"""Presets: every task of the paper has settings of both styles, and all of them are valid."""

import dataclasses

import pytest

from hypergrad_rl import BLPOConfig, ConfigError, PPOConfig, preset
from hypergrad_rl.inverse import in_sample_space
from hypergrad_rl.presets import STYLES

TASKS = sorted(STYLES["paper"])


def test_the_tasks_are_those_of_the_paper() -> None:
    assert len(TASKS) == 15
    assert set(TASKS) <= set(STYLES["tuned"])


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize("algo", ["ppo", "nested", "blpo"])
def test_every_preset_is_valid(style: str, algo: str) -> None:
    for env in STYLES[style]:
        config = preset(algo, env, style=style, seed=4)
        assert (config.algo, config.env, config.seed) == (algo, env, 4)


def test_the_published_settings() -> None:
    common = {
        "gamma": 0.99, "gae_lambda": 0.95, "clip": 0.2, "epochs": 4, "hidden": (64, 64),
        "rank": 5, "damping": 50.0, "solver": "nystrom", "sketch": "columns",
        "curvature": "hessian", "cross_term": "paper", "outer_objective": "advantage",
        "envs_per_minibatch": 1,
    }  # fmt: skip
    for env in TASKS:
        config = preset("blpo", env, style="paper")
        assert isinstance(config, BLPOConfig)
        settings = dataclasses.asdict(config)
        assert {name: settings[name] for name in common} == common, env
        discrete = config.num_envs == 4
        assert config.normalize_observations is config.normalize_rewards is (not discrete)
        rates = (2.5e-4, 1e-3) if discrete else (3e-4, 1.2e-3)
        assert (config.learning_rate, config.critic_learning_rate) == rates
        assert config.num_envs * config.num_steps == (512 if discrete else 20_480)
        ppo = preset("ppo", env, style="paper")
        assert isinstance(ppo, PPOConfig)
        assert ppo.num_minibatches == ppo.num_envs
        assert ppo.critic_learning_rate == ppo.learning_rate
    nested = {env: preset("nested", env, style="paper") for env in TASKS}
    assert {c.nested_steps for c in nested.values() if isinstance(c, BLPOConfig)} == {3, 5, 7, 10}


def test_unknown_styles_and_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="style='published': expected one of tuned, paper, fast"):
        preset("ppo", "CartPole-v1", style="published")
    with pytest.raises(ConfigError, match="no paper settings for 'Pendulum-v1'"):
        preset("ppo", "Pendulum-v1", style="paper")
    assert preset("ppo", "Pendulum-v1").gamma == 0.9
    assert preset("ppo", "Other-v0").total_steps == 500_000


def test_fast_settings_do_less_of_the_same_update() -> None:
    """Fewer and longer steps, another solver: task, objective, batches and bound are the tuned."""
    work = {
        "epochs", "learning_rate", "nested_steps", "critic_learning_rate",
        "solver", "rank", "cg_iters", "cg_rtol",
    }  # fmt: skip
    for env in STYLES["fast"]:
        fast, tuned = (preset("blpo", env, style=style) for style in ("fast", "tuned"))
        assert isinstance(fast, BLPOConfig)
        settings, others = dataclasses.asdict(fast), dataclasses.asdict(tuned)
        assert {name for name, value in settings.items() if others[name] != value} <= work
        assert fast.gradient_steps < 0.7 * tuned.gradient_steps
        assert fast.compiles_whole  # one graph an update, its solve included
        assert in_sample_space(fast)
        assert preset("ppo", env, style="fast") == preset("ppo", env)
        nested = preset("nested", env, style="fast")
        assert (nested.algo, nested.gradient_steps < fast.gradient_steps) == ("nested", True)
