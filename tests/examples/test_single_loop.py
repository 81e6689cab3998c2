"""The comparison of single-loop methods: its data, and that it runs from end to end."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "single_loop.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


def test_the_means_are_near_what_was_asked_for(example: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    side = example["make_side"](20_000, 10, 4, 0.1, 0.5, draw)
    hess, outer_hess, cross, linear, _ = side.means()
    # Sample covariances of 20000 rows: relative errors of about sqrt(10 / 20000) = 0.02.
    spectrum = torch.linalg.eigvalsh(hess)
    expected = torch.logspace(-1, 0, 10, dtype=torch.float64)
    assert torch.allclose(spectrum, expected, rtol=0.1)
    assert float(torch.linalg.eigvalsh(outer_hess)[0].abs()) < 1e-10  # one flat direction
    values = torch.linalg.svdvals(cross).flip(0)
    wanted = torch.logspace(-1, torch.tensor(0.5).log10().item(), 4, dtype=torch.float64)
    assert torch.allclose(values, wanted, rtol=0.15, atol=0.02)
    assert float(linear.norm()) < 0.1


def test_it_runs_from_end_to_end(example: dict[str, Any], tmp_path: Path) -> None:
    options = ["--seeds", "0", "1", "--budget", "60", "--samples", "256", "128"]
    results = example["main"](["--run-dir", str(tmp_path), *options])
    saved = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert saved["final_norm"] == results["final_norm"]
    assert set(saved["final_norm"]) == set(example["methods"](1, 1))
    for curves in saved["curves"].values():
        assert len(curves) == 2
        costs = [cost for cost, _ in curves[0]]
        assert costs == sorted(costs)
        assert costs[0] == 0
        assert costs[-1] >= 60
    assert (tmp_path / "single_loop.png").stat().st_size > 5000
