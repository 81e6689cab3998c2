"""``CG(compile=True, mixed_precision=True)``: products in float32, answers of float64.

But where said otherwise the backend runs the captured graph without generating code: then rounds
are as they are, and the products of rounded vectors are made in float64.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from hypergrad import Status
from hypergrad.operators import compilation, loops
from hypergrad.solvers import compiled_cg, traced_cg
from tests.solvers.compiled import (
    OPERATORS,
    answers_watched,
    generating,
    loss,
    passes_counted,
    point,
    right_hand_side,
)
from tests.strategies import F32, F64, gaussian, symmetric

pytestmark = pytest.mark.usefixtures("capture_only")

N = 12


def mixed(rtol: float = 1e-10, **options: Any) -> hypergrad.CG:
    return hypergrad.CG(rtol=rtol, compile=True, mixed_precision=True, **options)


def conditioned(digits: float, dtype: torch.dtype = F64) -> Tensor:
    """A positive definite matrix, eigenvalues from one to ten to minus ``digits``."""
    return symmetric(torch.logspace(0, -digits, N, dtype=F64), seed=1).matrix.to(dtype)


def graphs_used() -> list[str]:
    """The recurrences that were run, by the names of their graphs."""
    graphs = compilation._graphs.values()
    names = [graph.what.partition(" with ")[0] for graph in graphs if graph.proved]
    return [name for name in names if name.startswith("CG")]


BATCH = point(0)[1:]
MATRIX = symmetric(torch.logspace(0, -2, N, dtype=F64), seed=2).matrix
PROBLEMS: dict[str, Callable[[], Any]] = {name: partial(OPERATORS[name], F64) for name in OPERATORS}
PROBLEMS |= {
    "matrix": lambda: conditioned(2.0),
    "multiple": lambda: 2.0 * hypergrad.as_operator(conditioned(2.0)) + 0.25,
    "callable": lambda: hypergrad.as_operator(
        lambda x: MATRIX @ x, like=gaussian(N), batchable=True
    ),
    "closure": lambda: hypergrad.hessian(lambda p: loss(p, *BATCH), point(0)[0]) + 2.0,
}


def rhs(name: str) -> Any:
    vector = name in ("matrix", "multiple", "callable")
    return gaussian(N) if vector else right_hand_side()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answer_is_that_of_float64(name: str, keep: bool) -> None:
    operator, v = hypergrad.as_operator(PROBLEMS[name]()), rhs(name)
    found = hypergrad.solve(operator, v, mixed(1e-12, reorthogonalize=keep), damping=0.5)
    assert found.info.status is Status.CONVERGED
    x, flat = (operator.layout.flatten(tree) for tree in (found.value, v))
    residual = flat - operator.to_dense() @ x - 0.5 * x
    assert float(residual.norm() / flat.norm()) <= 1.01e-12
    assert found.info.residual_norm == pytest.approx(float(residual.norm()), rel=0.05)
    assert graphs_used() == ["CG in float32"]


@given(
    digits=st.floats(0.0, 12.0),
    size=st.integers(-12, 12),
    rtol=st.floats(1e-13, 1e-2),
    budget=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    keep=st.booleans(),
)
def test_reports_are_true(
    digits: float, size: int, rtol: float, budget: int, seed: int, keep: bool
) -> None:
    """Of every condition, scale, tolerance and budget."""
    a, v = conditioned(digits), 10.0**size * gaussian(N, seed=seed)
    solver = mixed(rtol, max_iters=budget, reorthogonalize=keep)
    found = hypergrad.solve(a, v, solver, on_failure="ignore")
    check_report(found, a, v, rtol, budget)


def check_report(found: hypergrad.Solution, a: Tensor, v: Tensor, rtol: float, budget: int) -> None:
    residual = float((v - a @ found.value).norm())
    rounding = 1e-15 * float(found.value.norm()) + 1e-15 * float(v.norm())
    assert abs(found.info.residual_norm - residual) <= 100 * rounding
    assert found.info.converged == (found.info.residual_norm <= rtol * float(v.norm()))
    # The eager solver, which has the last word, takes one iteration at least.
    assert found.info.iterations <= budget + 1


@pytest.mark.parametrize("size", [1e-300, 1e-60, 1e-42, 1e60, 1e150])
def test_operators_beyond_the_range_of_float32(size: float) -> None:
    a, v = size * conditioned(2.0), gaussian(N)
    info = hypergrad.solve(a, v, mixed()).info
    assert info.converged
    assert info.relative_residual <= 1e-10


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_right_hand_sides_beyond_the_range_of_float32(size: float) -> None:
    a, v = conditioned(2.0), size * gaussian(N)
    found = hypergrad.solve(a, v, mixed())
    assert found.info.converged
    torch.testing.assert_close(
        found.value / size, torch.linalg.solve(a, v / size), rtol=1e-7, atol=1e-8
    )


@pytest.mark.parametrize("start", [-16, -8, -3])
def test_a_warm_start_is_gone_on_from(start: int) -> None:
    a, v = conditioned(2.0), gaussian(N)
    exact = torch.linalg.solve(a, v)
    near = exact + 10.0**start * gaussian(N, seed=3)
    warm = hypergrad.solve(a, v, mixed(), x0=near)
    cold = hypergrad.solve(a, v, mixed()).info
    assert warm.info.converged
    assert warm.info.iterations < cold.iterations
    torch.testing.assert_close(warm.value, exact, rtol=1e-7, atol=1e-8)


def test_a_budget_ends_it_with_the_best_so_far() -> None:
    a, v = conditioned(5.0), gaussian(N)
    norms = []
    for count in range(1, 30):
        solver = mixed(1e-13, max_iters=count)
        info = hypergrad.solve(a, v, solver, on_failure="ignore").info
        assert info.iterations <= count
        norms.append(info.relative_residual)
        if info.converged:
            break
        assert info.status is Status.MAX_ITERATIONS
        assert info.iterations == count
    assert len(norms) > N
    assert all(norm <= 1.0 for norm in norms)


def test_products_of_both_dtypes_are_counted() -> None:
    a, v = conditioned(1.0), gaussian(N)
    hypergrad.solve(a, v, mixed(1e-3))
    for rtol, least in [(1e-3, 1), (1e-12, 2)]:
        info = hypergrad.solve(a, v, mixed(rtol)).info
        rounds = info.num_hvps - info.iterations
        assert least <= rounds <= 4


@pytest.mark.parametrize("lowest", [-2.0, -1e-3])
def test_negative_curvature_is_reported_with_its_direction(lowest: float) -> None:
    values = torch.linspace(1.0, 3.0, N, dtype=F64)
    values[0] = lowest
    a, v = symmetric(values, seed=1).matrix, gaussian(N)
    info = hypergrad.solve(a, v, mixed(), on_failure="ignore").info
    assert info.status is Status.NEGATIVE_CURVATURE
    assert isinstance(info.direction, Tensor)
    assert float(info.direction @ a @ info.direction) <= 0


def test_a_singular_system_is_no_success() -> None:
    values = torch.linspace(0.0, 3.0, N, dtype=F64)
    a, v = symmetric(values, seed=1).matrix, gaussian(N)
    info = hypergrad.solve(a, v, mixed(), on_failure="ignore").info
    assert info.status in (Status.NEGATIVE_CURVATURE, Status.STAGNATED)
    assert info.relative_residual > 1e-3


def test_products_that_are_not_symmetric_are_refused() -> None:
    a = conditioned(1.0) + torch.triu(gaussian(N, N), 1)
    with pytest.raises(hypergrad.NotSymmetricError):
        hypergrad.solve(a, gaussian(N), mixed(), damping=20.0)


@pytest.mark.parametrize("part", [1e-2, 2e-2])
@pytest.mark.parametrize("budget", [None, 2, 3, 8])
def test_slight_asymmetry_is_that_of_float64(part: float, budget: int | None) -> None:
    """Which float32 could not tell from rounding, were it not for the first two products."""
    a, k = conditioned(1.0), gaussian(N, N, seed=4)
    a = a + (k - k.T) * part * a.norm() / (k - k.T).norm()
    for solver in (mixed(1e-12, max_iters=budget), hypergrad.CG(rtol=1e-12, max_iters=budget)):
        with pytest.raises(hypergrad.NotSymmetricError):
            hypergrad.solve(a, gaussian(N), solver)


@pytest.mark.parametrize("damping", [1e6, 1e8, 1e12, 1e40])
def test_a_large_damping_hides_no_product(damping: float) -> None:
    """A graph is compared with eager products; what damping leaves of them is no evidence."""
    a, v = conditioned(1.0), gaussian(N)
    for solver in (mixed(1e-11), hypergrad.CG(rtol=1e-11, compile=True)):
        assert hypergrad.solve(a, v, solver, damping=damping).info.converged  # without a warning
        assert hypergrad.solve(a, v, solver).info.converged
    assert sorted(graphs_used()) == ["CG", "CG in float32"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    a = conditioned(1.0)
    a[2, 3] = a[3, 2] = bad
    with pytest.raises(hypergrad.NonFiniteError):
        hypergrad.solve(a, gaussian(N), mixed())


def test_a_tolerance_below_rounding_is_no_success() -> None:
    a = conditioned(4.0)
    v = a @ gaussian(N)
    info = hypergrad.solve(a, v, mixed(1e-18), on_failure="ignore").info
    assert info.status is Status.STAGNATED
    assert info.relative_residual <= 1e-15


def test_a_derivative_is_right_in_float64() -> None:
    v = gaussian(N).requires_grad_()
    a = conditioned(2.0).requires_grad_()
    found = hypergrad.solve(a, v, mixed(1e-13))
    of_a, of_v = torch.autograd.grad(found.value.sum(), (a, v))
    exact = torch.linalg.solve(a, v)
    expected_a, expected_v = torch.autograd.grad(exact.sum(), (a, v))
    torch.testing.assert_close(of_v, expected_v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of_a, expected_a, rtol=1e-9, atol=1e-9)
    (report,) = found.backward
    assert report.converged


def test_a_hypergradient_is_right_in_float64() -> None:
    params, x, y = point(0)
    weight = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def inner(inner_params: dict[str, Tensor], outer_params: Tensor) -> Tensor:
        decay = sum((leaf**2).sum() for leaf in inner_params.values())
        return loss(inner_params, x, y) + outer_params.exp() * decay

    def outer(inner_params: dict[str, Tensor], outer_params: Tensor) -> Tensor:
        return loss(inner_params, x, y + 0.1)

    found = [
        hypergrad.hypergradient(inner, outer, params, weight, solver=solver).grad
        for solver in (mixed(1e-12), hypergrad.Exact())
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_a_solve_in_float32_is_the_same_without() -> None:
    a, v = conditioned(2.0, F32), gaussian(N).to(F32)
    plain = hypergrad.solve(a, v, hypergrad.CG(rtol=1e-4, compile=True), damping=0.1)
    found = hypergrad.solve(a, v, mixed(1e-4), damping=0.1)
    assert torch.equal(found.value, plain.value)
    assert graphs_used() == ["CG"]


def test_a_constant_in_float64_is_right_all_the_same() -> None:
    weights = torch.linspace(1.0, 2.0, N, dtype=F64)

    def weighted(p: Tensor) -> Tensor:
        return (weights * torch.cosh(p)).sum()

    v = gaussian(N)
    operator = hypergrad.hessian(weighted, torch.zeros(N, dtype=F64))
    found = hypergrad.solve(operator, v, mixed(1e-13))
    torch.testing.assert_close(found.value, v / weights, rtol=1e-11, atol=1e-12)


def test_integers_stay_integers() -> None:
    inputs, labels = gaussian(30, 4), torch.arange(30) % 3

    def classify(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ w, y) + 0.01 * w.square().sum()

    w = 0.1 * gaussian(4, 3, seed=5)
    operator = hypergrad.hessian(classify, w, inputs, labels)
    found = hypergrad.solve(operator, torch.ones_like(w), mixed(1e-12))
    exact = hypergrad.solve(operator, torch.ones_like(w), hypergrad.Exact()).value
    torch.testing.assert_close(found.value, exact, rtol=1e-9, atol=1e-9)
    assert graphs_used() == ["CG in float32"]


def test_a_loss_that_draws_is_not_believed() -> None:
    draws = iter(range(1000))

    def restless(p: Tensor) -> Tensor:
        return (p**2).sum() * (1.0 + next(draws))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        operator = hypergrad.hessian(restless, gaussian(N))
        found = hypergrad.solve(operator, gaussian(N), mixed(), damping=0.1)
    assert any(issubclass(w.category, hypergrad.CompilationWarning) for w in seen)
    assert found.info.converged


def test_a_graph_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = answers_watched(monkeypatch, compiled_cg)
    hypergrad.solve(conditioned(3.0), gaussian(N), mixed())
    assert answered == [True]


# With generated code ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["matrix", "hessian", "ggn", "callable", "closure"])
def test_products_in_float32_give_the_answer_of_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass a round, in float64; from the vector on all of the loop is float32."""
    within: set[torch.dtype] = set()

    class Looking(loops.HoistInvariants):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            for body in bodies_of(graph):
                within.update(node.meta["val"].dtype for node in products_of(body))

    operator, v = hypergrad.as_operator(PROBLEMS[name]()), rhs(name)
    with generating(monkeypatch):
        monkeypatch.setattr(loops, "HoistInvariants", Looking)
        counts = passes_counted(monkeypatch)
        found = hypergrad.solve(operator, v, mixed(1e-12), damping=0.5)
        assert graphs_used() == ["CG in float32"]
    x, flat = (operator.layout.flatten(tree) for tree in (found.value, v))
    residual = flat - operator.to_dense() @ x - 0.5 * x
    assert float(residual.norm() / flat.norm()) <= 1.01e-12
    assert found.info.residual_norm == pytest.approx(float(residual.norm()), rel=0.05)
    assert within <= {F32}
    assert counts == [(0 if name in ("matrix", "callable") else 1, 0)]


