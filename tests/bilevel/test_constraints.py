from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from tests.strategies import (
    F32,
    F64,
    flat,
    gaussian,
    generator,
    quick_and_thorough,
    relative_error,
    seeds,
    tree_like,
    trees,
)

EPS = torch.finfo(F64).eps
INF = math.inf


def rows(seed: int, scale: float = 1.0) -> Tensor:
    """Several vectors to project, of a size that is drawn too."""
    source = generator(seed)
    count, size = (int(torch.randint(1, 9, (), generator=source)) for _ in range(2))
    return scale * torch.randn(count, size, generator=source, dtype=F64)


scales = st.sampled_from([1e-6, 1e-1, 1.0, 10.0, 1e6])


# Projections ------------------------------------------------------------------------------------


@quick_and_thorough
@given(seed=seeds, scale=scales, total=st.sampled_from([1e-3, 1.0, 50.0]))
def test_the_simplex_projection_meets_its_kkt_conditions(
    effort: str, seed: int, scale: float, total: float
) -> None:
    # y is nearest to v among y >= 0 with sum y = total exactly if, for some t in each row,
    # y - v + t >= 0 with equality where y > 0.
    v = rows(seed, scale)
    y = hypergrad.project_simplex(v, total)
    rounding = 50 * EPS * (total + v.abs().max())
    assert bool((y >= 0).all())
    torch.testing.assert_close(
        y.sum(-1), torch.full((len(v),), total, dtype=F64), rtol=0, atol=float(rounding)
    )
    gap = v - y
    for i in range(len(v)):
        kept, out = gap[i][y[i] > 0], gap[i][y[i] == 0]
        assert float(kept.max() - kept.min()) <= rounding
        assert bool((out <= kept.mean() + rounding).all())


@quick_and_thorough
@given(seed=seeds, scale=scales)
def test_projections_are_idempotent_and_do_not_expand(effort: str, seed: int, scale: float) -> None:
    v = rows(seed, scale)
    w = v + gaussian(*v.shape, seed=seed + 1)
    low = -gaussian(v.shape[-1], seed=seed + 2).abs()
    high = gaussian(v.shape[-1], seed=seed + 3).abs()
    projections: list[Callable[[Tensor], Tensor]] = [
        hypergrad.project_simplex,
        lambda tree: hypergrad.project_box(tree, low, high),
    ]
    for project in projections:
        y = project(v)
        torch.testing.assert_close(project(y), y, rtol=0, atol=20 * EPS)
        distances = (y - project(w)).norm(dim=-1)
        assert bool((distances <= (v - w).norm(dim=-1) + 100 * EPS * scale).all())


def test_a_point_of_the_simplex_stays() -> None:
    for point in ([1.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]):
        y = torch.tensor(point, dtype=F64)
        assert torch.equal(hypergrad.project_simplex(y), y)


