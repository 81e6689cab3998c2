"""Hypergradients, games, steppers and spectra on another device: as on the CPU, and there."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.elsewhere.device import WIDE, move
from tests.elsewhere.problems import (
    DTYPES,
    MATRIX,
    SOLVERS,
    V,
    assert_same,
    compare,
    compare_errors,
    gaussian,
    seeded,
    stay,
    without_forward_mode,
)

X, Y = gaussian(12, 3), gaussian(12, 1, seed=1)
VALID = gaussian(8, 3, seed=2), gaussian(8, 1, seed=3)
INNER = {"w": torch.zeros(3, 1), "b": torch.zeros(1)}
OUTER = {"decay": torch.tensor([0.3, 0.2, 0.4]), "shift": torch.tensor(0.1)}


class Problem:
    """Ridge regression with a decay of its own for each weight; all data where ``to`` puts it."""

    def __init__(self, to: Any, noise: float = 0.0) -> None:
        self.data, self.valid = to((X, Y)), to(VALID)
        self.start, self.outer, self.noise = to(INNER), to(OUTER), noise

    def inner_loss(self, w: Any, y: Any, *batch: Tensor) -> Tensor:
        x, target = batch or self.data
        if self.noise:
            x = torch.nn.functional.dropout(x, self.noise)
        error = (x @ w["w"] + w["b"] - target).square().mean()
        decay = (y["decay"].exp() * w["w"][:, 0].square()).sum() + (w["b"] - y["shift"]).square()
        loss: Tensor = error + 0.5 * decay.sum()
        return loss

    def outer_loss(self, w: Any, y: Any, *batch: Tensor) -> Tensor:
        x, target = batch or self.valid
        loss: Tensor = (x @ w["w"] + w["b"] - target).square().mean() + 0.01 * y["shift"].square()
        return loss

    def solve(self, init: Any, y: Any) -> Any:
        w = {name: leaf.clone() for name, leaf in init.items()}
        for _ in range(60):
            w = {name: leaf.detach().requires_grad_() for name, leaf in w.items()}
            with torch.enable_grad():
                loss = self.inner_loss(w, {name: leaf.detach() for name, leaf in y.items()})
            grads = torch.autograd.grad(loss, list(w.values()))
            w = {n: (x - 0.1 * g).detach() for (n, x), g in zip(w.items(), grads, strict=True)}
        return w

    def solution(self) -> Any:
        return self.solve(self.start, self.outer)


LOW = {"nystrom": hypergrad.Nystrom(rank=3), "pcg": hypergrad.NystromPCG(rank=3)}


@pytest.mark.parametrize("solver", {**SOLVERS, **LOW}.values(), ids=SOLVERS.keys())
@pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")
def test_hypergradients(solver: Any) -> None:
    def found(to: Any) -> Any:
        p = Problem(to)
        got = hypergrad.hypergradient(
            p.inner_loss, p.outer_loss, p.solution(), p.outer, solver=solver, damping=0.5, x0=None
        )
        return got.grad, got.direct, got.implicit, got.ihvp, got.outer_value

    compare(found, rtol=1e-3)


def test_two_places_are_told() -> None:
    here, there = Problem(stay), Problem(move)
    for inner, outer in ((here.start, there.outer), (there.start, here.outer)):
        with pytest.raises(hypergrad.DeviceError):
            hypergrad.hypergradient(there.inner_loss, there.outer_loss, inner, outer)
        with pytest.raises(hypergrad.DeviceError):
            hypergrad.SOBA(there.inner_loss, there.outer_loss, inner_lr=0.1, outer_lr=0.1).init(
                inner, outer
            )


def fixed_point(p: Problem, w: Any, y: Any) -> Any:
    grads = torch.func.grad(p.inner_loss)(w, y)
    return {name: w[name] - 0.1 * grads[name] for name in w}


RULES: dict[str, Callable[[Problem], Any]] = {
    "loss": lambda p: hypergrad.implicit(p.inner_loss),
    "loss, minres": lambda p: hypergrad.implicit(p.inner_loss, hypergrad.MINRES(), 0.1),
    "loss, nystrom": lambda p: hypergrad.implicit(p.inner_loss, hypergrad.Nystrom(rank=4), 0.1),
    "loss, exact": lambda p: hypergrad.implicit(p.inner_loss, hypergrad.Exact()),
    "root": lambda p: hypergrad.implicit(root=torch.func.grad(p.inner_loss)),
    "fixed point": lambda p: hypergrad.implicit(fixed_point=lambda w, y: fixed_point(p, w, y)),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_implicit_functions(make: Any) -> None:
    def found(to: Any) -> Any:
        p = Problem(to)
        outer = {name: leaf.detach().clone().requires_grad_() for name, leaf in p.outer.items()}
        solve = make(p)(p.solve)
        p.outer_loss(solve(p.start, outer), outer).backward()  # type: ignore[no-untyped-call]
        solution = solve.solution(p.start, outer)
        tangents = torch.func.jvp(lambda y: solve(p.start, y), (p.outer,), (p.outer,))
        again = torch.func.grad(lambda y: p.outer_loss(solve(p.start, y), y))(p.outer)
        return [leaf.grad for leaf in outer.values()], solution.value, tangents, again

    compare(found, rtol=1e-3)


def decayed(y: Any) -> Any:
    return hypergrad.SGD(lr=0.05 * y["shift"].exp(), momentum=0.5)


UNROLLED: dict[str, dict[str, Any]] = {
    "reverse": {"optimizer": hypergrad.SGD(lr=0.1)},
    "forward": {"optimizer": hypergrad.SGD(lr=0.1, momentum=0.9), "mode": "forward"},
    "checkpoints": {"optimizer": hypergrad.Adam(lr=0.05), "checkpoint_every": 2},
    "truncated": {"optimizer": hypergrad.Adam(lr=0.05), "mode": "truncated", "truncate": 3},
    "of y": {"optimizer": decayed, "checkpoint_every": 3},
}
UNROLLED = without_forward_mode(UNROLLED, "forward")


@pytest.mark.parametrize("options", UNROLLED.values(), ids=UNROLLED.keys())
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_unrolled_hypergradients(options: Any, noise: float) -> None:
    """With dropout, too: what is done again draws what was drawn."""

    def found(to: Any) -> Any:
        p = Problem(to, noise)
        before = torch.get_rng_state()
        got = hypergrad.unrolled_hypergradient(
            p.inner_loss, p.outer_loss, p.start, p.outer, num_steps=7, **options
        )
        if to is move:  # nothing was drawn here
            assert torch.equal(torch.get_rng_state(), before)
        return got.grad, got.inner_params, got.direct, got.implicit

    compare(found, rtol=1e-4)


def test_replayed_steps_leave_the_generator_of_the_device_where_it_was() -> None:
    """After checkpoints it stands where it stands without them."""
    left, grads = [], []
    for every in (7, 2):
        torch.manual_seed(0)
        p = Problem(move, 0.4)
        got = hypergrad.unrolled_hypergradient(
            p.inner_loss, p.outer_loss, p.start, p.outer, num_steps=7,
            optimizer=hypergrad.SGD(lr=0.1), checkpoint_every=every,
        )  # fmt: skip
        grads.append(got.grad)
        left.append(torch.elsewhere.get_rng_state())  # type: ignore[attr-defined]
    assert torch.equal(*left)
    assert_same({k: v.cpu() for k, v in grads[0].items()}, grads[1])


def test_batches_of_unrolled_steps_and_darts() -> None:
    def found(to: Any) -> Any:
        p = Problem(to)
        batches = [to((X[i : i + 4], Y[i : i + 4])) for i in (0, 4, 8)]
        got = hypergrad.unrolled_hypergradient(
            lambda w, y, batch: p.inner_loss(w, y, *batch), p.outer_loss, p.start, p.outer,
            num_steps=3, optimizer=hypergrad.SGD(lr=0.1), batches=batches,
        )  # fmt: skip
        darts = hypergrad.darts_hypergradient(
            p.inner_loss, p.outer_loss, p.start, p.outer, step_size=0.1
        )
        return got.grad, darts.grad, darts.inner_params

    compare(found, rtol=1e-3)


RATES: dict[str, Any] = {"inner_lr": 0.1, "outer_lr": 0.05}
METHODS: dict[str, Callable[[Problem], Any]] = {
    "soba": lambda p: hypergrad.SOBA(p.inner_loss, p.outer_loss, **RATES),
    "soba, schedule": lambda p: hypergrad.SOBA(
        p.inner_loss, p.outer_loss, inner_lr=0.1, outer_lr=hypergrad.PowerSchedule(0.1, 0.5)
    ),
    "saba": lambda p: hypergrad.SABA(
        p.inner_loss, p.outer_loss, **RATES, num_inner_blocks=2, num_outer_blocks=2
    ),
    "amigo": lambda p: hypergrad.AmIGO(p.inner_loss, p.outer_loss, **RATES, inner_steps=2),
    "stocbio": lambda p: hypergrad.StocBiO(p.inner_loss, p.outer_loss, **RATES),
    "f2sa": lambda p: hypergrad.F2SA(
        p.inner_loss, p.outer_loss, **RATES, penalty_lr=0.05, multiplier=5.0
    ),
}  # fmt: skip


def steps(name: str, method: Any, state: Any, p: Problem, count: int) -> Any:
    for i in range(count):
        if name == "saba":
            half = slice(6 * (i % 2), 6 * (i % 2) + 6)
            inner = [x[half] for x in p.data]
            outer = [x[4 * (i % 2) : 4 * (i % 2) + 4] for x in p.valid]
            state = method.step(state, [inner], [outer], inner_index=i % 2, outer_index=i % 2)
        else:
            state = method.step(state)
    return state


@pytest.mark.parametrize("name", METHODS)
def test_steppers_and_what_is_saved_of_them(name: str) -> None:
    """A state that was saved as tensors of the CPU goes on where its problem is."""

    def found(to: Any) -> Any:
        p = Problem(to)
        method = METHODS[name](p)
        state = steps(name, method, method.init(p.start, p.outer), p, 4)
        straight = steps(name, method, state, p, 3)
        file = io.BytesIO()
        saved = {k: {n: x.cpu() if isinstance(x, Tensor) else x for n, x in v.items()}
                 if isinstance(v, dict) else v for k, v in state.state_dict().items()}  # fmt: skip
        torch.save(saved, file)
        file.seek(0)
        anew = method.init(p.start, p.outer).load_state_dict(torch.load(file))
        resumed = steps(name, method, anew, p, 3)
        return straight.inner_params, straight.outer_params, resumed.outer_params

    compare(found)


CONSTRAINTS: dict[str, Callable[[Any], Any]] = {
    "box": lambda x: hypergrad.project_box(x, -0.2, 0.3),
    "box, tensors": lambda x: hypergrad.project_box(x, x["w"].detach().abs().min() * 0, 0.3),
    "simplex": hypergrad.project_simplex,
    "sigmoid": lambda x: hypergrad.sigmoid_box(x, -1.0, 2.0),
    "sigmoid, back": lambda x: hypergrad.sigmoid_box_inverse(
        hypergrad.sigmoid_box(x, -1.0, 2.0), -1.0, 2.0
    ),
    "sigmoid, one": lambda x: hypergrad.sigmoid_box(x, 0.0),
    "softmax": hypergrad.softmax_simplex,
    "softmax, back": lambda x: hypergrad.softmax_simplex_inverse(hypergrad.softmax_simplex(x)),
}


@pytest.mark.parametrize("project", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_constraints(project: Any) -> None:
    def found(to: Any) -> Any:
        tree = {name: to(gaussian(2, 4, seed=i)).requires_grad_() for i, name in enumerate("wu")}
        given = project(tree)
        size = torch.stack([leaf.pow(3).sum() for leaf in given.values()]).sum()
        grads = torch.autograd.grad(size, list(tree.values()), allow_unused=True)
        return given, [g for g in grads if g is not None]

    compare(found)


def test_errors_of_constraints() -> None:
    compare_errors(lambda to: hypergrad.project_box(to(V), 1.0, 0.0), hypergrad.ConstraintError)
    compare_errors(
        lambda to: hypergrad.sigmoid_box_inverse(to(V), -0.1, 0.1), hypergrad.ConstraintError
    )


def leader(x: Tensor, z: Tensor) -> Tensor:
    return (-x * (10 - x - z)).sum()


def follower(x: Tensor, z: Tensor) -> Tensor:
    return (-z * (10 - x - z)).sum()


def test_games() -> None:
    def found(to: Any) -> Any:
        x = to(torch.tensor([4.0, 5.0]))
        got = hypergrad.stackelberg_gradient(leader, follower, x, (10 - x) / 2)
        return got.grad, got.ihvp

    compare(found)
    checks = []
    for to in (stay, move):
        for solver in (None, hypergrad.CG(), hypergrad.Exact()):
            for dense in (500, 1)[: 1 + WIDE]:  # Lanczos may end a step earlier without float64
                x, z = to(torch.tensor([5.0, 5.0])), to(torch.tensor([2.5, 2.5]))
                checks.append(
                    str(
                        hypergrad.check_stackelberg(
                            leader, follower, x, z, solver=solver, max_dense=dense
                        )
                    )
                )
    assert checks[: len(checks) // 2] == checks[len(checks) // 2 :]


@pytest.mark.parametrize("dtype", DTYPES[:-2])
def test_checks_and_certificates(dtype: torch.dtype) -> None:
    """The same verdicts of the same numbers."""
    verdicts = []

    def cast(to: Any) -> Any:
        return lambda tree: to(torch.utils._pytree.tree_map(lambda x: x.to(dtype), tree))

    for to in (stay, move):
        p = Problem(cast(to))
        w = p.solution()
        got = hypergrad.hypergradient(p.inner_loss, p.outer_loss, w, p.outer)
        check = hypergrad.check_hypergradient(
            p.inner_loss,
            p.outer_loss,
            w,
            p.outer,
            solve_inner=p.solve,
            gradient=got,
            strong_convexity=0.5,
        )
        drawn = hypergrad.check_hypergradient(
            p.inner_loss,
            p.outer_loss,
            w,
            p.outer,
            solve_inner=p.solve,
            generator=seeded(),
            num_directions=1,
        )
        certificate = hypergrad.hypergradient_certificate(
            p.inner_loss, p.outer_loss, w, p.outer, got, strong_convexity=0.5
        )
        verdicts.append((check.passed, drawn.passed, certificate.corrected))
        assert check.passed
    assert verdicts[0][:2] == verdicts[1][:2]


def test_a_loop_of_outer_steps_with_what_is_carried() -> None:
    """torch's optimiser on outer parameters there, a sketch and a warm start from step to step."""

    def found(to: Any) -> Any:
        p = Problem(to)
        outer = {name: leaf.clone().requires_grad_() for name, leaf in p.outer.items()}
        optimizer = torch.optim.Adam(list(outer.values()), lr=0.05)
        carried = hypergrad.ReusedSketch(hypergrad.Nystrom(rank=4, generator=seeded()))
        x0, w = None, p.start
        for _ in range(3):
            w = p.solve(w, outer)
            plain = {name: leaf.detach() for name, leaf in outer.items()}
            got = hypergrad.hypergradient(p.inner_loss, p.outer_loss, w, plain, x0=x0)
            hypergrad.hypergradient(
                p.inner_loss, p.outer_loss, w, plain, solver=carried, damping=0.1
            )
            x0 = got.ihvp
            for name, leaf in outer.items():
                leaf.grad = got.grad[name]
            optimizer.step()
        return {name: leaf.detach() for name, leaf in outer.items()}

    compare(found, rtol=1e-3)


