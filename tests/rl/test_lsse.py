"""Equilibria of actor and critic: a decision process whose leader has to anticipate its critic."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor

import hypergrad
from benchmarks.trained_pairs import Pair, train, untrained

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "lsse.py"
F64 = torch.float64
#: Reverse mode alone, with derivatives of its own by ``create_graph``.
hessian: Callable[..., Any] = torch.autograd.functional.hessian
STEPS = 100
SEEDS = range(3)


@pytest.fixture(scope="module")
def game() -> dict[str, Any]:
    mpl.use("Agg")  # no display is needed
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def trained(game: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Actor and critic where BLPO's updates end, from random starts."""
    return [game["play"]("blpo", *game["initial"](seed), STEPS)[-1] for seed in SEEDS]


def check(game: dict[str, Any], theta: Tensor, w: Tensor) -> hypergrad.StackelbergCheck:
    return hypergrad.check_stackelberg(game["leader_loss"], game["follower_loss"], theta, w)


def total_hessian(game: dict[str, Any], theta: Tensor) -> Tensor:
    """Of -objective, where the critic's answer is inserted: no implicit differentiation."""
    matrix = hessian(lambda t: -game["objective"](t), theta)
    assert isinstance(matrix, Tensor)
    return matrix


def test_the_leaders_optima_are_those_of_a_dense_grid(game: dict[str, Any]) -> None:
    star = game["optimum"]()
    spacing = 0.04
    axis = torch.arange(-5, 5 + spacing, spacing, dtype=F64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    best = grid[game["objective"](grid).argmax()]
    # The best of the grid lies within half a spacing of a maximum, or beats the point that does;
    # the latter by no more than the ratio of the curvatures allows.
    curvatures = torch.linalg.eigvalsh(total_hessian(game, torch.full((2,), star, dtype=F64)))
    bound = spacing / 2 * 2**0.5 * float((curvatures[-1] / curvatures[0]).sqrt())
    assert float((best.abs() - star).norm()) <= 1.1 * bound
    assert best[0] * best[1] > 0


def test_blpo_reaches_the_leaders_optimum(
    game: dict[str, Any], trained: list[tuple[Tensor, Tensor]]
) -> None:
    star = game["optimum"]()
    for theta, w in trained:
        found = check(game, theta, w)
        assert found.is_equilibrium
        assert found.leader_distance is not None
        assert found.follower_distance is not None
        # The update's zero is not D f1's, for the damping rho: |x_rho - x| <= rho / curvature |x|,
        # hence a gradient off by that share of the correction, which is at most 1/4 long.
        damped = game["DAMPING"] / found.follower_curvature * 0.25 / found.leader_curvature
        # To first order; the factor 1.5 is for the change of the curvature on the way.
        distance = float((theta.abs() - star).norm())
        assert distance <= 1.5 * (found.leader_distance + damped)
        assert distance <= 1e-3
        away = float((w - game["best_response"](theta)).norm())
        assert away <= 1.5 * found.follower_distance + 1e-12


def test_the_curvatures_at_the_trained_pair_are_those_of_the_inserted_answer(
    game: dict[str, Any], trained: list[tuple[Tensor, Tensor]]
) -> None:
    theta = trained[0][0]
    found = check(game, theta, game["best_response"](theta))
    expected = float(torch.linalg.eigvalsh(total_hessian(game, theta))[0])
    assert found.leader_curvature == pytest.approx(expected, rel=1e-9)
    features = game["FEATURES"]
    gauss_newton = features.T @ torch.diag(game["visits"](theta)) @ features
    expected = float(torch.linalg.eigvalsh(gauss_newton)[0])
    assert found.follower_curvature == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("method", "seeds"), [("simultaneous", range(3)), ("nested", range(1))])
