"""The tables on sketches in the documentation: ``python -m benchmarks.sketches NAME``."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import hypergrad

F64 = torch.float64
DIM = 300
DAMPINGS = (1e-6, 1e-4, 1e-2, 1.0)
RANKS = (5, 20, 80)


def _padded(values: Tensor, dim: int) -> Tensor:
    return torch.cat([values, torch.zeros(dim - len(values), dtype=F64)])


#: Eigenvalues by dimension, the largest one.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda n: torch.linspace(1.0, 0.5, n, dtype=F64),
    "clustered": lambda n: torch.tensor([1.0, 1e-2, 1e-4], dtype=F64)[torch.arange(n) * 3 // n],
    "exponential": lambda n: torch.exp(-torch.arange(n, dtype=F64) / 10),
    "1/i": lambda n: 1.0 / torch.arange(1, n + 1, dtype=F64),
    "rank-deficient": lambda n: _padded(torch.logspace(0, -2, max(1, n // 10), dtype=F64), n),
    "outliers": lambda n: torch.where(torch.arange(n) < n // 10, 1.0, 1e-2).to(F64),
    "outliers and zeros": lambda n: _padded(torch.ones(max(1, n // 10), dtype=F64), n),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """A = Q diag(values) Q' with a random Q, and a random right-hand side."""

    values: Tensor
    basis: Tensor
    v: Tensor

    @classmethod
    @functools.cache  # a script: the problems of one table at most
    def of(cls, spectrum: str, dim: int, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(dim, dim + 1, generator=generator, dtype=F64)
        return cls(SPECTRA[spectrum](dim), torch.linalg.qr(gaussian[:, :-1]).Q, gaussian[:, -1])

    @functools.cached_property
    def matrix(self) -> Tensor:
        return (self.basis * self.values) @ self.basis.T

    def error(self, x: Tensor, damping: float) -> float:
        """Relative error of an answer."""
        exact = self.basis @ ((self.basis.T @ self.v) / (self.values + damping))
        return float((x - exact).norm() / exact.norm())


def norm(matrix: Tensor) -> float:
    """Spectral norm of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).abs().max())


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *([list(row) for row in rows])]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def complement(dim: int = DIM, seeds: int = 10, ranks: tuple[int, ...] = RANKS) -> str:
    """Relative errors with and without the complement, and over that of v/damping."""
    rows = []
    for spectrum in SPECTRA:
        for rank in ranks:
            cells = [spectrum, str(rank)]
            for damping in DAMPINGS:
                same, equal, plain = [], [], []
                for seed in range(seeds):
                    problem = Problem.of(spectrum, dim, seed)
                    matrix = problem.matrix
                    errors = []
                    for k, kind in ((rank, "quadrature"), (rank, "zero"), (rank + 5, "zero")):
                        solver = hypergrad.Nystrom(
                            min(k, dim),
                            generator=source(seed),
                            complement=kind,  # type: ignore[arg-type]
                        )
                        solution = hypergrad.solve(
                            matrix, problem.v, solver, damping=damping, on_failure="ignore"
                        )
                        errors.append(problem.error(solution.value, damping))
                    floor = 1e-12
                    same.append((errors[0] + floor) / (errors[1] + floor))
                    equal.append((errors[0] + floor) / (errors[2] + floor))
                    plain.append(errors[0] / problem.error(problem.v / damping, damping))
                cells.append(
                    f"{statistics.median(same):.1g} / {statistics.median(equal):.1g} / "
                    f"{max(plain):.2g}"
                )
            rows.append(cells)
    return markdown(["eigenvalues", "rank", *(f"{x:.0e}" for x in DAMPINGS)], rows)


def draws(dim: int = DIM, seeds: int = 5, rank: int = 20) -> str:
    """|A - A_nys| / |A| by kind of test matrix, on dense and on localised eigenvectors."""
    rows = []
    for spectrum in ("exponential", "1/i", "rank-deficient"):
        for place in ("dense", "localised", "dead rows"):
            cells = [spectrum, place]
            for kind in ("gaussian", "structured", "columns", "diagonal", "diagonal given"):
                errors = []
                for seed in range(seeds):
                    matrix = Problem.of(spectrum, dim, seed).matrix
                    if place == "localised":  # rows of very different size
                        size = torch.logspace(0, -2, dim, dtype=F64)
                        size = size[torch.randperm(dim, generator=source(seed))]
                        matrix = size[:, None] * matrix * size
                        matrix = matrix / norm(matrix)
                    if place == "dead rows":
                        alive = torch.rand(dim, generator=source(seed), dtype=F64) < 0.2
                        matrix = matrix * alive * alive[:, None]
                    sketch = hypergrad.nystrom_sketch(
                        matrix,
                        rank,
                        sketch=kind.split()[0],  # type: ignore[arg-type]
                        generator=source(seed),
                        complement="zero",
                        diagonal=matrix.diagonal() if "given" in kind else None,
                    )
                    rest = matrix - (sketch.basis.T * sketch.eigenvalues) @ sketch.basis
                    errors.append(norm(rest) / norm(matrix))
                cells.append(f"{statistics.median(errors):.2g}")
            rows.append(cells)
    header = ["eigenvalues", "eigenvectors", "gaussian", "structured", "columns", "diagonal"]
    return markdown([*header, "diagonal given"], rows)


def drawing_time(dims: tuple[int, ...] = (10_000, 1_000_000), repeats: int = 5) -> str:
    """Milliseconds to draw a test matrix, one thread, best of some."""
    from hypergrad.solvers.embedding import Embedding

    torch.set_num_threads(1)
    rows = []
    for dim in dims:
        for rank in (10, 50) if dim > 100_000 else (10, 50, 400):
            cells = [str(dim), str(rank)]
            for kind in ("gaussian", "structured", "columns"):
                best = float("inf")
                for seed in range(repeats):
                    start = time.perf_counter()
                    Embedding(
                        kind,
                        source(seed),
                        dim,
                        torch.device("cpu"),
                        F64,
                    ).rows(rank)
                    best = min(best, time.perf_counter() - start)
                cells.append(f"{1e3 * best:.3g}")
            rows.append(cells)
    return markdown(["dimension", "rank", "gaussian", "structured", "columns"], rows)


def update(dim: int = DIM, seeds: int = 5, rank: int = 20) -> str:
    """|A - A_nys| / |A| of an update over that of a fresh sketch with as many products."""
    rows = []
    for spectrum in ("exponential", "1/i", "outliers", "rank-deficient"):
        cells = [spectrum]
        for move in (0.0, 0.1, 1.0, 3.0):
            ratios = []
            for seed in range(seeds):
                matrix = Problem.of(spectrum, dim, seed).matrix
                old = hypergrad.nystrom_sketch(
                    matrix, rank, generator=source(seed), complement="zero"
                )
                # Eigenvectors turned by an angle of about `move`, eigenvalues kept.
                skew = torch.randn(dim, dim, generator=source(seed + 99), dtype=F64) / dim**0.5
                turn = torch.linalg.matrix_exp(0.5 * move * (skew - skew.T))
                moved = turn @ matrix @ turn.T
                moved = 0.5 * (moved + moved.T)
                warm = old.update(moved, generator=source(seed + 1))
                fresh = hypergrad.nystrom_sketch(
                    moved, min(rank, dim), generator=source(seed + 1), complement="zero"
                )
                norms = [
                    norm(moved - (sketch.basis.T * sketch.eigenvalues) @ sketch.basis)
                    for sketch in (warm, fresh)
                ]
                ratios.append((norms[0] + 1e-14) / (norms[1] + 1e-14))
            cells.append(f"{statistics.median(ratios):.2g} ({max(ratios):.2g})")
        rows.append(cells)
    return markdown(["eigenvalues", "0", "0.1", "1", "3"], rows)


def error_estimate(dim: int = DIM, seeds: int = 5) -> str:
    """Estimates of |A - A_nys| over the true value: smallest and largest over ranks and seeds."""
    rows = []
    for spectrum in SPECTRA:
        cells = [spectrum]
        found: dict[str, list[float]] = {"power": [], "lanczos": [], "bound": []}
        for rank in (5, 20, 80):
            for seed in range(seeds):
                matrix = Problem.of(spectrum, dim, seed).matrix
                sketch = hypergrad.nystrom_sketch(
                    matrix, rank, generator=source(seed), complement="zero"
                )
                rest = matrix - (sketch.basis.T * sketch.eigenvalues) @ sketch.basis
                true = norm(rest)
                if true < 1e-12:
                    continue
                x = torch.randn(dim, generator=source(seed), dtype=F64)
                for _ in range(10):
                    x = x / x.norm()
                    before, x = x, rest @ x
                ends = sketch.error_estimate(matrix, generator=source(seed))
                found["power"].append(float(before @ x) / true)
                found["lanczos"].append(max(ends.largest, -ends.smallest) / true)
                found["bound"].append(ends.largest_bound / true)
        for values in found.values():
            cells.append(f"{min(values):.2f} to {max(values):.2f}")
        rows.append(cells)
    return markdown(["eigenvalues", "power iteration", "`largest`", "`largest_bound`"], rows)


def trace(dim: int = DIM, seeds: int = 20, products: int = 40) -> str:
    """Root mean square relative error of the trace with as many products each."""
    rows = []
    for spectrum in SPECTRA:
        errors: dict[str, list[float]] = {"seen": [], "own": [], "half": [], "hutchinson": []}
        for seed in range(seeds):
            matrix = Problem.of(spectrum, dim, seed).matrix
            true = float(matrix.trace())
            full = hypergrad.nystrom_sketch(
                matrix, products, generator=source(seed), complement="zero"
            )
            half = hypergrad.nystrom_sketch(
                matrix, products // 2, generator=source(seed), complement="zero"
            )
            signs = torch.randint(0, 2, (products, dim), generator=source(seed)) * 2.0 - 1.0
            signs = signs.to(F64)
            estimates = {
                "seen": float(full.eigenvalues.sum()),
                "own": full.trace(),
                "half": half.trace(matrix, num_probes=products // 2, generator=source(seed)),
                "hutchinson": float((signs @ matrix * signs).sum() / products),
            }
            for name, value in estimates.items():
                errors[name].append((value / true - 1) ** 2)
        rows.append([spectrum, *(f"{statistics.mean(x) ** 0.5:.1e}" for x in errors.values())])
    names = ["sum of `eigenvalues`", "`trace()`", "`trace(operator)`", "random signs alone"]
    return markdown(["eigenvalues", *names], rows)


def automatic_rank(dim: int = DIM, seeds: int = 3) -> str:
    """Rank, products and true condition number that rank="auto" comes to (medians; worst)."""
    rows = []
    for spectrum in SPECTRA:
        for damping in (1e-1, 1e-2, 1e-3):
            ranks, products, conditions = [], [], []
            for seed in range(seeds):
                matrix = Problem.of(spectrum, dim, seed).matrix
                sketch = hypergrad.nystrom_sketch(
                    matrix, "auto", damping=damping, generator=source(seed), max_rank=dim,
                    complement="zero",
                )  # fmt: skip
                ranks.append(sketch.rank)
                products.append(sketch.num_hvps)
                conditions.append(preconditioned_condition(matrix, sketch, damping))
            needed = Problem.of(spectrum, dim, 0).values
            effective = float((needed / (needed + damping)).sum())
            rows.append(
                [spectrum, f"{damping:.0e}", f"{effective:.0f}", f"{statistics.median(ranks):.0f}",
                 f"{statistics.median(products):.0f}", f"{max(conditions):.2g}"]
            )  # fmt: skip
    header = ["eigenvalues", "damping", "effective dimension", "rank", "products", "condition"]
    return markdown(header, rows)


def preconditioned_condition(
    matrix: Tensor, sketch: hypergrad.NystromSketch, damping: float
) -> float:
    """Condition number of P^-1/2 (A + damping I) P^-1/2, exactly."""
    eye = torch.eye(len(matrix), dtype=F64)
    inverse = sketch.preconditioner(damping).matmat(eye)
    values, vectors = torch.linalg.eigh(0.5 * (inverse + inverse.T))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    spectrum = torch.linalg.eigvalsh(root @ (matrix + damping * eye) @ root)
    return float(spectrum[-1] / spectrum[0])


TABLES: dict[str, Callable[[], str]] = {
    "complement": complement,
    "draws": draws,
    "drawing-time": drawing_time,
    "update": update,
    "error-estimate": error_estimate,
    "trace": trace,
    "automatic-rank": automatic_rank,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    print(TABLES[parser.parse_args().table]())


if __name__ == "__main__":
    main()
