"""PureJaxRL's PPO: its ``make_train``, compiled whole as by its own program; it prints nothing.

python -m benchmarks.rl_peers.programs.purejaxrl CHECKOUT 'SETTINGS AS JSON'
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import types
from pathlib import Path

import brax.envs  # noqa: F401  # before the clock starts, as the others
import distrax  # noqa: F401
import jax
import optax  # noqa: F401

from benchmarks.reproduction.authors import five_results
from benchmarks.rl_peers.marks import Marks


def main(checkout: str, settings: str) -> None:
    config = json.loads(settings)
    marks = Marks()
    if importlib.util.find_spec("navix") is None:  # gridworlds, imported and not used here
        sys.modules["navix"] = types.ModuleType("navix")
    five_results()
    directory = Path(checkout) / "purejaxrl"
    sys.path.insert(0, str(directory))
    make_train = runpy.run_path(str(directory / "ppo.py"), run_name="ppo")["make_train"]
    key = jax.random.PRNGKey(0)
    train = jax.jit(make_train(dict(config))).lower(key).compile()
    marks.at(0)
    jax.block_until_ready(train(key))
    update = config["NUM_ENVS"] * config["NUM_STEPS"]
    marks.at(config["TOTAL_TIMESTEPS"] // update * update)
    marks.report("jax", "flax", "gymnax")


if __name__ == "__main__":
    main(*sys.argv[1:])