def test_without_the_correction_every_start_ends_at_the_saddle(
    game: dict[str, Any], method: str, seeds: range
) -> None:
    for seed in seeds:
        theta, w = game["play"](method, *game["initial"](seed), 150)[-1]
        # theta_2 shrinks by 1 - step tau sigmoid'(theta_2): 0.4 near zero.
        assert float(theta.norm()) <= 1e-6
        found = check(game, theta, w)
        # Every first-order condition holds: only the second-order one tells.
        assert found.follower_gradient_norm <= found.gradient_tol
        assert found.leader_gradient_norm is not None
        assert found.leader_gradient_norm <= found.gradient_tol
        assert found.leader_curvature == pytest.approx(game["TAU"] / 4 - 1 / 8, abs=1e-6)
        assert not found.is_equilibrium
        assert not found.meets_necessary
        assert len(found.failures) == 1
        assert "leader's total Hessian is not positive definite" in found.message
        assert found.leader_distance is None


def test_the_followers_steps_are_along_its_gradient(game: dict[str, Any]) -> None:
    theta, w = game["initial"](0)
    _, moved = game["play"]("simultaneous", theta, w, 1)[1]
    gradient = torch.func.grad(game["follower_loss"], argnums=1)(theta, w)
    torch.testing.assert_close((w - moved) / game["FOLLOWER_STEP"], gradient)


def test_an_untrained_actor_or_critic_is_no_equilibrium(
    game: dict[str, Any], trained: list[tuple[Tensor, Tensor]]
) -> None:
    theta, w = game["initial"](0)
    found = check(game, theta, game["best_response"](theta))
    assert "the leader's total gradient is not zero" in found.message
    assert not found.meets_necessary
    found = check(game, trained[0][0], w)
    assert "the follower's gradient is not zero" in found.message
    assert not found.meets_necessary


def sampled_steps(game: dict[str, Any], theta: Tensor) -> Tensor:
    """40 estimates of the total derivative by the sampled update, (40, 2)."""
    generator = torch.Generator().manual_seed(0)
    w = game["best_response"](theta)
    moved = [game["sampled_update"](theta, w, 2000, generator)[0] for _ in range(40)]
    return (theta - torch.stack(moved)) / game["LEADER_STEP"]


def test_the_sampled_update_estimates_the_total_derivative(game: dict[str, Any]) -> None:
    theta = torch.tensor([0.7, -0.4], dtype=F64)
    steps = sampled_steps(game, theta)
    mean, error = steps.mean(0), steps.std(0) / len(steps) ** 0.5
    total = -torch.func.grad(game["objective"])(theta)
    assert float(error.norm()) <= 0.05 * float(total.norm())
    assert ((mean - total).abs() <= 4 * error).all()
    # The second entry of d alone is the entropy's, which the same test tells from the sum.
    partial = torch.func.grad(game["leader_loss"])(theta, game["best_response"](theta))
    assert (partial[1] - mean[1]).abs() > 4 * error[1]
    assert (2 * partial[1] - total[1] - mean[1]).abs() > 4 * error[1]  # c with the other sign


def test_the_sampled_update_reaches_the_leaders_optimum(game: dict[str, Any]) -> None:
    star = game["optimum"]()
    path = game["play_sampled"](1, 60)[30:]
    # Noise sigma on a step a of curvature m: a stationary variance of a sigma^2 / (2 m) or less in
    # each direction.  sigma^2 is measured at the optimum.
    noise = sampled_steps(game, torch.full((2,), star, dtype=F64)).std(0).square().sum()
    curvature = torch.linalg.eigvalsh(total_hessian(game, torch.full((2,), star, dtype=F64)))[0]
    spread = (game["LEADER_STEP"] * noise / (2 * curvature)).sqrt()
    assert float(spread) <= 0.2
    assert float((path.abs() - star).norm(dim=-1).max()) <= 5 * float(spread)
    assert (path[:, 0] * path[:, 1] > 0).all()


def test_counting_every_move_the_partial_gradient_is_enough(game: dict[str, Any]) -> None:
    # f of BLPO's updates: c counts the second move again, which d has counted once.
    star, initial = game["optimum"](), game["initial"](0)
    theta, _ = game["play"]("nested", *initial, STEPS, "every")[-1]
    assert float((theta.abs() - star).norm()) <= 1e-3
    theta, w = game["play"]("blpo", theta, game["best_response"](theta), STEPS, "every")[-1]
    # tanh(theta_2 / 2) = tau theta_1 and 2 tanh(theta_1 / 2) = tau theta_2
    first, second = theta.abs().tolist()
    assert first == pytest.approx(math.tanh(second / 2) / game["TAU"], abs=0.05)
    assert second == pytest.approx(2 * math.tanh(first / 2) / game["TAU"], abs=0.05)
    assert game["objective"](theta) < game["objective"](torch.full((2,), star, dtype=F64)) - 0.02
    f = game["leader_loss_of_every_move"](theta)
    found = hypergrad.check_stackelberg(f, game["follower_loss"], theta, w, gradient_tol=1e-3)
    assert found.is_equilibrium  # of its own game


