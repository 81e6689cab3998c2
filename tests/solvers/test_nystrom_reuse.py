"""Automatic rank, the complement, draws by the diagonal, error and trace estimates, updates."""

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
from hypergrad.solvers.complement import Complement
from hypergrad.solvers.embedding import Embedding
from tests.strategies import (
    F32,
    F64,
    INDEFINITE,
    POSITIVE,
    SINGULAR,
    Problem,
    dense_solve,
    gaussian,
    generator,
    problems,
    quick_and_thorough,
    relative_error,
    seeds,
    symmetric,
)

CPU = torch.device("cpu")


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).abs().max())


def dense(sketch: hypergrad.NystromSketch) -> Tensor:
    return (sketch.basis.T * sketch.eigenvalues) @ sketch.basis


def preconditioned_condition(
    matrix: Tensor, sketch: hypergrad.NystromSketch, damping: float
) -> float:
    eye = torch.eye(len(matrix), dtype=F64)
    inverse = sketch.preconditioner(damping).to_dense().to(F64)
    values, vectors = torch.linalg.eigh(0.5 * (inverse + inverse.T))
    root = (vectors * values.sqrt()) @ vectors.T
    spectrum = torch.linalg.eigvalsh(root @ (matrix + damping * eye) @ root)
    return float(spectrum[-1] / spectrum[0])


# Automatic rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [*POSITIVE, *SINGULAR])
@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("sketch", ["gaussian", "structured", "columns", "diagonal"])
def test_an_automatic_rank_reaches_its_condition_number(
    spectrum: str, damping: float, sketch: Any
) -> None:
    problem = symmetric((POSITIVE | SINGULAR)[spectrum](40), seed=1)
    made = hypergrad.nystrom_sketch(
        problem.matrix, "auto", damping=damping, sketch=sketch, generator=generator(0)
    )
    assert made.condition_bound is not None
    assert made.condition_bound <= 10
    condition = preconditioned_condition(problem.matrix, made, damping)
    # The bound holds for |A - A_nys|, whose estimate may be a little low.
    assert condition <= 1.05 * made.condition_bound
    assert condition <= 10


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_an_automatic_rank_in_few_digits(dtype: torch.dtype) -> None:
    problem = symmetric(POSITIVE["inverse"](60), seed=1)
    made = hypergrad.nystrom_sketch(
        problem.matrix.to(dtype), "auto", damping=0.05, generator=generator(0)
    )
    matrix = problem.matrix.to(dtype).to(F64)
    assert preconditioned_condition(0.5 * (matrix + matrix.T), made, 0.05) <= 10


def test_a_tighter_tolerance_takes_a_larger_rank() -> None:
    problem = symmetric(torch.logspace(0, -6, 200, dtype=F64), seed=1)
    ranks = [
        hypergrad.nystrom_sketch(
            problem.matrix, "auto", damping=1e-3, tol=tol, generator=generator(0)
        ).rank
        for tol in (100.0, 9.0, 0.1)
    ]
    assert ranks == sorted(ranks)
    assert 8 < ranks[0] < ranks[-1]


def test_an_automatic_rank_spends_no_product_twice() -> None:
    problem = symmetric(torch.logspace(0, -6, 200, dtype=F64), seed=1)
    made = hypergrad.nystrom_sketch(
        problem.matrix, "auto", damping=1e-3, complement="zero", generator=generator(0)
    )
    # Ten for a look at the error, which the last eigenvalue allows at most twice, one to vouch.
    assert made.rank + 10 <= made.num_hvps <= made.rank + 2 * 11


def test_the_cap_is_reported() -> None:
    problem = symmetric(POSITIVE["flat"](100), seed=1)
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"cap, rank 20: .* than the 10 asked"):
        made = hypergrad.nystrom_sketch(problem.matrix, "auto", damping=1e-3, max_rank=20)
    assert made.rank == 20
    assert made.condition_bound == pytest.approx(2001, rel=0.1)  # 1 + (1 + 1)/1e-3
    solver = Nystrom("auto", max_rank=20)
    v = gaussian(100)
    with pytest.warns(hypergrad.ConvergenceWarning, match="Raise damping or rank"):
        info = hypergrad.solve(problem.matrix, v, solver, damping=1e-3).info
    assert (info.status, info.rank) == (Status.STAGNATED, 20)
    quiet = hypergrad.solve(problem.matrix, v, Nystrom("auto"), damping=1e-3)
    assert quiet.info.status is Status.FIXED_ITERATIONS  # the cap is then the dimension


