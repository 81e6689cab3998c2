"""What holds for every configuration of the dense solver and of the series."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Exact, Neumann, Status
from tests.strategies import (
    F32,
    F64,
    SPECTRA,
    Problem,
    gaussian,
    problems,
    quick_and_thorough,
    relative_error,
    relative_residual,
    right_hand_scales,
    seeds,
)

CONFIGURATIONS = {
    "exact": Exact(),
    "exact ldl": Exact(fallback="ldl"),
    "neumann": Neumann(num_terms=30),
    "chebyshev": Neumann(num_terms=30, acceleration="chebyshev"),
}


@quick_and_thorough
@pytest.mark.parametrize("name", CONFIGURATIONS)
@given(
    problem=problems(SPECTRA, max_dim=10),
    dtype=st.sampled_from([torch.bfloat16, F32, F64]),
    relative=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]),
    size=right_hand_scales,
    seed=seeds,
)
def test_finite_honest_scale_free_and_the_same_in_a_batch(
    effort: str,
    name: str,
    problem: Problem,
    dtype: torch.dtype,
    relative: float,
    size: float,
    seed: int,
) -> None:
    solver, n = CONFIGURATIONS[name], problem.n
    damping = relative * (problem.norm or 1.0)
    rows = gaussian(2, n, seed=seed).to(dtype)
    stored = problem.matrix.to(dtype)

    def run(v: Tensor, batched: bool = False) -> hypergrad.Solution:
        return hypergrad.solve(
            stored, v, solver, damping=damping, batched=batched, on_failure="ignore"
        )

    try:
        alone, together = run(rows[0]), run(rows, batched=True)
    except hypergrad.NonFiniteError:  # the answer is beyond the dtype: a singular system
        assert relative <= 1e-6
        assert dtype != F64
        return
    x, info = alone.value, alone.info
    assert torch.isfinite(x).all()
    outside = relative_residual(stored.to(F64), damping, x, rows[0])
    gain = float(x.to(F64).norm() / rows[0].to(F64).norm())
    eps = torch.finfo(dtype).eps
    rounding = 8 * n * eps * (problem.norm + damping) * gain + 1e-13
    assert abs(outside - info.relative_residual) <= rounding + 1e-6 * outside
    if info.status is Status.CONVERGED:
        assert outside <= 2 * getattr(solver, "rtol", 0.0) + rounding
    assert info.status.failed or info.relative_residual <= 1.0 + rounding
    # In a batch only the order of roundings in the products changes.
    if relative >= 1e-2:
        slack = 1e3 * n * eps / relative
        assert relative_error(together.value[0], x) <= slack
    scale = size if dtype == F64 else 2.0 ** round(math.log2(size) / 4)
    if scale == 2.0 ** round(math.log2(scale)):
        assert torch.equal(run(rows[0] * scale).value, x * scale)
    elif relative >= 1e-2:
        assert relative_error(run(rows[0] * scale).value / scale, x) <= 1e3 * n * eps / relative


@quick_and_thorough
@pytest.mark.parametrize("name", CONFIGURATIONS)
@given(seed=seeds, order=st.permutations(["a", "b", "c"]))
def test_the_order_of_leaves_does_not_matter(
    effort: str, name: str, seed: int, order: list[str]
) -> None:
    v = {"a": gaussian(2, 2, seed=seed), "b": gaussian(3, seed=seed + 1), "c": gaussian(1, seed=1)}
    diagonals = {key: torch.linspace(1.0, 0.2, leaf.numel(), dtype=F64) for key, leaf in v.items()}

    def hvp(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum(leaf.sum() for leaf in tree.values())
        return {
            key: diagonals[key].reshape(leaf.shape) * leaf + 0.1 * total
            for key, leaf in tree.items()
        }

    solver = CONFIGURATIONS[name]
    x = hypergrad.solve(hvp, v, solver, damping=0.5).value
    permuted = hypergrad.solve(hvp, {key: v[key] for key in order}, solver, damping=0.5).value
    for key in v:
        # The start of the Lanczos run is another one; Neumann's step follows, and 30 terms of
        # condition 3 leave little of it.
        assert relative_error(permuted[key], x[key]) <= 1e-2 if "n" in name else 1e-12
