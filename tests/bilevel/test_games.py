from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.strategies import (
    F32,
    F64,
    flat,
    gaussian,
    orthogonal,
    relative_error,
    tree_like,
)


def matrix(*eigenvalues: float, seed: int) -> Tensor:
    basis = orthogonal(len(eigenvalues), seed)
    return (basis * torch.tensor(eigenvalues, dtype=F64)) @ basis.T


@dataclass(frozen=True)
class Quadratic:
    """A game of two quadratics, with its equilibrium and total derivatives in closed form.

    f1 = x'Ax/2 + x'Bz + z'Cz/2 + a'x + c'z and f2 = z'Hz/2 + z'Mx + e'z, so that the response is
    r(x) = -H^-1 (Mx + e).
    """

    own: Tensor
    follower: Tensor
    seed: int = 0

    def __post_init__(self) -> None:
        n1, n2 = len(self.own), len(self.follower)
        draw = [gaussian(n1, n2, seed=self.seed), gaussian(n2, n1, seed=self.seed + 1)]
        object.__setattr__(self, "cross", draw[0])
        object.__setattr__(self, "mixed", draw[1])
        object.__setattr__(self, "linear1", gaussian(n1, seed=self.seed + 2))
        object.__setattr__(self, "linear2", gaussian(n2, seed=self.seed + 3))
        object.__setattr__(self, "shift", gaussian(n2, seed=self.seed + 4))

    cross: Tensor = None  # type: ignore[assignment]
    mixed: Tensor = None  # type: ignore[assignment]
    linear1: Tensor = None  # type: ignore[assignment]
    linear2: Tensor = None  # type: ignore[assignment]
    shift: Tensor = None  # type: ignore[assignment]

    @property
    def slope(self) -> Tensor:
        """S = dr/dx."""
        return -torch.linalg.solve(self.follower, self.mixed)

    @property
    def total_hessian(self) -> Tensor:
        # C = I: the leader likes small responses.
        return (
            self.own
            + self.cross @ self.slope
            + (self.cross @ self.slope).T
            + self.slope.T @ self.slope
        )

    def response(self, x: Tensor) -> Tensor:
        return -torch.linalg.solve(self.follower, self.mixed @ x + self.shift)

    def total_gradient(self, x: Tensor) -> Tensor:
        z = self.response(x)
        direct = self.own @ x + self.cross @ z + self.linear1
        return direct + self.slope.T @ (self.cross.T @ x + z + self.linear2)

    @property
    def equilibrium(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(len(self.own), dtype=F64)
        x = -torch.linalg.solve(self.total_hessian, self.total_gradient(zero))
        return x, self.response(x)

    def leader(self, x: Tensor, z: Tensor) -> Tensor:
        g = self.cast(x.dtype)
        quadratic = 0.5 * x @ g.own @ x + x @ g.cross @ z + 0.5 * z @ z
        return quadratic + g.linear1 @ x + g.linear2 @ z

    def follow(self, x: Tensor, z: Tensor) -> Tensor:
        g = self.cast(x.dtype)
        return 0.5 * z @ g.follower @ z + z @ g.mixed @ x + g.shift @ z

    def cast(self, dtype: torch.dtype) -> Any:
        class Cast:
            pass

        cast = Cast()
        for name in ("own", "follower", "cross", "mixed", "linear1", "linear2", "shift"):
            setattr(cast, name, getattr(self, name).to(dtype))
        return cast

    def check(self, x: Tensor, z: Tensor, **options: Any) -> hypergrad.StackelbergCheck:
        return hypergrad.check_stackelberg(self.leader, self.follow, x, z, **options)


GOOD = Quadratic(matrix(30.0, 40.0, 50.0, seed=1), matrix(2.0, 3.0, 4.0, 5.0, seed=2))


def smallest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


def test_an_equilibrium_has_the_figures_of_its_closed_form() -> None:
    check = GOOD.check(*GOOD.equilibrium)
    assert check.is_equilibrium
    assert check.failures == ()
    assert check.follower_gradient_norm <= 1e-12
    assert check.follower_curvature == pytest.approx(2.0, rel=1e-10)
    assert check.leader_gradient_norm is not None
    assert check.leader_gradient_norm <= 1e-11
    assert check.leader_curvature == pytest.approx(smallest(GOOD.total_hessian), rel=1e-9)
    assert not check.estimated
    assert check.message.startswith("A local strong Stackelberg equilibrium: gradients of ")
    assert str(check) == check.message


def test_the_leaders_total_derivative() -> None:
    x = gaussian(3, seed=9)
    got = hypergrad.stackelberg_gradient(
        GOOD.leader, GOOD.follow, x, GOOD.response(x), solver=hypergrad.CG(rtol=1e-12)
    )
    assert relative_error(got.grad, GOOD.total_gradient(x)) <= 1e-10
    z = GOOD.response(x)
    torch.testing.assert_close(got.direct, torch.func.grad(GOOD.leader)(x, z))


# Each condition fails in turn -------------------------------------------------------------------


def test_a_follower_that_does_not_respond() -> None:
    x, z = GOOD.equilibrium
    check = GOOD.check(x, z + 1e-3)
    assert not check.is_equilibrium
    assert "the follower's gradient is not zero" in check.message
    shift = GOOD.follower @ torch.full((4,), 1e-3, dtype=F64)
    assert check.follower_gradient_norm == pytest.approx(float(shift.norm()), rel=1e-8)


@pytest.mark.parametrize(("least", "words"), [(-1.0, "is -1.0e"), (0.0, "told from zero")])
def test_a_follower_at_a_saddle(least: float, words: str) -> None:
    # f2 = z1^2/2 + least z2^2/2 at z = 0 is stationary, whatever the leader plays.
    curvatures = torch.tensor([1.0, least], dtype=F64)
    check = hypergrad.check_stackelberg(
        lambda x, z: (x**2).sum() + (z**2).sum(),
        lambda x, z: 0.5 * (curvatures * z**2).sum() + z[0] * x[0],
        torch.zeros(1, dtype=F64),
        torch.zeros(2, dtype=F64),
    )
    assert len(check.failures) == 1
    assert "follower's Hessian is not positive definite" in check.message
    assert words in check.message
    # Without a response there is nothing of the leader's to tell.
    assert check.leader_gradient_norm is None
    assert check.leader_curvature is None
    assert check.follower_curvature == pytest.approx(least, abs=1e-14)


def test_a_leader_that_can_gain() -> None:
    x, _ = GOOD.equilibrium
    x = x + 1e-3
    check = GOOD.check(x, GOOD.response(x))
    assert len(check.failures) == 1
    assert "leader's total gradient is not zero" in check.message
    expected = float(GOOD.total_gradient(x).norm())
    assert check.leader_gradient_norm == pytest.approx(expected, rel=1e-8)
    assert GOOD.check(x, GOOD.response(x), gradient_tol=1.0).is_equilibrium


def test_distances_are_those_to_the_equilibrium_at_most() -> None:
    x, _ = GOOD.equilibrium
    moved = x + 1e-3 * gaussian(3, seed=11)
    z = GOOD.response(moved) + 1e-6 * gaussian(4, seed=12)
    check = GOOD.check(moved, z)
    # Of quadratics |D f1| >= m |x - x*| exactly, at the response.
    assert check.leader_distance is not None
    assert check.follower_distance is not None
    exact = GOOD.check(moved, GOOD.response(moved))
    assert exact.leader_distance is not None
    assert exact.leader_distance >= float((moved - x).norm()) * (1 - 1e-9)
    condition = torch.linalg.cond(GOOD.total_hessian)
    assert exact.leader_distance <= float((moved - x).norm() * condition) * (1 + 1e-9)
    assert check.follower_distance >= float((z - GOOD.response(moved)).norm()) * (1 - 1e-6)
    # No scale of the losses changes them.
    scaled = hypergrad.check_stackelberg(
        lambda x, z: 1e3 * GOOD.leader(x, z), lambda x, z: 1e-3 * GOOD.follow(x, z), moved, z
    )
    assert scaled.leader_distance == pytest.approx(check.leader_distance, rel=1e-9)
    assert scaled.follower_distance == pytest.approx(check.follower_distance, rel=1e-9)


@pytest.mark.parametrize(("least", "necessary"), [(0.5, True), (0.0, True), (-0.5, False)])
def test_necessary_conditions_allow_a_flat_direction(least: float, necessary: bool) -> None:
    curvatures = torch.tensor([1.0, least], dtype=F64)
    zero = torch.zeros(2, dtype=F64)

    def follower(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * ((z - x) ** 2).sum()

    def check(x: Tensor, z: Tensor) -> hypergrad.StackelbergCheck:
        return hypergrad.check_stackelberg(
            lambda x, z: 0.5 * (curvatures * z**2).sum(), follower, x, z
        )

    found = check(zero, zero)
    assert found.is_equilibrium == (least > 0)
    assert found.meets_necessary == necessary
    assert (found.leader_distance is None) == (least <= 0)
    assert not check(zero + 1e-3, zero + 1e-3).meets_necessary
    assert not check(zero, zero + 1e-3).meets_necessary


def test_without_a_response_the_necessary_conditions_are_not_met() -> None:
    zero = torch.zeros(1, dtype=F64)
    check = hypergrad.check_stackelberg(
        lambda x, z: (x * z).sum(), lambda x, z: -(z**2).sum() - (x * z).sum(), zero, zero
    )
    assert not check.meets_necessary
    assert check.follower_distance is None
    assert check.leader_distance is None


def test_a_leader_at_a_saddle_of_what_it_gets() -> None:
    # Its own Hessian is positive definite: only the response makes it a saddle.
    game = Quadratic(matrix(0.1, 0.2, 0.3, seed=1), GOOD.follower)
    assert smallest(game.own) > 0
    assert smallest(game.total_hessian) < 0
    check = game.check(*game.equilibrium)
    assert len(check.failures) == 1
    assert "leader's total Hessian is not positive definite" in check.message
    assert check.leader_curvature == pytest.approx(smallest(game.total_hessian), rel=1e-9)


def test_a_nash_equilibrium_that_is_no_stackelberg_equilibrium() -> None:
    # Of f1 = x^2/2 - 2xz, f2 = z^2/2 - xz, (0, 0) is a strict Nash equilibrium: both own
    # curvatures are 1.  But z = x makes f1 = -1.5 x^2.
    zero = torch.tensor(0.0, dtype=F64)
    check = hypergrad.check_stackelberg(
        lambda x, z: 0.5 * x**2 - 2 * x * z, lambda x, z: 0.5 * z**2 - x * z, zero, zero
    )
    assert check.leader_curvature == pytest.approx(-3.0)
    assert len(check.failures) == 1


def test_a_stackelberg_equilibrium_that_is_no_nash_equilibrium() -> None:
    # The zero-sum game f = -x^2/2 + 2xz - z^2/2 of a leader who minimises: own curvature -1, but
    # z = 2x makes f = 1.5 x^2.
    zero = torch.tensor(0.0, dtype=F64)

    def f(x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * x**2 + 2 * x * z - 0.5 * z**2

    check = hypergrad.check_stackelberg(f, lambda x, z: -f(x, z), zero, zero)
    assert check.is_equilibrium
    assert check.leader_curvature == pytest.approx(3.0)


# Beyond quadratics ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_total_hessian_is_that_of_the_explicit_response(seed: int) -> None:
    # f2 = sum(cosh z - z p) has the response z = asinh(p), and third derivatives that count.
    mix, start = gaussian(4, 3, seed=seed), gaussian(3, seed=seed + 1)
    slope = gaussian(4, seed=seed + 2)

    def pull(x: Tensor) -> Tensor:
        return torch.sin(mix @ x)

    def f1(x: Any, z: Any) -> Tensor:
        x, z = flat(x), flat(z)
        return (z**2).sum() + (slope * torch.sin(z)).sum() + (x.mean() * z).sum() + (x**4).sum()

    def f2(x: Any, z: Any) -> Tensor:
        x, z = flat(x), flat(z)
        return (torch.cosh(z) - z * pull(x)).sum()

    def total(x: Tensor) -> Tensor:
        return f1(x, torch.asinh(pull(x)))

    x = {"a": start[:1].reshape(()), "b": start[1:]}
    response = torch.asinh(pull(start))
    z = [response[:2], (response[2:].reshape(2, 1),)]
    check = hypergrad.check_stackelberg(f1, f2, x, z)
    hessian = torch.func.hessian(total)(start)
    scale = float(torch.linalg.eigvalsh(hessian).abs().max())
    assert check.leader_curvature is not None
    assert abs(check.leader_curvature - smallest(hessian)) <= 1e-10 * scale
    expected = float(torch.func.grad(total)(start).norm())
    assert check.leader_gradient_norm == pytest.approx(expected, rel=1e-10)
    assert check.follower_curvature == pytest.approx(float(torch.cosh(response).min()), rel=1e-12)


def test_large_players_are_judged_by_lanczos() -> None:
    full = GOOD.check(*GOOD.equilibrium)
    check = GOOD.check(*GOOD.equilibrium, max_dense=2)
    # Lanczos of three and four steps is exact here; CG at 1e-10 replaces the factorisation.
    assert check.is_equilibrium
    assert check.leader_curvature == pytest.approx(full.leader_curvature, rel=1e-8)
    assert check.follower_curvature == pytest.approx(full.follower_curvature, rel=1e-8)
    # With fewer steps than entries it is an estimate, and the sentence says so.
    n = 200
    check = hypergrad.check_stackelberg(
        lambda x, z: (x**2).sum() + (z**2).sum(),
        lambda x, z: (torch.linspace(1, 2, n, dtype=F64) * z**2).sum() - x * z.sum(),
        torch.tensor(0.0, dtype=F64),
        torch.zeros(n, dtype=F64),
        max_dense=100,
    )
    assert check.is_equilibrium
    assert check.estimated
    assert "estimated by Lanczos" in check.message
    assert check.follower_curvature >= 2.0


def test_in_single_precision() -> None:
    x, z = GOOD.equilibrium
    check = GOOD.check(x.to(F32), z.to(F32), gradient_tol=1e-3)
    assert check.is_equilibrium
    assert check.leader_curvature == pytest.approx(smallest(GOOD.total_hessian), rel=1e-4)


def test_gradient_play_of_the_leader_finds_the_equilibrium() -> None:
    x = gaussian(3, seed=5)
    for _ in range(100):
        got = hypergrad.stackelberg_gradient(GOOD.leader, GOOD.follow, x, GOOD.response(x))
        x = x - 0.02 * got.grad
    expected, _ = GOOD.equilibrium
    assert relative_error(x, expected) <= 1e-4
    assert GOOD.check(x, GOOD.response(x), gradient_tol=1e-2).is_equilibrium


def test_nothing_of_the_caller_is_changed() -> None:
    x, z = (leaf.clone().requires_grad_() for leaf in GOOD.equilibrium)
    with torch.no_grad():
        assert GOOD.check(x, z).is_equilibrium
    assert x.grad is None
    assert z.grad is None


def test_trees_of_other_structures_and_bad_options_are_named() -> None:
    x, z = GOOD.equilibrium
    for option, value in (("gradient_tol", -1.0), ("max_dense", 0), ("solver", "cg")):
        with pytest.raises(hypergrad.SolverOptionError, match=option):
            GOOD.check(x, z, **{option: value})
    with pytest.raises(hypergrad.NonFiniteError):
        GOOD.check(x * torch.nan, z)


def test_a_failed_linear_solve_is_announced() -> None:
    short = hypergrad.CG(rtol=1e-12, max_iters=1)
    with pytest.warns(hypergrad.ConvergenceWarning, match="rest on a failed linear solve"):
        GOOD.check(*GOOD.equilibrium, solver=short)


def test_a_leader_without_a_stake_of_its_own() -> None:
    # f1 names z alone, as an actor's loss may; D f1 is all through the response.
    target = gaussian(3, seed=3)
    check = hypergrad.check_stackelberg(
        lambda x, z: ((z - target) ** 2).sum(),
        lambda x, z: ((z - tree_like(x, x)) ** 2).sum(),
        target,
        target.clone(),
    )
    assert check.is_equilibrium
    assert check.leader_curvature == pytest.approx(2.0)