@pytest.mark.parametrize("dtype", [torch.float16, F32, F64])
def test_common_offsets_and_far_entries_cost_no_digits(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    v = torch.tensor([largest, largest, -largest, 0.0], dtype=dtype)
    assert hypergrad.project_simplex(v).tolist() == [0.5, 0.5, 0.0, 0.0]
    v = torch.tensor([512.0, 512.5, 500.0], dtype=dtype)
    assert hypergrad.project_simplex(v).tolist() == [0.25, 0.75, 0.0]
    assert hypergrad.project_simplex(v).dtype == dtype


def test_equal_entries_share() -> None:
    assert hypergrad.project_simplex(torch.zeros(2, 3, 4)).unique().tolist() == [0.25]


@quick_and_thorough
@given(tree=trees())
def test_a_box_over_any_tree(effort: str, tree: Any) -> None:
    v = flat(tree)
    low, high = torch.full_like(v, -0.3), torch.linspace(0.0, 1.0, len(v), dtype=F64)
    expected = torch.minimum(torch.maximum(v, low), high)
    got = hypergrad.project_box(tree, tree_like(tree, low), tree_like(tree, high))
    assert torch.equal(flat(got), expected)
    assert torch.equal(flat(hypergrad.project_box(tree, -0.3)), v.clamp(min=-0.3))
    assert torch.equal(flat(hypergrad.project_box(tree)), v)


def test_projections_have_their_derivatives() -> None:
    # Away from the faces, where they have one.
    v = torch.tensor([[0.9, 0.4, -1.0], [0.1, 0.2, 0.3]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(hypergrad.project_simplex, v)
    assert torch.autograd.gradcheck(lambda v: hypergrad.project_box(v, -0.5, 0.25), v)


def test_projected_descent_ends_at_the_constrained_optimum() -> None:
    # w*(y) = y, so that F(y) = 0.5 |y - c|^2 over the simplex has the projection of c for its
    # minimiser; steps of 0.5 halve what is left.
    c = torch.tensor([0.8, 0.6, -0.5, 0.1], dtype=F64)
    y = torch.full((4,), 0.25, dtype=F64)
    for _ in range(60):
        got = hypergrad.hypergradient(
            lambda w, y: 0.5 * ((w - y) ** 2).sum(),
            lambda w, y: 0.5 * ((w - c) ** 2).sum(),
            y.clone(),
            y,
        )
        y = hypergrad.project_simplex(y - 0.5 * got.grad)
    torch.testing.assert_close(y, torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=F64))


# Maps from free parameters ----------------------------------------------------------------------

BOXES: dict[str, tuple[Any, Any]] = {
    "both": (-0.1, 0.3),
    "low": (2.0, None),
    "high": (None, -3.0),
    "none": (None, None),
    "mixed": (
        torch.tensor([-INF, -1.0, 0.0, -INF], dtype=F64),
        torch.tensor([INF, INF, 5.0, 2.0], dtype=F64),
    ),
}


@pytest.mark.parametrize("name", BOXES)
def test_the_map_into_a_box_and_back(name: str) -> None:
    low, high = BOXES[name]
    free = 4.0 * gaussian(50, 4, seed=1)
    point = hypergrad.sigmoid_box(free, low, high)
    assert torch.equal(hypergrad.project_box(point, low, high), point)
    # Rounding of the point, next to a bound, is what the inverse makes larger: by exp(|z|).
    back = hypergrad.sigmoid_box_inverse(point, low, high)
    assert bool(((back - free).abs() <= 100 * EPS * (1 + free.abs().exp())).all())
    again = hypergrad.sigmoid_box(back, low, high)
    torch.testing.assert_close(again, point, rtol=100 * EPS, atol=100 * EPS)
    ordered = hypergrad.sigmoid_box(free.sort(dim=0).values, low, high)
    assert bool((ordered.diff(dim=0) >= 0).all())


@pytest.mark.parametrize("name", BOXES)
def test_the_map_into_a_box_has_its_derivatives(name: str) -> None:
    low, high = BOXES[name]
    free = gaussian(3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: hypergrad.sigmoid_box(z, low, high), free)
    assert torch.autograd.gradgradcheck(lambda z: hypergrad.sigmoid_box(z, low, high), free)
    point = hypergrad.sigmoid_box(free, low, high).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: hypergrad.sigmoid_box_inverse(y, low, high), point)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_map_never_passes_a_bound(dtype: torch.dtype) -> None:
    # -0.1 + (0.3 - -0.1) is above 0.3 in float64.
    free = torch.tensor([-1e4, -40.0, -1.0, 1.0, 40.0, 1e4], dtype=dtype)
    low, high = torch.tensor(-0.1, dtype=dtype), torch.tensor(0.3, dtype=dtype)
    point = hypergrad.sigmoid_box(free, low, high)
    assert float(point[0]) == float(low)
    assert float(point[-1]) == float(high)
    assert bool(((point >= low) & (point <= high)).all())
    leaf = free.clone().requires_grad_()
    hypergrad.sigmoid_box(leaf, low, None).sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.5, None), (None, 0.5), (None, None)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
def test_far_out_the_map_and_its_derivatives_are_finite(bounds: Any, dtype: torch.dtype) -> None:
    # exp(100) leaves the range of float32, and exp(800) that of float64.
    free = torch.tensor([-800.0, -100.0, -60.0, 60.0, 100.0, 800.0], dtype=dtype)
    leaf = free.clone().requires_grad_()
    point = hypergrad.sigmoid_box(leaf, *bounds)
    point.sum().backward()
    low, high = bounds
    exact = {
        (0.0, 1.0): free.clamp(0.0, 1.0),
        (0.5, None): 0.5 + free.clamp(min=0.0),
        (None, 0.5): 0.5 + free.clamp(max=0.0),
        (None, None): free,
    }[low, high]
    torch.testing.assert_close(point.detach(), exact)
    assert leaf.grad is not None
    slope = ((free > 0) & (high is None)) | ((free < 0) & (low is None))
    torch.testing.assert_close(leaf.grad, slope.to(dtype))


@quick_and_thorough
@given(seed=seeds, total=st.sampled_from([1e-3, 1.0, 50.0]))
def test_the_map_onto_the_simplex_and_back(effort: str, seed: int, total: float) -> None:
    free = rows(seed)
    point = hypergrad.softmax_simplex(free, total)
    assert bool((point > 0).all())
    torch.testing.assert_close(point.sum(-1), torch.full((len(free),), total, dtype=F64))
    back = hypergrad.softmax_simplex_inverse(point, total)
    expected = free - free.mean(-1, keepdim=True)
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-13)
    assert relative_error(hypergrad.softmax_simplex(back, total), point) <= 1e-13


