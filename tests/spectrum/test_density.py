from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypergrad
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    POSITIVE,
    SPECTRA,
    Problem,
    flat,
    gaussian,
    generator,
    problems,
    quick_and_thorough,
    seeds,
    symmetric,
    tree_hvp,
)


@quick_and_thorough
@given(
    problem=problems(SPECTRA | {}, max_dim=20),
    steps=st.integers(1, 25),
    probes=st.integers(1, 6),
    seed=seeds,
)
def test_is_a_probability_measure_inside_the_spectrum(
    effort: str, problem: Problem, steps: int, probes: int, seed: int
) -> None:
    density = hypergrad.spectral_density(
        problem.matrix, num_steps=steps, num_probes=probes, generator=generator(seed)
    )
    low, high = float(problem.eigenvalues.min()), float(problem.eigenvalues.max())
    rounding = 100 * torch.finfo(F64).eps * problem.norm
    assert low - rounding <= density.smallest <= density.largest <= high + rounding
    ones = torch.ones(len(density.weights), dtype=F64)
    torch.testing.assert_close(density.weights.sum(dim=1), ones)
    assert bool((density.weights >= 0).all())
    assert density.num_hvps <= steps * max(probes, min(probes, problem.n))
    if steps >= problem.n:
        assert density.smallest == pytest.approx(low, abs=1e-7 * problem.norm)
        assert density.largest == pytest.approx(high, abs=1e-7 * problem.norm)
    # Moments below twice the steps are those of the probes, whatever the spectrum.
    for order in range(1, min(4, 2 * steps - 1)):
        assert abs(density.moment(order)) <= (1 + 1e-9) * problem.norm**order


@quick_and_thorough
@given(problem=problems(SPECTRA | {}, max_dim=12))
def test_everything_is_exact_with_all_probes_and_steps(effort: str, problem: Problem) -> None:
    n = problem.n
    density = hypergrad.spectral_density(problem.matrix, num_steps=n, num_probes=n)
    size = problem.norm or 1.0
    for f in (lambda x: x / size, lambda x: (x / size) ** 3, lambda x: torch.exp(x / size)):
        exact = float(f(problem.eigenvalues).sum())
        estimate = density.integrate(f)
        assert estimate.value == pytest.approx(exact, abs=1e-9 * n)
        assert estimate.standard_error == 0.0


def test_gauss_quadrature_is_exact_below_twice_the_steps() -> None:
    problem = symmetric(torch.linspace(-1.0, 1.0, 60, dtype=F64), seed=1)
    source = generator(4)
    density = hypergrad.spectral_density(
        problem.matrix, num_steps=5, num_probes=1, generator=source
    )
    # The probe, drawn as the library draws it: in float32.
    probe = torch.randn(1, 60, generator=generator(4), dtype=F32).to(F64)[0]
    shares = (problem.basis.T @ (probe / probe.norm())) ** 2
    for order in range(1, 10):
        exact = float(shares @ problem.eigenvalues**order)
        assert density.moment(order) == pytest.approx(exact, abs=1e-13)
    tenth = float(shares @ problem.eigenvalues**10)
    assert abs(density.moment(10) - tenth) > 1e-6


@pytest.mark.parametrize("spectrum", ["clustered", "inverse"])
def test_integrals_are_unbiased_and_know_their_error(spectrum: str) -> None:
    problem = symmetric(POSITIVE[spectrum](50), seed=1)
    damping, count = 1e-2, 60

    def f(x: torch.Tensor) -> torch.Tensor:
        return x / (x + damping)

    estimates = [
        hypergrad.spectral_density(
            problem.matrix, num_steps=25, num_probes=6, generator=generator(seed)
        ).integrate(f)
        for seed in range(count)
    ]
    values = torch.tensor([estimate.value for estimate in estimates], dtype=F64)
    spread, exact = float(values.std()), float(f(problem.eigenvalues).sum())
    # The quadrature's own error for 25 steps at condition 100 is 1e-4 of f at most.
    assert abs(float(values.mean()) - exact) <= 4 * spread / count**0.5 + 1e-4 * exact
    claimed = math.sqrt(sum(estimate.standard_error**2 for estimate in estimates) / count)
    assert 0.75 * spread - 1e-9 <= claimed <= 1.3 * spread + 1e-9