def test_the_example_runs_from_end_to_end(game: dict[str, Any], tmp_path: Path) -> None:
    results = game["main"](["--run-dir", str(tmp_path), "--seeds", "1", "--steps", "5"])
    saved = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert saved == results
    assert len(saved["rows"]) == len(game["METHODS"]) * len(game["JUDGES"])
    assert (tmp_path / "lsse.png").stat().st_size > 10_000


# BLPO's own objectives, on tabular MDPs ---------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A softmax policy and a linear critic, trained along BLPO's exact total derivative."""
    return train(0, correction=True, updates=50)


def test_a_trained_pair_is_an_equilibrium(pair: Pair) -> None:
    found = pair.check()
    assert found.is_equilibrium
    assert found.meets_necessary
    assert found.leader_gradient_norm is not None
    assert found.leader_distance is not None
    _, f, g = pair.rollout()
    parts = hypergrad.stackelberg_gradient(f, g, pair.theta, pair.w, solver=hypergrad.Exact())
    # Zero because its parts cancel: the correction is no smaller than what is left of the sum.
    assert found.leader_gradient_norm <= 1e-6 * float(parts.implicit.norm())
    assert found.leader_distance <= 1e-3
    # 2 visits-weighted features' Gram matrix: the linear critic's loss is strongly convex.
    visits = pair.rollout()[0].visits.mean(0)
    gram = 2 * pair.features.T @ (visits[:, None] * pair.features)
    smallest = float(torch.linalg.eigvalsh(gram)[0])
    assert found.follower_curvature == pytest.approx(smallest, rel=1e-9)


def test_its_total_hessian_is_that_of_the_follower_solved_explicitly(pair: Pair) -> None:
    _, f, g = pair.rollout()

    def total(theta: Tensor) -> Tensor:
        # g is quadratic in w: one Newton step from anywhere is the exact response.
        gradient = torch.func.grad(g, argnums=1)(theta, pair.w)
        curvature = hessian(lambda w: g(theta, w), pair.w, create_graph=True)
        return f(theta, pair.w - torch.linalg.solve(curvature, gradient))

    size = pair.theta.numel()
    matrix = hessian(total, pair.theta).reshape(size, size)
    expected = torch.linalg.eigvalsh(matrix)
    found = pair.check().leader_curvature
    assert found == pytest.approx(float(expected[0]), abs=1e-10 * float(expected[-1]))


def test_logits_that_shift_together_leave_it_semidefinite(pair: Pair) -> None:
    # With every logit free, each state has a direction that changes no policy.
    found = pair.check(full=True)
    assert found.leader_curvature == pytest.approx(0.0, abs=1e-14)
    assert not found.is_equilibrium
    assert "cannot be told from zero" in found.message
    assert found.meets_necessary
    assert found.leader_distance is None


def test_an_actor_that_ignores_the_response_ends_elsewhere() -> None:
    nested = train(0, correction=False, updates=30)
    found = nested.check()
    _, f, g = nested.rollout()
    parts = hypergrad.stackelberg_gradient(f, g, nested.theta, nested.w, solver=hypergrad.Exact())
    assert float(parts.direct.norm()) <= 1e-8  # its own gradient is zero
    assert found.follower_gradient_norm <= found.gradient_tol
    assert found.leader_gradient_norm is not None
    assert found.leader_gradient_norm >= 0.1
    assert not found.meets_necessary


def test_an_untrained_pair_is_no_equilibrium() -> None:
    found = untrained(0).check()
    assert not found.is_equilibrium
    assert len(found.failures) >= 2
    assert not found.meets_necessary