def test_an_automatic_rank_of_an_indefinite_operator_sees_what_matters() -> None:
    problem = symmetric(INDEFINITE["alternating"](40), seed=1)
    made = hypergrad.nystrom_sketch(problem.matrix, "auto", damping=1e-2, generator=generator(0))
    assert made.smallest_eigenvalue == pytest.approx(float(problem.eigenvalues.min()), rel=1e-6)
    assert float((dense(made) - problem.matrix).norm()) <= 1e-9


def test_automatic_rank_and_damping_agree() -> None:
    problem = symmetric(torch.logspace(0, -6, 100, dtype=F64), seed=1)
    v = gaussian(100)
    x, info = hypergrad.nystrom_ihvp(problem.hvp(), v, rank="auto", return_info=True)
    assert 0.99e-3 <= info.damping <= 0.03  # of the sketch's largest eigenvalue
    assert info.status is Status.FIXED_ITERATIONS
    assert relative_error(x, dense_solve(problem.matrix, v, info.damping)) <= 0.5


# The complement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [*POSITIVE, *SINGULAR])
@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [2, 20])
def test_with_the_complement_it_is_no_worse_than_v_over_the_damping(
    spectrum: str, relative: float, rank: int
) -> None:
    # In the mean over right-hand sides, which is what it is made for.
    for seed in range(2):
        problem = symmetric((POSITIVE | SINGULAR)[spectrum](80), seed=seed)
        made = hypergrad.nystrom_sketch(problem.matrix, rank, generator=generator(seed))
        inverse = made.solve_block(torch.eye(80, dtype=F64), relative)
        exact = (problem.basis / (problem.eigenvalues + relative)) @ problem.basis.T
        plain = torch.eye(80, dtype=F64) / relative
        assert float((inverse - exact).norm()) <= float((plain - exact).norm()) * (1 + 1e-9)


def test_with_the_complement_a_flat_spectrum_is_solved_at_rank_one() -> None:
    problem = symmetric(3.0 * POSITIVE["flat"](50), seed=1)
    v = gaussian(50, seed=2)
    x, info = hypergrad.nystrom_ihvp(problem.hvp(), v, rank=1, damping=1e-6, return_info=True)
    assert relative_error(x, v / (3.0 + 1e-6)) <= 1e-9
    assert info.relative_residual <= 1e-6
    assert info.num_hvps <= 1 + 1 + 5 + 1


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("seed", range(10))
def test_where_nothing_is_left_out_the_complement_stays_zero(dtype: torch.dtype, seed: int) -> None:
    values = torch.cat([torch.logspace(0, -2, 10, dtype=F64), torch.zeros(30, dtype=F64)])
    problem = symmetric(values, seed=seed)
    for rank in (10, 11, 20, 40):
        made = hypergrad.nystrom_sketch(problem.matrix.to(dtype), rank, generator=generator(seed))
        assert made.complement is None


def test_the_complement_is_spent_only_where_it_matters() -> None:
    problem = symmetric(POSITIVE["inverse"](100), seed=1)
    v = gaussian(100)

    def cost(damping: Any, **options: Any) -> int:
        solver = Nystrom(10, generator=generator(0), **options)
        return hypergrad.solve(
            problem.matrix, v, solver, damping=damping, on_failure="ignore"
        ).info.num_hvps

    assert cost(1e-4) == cost(1e-4, complement="zero") + 5
    assert cost(1.0) == cost(1.0, complement="zero")
    assert cost("auto") == cost("auto", complement="zero")


def test_no_negative_curvature_is_met_outside_a_sketch_of_a_positive_operator() -> None:
    # Three eigenvalues 1e4 times smaller than the rest: the Lanczos vectors there are made of
    # small remainders, and must not lean back into the sketch.
    for seed in range(60):
        n, rank = 6 + seed % 3, 1 + seed % 3
        problem = symmetric(torch.tensor([1.0] * (n - 3) + [1e-4] * 3, dtype=F64), seed=seed)
        made = hypergrad.nystrom_sketch(
            problem.matrix, rank, damping=1e-8, sketch="columns", generator=generator(seed)
        )
        assert made.smallest_eigenvalue >= 0