def test_the_map_onto_the_simplex_has_its_derivatives() -> None:
    free = gaussian(2, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(hypergrad.softmax_simplex, free)
    assert torch.autograd.gradgradcheck(hypergrad.softmax_simplex, free)


def test_a_hypergradient_through_a_map() -> None:
    # F(y) = |y|^2 / 2 with y = map(z): the chain rule by hand.
    free = gaussian(3, seed=4)
    got = hypergrad.hypergradient(
        lambda w, z: 0.5 * ((w - hypergrad.sigmoid_box(z, 0.0, 2.0)) ** 2).sum(),
        lambda w, z: 0.5 * (w**2).sum(),
        hypergrad.sigmoid_box(free, 0.0, 2.0),
        free,
    )
    s = torch.sigmoid(free)
    torch.testing.assert_close(got.grad, 2 * s * 2 * s * (1 - s))


def test_everything_runs_under_transforms() -> None:
    # Losses call the maps wherever the library differentiates them, and that is also torch.func.
    free = gaussian(3, 4, seed=5)
    low, high = BOXES["mixed"]
    functions: list[Callable[[Tensor], Tensor]] = [
        hypergrad.project_simplex,
        lambda z: hypergrad.project_box(z, -0.5, 0.5),
        lambda z: hypergrad.sigmoid_box(z, low, high),
        lambda z: hypergrad.sigmoid_box_inverse(hypergrad.sigmoid_box(z, low, high), low, high),
        hypergrad.softmax_simplex,
        lambda z: hypergrad.softmax_simplex_inverse(hypergrad.softmax_simplex(z)),
    ]
    for function in functions:
        rows = torch.stack([function(row) for row in free])
        assert relative_error(torch.func.vmap(function)(free), rows) <= 1e-14
        jacobians = torch.stack(
            [torch.autograd.functional.jacobian(function, row) for row in free]  # type: ignore[no-untyped-call]
        )
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            got = torch.func.vmap(jacobian(function))(free)
            torch.testing.assert_close(got, jacobians)


def test_second_derivatives_of_the_outer_loss_through_a_map() -> None:
    # w = y = map(z), so that F(z) = |map(z)|^2: by the decorator and by hand.
    solve = hypergrad.implicit(
        lambda w, z: 0.5 * ((w - hypergrad.softmax_simplex(z)) ** 2).sum(),
        hypergrad.Exact(),
    )(lambda init, z: torch.softmax(z, -1))
    z = gaussian(4, seed=6)
    got = torch.func.hessian(lambda z: (solve(None, z) ** 2).sum())(z)
    expected = torch.func.hessian(lambda z: (torch.softmax(z, -1) ** 2).sum())(z)
    assert relative_error(got, expected) <= 1e-10


# Bad input --------------------------------------------------------------------------------------

ONES = torch.ones(3)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "crossed bounds": (
        lambda: hypergrad.project_box(ONES, 1.0, 0.0), hypergrad.ConstraintError,
        "low is above high in 3 entries",
    ),
    "an empty open box": (
        lambda: hypergrad.sigmoid_box(ONES, 1.0, 1.0), hypergrad.ConstraintError, "not below",
    ),
    "a box wider than the dtype": (
        lambda: hypergrad.sigmoid_box(ONES, -3e38, 3e38), hypergrad.ConstraintError,
        "float32 cannot hold their distance",
    ),
    "nan bound": (
        lambda: hypergrad.project_box(ONES, math.nan), hypergrad.ConstraintError, "low holds nan",
    ),
    "an infinite point": (
        lambda: hypergrad.project_box(ONES, INF), hypergrad.ConstraintError, "low is above high",
    ),
    "bounds of another shape": (
        lambda: hypergrad.project_box(ONES, torch.zeros(2)), hypergrad.ConstraintError,
        r"low has shape \(2,\), which does not broadcast",
    ),
    "bounds of another structure": (
        lambda: hypergrad.project_box({"a": ONES}, {"b": ONES}), hypergrad.ConstraintError,
        r"\['b'\].*expected those of the tree",
    ),
    "bounds that are a word": (
        lambda: hypergrad.project_box(ONES, "0"), hypergrad.LeafTypeError, "low is a str",
    ),
    "complex bounds": (
        lambda: hypergrad.project_box(ONES, torch.tensor(1j)), hypergrad.LeafTypeError, "complex",
    ),
    "nan": (
        lambda: hypergrad.project_simplex(ONES * math.nan), hypergrad.NonFiniteError, "nan or inf",
    ),
    "integers": (
        lambda: hypergrad.project_box(torch.arange(3), 0), hypergrad.LeafTypeError, "int64",
    ),
    "a number on a simplex": (
        lambda: hypergrad.project_simplex({"a": torch.tensor(1.0)}), hypergrad.ConstraintError,
        r"\['a'\] has shape \(\)",
    ),
    "no entries on a simplex": (
        lambda: hypergrad.project_simplex({"a": ONES, "b": torch.zeros(2, 0)}),
        hypergrad.ConstraintError, r"\['b'\] has shape \(2, 0\)",
    ),
    "a total of zero": (
        lambda: hypergrad.project_simplex(ONES, 0.0), hypergrad.SolverOptionError, "total is 0",
    ),
    "on the boundary of the box": (
        lambda: hypergrad.sigmoid_box_inverse(ONES, 0.0, 1.0), hypergrad.ConstraintError,
        "3 of 3 entries are not strictly inside",
    ),
    "on the boundary of the simplex": (
        lambda: hypergrad.softmax_simplex_inverse(torch.tensor([0.0, 1.0])),
        hypergrad.ConstraintError, "not inside of the simplex",
    ),
    "off the simplex": (
        lambda: hypergrad.softmax_simplex_inverse(ONES), hypergrad.ConstraintError,
        r"off by 2\.0e\+00",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
