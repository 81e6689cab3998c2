from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.bilevel.random_problems import partial_hypergradient, random_problem
from tests.bilevel.test_hypergradient import quadratic
from tests.bilevel.test_unroll import logistic, mlp
from tests.strategies import F32, F64, flat, gaussian, relative_error


@pytest.mark.parametrize("count", [12, pytest.param(600, marks=pytest.mark.slow)])
def test_the_true_error_is_below_the_bound_and_not_far_below(count: int) -> None:
    ratios = []
    for seed in range(count):
        problem = random_problem(seed)
        w, got = partial_hypergradient(problem, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.InnerProblemWarning)
            certificate = hypergrad.hypergradient_certificate(
                problem.inner, problem.outer, w, problem.y, got,
                strong_convexity=problem.strong_convexity if seed % 2 else None,
            )  # fmt: skip
        error = float((got.grad - problem.truth).norm())
        true = error / float(problem.truth.norm())
        assert certificate.certified, (seed, certificate.message)
        assert true <= certificate.relative_error, (seed, certificate.message)
        assert error <= certificate.error
        corrected = float((certificate.corrected - problem.truth).norm())
        assert corrected <= certificate.margin, (seed, certificate.message)
        parts = certificate.linear_error + certificate.inner_error + certificate.margin
        assert certificate.error <= parts * (1 + 1e-12)
        if true > 1e-12:  # below, the problem's own rounding is what is compared
            ratios.append(certificate.relative_error / true)
    assert len(ratios) > 0.8 * count
    assert statistics.median(ratios) <= 10  # measured: 1.0000
    assert max(ratios) <= 1e4


def test_the_plain_bounds_hold_on_a_quadratic_solved_in_part() -> None:
    inner, star, y = quadratic()  # curvatures from 1 to 3
    for shift in (0.0, 1e-4, 1e-2):
        w = star + shift * gaussian(4, seed=3)
        got = hypergrad.hypergradient(
            inner, lambda w, y: (w**2).sum(), w, y, solver=hypergrad.CG(rtol=0.0, max_iters=2)
        )
        certificate = hypergrad.hypergradient_certificate(
            inner, lambda w, y: (w**2).sum(), w, y, got, strong_convexity=1.0
        )
        assert float((w - star).norm()) <= certificate.inner_distance * (1 + 1e-9) + 1e-14
        assert certificate.linear_residual == pytest.approx(got.info.relative_residual, rel=1e-6)
        assert certificate.linear_bound is not None
        assert certificate.linear_error <= certificate.linear_bound
        matrix = torch.func.hessian(lambda w: inner(w, y))(star)
        truth = torch.linalg.solve(matrix, 2 * star)
        assert relative_error(certificate.corrected, truth) <= 1e-9
        assert certificate.smallest_curvature == 1.0
        assert certificate.curvature_given
        assert certificate.largest_curvature == pytest.approx(3.0, rel=1e-9)


def test_damping_is_an_error_of_the_linear_solve() -> None:
    inner, star, y = quadratic()
    got = hypergrad.hypergradient(
        inner, lambda w, y: w.sum(), star, y, solver=hypergrad.Exact(), damping=0.5
    )
    certificate = hypergrad.hypergradient_certificate(inner, lambda w, y: w.sum(), star, y, got)
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)
    truth = torch.linalg.solve(matrix, torch.ones(4, dtype=F64))
    true = relative_error(got.grad, truth)
    assert true == pytest.approx(certificate.relative_error, rel=1e-6)
    assert "the linear solve" in certificate.message
    assert certificate.linear_residual is not None
    assert certificate.linear_residual > 0.1  # though the damped system is solved exactly


def test_an_inner_problem_that_is_not_solved_is_announced() -> None:
    inner, outer, start, y = logistic()
    got = hypergrad.hypergradient(inner, outer, start + 1.0, y)
    with pytest.warns(hypergrad.InnerProblemWarning, match="Run the inner solver") as caught:
        certificate = hypergrad.hypergradient_certificate(inner, outer, start + 1.0, y, got)
    assert caught[0].filename == __file__
    assert certificate.certified
    assert certificate.inner_error > 100 * certificate.linear_error
    assert "most of the error comes from the inner problem" in certificate.message