def number(to: Any, *values: Any) -> Tensor:
    moved: Tensor = to(torch.tensor([float(x) for x in values]))
    return moved


def traced(method: Any, to: Any, generator: Any) -> Tensor:
    found = hypergrad.trace(to(MATRIX), num_hvps=9, method=method, generator=generator)
    return number(to, found.value, found.standard_error)


def diagonals(method: Any, to: Any, generator: Any) -> Any:
    return hypergrad.diagonal(to(MATRIX), num_hvps=8, method=method, generator=generator).value


SPECTRA: dict[str, Callable[[Any, Any], Any]] = {
    **{x: functools.partial(traced, x) for x in ("xtrace", "hutch++", "hutchinson")},
    **{f"diagonal, {x}": functools.partial(diagonals, x) for x in ("xdiag", "hutchinson")},
    "trace, whole": lambda to, g: number(to, hypergrad.trace(to(MATRIX), num_hvps=40).value),
    "diagonal, whole": lambda to, g: hypergrad.diagonal(to(MATRIX), num_hvps=40).value,
    "extremes": lambda to, g: number(
        to, (e := hypergrad.extreme_eigenvalues(to(MATRIX), generator=g)).largest, e.smallest
    ),
    "density": lambda to, g: hypergrad.spectral_density(
        to(MATRIX), num_probes=2, generator=g
    ).density(to(torch.linspace(0.0, 3.0, 20)), width=0.2),
}  # fmt: skip


@pytest.mark.parametrize("make", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("source", [seeded, lambda: None], ids=["generator", "default"])
def test_spectra(make: Any, source: Any) -> None:
    compare(lambda to: make(to, source()), rtol=1e-3)
