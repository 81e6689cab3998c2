"""The atlas judges fairly: a lie is marked, a peer's win is found, budgets are kept."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hypergrad
from benchmarks.atlas import __main__ as atlas
from benchmarks.atlas import cases, compare, ours, records
from benchmarks.atlas.records import Answer, Record
from benchmarks.benchmarks import stability
from benchmarks.peers import __main__ as peers
from benchmarks.peers.adapters import scipy as scipy_adapter
from benchmarks.peers.protocol import Peer, Task, attempt, listen, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def diagonal_system(dtype: str = "float64", size: float = 1.0, budget: int = 6) -> cases.System:
    """Six eigenvalues from 1 to 1e-2 and no damping to speak of."""
    case = cases.Case("damping", "flat", None, 1e-3, dtype, size, (budget,))
    return cases.make_system(case, np.eye(6, dtype=dtype), np.logspace(0, -2, 6).astype(dtype))


def entry(name: str) -> ours.Entry:
    return ours.chosen([name])[0]


# Cases ----------------------------------------------------------------------------------------


def test_every_axis_that_is_promised_is_there() -> None:
    every = list(cases.all_cases())
    assert {case.spectrum for case in every} == set(cases.SPECTRA)
    assert {case.condition for case in every} >= {1e0, 1e12}
    assert {case.damping for case in every} >= {1e-8, 1e0}
    assert {case.size for case in every} >= {1e-30, 1e30}
    assert {case.dtype for case in every} == {"float32", "float64"}
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_reference_solves_the_system(dtype: str, size: float) -> None:
    system = diagonal_system(dtype, size)
    exact = (system.v.astype(np.longdouble) / np.longdouble(size)) / (
        system.values.astype(np.longdouble) + np.longdouble(system.case.damping)
    )
    # Rounded once to float64.
    np.testing.assert_allclose(system.truth, exact.astype(float), rtol=1e-15)
    assert system.relative_error(system.truth * size) < 1e-15
    assert system.relative_error(np.zeros(6)) == 1.0
    assert system.relative_residual(np.zeros(6)) == 1.0


def test_the_reference_is_right_at_condition_1e12() -> None:
    case = cases.Case("condition", "exponential", 1e12, cases.NEXT_TO_NOTHING, "float64")
    basis, values = ours._factors(case)
    system = cases.make_system(case, basis, values)
    # A float64 factorisation alone leaves eps x condition = 2e-4 here; one that is right to the
    # last digit leaves the rounding of its own entries: |A| |x| eps = 1e12 x 1e-16 of |v|.
    assert system.relative_residual(system.truth) < 1e-3
    projected = basis.T.astype(np.longdouble) @ system.v.astype(np.longdouble)
    known = basis.astype(np.longdouble) @ (projected / (values + np.longdouble(case.damping)))
    # The factors are orthogonal to eps only, which moves A's small eigenvalues by eps of 1e-12.
    assert np.linalg.norm(known - system.truth) < 1e-3 * np.linalg.norm(system.truth)


def test_systems_survive_their_file(tmp_path: Path) -> None:
    systems = [diagonal_system("float32", 1e30), diagonal_system()]
    cases.save(systems, tmp_path / "cases.npz")
    for before, after in zip(systems, cases.load(tmp_path / "cases.npz"), strict=True):
        assert before.case == after.case
        for name in ("basis", "values", "v", "truth"):
            kept, read = getattr(before, name), getattr(after, name)
            assert kept.dtype == read.dtype
            np.testing.assert_array_equal(kept, read)


# Judgement ------------------------------------------------------------------------------------


def judged(answer: Answer) -> Record:
    return records.judge(diagonal_system(), answer, 6, "peer", "a solver", "cg", "budget", 6)


def test_a_lie_is_a_silent_failure() -> None:
    system = diagonal_system()
    right, wrong = system.truth, system.truth * 0.5
    assert judged(Answer(wrong, "converged", 1e-5)).silent
    assert not judged(Answer(right, "converged", 1e-5)).silent
    # Said, whatever the residual is.
    assert not judged(Answer(wrong, "failed")).silent
    assert not judged(Answer(None, "error")).silent
    # Half of the answer leaves half of v: without a word that is a silent failure.
    assert judged(Answer(wrong, "nothing")).silent
    assert not judged(Answer(right * 0.95, "nothing")).silent
    # A report of the residual is true or false.
    assert not judged(Answer(wrong, "figure", 0.5)).silent
    assert judged(Answer(wrong, "figure", 0.01)).silent
    # No number at all, and no word.
    assert judged(Answer(wrong * math.nan, "nothing")).silent
    assert judged(Answer(wrong * math.nan, "converged", 1e-5)).error == math.inf


def test_a_claim_is_held_to_half_the_digits_at_most() -> None:
    # A tolerance below the rounding cannot be met by anybody.
    nearly = diagonal_system().truth * (1 + 1e-9)
    assert not judged(Answer(nearly, "converged", 1e-16)).silent
    assert judged(Answer(nearly * (1 + 1e-6), "converged", 1e-16)).silent


def test_records_survive_their_file(tmp_path: Path) -> None:
    some = [judged(Answer(None, "error", detail="ValueError")), judged(Answer(None, "nothing"))]
    some.append(replace(some[0], condition=1e6))
    records.write(some, tmp_path / "some.csv")
    assert records.read(tmp_path / "some.csv") == some


@pytest.mark.parametrize("cost", [lambda k: k, lambda k: k + 10, lambda k: 2 * k + 1])
def test_a_budget_is_kept_and_used(cost: object) -> None:
    assert callable(cost)
    answer, spent = records.within(100, lambda k: (Answer(None, "nothing", detail=str(k)), cost(k)))
    assert 80 <= spent <= 100
    assert cost(int(answer.detail)) == spent


def test_columns_are_counted_one_by_one() -> None:
    products = records.Products(lambda x: x)
    products(np.ones(3))
    products(np.ones((3, 4)))
    assert products.count == 5


# The library's half ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Exact", "CG", "Nyström", "Nyström, columns", "Neumann"])
def test_the_products_counted_are_those_reported(name: str) -> None:
    system = cases.make_system(
        cases.Case("damping", "rank-deficient", None, 1e-2, "float64"),
        *ours._factors(cases.Case("damping", "rank-deficient", None, 1e-2, "float64")),
    )
    config = entry(name).make(entry(name).defaults())
    seen: list[int] = []

    def product(x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        basis, values = torch.from_numpy(system.basis), torch.from_numpy(system.values)
        return basis @ (values * (basis.T @ x))

    v = torch.from_numpy(system.v)
    info = hypergrad.solve(product, v, config, damping=1e-2, on_failure="ignore").info
    _, spent = ours.attempt(system, entry(name).make(entry(name).defaults()))
    assert len(seen) == info.num_hvps == spent


def test_the_library_keeps_to_a_budget_and_is_not_silent() -> None:
    case = cases.Case("damping", "1/i", None, 1e-2, "float64")
    system = cases.make_system(case, *ours._factors(case))
    for name in ("CG", "Neumann", "Nyström, columns"):
        record = ours.record(system, entry(name), "budget", 30)
        assert 20 < record.hvps <= 30
        assert not record.silent
    # (1 - sqrt(1/k)) / (1 + sqrt(1/k)) to the 28th for condition 100, in the energy norm, twice:
    # the residual of CG's best iterate is within sqrt(k) of it.
    assert ours.record(system, entry("CG"), "budget", 30).error < 2 * 0.82**28 * 10


@pytest.mark.parametrize("cell", list(stability.CELLS))
def test_a_cell_of_the_atlas_is_tracked(cell: str) -> None:
    suite = stability.Atlas()
    suite.setup("CG", cell)
    value = suite.track_error_at_100("CG", cell)
    # CG stops at negative curvature, with an error of at most about that of x = 0.
    assert value <= 0.1 if cell == "indefinite" else value < -1


def test_a_solver_that_the_library_lacks_is_an_error() -> None:
    missing = replace(entry("CG"), configuration="NoSuchSolver")
    with pytest.raises(AttributeError, match="NoSuchSolver"):
        missing.make({})
    with pytest.raises(SystemExit, match="no such solvers"):
        ours.chosen(["CGG"])


# Peers ----------------------------------------------------------------------------------------


def test_scipy_runs_through_its_adapter() -> None:
    rows = list(run(scipy_adapter.OWNER, scipy_adapter.PEERS, [diagonal_system(budget=12)]))
    assert [row.solver for row in rows] == ["cg", "cg", "minres", "minres", "gmres", "gmres"]
    for row in rows:
        assert row.hvps <= 12 or row.mode == "default"
        # Six eigenvalues take six products.
        assert row.error < 1e-9 or row.mode == "default"
        assert not row.silent or row.solver == "minres"  # which stops by a tolerance of its own


def test_a_warning_is_a_word_and_an_exception_too() -> None:
    def warned() -> Answer:
        warnings.warn("did not converge", RuntimeWarning, stacklevel=1)
        return Answer(np.ones(1), "nothing")

    assert listen(warned).said == "failed"
    assert listen(lambda: Answer(np.ones(1), "nothing")).said == "nothing"

    def refused() -> Answer:
        raise ValueError

    assert listen(refused).said == "error"


def test_a_peer_gets_its_own_copy_of_v() -> None:
    def spoil(task: Task) -> Answer:
        task.v[:] = 0.0
        return Answer(task.v, "nothing")

    system = diagonal_system()
    attempt(system, Peer("spoiler", "cg", spoil), None)
    assert bool((system.v != 0).all())


def test_the_peers_side_needs_neither_the_library_nor_torch() -> None:
    code = (
        "import benchmarks.peers.run, benchmarks.peers.protocol, sys;"
        "print('torch' in sys.modules, 'hypergrad' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_a_package_that_does_not_install_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases.save([diagonal_system()], tmp_path / "cases.npz")
    monkeypatch.setattr(peers, "install", lambda package, directory: "ERROR: no such thing")
    monkeypatch.setattr(peers, "version", lambda name, directory: "")
    peers.main(["--output", str(tmp_path), "--environments", str(tmp_path), "--only", "pyDVL"])
    assert "pyDVL : ERROR: no such thing" in capsys.readouterr().out
    assert "no such thing" in (tmp_path / "peers" / "versions.csv").read_text("utf-8")
    assert not (tmp_path / "peers" / "pydvl.csv").exists()


# Comparison -----------------------------------------------------------------------------------


def of(owner: str, solver: str, family: str, hvps: int, error: float) -> Record:
    base = judged(Answer(diagonal_system().truth, "converged", 1e-5))
    return replace(
        base, owner=owner, solver=solver, family=family, hvps=hvps, error=error, budget=hvps
    )


FAMILIES = {"CG": "cg", "Neumann": "neumann"}


def test_a_peer_that_wins_is_found() -> None:
    mine = [of("hypergrad", "CG", "cg", 10, 1e-3), of("hypergrad", "Neumann", "neumann", 10, 0.5)]
    winner = of("peer", "its cg", "cg", 10, 1e-6)
    slow = of("peer", "its series", "neumann", 10, 1e-2)  # beats Neumann, not CG
    found = compare.wins(mine, [winner, slow], FAMILIES, lambda cell, name, hvps: None)
    assert {(win.solver, win.against) for win in found} == {
        ("its cg", "any"), ("its cg", "kind"), ("its series", "kind"),
    }  # fmt: skip
    assert found[0].factor == pytest.approx(1000.0)
    assert found[0].ours_by == "CG"


@pytest.mark.parametrize(
    ("more", "residual", "error", "why"),
    [
        (1e-6, 1e-3, 1e-3, "checks"),
        (1e-3, 1e-9, 1e-3, "residual"),
        (1e-3, 1e-1, 4e-15, "rounding"),  # less than ten times eps times a condition of two
        (1e-3, 1e-1, 1e-3, "unexplained"),
    ],
)
def test_a_win_is_explained_by_measurement(
    more: float, residual: float, error: float, why: str
) -> None:
    peer = replace(of("peer", "its cg", "cg", 10, min(1e-6, error / 3)), residual=1e-4)
    mine = replace(of("hypergrad", "CG", "cg", 10, error), residual=residual)

    def rerun(cell: tuple[object, ...], name: str, hvps: int) -> Record:
        assert 10 < hvps <= 13
        return of("hypergrad", "CG", "cg", hvps, more)

    found = compare.wins([mine], [peer], {"CG": "cg"}, rerun)
    assert [win.why for win in found] == [why, why]
    stopped = replace(mine, detail="NEGATIVE_CURVATURE")
    found = compare.wins([stopped], [peer], {"CG": "cg"}, rerun)
    assert {win.why for win in found} == {"checks" if why == "checks" else "curvature"}


def test_no_answer_is_no_win_and_rounding_is_a_tie() -> None:
    mine = [of("hypergrad", "CG", "cg", 10, 3e-15)]
    theirs = [
        of("peer", "as good", "cg", 10, 2e-15),
        of("peer", "worse than nothing", "neumann", 10, 40.0),
        of("peer", "no number", "cg", 10, math.inf),
    ]
    assert compare.wins(mine, theirs, {"CG": "cg"}, lambda cell, name, hvps: None) == []


def test_the_library_is_run_at_the_products_that_the_peer_spent() -> None:
    # What is known took more products than the peer: it does not count, a run within does.
    mine = [of("hypergrad", "CG", "cg", 10, 1e-9)]
    asked: list[tuple[str, int]] = []

    def rerun(cell: tuple[object, ...], name: str, hvps: int) -> Record:
        asked.append((name, hvps))
        return of("hypergrad", name, "cg", hvps, 1e-2)

    peer = of("peer", "its cg", "cg", 7, 1e-3)
    (win, _) = compare.wins(mine, [peer], {"CG": "cg"}, rerun)
    assert win.ours == 1e-2
    assert asked == [("CG", 7)]  # once, though compared twice
    assert win.why == "checks"  # at ten products, which is known, the library is ahead
    assert compare.wins([], [peer], {"CG": "cg"}, lambda c, n, h: of("", n, "cg", h, 1e-4)) == []


def test_the_whole_of_a_tiny_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [case for case in cases.all_cases() if case.slice == "size"][:2]
    few += [case for case in cases.all_cases() if case.slice == "damping"][:2]
    few += [replace(few[0], slice="curve", dtype="float64", budgets=(5, 10))]
    monkeypatch.setattr(ours, "all_cases", lambda: iter(few))
    some = run(scipy_adapter.OWNER, scipy_adapter.PEERS[:1], ours.make_systems())
    records.write(some, tmp_path / "peers" / "scipy.csv")
    atlas.main(["--output", str(tmp_path), "--solvers", "CG", "Neumann"])
    rows = records.read(tmp_path / "ours.csv")
    assert {row.solver for row in rows} == {"CG", "Neumann"}
    assert not any(row.silent for row in rows)
    for picture in ("ours_damping_float32", "size", "curves", "advantage"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000
    assert (tmp_path / "wins.csv").read_text("utf-8").startswith("against,owner,solver")