def saddle(w: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (w[0] ** 2 - w[1] ** 2) - y @ w


def test_no_bound_is_given_where_there_is_no_minimum() -> None:
    y = gaussian(2)
    got = hypergrad.hypergradient(
        saddle, lambda w, y: w.sum(), gaussian(2, seed=1), y, solver=hypergrad.Exact()
    )
    with pytest.warns(hypergrad.InnerProblemWarning, match="curvature"):
        certificate = hypergrad.hypergradient_certificate(
            saddle, lambda w, y: w.sum(), gaussian(2, seed=1), y, got
        )
    assert not certificate.certified
    assert certificate.relative_error == certificate.error == math.inf
    assert certificate.message.startswith("No bound")


def test_no_bound_is_given_where_the_inner_loss_has_no_minimum() -> None:
    # exp(w) is convex and its Newton steps go on for ever.
    def inner(w: Tensor, y: Tensor) -> Tensor:
        return torch.exp(w + y).sum()

    w, y = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    got = hypergrad.hypergradient(inner, lambda w, y: (w**3).sum() + w.sum(), w, y)
    with pytest.warns(hypergrad.InnerProblemWarning, match="Newton steps"):
        certificate = hypergrad.hypergradient_certificate(
            inner, lambda w, y: (w**3).sum() + w.sum(), w, y, got, max_corrections=3
        )
    assert not certificate.certified


def test_a_true_hypergradient_of_zero_has_no_relative_bound() -> None:
    inner, star, y = quadratic()
    matrix = torch.func.hessian(lambda w: inner(w, y))(star)
    c = gaussian(4, seed=5)

    def outer(w: Tensor, y: Tensor) -> Tensor:  # the same for every y, at the solution A w = y
        return w @ c - y @ torch.linalg.solve(matrix, c)

    got = hypergrad.hypergradient(inner, outer, star, y, solver=hypergrad.CG(rtol=1e-2))
    certificate = hypergrad.hypergradient_certificate(inner, outer, star, y, got)
    assert not certificate.certified
    assert "cannot be told from zero" in certificate.message
    assert float(got.grad.norm()) <= certificate.error < 0.1


def test_an_exact_hypergradient_is_known_to_rounding() -> None:
    inner, star, y = quadratic()
    got = hypergrad.hypergradient(
        inner, lambda w, y: (w**2).sum(), star, y, solver=hypergrad.Exact()
    )
    certificate = hypergrad.hypergradient_certificate(
        inner, lambda w, y: (w**2).sum(), star, y, got
    )
    assert certificate.certified
    assert certificate.relative_error <= 1e-9


@pytest.mark.parametrize("shift", [0.0, 1e-5, 1e-2])
def test_in_float32_the_bound_holds_too(shift: float) -> None:
    for seed in range(5):
        problem = random_problem(seed)
        w = (problem.star + shift * gaussian(len(problem.star), seed=seed)).to(F32)
        y = problem.y.to(F32)

        def narrow(loss: Any) -> Any:
            # The problem's own constants stay float64; what goes in and out is float32.
            return lambda a, b: loss(a.double(), b.double()).to(a.dtype)

        inner, outer = narrow(problem.inner), narrow(problem.outer)
        got = hypergrad.hypergradient(inner, outer, w, y, solver=hypergrad.CG(rtol=1e-4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.InnerProblemWarning)
            certificate = hypergrad.hypergradient_certificate(inner, outer, w, y, got)
        true = relative_error(got.grad, problem.truth)
        assert true <= certificate.relative_error, (seed, certificate.message)


def test_judges_unrolled_gradients_and_plain_trees() -> None:
    inner, outer, start, y = mlp()
    unrolled = hypergrad.unrolled_hypergradient(
        inner, outer, start, y, num_steps=60, optimizer=hypergrad.SGD(lr=0.5, momentum=0.5),
        mode="truncated", truncate=4,
    )  # fmt: skip
    certificate = hypergrad.hypergradient_certificate(
        inner, outer, unrolled.inner_params, y, unrolled
    )
    assert certificate.linear_bound is None
    assert certificate.linear_residual is None
    truth = hypergrad.unrolled_hypergradient(
        inner, outer, unrolled.inner_params, y, num_steps=100,
        optimizer=hypergrad.SGD(lr=0.5, momentum=0.5),
    )  # fmt: skip
    true = relative_error(flat(unrolled.grad), flat(truth.grad))
    assert true <= certificate.relative_error <= 1.01 * true
    plain = hypergrad.hypergradient_certificate(
        inner, outer, unrolled.inner_params, y, unrolled.grad
    )
    assert plain.relative_error == certificate.relative_error
    assert relative_error(flat(certificate.corrected), flat(truth.grad)) <= 1e-8


def test_a_strong_convexity_that_is_not_there_is_refused() -> None:
    inner, star, y = quadratic()
    got = hypergrad.hypergradient(inner, lambda w, y: w.sum(), star, y)
    with pytest.raises(hypergrad.SolverOptionError, match=r"strong_convexity is 1\.5"):
        hypergrad.hypergradient_certificate(
            inner, lambda w, y: w.sum(), star, y, got, strong_convexity=1.5
        )
    for options in ({"strong_convexity": 0.0}, {"max_corrections": 0}):
        with pytest.raises(hypergrad.SolverOptionError, match="expected"):
            hypergrad.hypergradient_certificate(
                inner, lambda w, y: w.sum(), star, y, got, **options
            )  # fmt: skip


def test_a_gradient_of_another_shape_is_refused() -> None:
    inner, star, y = quadratic()
    with pytest.raises(hypergrad.TreeStructureError, match="gradient"):
        hypergrad.hypergradient_certificate(inner, lambda w, y: w.sum(), star, y, torch.ones(3))


def test_nothing_is_modified() -> None:
    inner, star, y = quadratic()
    w, y = (star + 0.1).requires_grad_(), y.clone().requires_grad_()
    kept = w.detach().clone()
    got = hypergrad.hypergradient(inner, lambda w, y: (w * y).sum(), w, y)
    with torch.no_grad():
        certificate = hypergrad.hypergradient_certificate(
            inner, lambda w, y: (w * y).sum(), w, y, got
        )
    assert torch.equal(w, kept)
    assert w.grad is None
    assert y.grad is None
    assert not certificate.corrected.requires_grad