def test_negative_curvature_met_outside_is_reported() -> None:
    # Large positive eigenvalues, which the sketch sees, over a negative bulk, which it does not.
    values = torch.cat([torch.ones(3, dtype=F64), torch.full((97,), -1e-3, dtype=F64)])
    basis = torch.eye(100, dtype=F64)
    matrix = (basis * values) @ basis.T
    columns = torch.zeros(100, dtype=F64)
    columns[:3] = 1.0
    made = hypergrad.nystrom_sketch(matrix, 3, sketch="diagonal", diagonal=columns)
    assert made.eigenvalues.tolist() == [1.0, 1.0, 1.0]
    assert made.complement is None
    assert made.smallest_eigenvalue == pytest.approx(-1e-3, rel=1e-9)
    with pytest.raises(hypergrad.NegativeCurvatureError, match=r"-1\.000e-03"):
        hypergrad.nystrom_sketch(
            matrix, 3, sketch="diagonal", diagonal=columns, negative_curvature="raise"
        )


@quick_and_thorough
@given(
    values=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=12), seed=seeds,
    damping=st.sampled_from([1e-8, 1e-4, 1.0]), steps=st.integers(1, 6),
)  # fmt: skip
def test_the_quadratures_bound_the_mean_from_both_sides(
    effort: str, values: list[float], seed: int, damping: float, steps: int
) -> None:
    # For the distribution seen from one vector: Lanczos in exact arithmetic, by a dense recurrence.
    spectrum = torch.tensor(values, dtype=F64)
    start = gaussian(len(values), seed=seed)
    start = start / start.norm()
    mean = float((start**2 / (spectrum + damping)).sum())
    basis, diagonal, off = start[None], [], []
    for _ in range(min(steps, len(values))):
        image = spectrum * basis[-1]
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):
            image = image - (basis @ image) @ basis
        off.append(float(image.norm()) if len(basis) < len(values) else 0.0)
        if off[-1] <= 1e-9:
            off[-1] = 0.0
            break
        basis = torch.cat([basis, (image / image.norm())[None]])
    made = Complement.of(torch.tensor(diagonal, dtype=F64), torch.tensor(off, dtype=F64))
    lower = float((made.weights / (made.nodes + damping)).sum())
    upper = float((made.radau_weights / (made.radau_nodes + damping)).sum())
    slack = 1e-6
    assert lower <= mean * (1 + slack)
    assert mean <= upper * (1 + slack)
    assert upper <= (1 + slack) / damping
    assert lower * (1 - slack) <= made.inverse(damping) <= min(upper * (1 + slack), 1 / damping)
    assert made.mean == pytest.approx(float(start**2 @ spectrum), rel=1e-6)


# Draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "structured", "columns", "diagonal"])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_rows_stay_orthonormal_as_they_grow(kind: Any, n: int) -> None:
    source = Embedding(kind, generator(0), n, CPU, F64, torch.arange(n, dtype=F64))
    rows = torch.zeros(0, n, dtype=F64)
    while len(rows) < n:
        rows = torch.cat([rows, source.rows(min(max(1, len(rows)), n - len(rows)))])
    torch.testing.assert_close(rows @ rows.T, torch.eye(n, dtype=F64), rtol=0, atol=1e-13)


def test_structured_rows_are_of_a_cosine_transform() -> None:
    from scipy.fft import dct

    n = 16
    rows = Embedding("structured", generator(0), n, CPU, F64).rows(n)
    signs = rows[(rows.abs() - n**-0.5).abs().amax(1).argmin()].sign()  # the constant row
    transform = torch.from_numpy(dct(torch.eye(n, dtype=F64).numpy(), norm="ortho", axis=0))
    for row in rows * signs:
        gap = torch.minimum((transform - row).norm(dim=1), (transform + row).norm(dim=1))
        assert float(gap.min()) <= 1e-13


