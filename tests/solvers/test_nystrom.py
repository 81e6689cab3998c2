from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Nystrom, Status
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SCALES,
    SINGULAR,
    SPECTRA,
    Problem,
    dense_solve,
    gaussian,
    generator,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    seeds,
    symmetric,
    tree_hvp,
)

SKETCHES: tuple[Any, ...] = ("gaussian", "columns")
every_sketch = pytest.mark.parametrize("sketch", SKETCHES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

#: Non-zero eigenvalues by rank; the last one at least 1e-4 so that float32 products show them.
NONZERO = {
    "flat": lambda r: torch.ones(r, dtype=F64),
    "inverse": lambda r: 1.0 / torch.arange(1, r + 1, dtype=F64),
    "wide": lambda r: torch.logspace(0, -4, r, dtype=F64),
    "indefinite": lambda r: torch.linspace(1, 0.1, r, dtype=F64) * (-1.0) ** torch.arange(r),
}


def tolerance(dtype: torch.dtype, relative_damping: float) -> float:
    """What a low-rank A is solved to as a rule: rounding its products costs some eps |A| / damping.

    The condition of the test matrix within the range multiplies that; see :func:`promised`.
    """
    eps = torch.finfo(dtype).eps
    if dtype == F64:
        return 1e-10 + 10 * eps / relative_damping
    return 1e-4 + 3 * eps / relative_damping


def promised(dtype: torch.dtype, relative_damping: float) -> float:
    """The largest error in units of |v| / damping that is not worth a second pass.

    To first order twice the prediction of ``Core.noisy``, whatever the test matrix; |x| is smaller
    than |v| / damping where v lies in the range of A.
    """
    eps = torch.finfo(dtype).eps
    return 2 * (3 * eps / relative_damping + eps**0.6)


# The one-argument call --------------------------------------------------------------------------


@every_dtype
@every_sketch
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")
def test_needs_nothing_but_a_rank(
    dtype: torch.dtype, sketch: Any, scale: float, spectrum: str, rank: int
) -> None:
    like = {
        "w": torch.zeros(3, 3, dtype=dtype),
        "b": [torch.zeros(2).to(dtype), torch.zeros(()).to(dtype)],
    }
    problem = symmetric(SPECTRA[spectrum](12), seed=1, scale=scale)
    v = {"w": gaussian(3, 3).to(dtype), "b": [gaussian(2).to(dtype), torch.ones((), dtype=dtype)]}
    hvp = tree_hvp(problem.matrix.to(dtype), like)
    x, info = hypergrad.nystrom_ihvp(hvp, v, rank=rank, sketch=sketch, return_info=True)
    assert x["w"].shape == (3, 3)
    assert x["b"][0].dtype == x["w"].dtype == dtype
    assert x["b"][1].shape == ()
    assert all(bool(torch.isfinite(leaf).all()) for leaf in (x["w"], *x["b"]))
    assert info.damping > 0
    assert hypergrad.nystrom_ihvp(hvp, v, rank=rank)["w"].shape == (3, 3)


# Accuracy at low rank ---------------------------------------------------------------------------


def low_rank_error(
    dtype: torch.dtype, spectrum: str, rank: int, extra: int, n: int, relative: float, seed: int
) -> tuple[float, float]:
    """The error in units of |x|, and of |v| / damping."""
    eigenvalues = torch.zeros(n, dtype=F64)
    eigenvalues[:rank] = NONZERO[spectrum](rank)
    problem = symmetric(eigenvalues, seed=seed)
    # Inside the range is the hardest: all that leaks out of it is divided by the damping.
    v = (problem.basis[:, :rank] @ gaussian(rank, seed=seed + 1)).to(dtype)
    if seed % 2:
        v = gaussian(n, seed=seed + 1).to(dtype)
    solver = Nystrom(min(rank + extra, n), generator=generator(seed + 2))
    x = hypergrad.solve(problem.hvp(dtype), v, solver, damping=relative, on_failure="ignore").value
    expected = dense_solve(problem.matrix, v, relative)
    error = relative_error(x, expected)
    return error, error * relative * float(expected.norm() / v.double().norm())


def assert_accurate(
    dtype: torch.dtype, relative: float, errors: list[tuple[float, float]], part: float
) -> None:
    """``part`` of the sketches as a rule, and all of them as promised.

    Which of them is unlucky depends on the order in which a processor sums.
    """
    usual, in_units_of_v = zip(*errors, strict=True)
    assert sorted(usual)[int(part * len(usual))] <= tolerance(dtype, relative)
    assert max(in_units_of_v) <= promised(dtype, relative)


@every_dtype
@pytest.mark.parametrize("spectrum", NONZERO)
@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (4, 1), (12, 5), (30, 20), (60, 10)])
@pytest.mark.parametrize("extra", [0, 1, 8])
def test_agrees_with_the_dense_solve_when_the_rank_suffices(
    dtype: torch.dtype, spectrum: str, relative: float, n: int, rank: int, extra: int
) -> None:
    errors = [low_rank_error(dtype, spectrum, rank, extra, n, relative, s) for s in range(6)]
    assert_accurate(dtype, relative, errors, 0.5)


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("spectrum", NONZERO)
@pytest.mark.parametrize("extra", [0, 1, 8])
def test_agrees_with_the_dense_solve_for_the_worst_of_many_sketches(
    dtype: torch.dtype, spectrum: str, extra: int
) -> None:
    for relative in (1e-6, 1e-3):
        for n, rank in ((3, 1), (12, 5), (40, 20)):
            errors = [
                low_rank_error(dtype, spectrum, rank, extra, n, relative, seed)
                for seed in range(150)
            ]
            assert_accurate(dtype, relative, errors, 0.97)


