"""What is measured on the leader's objective: against differences, and its two claims."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hypergrad
from benchmarks.outer_objective import (
    Game,
    fit,
    main,
    measure,
    policy_gradient,
    policy_values,
)
from benchmarks.tabular import STATES, TabularMDP

F64 = torch.float64


def differences(function: object, theta: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, coordinate by coordinate."""
    assert callable(function)
    gradient = torch.zeros_like(theta)
    for place in range(theta.numel()):
        shift = torch.zeros_like(theta)
        shift.view(-1)[place] = step
        change = function(theta + shift) - function(theta - shift)
        gradient.view(-1)[place] = float(change) / (2 * step)
    return gradient


@pytest.mark.parametrize("distribution", ["fixed", "moving"])
@pytest.mark.parametrize("objective", ["return", "advantage"])
@pytest.mark.parametrize("features", [STATES, 2])
def test_the_total_derivative_is_that_of_the_solved_game(
    distribution: str, objective: str, features: int
) -> None:
    mdp = TabularMDP.random(3, stay=0.3)
    phi = torch.randn(STATES, features, generator=torch.Generator().manual_seed(1), dtype=F64)
    game = Game(mdp, phi, 0.95, objective, distribution)

    def solved(theta: Tensor) -> Tensor:
        visits, targets = game._visits(theta), game._targets(theta)
        weights = visits.sum(0)
        response = fit(phi, (visits * targets).sum(0) / weights, weights)
        return game.outer_loss(response, theta)

    result = hypergrad.hypergradient(
        game.inner_loss, game.outer_loss, game.best_response(), mdp.theta, solver=hypergrad.Exact()
    )
    torch.testing.assert_close(result.grad, differences(solved, mdp.theta), rtol=1e-7, atol=1e-9)
    assert float(result.implicit.norm()) > 1e-3 * float(result.direct.norm())


def test_the_policy_gradient_is_that_of_the_discounted_return() -> None:
    mdp = TabularMDP.random(5)
    expected = differences(lambda theta: mdp.start @ policy_values(mdp, theta), mdp.theta)
    torch.testing.assert_close(policy_gradient(mdp), expected, rtol=1e-7, atol=1e-9)


def test_the_advantages_of_a_converged_critic_have_no_mean() -> None:
    # E A = 0 under the policy's own values, at every state and step but for the horizon's end.
    mdp = TabularMDP.random(7)
    values = policy_values(mdp, mdp.theta)
    for q in mdp.lambda_action_values(mdp.theta, values, 0.7):
        mean = (mdp.theta.softmax(-1) * q).sum(-1)
        torch.testing.assert_close(mean, values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stay", [0.0, 0.8])
def test_the_baseline_turns_the_leader_against_the_return(stay: float) -> None:
    for seed in range(6):
        row = measure(seed, stay, "tabular", 0.95, "return", "fixed")
        assert row.total > 0.9
        row = measure(seed, stay, "tabular", 0.95, "advantage", "fixed")
        assert row.direct > 0.9
        assert row.total < -0.9
        assert row.bounded > 0.5  # half of |d| cannot turn d round


def test_writes_its_rows_and_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--mdps", "1", "--output", str(tmp_path)])
    main()
    with (tmp_path / "cosines.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * 2 * 2
    assert all(-1 <= float(row["total"]) <= 1 for row in rows)
    assert (tmp_path / "outer_objective.png").stat().st_size > 10_000
    assert "| 0.8 | 1 feature | 1.0 | advantage | moving |" in capsys.readouterr().out