def test_the_curve_is_the_smoothed_histogram_of_the_eigenvalues() -> None:
    problem = symmetric(
        torch.cat([torch.linspace(0.0, 0.2, 60, dtype=F64), torch.tensor([1.0], dtype=F64)]),
        seed=1,
    )
    density = hypergrad.spectral_density(problem.matrix, num_steps=40, num_probes=61)
    grid = torch.linspace(-1.0, 2.0, 3001, dtype=F64)
    width = 0.05
    curve = density.density(grid, width)
    assert float(curve.sum() * 1e-3) == pytest.approx(1.0, abs=1e-9)
    exact = torch.exp(-0.5 * ((grid[:, None] - problem.eigenvalues) / width) ** 2).mean(dim=1)
    exact = exact / (width * math.sqrt(2 * math.pi))
    # Forty steps resolve features of the width 0.05 in a range of one to far below a percent.
    assert float((curve - exact).abs().max()) <= 1e-3 * float(exact.max())
    assert density.density(grid.to(F32).reshape(-1, 1), width).shape == (3001, 1)
    assert density.density(grid.to(F32)).dtype == F32


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_any_dtype_and_scale(dtype: torch.dtype, spectrum: str) -> None:
    for scale in (1e-30, 1.0, 1e30):
        matrix = symmetric(SPECTRA[spectrum](12), seed=1, scale=scale).matrix.to(dtype)
        density = hypergrad.spectral_density(
            matrix, num_steps=6, num_probes=3, generator=generator(1)
        )
        assert density.nodes.dtype == F64
        assert bool(torch.isfinite(density.nodes).all())
        size = float(torch.linalg.eigvalsh(matrix.double()).abs().max())
        assert float(density.nodes.abs().max()) <= size * (1 + 20 * torch.finfo(dtype).eps)


def test_trees_one_dimension_and_zero() -> None:
    tree = {"w": gaussian(2, 3), "b": gaussian(3)}
    problem = symmetric(torch.linspace(1.0, 2.0, 9, dtype=F64), seed=1)
    density = hypergrad.spectral_density(
        tree_hvp(problem.matrix, tree), like=tree, num_steps=9, num_probes=len(flat(tree))
    )
    assert density.moment(1) == pytest.approx(1.5)
    single = hypergrad.spectral_density(torch.full((1, 1), 3.0), num_probes=5)
    assert (single.smallest, single.largest, single.num_hvps) == (3.0, 3.0, 1)
    zero = hypergrad.spectral_density(torch.zeros(5, 5), num_probes=2, generator=generator(0))
    assert (zero.smallest, zero.largest, zero.num_hvps) == (0.0, 0.0, 2)
    assert bool(torch.isfinite(zero.density(torch.zeros(3))).all())


def test_one_probe_does_not_claim_to_know_its_error() -> None:
    matrix = symmetric(SPECTRA["inverse"](30), seed=1).matrix
    density = hypergrad.spectral_density(matrix, num_probes=1, generator=generator(1))
    assert math.isinf(density.integrate(torch.exp).standard_error)


def test_bad_input_is_named() -> None:
    matrix = symmetric(SPECTRA["alternating"](10), seed=1).matrix
    for bad in (0, -1, 2.5, True):
        with pytest.raises(hypergrad.SolverOptionError, match="num_steps"):
            hypergrad.spectral_density(matrix, num_steps=bad)  # type: ignore[arg-type]
        with pytest.raises(hypergrad.SolverOptionError, match="num_probes"):
            hypergrad.spectral_density(matrix, num_probes=bad)  # type: ignore[arg-type]
    density = hypergrad.spectral_density(matrix, generator=generator(1))
    with pytest.raises(hypergrad.NonFiniteError, match="not finite at the node -"):
        density.integrate(torch.log)
    with pytest.raises(hypergrad.SolverOptionError, match="width"):
        density.density(torch.zeros(3), width=0.0)
    with pytest.raises(hypergrad.NotSymmetricError, match="asymmetry"):
        hypergrad.spectral_density(gaussian(20, 20), generator=generator(1))
    with pytest.raises(hypergrad.NotSymmetricError, match="asymmetry"):
        hypergrad.extreme_eigenvalues(gaussian(20, 20))


