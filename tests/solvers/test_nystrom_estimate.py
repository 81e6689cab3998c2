"""Nyström for one solve: no basis, and residuals that its own products estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad.solvers import nystrom, streamed
from tests.strategies import F32, F64, generator, symmetric

N, RANK = 200, 10


def matrix(values: Tensor) -> Tensor:
    return symmetric(values, seed=1).matrix.to(F32)


VALUES = torch.exp(-torch.arange(N, dtype=F64) / 3.0)
DECAYING = matrix(VALUES)
FLAT = matrix(torch.linspace(1.0, 0.5, N, dtype=F64))


class Counted:
    """Products with a matrix, counted."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.calls = a, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.a @ v


def right_hand_side(seed: int = 2) -> Tensor:
    return torch.randn(N, generator=generator(seed))


def solved(a: Any, v: Tensor, damping: Any = 0.3, **options: Any) -> hypergrad.Solution:
    solver = hypergrad.Nystrom(RANK, **{"generator": generator(3), **options})
    return hypergrad.solve(a, v, solver, damping=damping, on_failure="ignore")


def test_no_product_is_spent_on_checks_where_the_estimate_leaves_no_doubt() -> None:
    hvp, v = Counted(DECAYING), right_hand_side()
    x = solved(hvp, v, check="estimate").value
    assert hvp.calls == RANK
    told, info = hypergrad.nystrom_ihvp(
        hvp, v, rank=RANK, damping=0.3, generator=generator(3), return_info=True
    )
    assert torch.equal(x, told)  # the named call checks always, and its answer is the same
    assert hvp.calls == RANK + info.num_hvps == 2 * RANK + 1  # the residual vouches for the sketch
    residual = v - DECAYING @ x - 0.3 * x
    assert info.residual_norm == pytest.approx(float(residual.norm()), rel=1e-4)


def test_a_residual_that_leaves_doubt_asks_for_a_product_with_the_largest_eigenvector() -> None:
    hvp, v = Counted(DECAYING), DECAYING @ right_hand_side()
    info = solved(hvp, v, 0.03, complement="zero").info
    assert info.relative_residual > 0.2
    assert info.num_hvps == hvp.calls == RANK + 2