def test_generated_code_reports_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, of random systems, where products are those of float32."""
    source = random.Random(0)
    rounds = 0
    with generating(monkeypatch):
        for seed in range(150):
            digits, size = source.uniform(0, 12), 10.0 ** source.uniform(-12, 12)
            rtol, budget = 10.0 ** source.uniform(-13, -2), source.randrange(1, 60)
            a, v = conditioned(digits), size * gaussian(N, seed=seed)
            found = hypergrad.solve(a, v, mixed(rtol, max_iters=budget), on_failure="ignore")
            check_report(found, a, v, rtol, budget)
            rounds = max(rounds, found.info.num_hvps - found.info.iterations)
    assert rounds >= 3


def test_what_float32_cannot_settle_goes_on_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    with generating(monkeypatch):
        for digits in (4.0, 6.0, 8.0, 10.0):
            a = conditioned(digits)
            v = a @ gaussian(N)
            found = hypergrad.solve(a, v, mixed(1e-10, reorthogonalize=True))
            assert float((v - a @ found.value).norm() / v.norm()) <= 1.01e-10
            assert graphs_used() == ["CG in float32"] if digits < 7 else ["CG in float32", "CG"]


def test_a_round_ends_where_its_residual_is_no_longer_true(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an ill-conditioned system; what a recurrence makes of rounding is wasted."""
    values = torch.cat([torch.logspace(0, -4, 80), torch.full((20,), 1e-4)]).double()
    a = symmetric(values, seed=1).matrix
    v = gaussian(100)
    found = []
    for untrue in (traced_cg._UNTRUE, 0.0):
        monkeypatch.setattr(traced_cg, "_UNTRUE", untrue)
        with generating(monkeypatch):
            info = hypergrad.solve(a, v, mixed(1e-9, reorthogonalize=True)).info
        assert info.relative_residual <= 1e-9
        found.append(info.iterations)
    assert found[0] < 0.9 * found[1]