@every_dtype
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("sketch", SKETCHES)
def test_dead_rows(dtype: torch.dtype, seed: int, sketch: Any) -> None:
    problem = symmetric(torch.tensor([1.0, 0.7, 0.5, 0.3, 0.1], dtype=F64), seed=seed, dead=15)
    v = gaussian(20, seed=seed).to(dtype)
    solver = Nystrom(8, sketch=sketch, generator=generator(seed))
    solution = hypergrad.solve(problem.hvp(dtype), v, solver, damping=1e-3, on_failure="ignore")
    assert torch.isfinite(solution.value).all()
    assert float(solution.value.norm()) <= 1.0001e3 * float(v.norm())
    if sketch == "gaussian":
        expected = dense_solve(problem.matrix, v, 1e-3)
        assert relative_error(solution.value, expected) <= tolerance(dtype, 1e-3)


def test_too_small_a_rank_is_not_accurate_and_says_so_by_its_residual() -> None:
    problem = symmetric(POSITIVE["inverse"](100), seed=1)
    v = gaussian(100, seed=2)
    with pytest.warns(hypergrad.ConvergenceWarning, match="Raise damping or rank"):
        x, info = hypergrad.nystrom_ihvp(
            problem.hvp(), v, rank=5, damping=1e-4, generator=generator(0), return_info=True
        )
    assert info.status is Status.STAGNATED
    assert relative_error(x, dense_solve(problem.matrix, v, 1e-4)) > 0.5
    outside = relative_residual(problem.matrix, 1e-4, x, v)
    assert info.relative_residual == pytest.approx(outside, rel=1e-9)
    assert outside > 1.0


# The sketch -------------------------------------------------------------------------------------


@quick_and_thorough
@every_dtype
@every_sketch
@given(
    problem=problems(POSITIVE | SINGULAR), seed=seeds, data=st.data(),
    relative=st.sampled_from([1e-8, 1e-4, 1.0]),
)  # fmt: skip
def test_the_solve_is_symmetric_positive_definite_and_bounded_by_the_damping(
    effort: str, dtype: torch.dtype, sketch: Any, problem: Problem, seed: int,
    data: st.DataObject, relative: float,
) -> None:  # fmt: skip
    rank, n = data.draw(st.integers(1, problem.n)), problem.n
    damping = relative * (problem.norm or 1.0)
    made = hypergrad.nystrom_sketch(
        problem.matrix.to(dtype), rank, sketch=sketch, generator=generator(seed)
    )
    inverse = made.solve_block(torch.eye(n, dtype=F64), damping)
    values = torch.linalg.eigvalsh(0.5 * (inverse + inverse.T)) * damping
    # The basis is orthonormal to a few eps of float64, whatever the dtype of the products.
    assert float((inverse - inverse.T).norm()) * damping <= 1e-12 * n
    assert float(values[-1]) <= 1 + 1e-12 * n
    # In the sketch and outside it, 1/(l + damping) with l no more than the largest eigenvalue of A,
    # which the sketch is held to within a hundredth.
    largest = problem.norm * (1 + 1e-2)
    assert float(values[0]) >= damping / (damping + largest) - 1e-12 * n
    assert (made.eigenvalues >= 0).all()