@pytest.mark.parametrize("damping", ["auto", 0.1])
def test_negative_curvature_is_found_as_often_as_by_vouching_at_once(
    damping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = 1.0 / torch.arange(1.0, N + 1, dtype=F64)
    values[3::7] *= -1.0  # few enough that most cores are positive
    a = matrix(values)
    found = 0
    for seed in range(40):
        v = right_hand_side(500 + seed)
        info = solved(a, v, damping, generator=generator(seed)).info
        with monkeypatch.context() as patch:
            patch.setattr(nystrom, "NO_DOUBT", 0.0)  # every answer leaves doubt
            always = solved(a, v, damping, generator=generator(seed)).info
        assert (info.smallest_eigenvalue, info.status) == (
            always.smallest_eigenvalue,
            always.status,
        )
        found += always.num_hvps > 2 * RANK + 1
    assert found > 10  # that the core alone had not shown


def test_an_answer_that_is_replaced_keeps_its_warm_start() -> None:
    values = 1.0 / torch.arange(1.0, N + 1, dtype=F64)
    values[3::7] *= -1.0
    a, v = matrix(values), right_hand_side()
    replaced = 0
    for seed in range(20):
        solver = hypergrad.Nystrom(RANK, generator=generator(seed))
        options: dict[str, Any] = {"damping": "auto", "on_failure": "ignore"}
        info = hypergrad.solve(a, v, solver, **options).info
        solver = hypergrad.Nystrom(RANK, generator=generator(seed))
        exact = torch.linalg.solve(a.double() + info.damping * torch.eye(N), v.double())
        warm = hypergrad.solve(a, v, solver, x0=exact.float(), **options).info
        if warm.damping == info.damping:
            assert warm.relative_residual < 1e-5
        replaced += info.num_hvps > 2 * RANK + 1
    assert replaced > 5


def test_a_residual_as_large_as_v_is_found_by_a_product_and_warned_of() -> None:
    # At a hundredth of the eigenvalues that it leaves out a sketch of rank 10 is of no use.
    hvp, v = Counted(FLAT), right_hand_side()
    sketch = hypergrad.nystrom_sketch(FLAT, RANK, generator=generator(3), complement="zero")
    assert sketch.tail > 0.01
    solver = hypergrad.Nystrom(RANK, generator=generator(3), complement="zero", check="estimate")
    with pytest.warns(hypergrad.ConvergenceWarning):
        info = hypergrad.solve(hvp, v, solver, damping=5e-3).info
    assert info.num_hvps == hvp.calls == RANK + 1
    assert info.status is hypergrad.Status.STAGNATED
    assert info.relative_residual > 1


def test_an_estimate_is_near_the_residual() -> None:
    # Where one row more or less makes little difference.  The square is a mean of ten squares of
    # nearly normal numbers: below a 25th of the mean, or nine times it, in none of ten thousand.
    a = matrix(1.0 / torch.arange(1.0, N + 1, dtype=F64))
    ratios = []
    for seed in range(40):
        v = right_hand_side(1000 + seed)  # not a row of the test matrix
        estimate, true = (
            solved(a, v, generator=generator(seed), check=check).info
            for check in ("estimate", True)
        )
        if estimate.num_hvps == RANK:
            ratios.append(estimate.residual_norm / true.residual_norm)
    assert len(ratios) > 20
    assert 0.6 < sorted(ratios)[len(ratios) // 2] < 1.6
    assert min(ratios) > 0.2
    assert max(ratios) < 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_what_passes_the_estimate_is_smaller_than_v(seed: int) -> None:
    wrong = passed = 0
    for name in (torch.exp(-torch.arange(N) / 10.0), 1.0 / torch.arange(1.0, N + 1)):
        a = matrix(name.to(F64))
        for trial in range(60):
            source = 1000 * seed + trial
            v = right_hand_side(10**6 + source)
            v = a @ v if trial % 2 else v
            for damping in ("auto", 0.1, 0.03):
                options = {"damping": damping, "complement": "zero"}
                found = solved(a, v, generator=generator(source), check="estimate", **options)
                if found.info.num_hvps != RANK:
                    continue
                passed += 1
                true = solved(a, v, generator=generator(source), **options).info
                wrong += true.relative_residual >= 1
                assert true.relative_residual < 2
    assert passed > 50
    assert wrong <= 0.05 * passed


def test_each_of_many_right_hand_sides_must_pass() -> None:
    good = right_hand_side()
    zero = torch.zeros(N)
    solver = hypergrad.Nystrom(RANK, generator=generator(3), check="estimate")
    block = torch.stack([good, zero])
    info = hypergrad.solve(DECAYING, block, solver, damping=0.3, batched=True).info
    assert info.num_hvps == RANK
    assert [column.status.name for column in info.columns] == ["FIXED_ITERATIONS", "CONVERGED"]
    assert info.columns[1].residual_norm == 0.0


def test_a_scaled_problem_has_the_same_estimate() -> None:
    v = right_hand_side()
    plain = solved(DECAYING, v, check="estimate").info.relative_residual
    for scale in (2.0**-60, 2.0**60):
        scaled = solved(scale * DECAYING, v * 2.0**-40, 0.3 * scale, check="estimate").info
        assert scaled.relative_residual == pytest.approx(plain, rel=1e-6)


def test_an_operator_of_lower_rank_than_the_sketch_has_no_residual() -> None:
    q = torch.linalg.qr(torch.randn(N, 4, generator=generator(0)))[0]
    hvp = lambda v: q @ (torch.tensor([4.0, 3.0, 2.0, 1.0]) * (q.T @ v))  # noqa: E731
    info = solved(hvp, right_hand_side(), 0.1, check="estimate").info
    assert (info.num_hvps, info.rank) == (RANK, 4)
    assert info.relative_residual < 1e-4


def test_the_answer_is_that_of_a_sketch_with_a_basis() -> None:
    v = right_hand_side()
    sketch = hypergrad.nystrom_sketch(DECAYING, RANK, generator=generator(3))
    for damping in (1e-1, 1e-2):
        # The products' rounding, which both have in common, is 1e-7 |A| / damping.
        once = solved(DECAYING, v, damping, complement="zero").value
        kept = hypergrad.nystrom_sketch(
            DECAYING, RANK, generator=generator(3), damping=damping, complement="zero"
        ).solve(v, damping)
        torch.testing.assert_close(once, kept, rtol=1e-5, atol=1e-5 * float(kept.abs().max()))
    assert sketch.rank == RANK


def test_a_warm_start_and_a_derivative_go_through_the_same_factors() -> None:
    v = right_hand_side().requires_grad_()
    hvp = Counted(DECAYING)
    solution = solved(hvp, v)
    before = hvp.calls
    (gradient,) = torch.autograd.grad(solution.value.sum(), v)
    assert hvp.calls - before == 1  # the check of its residual, and no new sketch
    expected = solved(DECAYING, torch.ones(N)).value
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    x0 = solution.value.detach()
    warm = hypergrad.solve(
        DECAYING,
        v.detach(),
        hypergrad.Nystrom(RANK, generator=generator(3)),
        damping=0.3,
        x0=x0,
        on_failure="ignore",
    )
    correction = solved(DECAYING, v.detach() - DECAYING @ x0 - 0.3 * x0).value
    torch.testing.assert_close(warm.value, x0 + correction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("definite", [True, False])
def test_products_too_many_to_be_widened_are_held_twice(
    definite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = VALUES.clone()
    if not definite:
        values[1] = -0.7
    a, v = matrix(values), right_hand_side()
    small = solved(a, v, 1.0)
    monkeypatch.setattr(streamed, "_WORTH_STREAMING", N * RANK)
    large = solved(a, v, 1.0)
    if definite:
        assert torch.equal(small.value, large.value)
    assert large.info.relative_residual < 1
    smallest = large.info.smallest_eigenvalue
    assert smallest is not None
    assert (smallest < -0.4) == (not definite)


def test_an_eigenvalue_out_of_all_proportion_is_looked_at() -> None:
    # Of [[e, B], [B', 0]]-like operators one random row sees a positive core in half of the draws,
    # and an eigenvalue |A g|^2 / g'A g that nothing bounds; the product with its vector does.
    values = torch.zeros(N, dtype=F64)
    values[0], values[1] = 1.0, -1.0
    a = matrix(values)
    for seed in range(30):
        solver = hypergrad.Nystrom(1, generator=generator(seed), check="estimate")
        info = hypergrad.solve(a, right_hand_side(), solver, damping="auto", on_failure="ignore")
        assert info.info.damping < 5.0