def test_columns_are_drawn_in_proportion_to_the_diagonal() -> None:
    weights = torch.tensor([0.0, 1.0, -2.0, 5.0, 0.0], dtype=F64)
    count = torch.zeros(5)
    draws = 2000
    for seed in range(draws):
        row = Embedding("diagonal", generator(seed), 5, CPU, F64, weights).rows(1)
        count += row[0].to(F32)
    for got, expected in zip((count / draws).tolist(), [0, 1 / 8, 2 / 8, 5 / 8, 0], strict=True):
        # Four and a half standard deviations of a binomial share.
        assert abs(got - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws)


def test_rows_without_weight_come_last() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1e-300, 0.0], dtype=F64)
    firsts = []
    for seed in range(20):
        rows = Embedding("diagonal", generator(seed), 5, CPU, F64, weights).rows(5)
        order = rows.argmax(dim=1).tolist()
        assert set(order[:2]) == {1, 3}
        firsts.append(order[2])
    assert len(set(firsts)) > 1
    rows = Embedding("diagonal", generator(0), 5, CPU, F64, torch.zeros(5, dtype=F64)).rows(5)
    assert sorted(rows.argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]


def test_dead_rows_are_not_drawn_and_the_estimate_is_counted() -> None:
    problem = symmetric(torch.linspace(1, 0.1, 8, dtype=F64), seed=1, dead=92)
    v = gaussian(100)
    given_by = hypergrad.nystrom_sketch(
        problem.matrix, 8, sketch="diagonal", diagonal=problem.matrix.diagonal()
    )
    estimated = hypergrad.nystrom_sketch(problem.matrix, 8, sketch="diagonal")
    for made, cost in ((given_by, 0), (estimated, 10)):
        assert made.rank == 8
        # A second pass may be worth it where eight columns make a poor core; vouching may be.
        assert made.num_hvps - cost in (8, 9, 10, 16, 17, 18)
        assert relative_error(made.solve(v, 1e-3), dense_solve(problem.matrix, v, 1e-3)) <= 1e-9


def test_a_diagonal_is_a_tree_of_finite_numbers() -> None:
    matrix = torch.eye(3, dtype=F64)
    with pytest.raises(hypergrad.NonFiniteError, match="diagonal holds nan"):
        hypergrad.nystrom_sketch(
            matrix, 1, sketch="diagonal", diagonal=torch.tensor([1.0, math.nan, 1.0], dtype=F64)
        )
    with pytest.raises(hypergrad.TreeStructureError, match="diagonal has shape"):
        hypergrad.nystrom_sketch(matrix, 1, sketch="diagonal", diagonal=torch.ones(2, dtype=F64))
    with pytest.raises(hypergrad.SolverOptionError, match="'diagonal' where a diagonal is given"):
        Nystrom(1, diagonal=torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol is 0.0"),
        ({"tol": math.inf}, "tol is inf"),
        ({"max_rank": 0}, "max_rank is 0"),
        ({"complement": "mean"}, "complement is 'mean'"),
        ({"sketch": "hadamard"}, "sketch is 'hadamard'"),
    ],
)
def test_options_are_checked_when_made(options: Any, message: str) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match=message):
        Nystrom(3, **options)
    with pytest.raises(hypergrad.RankError, match="'automatic'"):
        Nystrom("automatic")  # type: ignore[arg-type]


# Error and trace --------------------------------------------------------------------------------


@pytest.mark.parametrize("seeded", [True, False])
def test_the_error_is_not_measured_on_the_rows_of_the_test_matrix(seeded: bool) -> None:
    # A and its sketch agree on them, and many a sketch is drawn with the seed zero.
    matrix = torch.eye(12, dtype=F64)
    torch.manual_seed(0)
    made = hypergrad.nystrom_sketch(matrix, 1, generator=generator(0) if seeded else None)
    assert made.error_estimate(matrix, num_steps=1).largest_bound >= 0.5


@quick_and_thorough
@given(problem=problems(POSITIVE | SINGULAR), seed=seeds, data=st.data())
def test_the_error_estimate_brackets_the_error(
    effort: str, problem: Problem, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, problem.n))
    made = hypergrad.nystrom_sketch(problem.matrix, rank, generator=generator(seed))
    ends = made.error_estimate(problem.matrix, num_steps=problem.n)
    error = spectral_norm(problem.matrix - dense(made))
    slack = 1e-10 * problem.norm
    assert max(ends.largest, -ends.smallest) <= error + slack
    assert ends.num_hvps <= problem.n
    # As many steps as dimensions see all that the start has a part of.
    assert ends.largest_bound >= 0.9 * error - slack