@quick_and_thorough
@given(problem=problems(POSITIVE | SINGULAR), seed=seeds, data=st.data())
def test_interpolates_and_lies_below_a_positive_operator(
    effort: str, problem: Problem, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, problem.n))
    made = hypergrad.nystrom_sketch(
        problem.matrix, rank, sketch="columns", generator=generator(seed)
    )
    approximation = (made.basis.T * made.eigenvalues) @ made.basis
    omega = torch.eye(problem.n, dtype=F64)[torch.randperm(problem.n, generator=generator(seed))]
    omega = omega[:rank].T
    size = problem.norm
    # Truncating the core at 8 eps of its norm may drop directions of products up to its root.
    slack = 10 * (problem.n * torch.finfo(F64).eps) ** 0.5 * size
    assert float((approximation @ omega - problem.matrix @ omega).norm()) <= slack
    gap = torch.linalg.eigvalsh(problem.matrix - approximation)
    assert float(gap[0]) >= -slack if len(gap) else True
    assert float(made.eigenvalues.max()) <= size * (1 + 1e-6) if made.rank else True
    if rank == problem.n:
        assert float((approximation - problem.matrix).norm()) <= 1e-10 * (size or 1.0)


@quick_and_thorough
@every_dtype
@every_sketch
@given(problem=problems(INDEFINITE), seed=seeds, data=st.data())
def test_eigenvalues_never_leave_the_spectrum_of_an_indefinite_operator(
    effort: str, dtype: torch.dtype, sketch: Any, problem: Problem, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, problem.n))
    made = hypergrad.nystrom_sketch(
        problem.matrix.to(dtype), rank, sketch=sketch, generator=generator(seed)
    )
    if not made.rank:
        return
    slack = 1e-2 * problem.norm
    assert float(made.eigenvalues.max()) <= max(float(problem.eigenvalues.max()), 0.0) + slack
    assert float(made.eigenvalues.min()) >= float(problem.eigenvalues.min()) - slack


@every_sketch
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_operator_whose_diagonal_blocks_are_zero(sketch: Any, seed: int, rank: int) -> None:
    # Columns of one block have a core of exactly zero, and products that are not.
    block = gaussian(4, 4, seed=1)
    zero = torch.zeros(4, 4, dtype=F64)
    matrix = torch.cat([torch.cat([zero, block], 1), torch.cat([block.T, zero], 1)])
    made = hypergrad.nystrom_sketch(matrix, rank, sketch=sketch, generator=generator(seed))
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert made.rank >= 1
    assert float(made.eigenvalues.abs().max()) <= norm * (1 + 1e-10)
    if sketch == "gaussian":  # a sketch of few vectors need not see both signs
        return
    assert made.smallest_eigenvalue < 0
    with pytest.raises(hypergrad.NegativeCurvatureError, match="smallest Ritz value"):
        hypergrad.nystrom_sketch(
            matrix, rank, sketch=sketch, generator=generator(seed), negative_curvature="raise"
        )


class TestPolicies:
    problem = symmetric(INDEFINITE["alternating"](10), seed=4)
    v = gaussian(10, seed=5)

    def solution(self, policy: Any, damping: Any = 0.35) -> hypergrad.Solution:
        solver = Nystrom(10, generator=generator(0), negative_curvature=policy)
        return hypergrad.solve(
            self.problem.hvp(), self.v, solver, damping=damping, on_failure="ignore"
        )

    def expected(self, eigenvalues: Tensor, damping: float = 0.35) -> Tensor:
        basis = self.problem.basis
        return (basis / (eigenvalues + damping)) @ basis.T @ self.v

    def test_keep_solves_the_system_as_it_is_and_says_that_it_is_indefinite(self) -> None:
        solution = self.solution("keep")
        assert relative_error(solution.value, self.expected(self.problem.eigenvalues)) <= 1e-9
        assert solution.info.status is Status.NEGATIVE_CURVATURE
        assert solution.info.smallest_eigenvalue == pytest.approx(
            float(self.problem.eigenvalues.min()), rel=1e-9
        )

    def test_absolute_takes_magnitudes(self) -> None:
        solution = self.solution("absolute")
        expected = self.expected(self.problem.eigenvalues.abs())
        assert relative_error(solution.value, expected) <= 1e-9
        assert not solution.info.status.failed

    def test_clip_takes_the_positive_part(self) -> None:
        solution = self.solution("clip")
        expected = self.expected(self.problem.eigenvalues.clamp(min=0.0))
        assert relative_error(solution.value, expected) <= 1e-9

    def test_raise_refuses(self) -> None:
        with pytest.raises(hypergrad.NegativeCurvatureError, match="Gauss-Newton"):
            self.solution("raise")

    def test_raise_accepts_positive_operators(self) -> None:
        for spectrum in POSITIVE | SINGULAR:
            matrix = symmetric(SPECTRA[spectrum](10), seed=1).matrix
            hypergrad.nystrom_sketch(matrix, 10, negative_curvature="raise")
            hypergrad.nystrom_sketch(matrix, 4, negative_curvature="raise")

    def test_automatic_damping_makes_the_kept_system_positive(self) -> None:
        solution = self.solution("keep", damping="auto")
        assert solution.info.damping > -float(self.problem.eigenvalues.min())
        assert not solution.info.status.failed


