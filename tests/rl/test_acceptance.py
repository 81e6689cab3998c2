"""CartPole-v1 at full length, 4 environments x 128 steps: about 20 minutes on two cores."""

from pathlib import Path

import numpy as np
import pytest

from hypergrad_rl import preset
from hypergrad_rl.report import read_metrics, summarize
from hypergrad_rl.runs import train_all


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("algo", "expected"), [("ppo", 450), ("nested", 475), ("blpo", 475)])
def test_cartpole(algo: str, expected: int, tmp_path: Path) -> None:
    runs = {
        tmp_path / str(seed): preset(algo, "CartPole-v1", total_steps=500_000, seed=seed)
        for seed in range(3)
    }
    train_all(runs, jobs=2, tensorboard=False)
    returns = [summarize(read_metrics(run)).final_return for run in runs]
    assert np.mean(returns) >= expected, returns
