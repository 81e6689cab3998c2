"""The authors' own program (JAX), run as it is through its ``main.py``: see the reproduction.

python -m benchmarks.rl_peers.programs.authors CHECKOUT [FLAGS]
"""

from __future__ import annotations

import sys

import brax  # noqa: F401  # before the clock starts, as the others
import distrax  # noqa: F401
import gymnax  # noqa: F401
import optax  # noqa: F401

from benchmarks.reproduction.authors import ROLLOUT, run_program
from benchmarks.rl_peers.marks import Marks


def main(checkout: str, *flags: str) -> None:
    marks = Marks()
    # Logged at one place of the update that its rollout is for: between two marks, whole updates.
    run_program(checkout, flags, lambda step, _: marks.at(-(-step // ROLLOUT) * ROLLOUT))
    marks.report("jax", "flax", "gymnax")


if __name__ == "__main__":
    main(*sys.argv[1:])