def test_permuting_leaves_permutes_the_answer() -> None:
    problem = symmetric(torch.linspace(1, 0.1, 5, dtype=F64), seed=1)
    order = torch.tensor([3, 4, 0, 1, 2])
    left = {"a": torch.zeros(3, dtype=F64), "b": torch.zeros(2, dtype=F64)}
    right = {"b": left["b"], "a": left["a"]}
    hvp_left = tree_hvp(problem.matrix, left)
    hvp_right = tree_hvp(problem.matrix[order][:, order], right)
    a, b = gaussian(3, seed=1), gaussian(2, seed=2)
    x = hypergrad.nystrom_ihvp(hvp_left, {"a": a, "b": b}, rank=5, damping=0.1)
    y = hypergrad.nystrom_ihvp(hvp_right, {"b": b, "a": a}, rank=5, damping=0.1)
    for key in left:
        torch.testing.assert_close(x[key], y[key], rtol=1e-10, atol=1e-12)


@every_sketch
def test_a_generator_makes_it_reproducible_and_the_global_state_is_not_touched(
    sketch: Any,
) -> None:
    problem = symmetric(POSITIVE["inverse"](20), seed=1)
    v = gaussian(20)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    answers = [
        hypergrad.nystrom_ihvp(
            problem.hvp(), v, rank=5, sketch=sketch, generator=generator(seed), damping=0.5
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_without_a_generator_the_global_seed_decides() -> None:
    problem = symmetric(POSITIVE["inverse"](20), seed=1)
    answers = []
    for _ in range(2):
        torch.manual_seed(5)
        answers.append(hypergrad.nystrom_ihvp(problem.hvp(), gaussian(20), rank=5, damping=0.5))
    assert torch.equal(answers[0], answers[1])


def test_a_reused_sketch_gives_the_same_answers_for_no_product() -> None:
    calls = 0

    def hvp(u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix @ u

    matrix = symmetric(POSITIVE["inverse"](20), seed=1).matrix
    v = gaussian(20, seed=2)
    made = hypergrad.nystrom_sketch(hvp, 6, like=v, generator=generator(1))
    assert made.num_hvps == calls <= 12  # one to check the sketch, five for the complement
    for damping in (1e-2, 1.0, "auto"):
        reused = made.solve(v, damping)
        assert calls == made.num_hvps
        solver = Nystrom(6, generator=generator(1))
        fresh = hypergrad.solve(matrix, v, solver, damping=damping, on_failure="ignore")
        torch.testing.assert_close(reused, fresh.value, rtol=1e-9, atol=1e-12)
        if damping == "auto":
            assert fresh.info.damping == pytest.approx(made.auto_damping(), rel=1e-12)


def test_columns_are_columns() -> None:
    # Of a diagonal matrix, k columns are k eigenpairs.
    matrix = torch.diag(torch.arange(1.0, 11.0, dtype=F64))
    made = hypergrad.nystrom_sketch(matrix, 4, sketch="columns", generator=generator(0))
    assert made.rank == 4
    assert all(round(x, 10) in range(1, 11) for x in made.eigenvalues.tolist())


def test_effective_dimension() -> None:
    problem = symmetric(POSITIVE["inverse"](15), seed=1)
    made = hypergrad.nystrom_sketch(problem.matrix, 15)
    for damping in (1e-3, 0.1, 10.0):
        expected = float((problem.eigenvalues / (problem.eigenvalues + damping)).sum())
        assert made.effective_dimension(damping) == pytest.approx(expected, rel=1e-9)


@quick_and_thorough
@given(seed=seeds, rank=st.integers(1, 30), spectrum=st.sampled_from(["inverse", "exponential"]))
def test_preconditioned_condition_number_is_below_its_bound(
    effort: str, seed: int, rank: int, spectrum: str
) -> None:
    # Frangella, Tropp, Udell, proposition 5.3: (lambda_k + damping + |A - A_nys|)/damping.
    problem = symmetric(POSITIVE[spectrum](40), seed=seed)
    damping = 1e-3
    made = hypergrad.nystrom_sketch(problem.matrix, rank, generator=generator(seed))
    inverse = made.preconditioner(damping).to_dense()
    damped = problem.matrix + damping * torch.eye(40, dtype=F64)
    values, vectors = torch.linalg.eigh(0.5 * (inverse + inverse.T))
    assert float(values[0]) > 0
    root = (vectors * values.sqrt()) @ vectors.T
    spectrum_after = torch.linalg.eigvalsh(root @ damped @ root)
    condition = float(spectrum_after[-1] / spectrum_after[0])
    approximation = (made.basis.T * made.eigenvalues) @ made.basis
    error = float(torch.linalg.matrix_norm(problem.matrix - approximation, 2))
    bound = (float(made.eigenvalues.min()) + damping + error) / damping
    assert condition <= bound * (1 + 1e-9)


@every_dtype
def test_16_bit_products_give_a_usable_sketch(dtype: torch.dtype) -> None:
    problem = symmetric(POSITIVE["inverse"](12), seed=1)
    made = hypergrad.nystrom_sketch(problem.matrix.to(torch.bfloat16), 4, generator=generator(0))
    assert (made.eigenvalues >= 0).all()
    x = made.solve(gaussian(12).to(torch.bfloat16), 0.1)
    assert x.dtype == torch.bfloat16
    assert torch.isfinite(x).all()


def test_products_that_change_from_call_to_call_are_refused() -> None:
    source = generator(0)

    def noisy(u: Tensor) -> Tensor:
        return torch.randn(20, generator=source, dtype=F64) * u

    with pytest.raises(hypergrad.NotSymmetricError, match="dropout or fresh minibatches"):
        hypergrad.nystrom_ihvp(noisy, gaussian(20), rank=8)


def test_float32_products_on_a_float32_vector_stay_float32() -> None:
    problem = symmetric(POSITIVE["inverse"](12), seed=1)
    seen = []

    def hvp(u: Tensor) -> Tensor:
        seen.append(u.dtype)
        return problem.matrix.to(F32) @ u

    hypergrad.nystrom_ihvp(hvp, gaussian(12).to(F32), rank=4)
    assert set(seen) == {F32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [3, "auto"])
def test_without_checks_the_answer_is_the_same_at_the_sketchs_products_alone(
    dtype: torch.dtype, rank: Any
) -> None:
    a = torch.diag(torch.logspace(0, -6, 60, dtype=dtype))
    v = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=dtype)

    def solved(check: bool) -> hypergrad.Solution:
        source = torch.Generator().manual_seed(0)
        solver = hypergrad.Nystrom(rank, generator=source, complement="zero", check=check)
        return hypergrad.solve(a, v, solver, damping=1e-3, on_failure="ignore")

    checked, bare = solved(True), solved(False)
    assert torch.equal(checked.value, bare.value)
    assert bare.info.num_hvps == checked.info.num_hvps - 2
    assert bare.info.status is hypergrad.Status.FIXED_ITERATIONS
    assert math.isnan(bare.info.relative_residual)
    assert not bare.info.converged
    if rank == 3:
        assert bare.info.num_hvps == 3


def test_without_checks_what_is_known_anyway_is_reported() -> None:
    zero = hypergrad.solve(torch.eye(4), torch.zeros(4), hypergrad.Nystrom(1, check=False)).value
    assert torch.equal(zero, torch.zeros(4))
    solver = hypergrad.Nystrom(4, check=False)
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0]))
    info = hypergrad.solve(a, torch.ones(4), solver, damping=0.5, on_failure="ignore").info
    assert info.status is hypergrad.Status.NEGATIVE_CURVATURE
    with pytest.raises(hypergrad.SolverOptionError, match="check is 1, expected True, False or"):
        hypergrad.Nystrom(4, check=1)  # type: ignore[arg-type]
    with pytest.raises(hypergrad.SolverOptionError, match="check=True"):
        hypergrad.ReusedSketch(solver)
