from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypergrad
from hypergrad.spectrum.diagonals import DiagonalMethod
from tests.strategies import (
    DTYPES,
    F64,
    SPECTRA,
    Problem,
    flat,
    generator,
    problems,
    quick_and_thorough,
    seeds,
    symmetric,
    tree_hvp,
    trees,
)

METHODS = get_args(DiagonalMethod)
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_is_unbiased_and_knows_its_error(method: DiagonalMethod, spectrum: str) -> None:
    problem = symmetric(SPECTRA[spectrum](40), seed=1)
    count = 200
    estimates = [
        hypergrad.diagonal(problem.matrix, num_hvps=18, method=method, generator=generator(seed))
        for seed in range(count)
    ]
    values = torch.stack([estimate.value for estimate in estimates])
    spread = values.std(dim=0)
    bias = (values.mean(dim=0) - problem.matrix.diagonal()).abs()
    # Five standard deviations: forty entries are looked at.
    assert bool((bias <= 5 * spread / count**0.5 + 1e-13).all())
    squares = torch.stack([estimate.standard_error for estimate in estimates]) ** 2
    claimed, seen = float(squares.mean().sqrt()), float((spread**2).mean().sqrt())
    # Leaving one out at a time correlates the samples.
    assert claimed <= 1.3 * seen + 1e-13
    assert seen <= 1.8 * claimed + 1e-13


@every_method
def test_the_variance_is_that_of_the_entries_beside_the_diagonal(method: DiagonalMethod) -> None:
    problem = symmetric(SPECTRA["alternating"](30), seed=1)
    off = problem.matrix - torch.diag(problem.matrix.diagonal())
    values = torch.stack(
        [
            hypergrad.diagonal(
                problem.matrix, num_hvps=10, method=method, generator=generator(seed)
            ).value
            for seed in range(400)
        ]
    )
    # Hutchinson's, exactly; XDiag averages half as many samples of what its sketch leaves.
    expected = (off**2).sum(dim=1) / 10
    ratio = float(values.var(dim=0).mean() / expected.mean())
    if method == "hutchinson":
        assert ratio == pytest.approx(1.0, abs=0.1)
    else:
        assert ratio <= 2.2


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_is_exact_with_as_many_products_as_columns(
    method: DiagonalMethod, dtype: torch.dtype
) -> None:
    for n in (1, 2, 7, 300):
        matrix = symmetric(SPECTRA["inverse"](n), seed=n).matrix.to(dtype)
        estimate = hypergrad.diagonal(matrix, num_hvps=max(n, 2), method=method)
        assert torch.equal(estimate.value, matrix.diagonal())
        assert torch.equal(estimate.standard_error, torch.zeros_like(estimate.value))
        assert estimate.num_hvps == n


@quick_and_thorough
@given(
    problem=problems(SPECTRA | {}, max_dim=25),
    method=st.sampled_from(METHODS),
    num_hvps=st.integers(2, 30),
    seed=seeds,
)
def test_is_finite_within_its_budget_and_scales_with_the_operator(
    effort: str, problem: Problem, method: DiagonalMethod, num_hvps: int, seed: int
) -> None:
    def estimate(matrix: torch.Tensor) -> hypergrad.DiagonalEstimate:
        return hypergrad.diagonal(
            matrix, num_hvps=num_hvps, method=method, generator=generator(seed)
        )

    plain, scaled = estimate(problem.matrix), estimate(2.0**-300 * problem.matrix)
    assert plain.num_hvps <= num_hvps
    assert bool(torch.isfinite(plain.value).all())
    assert bool((plain.standard_error >= 0).all())
    torch.testing.assert_close(
        scaled.value * 2.0**300, plain.value, rtol=1e-9, atol=1e-9 * problem.norm
    )


@quick_and_thorough
@given(tree=trees(), seed=seeds)
def test_comes_as_a_tree_of_the_operators_structure(effort: str, tree: Any, seed: int) -> None:
    n = len(flat(tree))
    problem = symmetric(torch.linspace(1.0, 0.2, n, dtype=F64), seed=seed)
    estimate = hypergrad.diagonal(tree_hvp(problem.matrix, tree), like=tree, num_hvps=n + 1)
    assert type(estimate.value) is type(tree)
    torch.testing.assert_close(flat(estimate.value), problem.matrix.diagonal())


def test_xdiag_is_exact_for_a_rank_below_its_sketch() -> None:
    eigenvalues = torch.zeros(50, dtype=F64)
    eigenvalues[:5] = torch.logspace(0, -2, 5, dtype=F64)
    matrix = symmetric(eigenvalues, seed=1).matrix
    estimate = hypergrad.diagonal(matrix, num_hvps=14, generator=generator(1))
    torch.testing.assert_close(estimate.value, matrix.diagonal(), rtol=0.0, atol=1e-12)


@every_method
def test_one_sample_does_not_claim_to_know_its_error(method: DiagonalMethod) -> None:
    least = 2 if method == "xdiag" else 1
    matrix = symmetric(SPECTRA["inverse"](30), seed=1).matrix
    error = hypergrad.diagonal(matrix, num_hvps=least, method=method).standard_error
    assert bool(torch.isinf(error).all())
    with pytest.raises(hypergrad.SolverOptionError, match="num_hvps"):
        hypergrad.diagonal(matrix, num_hvps=least - 1, method=method)