def test_plots_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    density = hypergrad.spectral_density(
        symmetric(SPECTRA["outliers"](30), seed=1).matrix, generator=generator(1)
    )
    path = tmp_path / "density.png"
    axes = density.plot(path=path)
    assert path.stat().st_size > 1000
    assert density.plot(ax=axes) is axes
    assert axes.get_xlabel() == "eigenvalue"


def test_the_plot_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    density = hypergrad.spectral_density(torch.eye(3), num_probes=3)
    blocked: dict[str, Any] = {"matplotlib": None, "matplotlib.figure": None}
    for name, module in blocked.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        density.plot()


def test_the_largest_value_is_one_that_counts() -> None:
    """Runs that end at an invariant subspace, but for rounding, have nodes of no weight."""
    ended = 0
    for seed in range(150):
        values = torch.tensor([0.01, 0.1, *[1.0] * (2 + seed % 3)], dtype=F64)
        density = hypergrad.spectral_density(
            symmetric(values, seed=seed).matrix,
            num_steps=4 + seed % 2,
            num_probes=1,
            generator=generator(seed),
        )
        ended += bool((density.weights == 0).any())
        assert density.largest == float(density.top(1))
    assert ended > 0


@quick_and_thorough
@given(
    problem=problems(SPECTRA | {}, max_dim=20),
    steps=st.integers(1, 25),
    probes=st.integers(1, 6),
    seed=seeds,
)
def test_top_is_never_above_the_eigenvalues(
    effort: str, problem: Problem, steps: int, probes: int, seed: int
) -> None:
    density = hypergrad.spectral_density(
        problem.matrix, num_steps=steps, num_probes=probes, generator=generator(seed)
    )
    longest = int((density.weights > 0).sum(dim=1).max())
    top = density.top(longest)
    exact = torch.linalg.eigvalsh(problem.matrix).flip(0)[:longest]
    assert bool((top <= exact + 100 * torch.finfo(F64).eps * problem.norm).all())
    assert bool((top.diff() <= 0).all())
    assert float(top[0]) == density.largest
    with pytest.raises(hypergrad.SolverOptionError, match="longest Lanczos run"):
        density.top(longest + 1)


def test_top_finds_what_stands_apart_and_no_padding() -> None:
    values = torch.cat([torch.tensor([10.0, 8.0, 5.0]), torch.linspace(-1.0, 1.0, 60)]).to(F64)
    density = hypergrad.spectral_density(
        symmetric(values, seed=3).matrix, num_steps=25, num_probes=3, generator=generator(0)
    )
    torch.testing.assert_close(density.top(3), values[:3], rtol=1e-10, atol=0)
    # Runs of different lengths: the identity's columns see one, two or three eigenvalues each.
    block = torch.zeros(6, 6, dtype=F64)
    block[0, 0] = 4.0
    block[1:3, 1:3] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    block[3:, 3:] = torch.tensor([[0.5, 0.1, 0.0], [0.1, 0.5, 0.1], [0.0, 0.1, 0.5]])
    density = hypergrad.spectral_density(block, num_steps=6, num_probes=6)
    exact = torch.linalg.eigvalsh(block).flip(0)
    top = density.top(3)
    assert float(top[0]) == pytest.approx(4.0)
    assert bool((top <= exact[:3] + 1e-12).all())


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_top_needs_a_count(count: Any) -> None:
    density = hypergrad.spectral_density(torch.eye(3, dtype=F64), num_steps=2, num_probes=1)
    with pytest.raises(hypergrad.SolverOptionError, match="count"):
        density.top(count)