def test_the_trace_is_without_bias() -> None:
    problem = symmetric(POSITIVE["inverse"](40), seed=1)
    true = float(problem.matrix.trace())
    for kind in ("gaussian", "structured", "columns"):
        estimates, with_probes = [], []
        for seed in range(80):
            made = hypergrad.nystrom_sketch(
                problem.matrix, 6, sketch=kind, generator=generator(seed),
                complement="zero",
            )  # fmt: skip
            estimates.append(made.trace())
            with_probes.append(
                made.trace(problem.matrix, num_probes=2, generator=generator(seed + 9999))
            )
        for sample in (torch.tensor(estimates), torch.tensor(with_probes)):
            error = float(sample.std()) / 80**0.5
            assert abs(float(sample.mean()) - true) <= 4.5 * error
            assert error <= 0.15 * true  # so that the test can fail


def test_a_complete_sketch_knows_the_trace() -> None:
    problem = symmetric(SINGULAR["half_rank"](20), seed=1)
    made = hypergrad.nystrom_sketch(problem.matrix, 15, generator=generator(0))
    assert made.trace() == pytest.approx(float(problem.matrix.trace()), rel=1e-9)


def test_a_sketch_without_an_estimate_of_the_trace_says_so() -> None:
    problem = symmetric(POSITIVE["inverse"](20), seed=1)
    made = hypergrad.nystrom_sketch(problem.matrix, 5, sketch="diagonal")
    with pytest.raises(hypergrad.SolverOptionError, match="Pass the operator"):
        made.trace()
    assert made.trace(problem.matrix, generator=generator(0)) > 0
    with pytest.raises(hypergrad.TreeStructureError):
        made.trace(torch.eye(3, dtype=F64))


# Updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["exponential", "inverse"])
@pytest.mark.parametrize("move", [0.0, 0.05, 0.5])
def test_an_update_is_better_than_a_fresh_sketch(spectrum: str, move: float) -> None:
    for seed in range(3):
        problem = symmetric(POSITIVE[spectrum](100), seed=seed)
        old = hypergrad.nystrom_sketch(problem.matrix, 20, generator=generator(seed))
        skew = gaussian(100, 100, seed=seed) / 10
        turn = torch.linalg.matrix_exp(0.5 * move * (skew - skew.T))
        moved = turn @ problem.matrix @ turn.T
        moved = 0.5 * (moved + moved.T)
        new = old.update(moved, generator=generator(seed))
        fresh = hypergrad.nystrom_sketch(moved, 20, generator=generator(seed))
        assert new.rank == 20
        assert new.num_hvps <= fresh.num_hvps
        assert spectral_norm(moved - dense(new)) < spectral_norm(moved - dense(fresh))
        assert float(torch.linalg.eigvalsh(moved - dense(new))[0]) >= -1e-9


def test_an_update_finds_what_is_new() -> None:
    old_values = torch.cat([torch.ones(3, dtype=F64), torch.zeros(27, dtype=F64)])
    problem = symmetric(old_values, seed=1)
    old = hypergrad.nystrom_sketch(problem.matrix, 5, generator=generator(0))
    assert (old.rank, old.tail) == (3, 0.0)
    new_values = old_values.clone()
    new_values[5] = 0.5
    moved = symmetric(new_values, seed=1).matrix
    new = old.update(moved, generator=generator(1))
    assert new.rank == 4
    assert spectral_norm(moved - dense(new)) <= 1e-9
    # Without random rows nothing outside the old basis can be seen.
    assert old.update(moved, fresh=0).rank == 3