@pytest.mark.parametrize(("dim", "digits", "rtol"), [(100, 8.0, 1e-6), (200, 8.0, 1e-3)])
def test_hopeless_rounds_leave_enough_of_the_budget(
    dim: int, digits: float, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float64 needs thousands of iterations of these, of which there are 10,000."""
    a = symmetric(torch.logspace(0, -digits, dim, dtype=F64), seed=1).matrix
    with generating(monkeypatch):
        plain = hypergrad.solve(a, gaussian(dim), hypergrad.CG(rtol=rtol, compile=True)).info
        info = hypergrad.solve(a, gaussian(dim), mixed(rtol)).info
    assert info.relative_residual <= rtol
    assert info.iterations <= plain.iterations + 300


INDEX = torch.tensor([1, 1, 3, 5])
PLACES = torch.arange(N) % 5
BASE = gaussian(5, seed=8)
WRITING: dict[str, Callable[[], hypergrad.LinearOperator]] = {
    "index": lambda: hypergrad.hessian(
        lambda p: p[INDEX].square().sum() + p.square().sum(), gaussian(N)
    ),
    "index_add": lambda: hypergrad.hessian(
        lambda p: (
            torch.zeros(5, dtype=F64).index_add(0, PLACES, p).square().sum() + p.square().sum()
        ),
        gaussian(N),
    ),
    "computed base": lambda: hypergrad.as_operator(
        lambda x: (BASE - BASE).index_add(0, PLACES, x)[PLACES] + 20.0 * x,
        like=gaussian(N),
        batchable=True,
    ),
    "qr": lambda: hypergrad.hessian(
        lambda p: (
            torch.linalg.qr(p.view(4, 3) + BASE[:3])[1].abs().pow(3).sum() + 9.0 * p.square().sum()
        ),
        gaussian(N),
    ),
}


@pytest.mark.parametrize("name", WRITING)
def test_what_is_written_in_a_turn_is_as_it_was_in_the_next(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generated code writes into what a turn of the loop makes, also where that moved out of it."""
    operator, v = WRITING[name](), gaussian(N, seed=2)
    shift = 30.0  # the QR decomposition has negative curvature
    eager = hypergrad.solve(operator, v, hypergrad.CG(rtol=1e-10), damping=shift)
    with generating(monkeypatch), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        for solver in (hypergrad.CG(rtol=1e-10, compile=True), mixed()):
            found = hypergrad.solve(operator, v, solver, damping=shift)
            assert found.info.converged
            assert found.info.num_hvps <= 4 * eager.info.num_hvps
            torch.testing.assert_close(found.value, eager.value, rtol=1e-8, atol=1e-9)
        assert sorted(graphs_used()) == ["CG", "CG in float32"]


@pytest.mark.parametrize("beyond", ["large", "small"])
def test_generated_code_beyond_the_range_of_float32(
    beyond: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [1e60, 1e150] if beyond == "large" else [1e-42, 1e-60, 1e-300]
    with generating(monkeypatch):
        for size in sizes:
            info = hypergrad.solve(size * conditioned(2.0), gaussian(N), mixed()).info
            assert info.converged
            assert info.relative_residual <= 1e-10
        assert graphs_used()[-1] == "CG"


def bodies_of(graph: torch.fx.Graph) -> list[torch.fx.Graph]:
    """Of its loops."""
    module = graph.owning_module
    assert module is not None
    loops_in = [n for n in graph.nodes if n.target is torch.ops.higher_order.while_loop]
    return [getattr(module, str(node.args[1].target)).graph for node in loops_in]


def products_of(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    aten = torch.ops.aten
    targets = (aten.mm.default, aten.mv.default, aten.addmm.default, aten.addmv.default)
    return [node for node in graph.nodes if node.target in targets]


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "yes", "compile": True},
        {"mixed_precision": True},
        {"mixed_precision": True, "compile": True, "rtol": 0.0, "max_iters": 5},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="mixed_precision is "):
        hypergrad.CG(**options)