def test_an_update_of_an_empty_sketch_and_of_a_full_one() -> None:
    zero = torch.zeros(6, 6, dtype=F64)
    empty = hypergrad.nystrom_sketch(zero, 2)
    assert empty.rank == 0
    problem = symmetric(POSITIVE["inverse"](6), seed=1)
    assert empty.update(problem.matrix).rank == 1
    with pytest.raises(hypergrad.SolverOptionError, match="the old sketch is empty"):
        empty.update(problem.matrix, fresh=0)
    with pytest.raises(hypergrad.SolverOptionError, match="fresh is -1"):
        empty.update(problem.matrix, fresh=-1)
    full = hypergrad.nystrom_sketch(problem.matrix, 6)
    again = full.update(2.0 * problem.matrix)
    assert again.rank == 6
    torch.testing.assert_close(again.eigenvalues, 2.0 * full.eigenvalues)


def test_an_update_keeps_the_policy() -> None:
    problem = symmetric(INDEFINITE["alternating"](12), seed=1)
    old = hypergrad.nystrom_sketch(problem.matrix, 6, negative_curvature="absolute")
    new = old.update(problem.matrix)
    assert (new.eigenvalues >= 0).all()
    assert new.smallest_eigenvalue < 0
    with pytest.raises(hypergrad.NegativeCurvatureError):
        hypergrad.nystrom_sketch(torch.eye(12, dtype=F64), 6, negative_curvature="raise").update(
            problem.matrix
        )


# Corners ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "structured", "columns", "diagonal"])
@pytest.mark.parametrize("rank", [1, "auto"])
@pytest.mark.parametrize("matrix", [[[0.0]], [[3.0]], [[-3.0]], [[1e-30]], [[1e30]]])
def test_one_dimension(kind: Any, rank: Any, matrix: Any) -> None:
    a = torch.tensor(matrix, dtype=F64)
    size = float(a.abs()) or 1.0
    solver = Nystrom(rank, kind)
    solution = hypergrad.solve(
        a, torch.ones(1, dtype=F64), solver, damping=0.1 * size, on_failure="ignore"
    )
    assert float(solution.value) == pytest.approx(1 / (float(a) + 0.1 * size), rel=1e-10)


@pytest.mark.parametrize("kind", ["gaussian", "structured", "columns", "diagonal"])
@pytest.mark.parametrize("rank", [1, 3, 12, "auto"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_multiples_of_the_identity(kind: Any, rank: Any, scale: float) -> None:
    v = gaussian(12)
    damping = 1e-3 * (scale or 1.0)
    x = hypergrad.nystrom_ihvp(
        scale * torch.eye(12, dtype=F64), v, rank=rank, damping=damping, sketch=kind
    )
    assert relative_error(x, v / (scale + damping)) <= 1e-9


def test_16_bit_products_keep_the_map_positive_and_bounded() -> None:
    problem = symmetric(POSITIVE["inverse"](40), seed=1)
    for kind in ("gaussian", "structured", "columns", "diagonal"):
        made = hypergrad.nystrom_sketch(
            problem.matrix.to(torch.bfloat16), 6, sketch=kind,
            generator=generator(0),
        )  # fmt: skip
        inverse = made.solve_block(torch.eye(40), 1e-2)
        values = torch.linalg.eigvalsh(0.5 * (inverse + inverse.T)) * 1e-2
        assert float(values[0]) > 0
        assert float(values[-1]) <= 1 + 1e-4


# Many right-hand sides ----------------------------------------------------------------------------


def test_a_sketch_solves_stacked_trees_as_it_solves_each() -> None:
    matrix = symmetric(torch.logspace(0, -3, 12, dtype=F64), seed=1).matrix

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        image = matrix @ torch.cat([v["a"].flatten(), v["b"]])
        return {"a": image[:6].reshape(2, 3), "b": image[6:]}

    stacked = {"a": gaussian(5, 2, 3, seed=2), "b": gaussian(5, 6, seed=3)}
    trees = [{name: leaf[i] for name, leaf in stacked.items()} for i in range(5)]
    sketch = hypergrad.nystrom_sketch(product, 4, trees[0], generator=generator(0))
    answer = sketch.solve(stacked, 0.1, batched=True)
    for i, tree in enumerate(trees):
        for name, leaf in sketch.solve(tree, 0.1).items():
            torch.testing.assert_close(answer[name][i], leaf, rtol=1e-12, atol=1e-12)
    with pytest.raises(hypergrad.TreeStructureError):
        sketch.solve(stacked, 0.1)
