"""The follower's linear system: every solver, in both spaces, against dense matrices in float64."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad_rl.inverse
from hypergrad_rl import BLPO, ConfigError
from hypergrad_rl.functional import shapes_of, unflatten
from hypergrad_rl.hypergradient import correction, cross_term, published_cross_term
from hypergrad_rl.inverse import (
    RITZ_VECTORS,
    Grams,
    Sketch,
    critic_response,
    draw_sketch,
    in_sample_space,
    inverse_hvp,
    ritz_extremes,
)
from hypergrad_rl.networks import DEFAULT_CRITIC, critic_value
from hypergrad_rl.rollout import Rollout
from tests.rl.small import (
    OBS,
    POLICY,
    STEPS,
    Problem,
    config,
    dense_curvature,
    flat,
    outer_gradients,
)

SINGLE_PASS: list[dict[str, Any]] = [
    {"sketch": "columns"},
    {"sketch": "diagonal"},
    {"sketch": "gaussian", "sketch_every": 2},
    {"sketch": "columns", "sketch_every": 2},
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(*values: float) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator()).double())
    return basis[0] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis[0].T


@pytest.mark.parametrize("kind", ["columns", "gaussian"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_sketch_solves_with_its_own_approximation(kind: str, shift: float) -> None:
    a = spectrum(-3.0, -0.5, 0.1, 1.0, 2.0, 5.0, 9.0)
    omega = torch.eye(7).double()[[1, 4, 6]]
    if kind == "gaussian":
        omega = torch.randn(3, 7, generator=generator()).double()
    y = omega @ a
    v = torch.arange(7.0).double()
    core = omega @ y.T + shift * torch.eye(3)
    approximate = y.T @ torch.linalg.inv(core) @ y
    expected = torch.linalg.solve(approximate + 0.3 * torch.eye(7).double(), v)
    x = Sketch(y, omega @ y.T).solve(v, 0.3, shift)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


def test_columns_without_curvature_have_no_part_in_a_sketch() -> None:
    """The weights of an input that is always zero: a singular core, and an answer all the same."""
    a = torch.zeros(5, 5, dtype=torch.float64)
    a[:3, :3] = spectrum(1.0, 2.0, 4.0)
    omega = torch.eye(5).double()[[0, 3, 1]]
    v = torch.ones(5).double()
    with_zero = Sketch(omega @ a, omega @ a @ omega.T).solve(v, 0.5)
    kept = omega[[0, 2]]
    torch.testing.assert_close(with_zero, Sketch(kept @ a, kept @ a @ kept.T).solve(v, 0.5))
    assert with_zero[3] == 2.0


@pytest.mark.parametrize("space", ["sample", "parameter"])
@pytest.mark.parametrize("damping", [0.3, "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "nystrom", "sketch": "gaussian"},
        *({"solver": "nystrom", **options} for options in SINGLE_PASS),
        {"solver": "nystrom_pcg", "cg_iters": 200, "cg_rtol": 1e-6},
        {"solver": "cg", "cg_iters": 3, "cg_rtol": 0.0},
        {"solver": "exact"},
        {"solver": "identity"},
    ],
    ids=str,
)
def test_the_logged_residual_is_the_true_one(
    problem: Problem, space: str, damping: Any, options: dict[str, Any]
) -> None:
    actor, critic, batch = problem
    paper = {"cross_term": "paper"} if space == "parameter" else {}
    settings = config(rank=6, damping=damping, **options, **paper)
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    dense = dense_curvature(critic, batch, "ggn")
    draw = draw_sketch(settings, batch.targets.numel(), len(dense), generator())
    if space == "parameter":
        solved = inverse_hvp(critic, batch, v, settings, draw)
        matrix, rhs, answer = dense, flat(v), solved.value
    else:
        solved = critic_response(critic, batch, v, settings, draw)
        if not in_sample_space(settings):
            return  # u comes from x, whose residual is looked at above
        jacobian = torch.func.jacrev(
            lambda w: critic_value(unflatten(w, shapes_of(critic)), batch.obs).reshape(-1)
        )(flat(critic).detach())
        matrix, rhs = 2 / len(jacobian) * jacobian @ jacobian.T, jacobian @ flat(v)
        answer = solved.value.reshape(-1)
    stats = {name: float(value) for name, value in solved.stats.items()}
    eigenvalues = torch.linalg.eigvalsh(matrix)
    rho = stats["damping"] if damping == "auto" else damping
    residual = (rhs - matrix @ answer - rho * answer).norm() / rhs.norm()
    assert stats["ihvp_relative_residual"] == pytest.approx(float(residual), rel=1e-3, abs=1e-6)
    slack = 1e-6 * float(eigenvalues[-1])
    assert solved.grams.gram.shape == solved.grams.core.shape == (RITZ_VECTORS, RITZ_VECTORS)
    smallest, largest = ritz_extremes(*solved.grams)
    assert eigenvalues[0] - slack <= smallest <= largest <= eigenvalues[-1] + slack
    if damping == "auto":
        # At least the largest eigenvalue (that is seen) over 1000.
        assert 0.5e-3 * eigenvalues[-1] <= rho < eigenvalues[-1]
    if options["solver"] == "exact":
        assert residual < 1e-9
    if options["solver"] == "nystrom_pcg":
        assert residual < 1e-5


@pytest.mark.parametrize("options", SINGLE_PASS, ids=str)
def test_a_sketch_of_full_rank_is_the_whole_curvature(
    problem: Problem, options: dict[str, Any]
) -> None:
    actor, critic, batch = problem
    num_params = flat(critic).numel()
    settings = config(
        solver="nystrom", curvature="hessian", damping=5.0, rank=num_params, **options
    )
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    draw = draw_sketch(settings, batch.targets.numel(), num_params, generator())
    solved = inverse_hvp(critic, batch, v, settings, draw)
    assert solved.stats["ihvp_relative_residual"] < 1e-5  # the core is squared: 1e-16 cond(H)^2


@pytest.mark.parametrize("kind", ["columns", "diagonal"])
def test_the_formula_for_columns_gives_what_products_give(problem: Problem, kind: str) -> None:
    actor, critic, batch = problem
    settings = config(solver="nystrom", curvature="hessian", damping=5.0, rank=6, sketch=kind)
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    draw = draw_sketch(settings, batch.targets.numel(), flat(critic).numel(), generator())
    # Of a function nothing is known, of the default critic its layers.
    expected = inverse_hvp(critic, batch, v, settings, draw, critic_value)
    solved = inverse_hvp(critic, batch, v, settings, draw, DEFAULT_CRITIC)
    assert not torch.equal(solved.value, expected.value)
    torch.testing.assert_close(solved.value, expected.value, rtol=1e-9, atol=1e-12)
    # The core is squared, and the Grams hold the products themselves.
    torch.testing.assert_close(solved.grams.core, expected.grams.core, rtol=1e-10, atol=1e-11)


def test_weighted_columns_are_drawn_by_the_diagonal(problem: Problem) -> None:
    actor, critic, batch = problem
    settings = config(solver="nystrom", sketch="diagonal", rank=1, cross_term="paper")
    diagonal = dense_curvature(critic, batch, "ggn").diagonal()
    size, draws = len(diagonal), 20_000
    noise = torch.empty(draws, size).exponential_(generator=generator())
    share = diagonal / diagonal.sum()
    counts = torch.bincount((noise.log() - diagonal.log()).argmin(1), minlength=size)
    error = (share * (1 - share) / draws).sqrt()
    assert ((counts / draws - share).abs() <= 5 * error + 1 / draws).all()  # the rule itself
    # And the solver follows it: its one column is that of the smallest key.
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    dense = dense_curvature(critic, batch, "ggn")
    for row in noise[:3]:
        column = int((row.log() - diagonal.log()).argmin())
        expected = Sketch(dense[column][None], dense[column, column].view(1, 1))
        solved = inverse_hvp(critic, batch, v, settings, row)
        torch.testing.assert_close(solved.value, expected.solve(flat(v), 10.0))


def test_ritz_values_lie_within_the_spectrum_and_reach_its_ends() -> None:
    a = spectrum(-2.0, -0.1, 0.5, 1.0, 7.0, 8.0)
    for rows in (1, 2, 4):
        vectors = torch.randn(rows, 6, generator=generator(rows)).double()
        smallest, largest = ritz_extremes(*Grams.of(vectors, vectors @ a))
        assert -2.0 - 1e-12 <= smallest <= largest <= 8.0 + 1e-12
    with_zeros = torch.nn.functional.pad(vectors, (0, 0, 3, 0))
    torch.testing.assert_close(
        ritz_extremes(*Grams.of(with_zeros, with_zeros @ a)), (smallest, largest)
    )
    vectors = torch.cat([vectors, 3 * vectors, 1e30 * torch.eye(6).double()])  # dependent ones, too
    smallest, largest = ritz_extremes(*Grams.of(vectors, vectors @ a))
    torch.testing.assert_close(smallest, torch.tensor(-2.0).double())
    torch.testing.assert_close(largest, torch.tensor(8.0).double())


def agent_on(problem: Problem, **settings: Any) -> tuple[BLPO, Rollout]:
    """An agent that hardly moves, so that every minibatch of a trajectory has one system."""
    _, _, batch = problem
    rollout = Rollout(
        **{f.name: getattr(batch, f.name).clone() for f in dataclasses.fields(Rollout)}
    )
    rollout.obs, rollout.next_obs = rollout.obs.float(), rollout.next_obs.float()
    rollout.rewards = rollout.rewards.float()
    own = {
        "num_envs": 2, "num_steps": STEPS, "hidden": (6, 5), "epochs": 3, "nested_steps": 1,
        "learning_rate": 1e-30, "critic_learning_rate": 1e-30, "rank": 3,
    }  # fmt: skip
    agent = BLPO(config(**{**own, **settings}), POLICY, OBS, generator())
    return agent, rollout


@pytest.mark.parametrize(("every", "sketches"), [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_a_sketch_is_kept_over_minibatches(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, every: int, sketches: int
) -> None:
    made = []
    make = hypergrad_rl.inverse._sketch

    def counted(*args: Any) -> Sketch:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(hypergrad_rl.inverse, "_sketch", counted)
    agent, rollout = agent_on(problem, sketch="columns", sketch_every=every)
    for update in (1, 2):  # none is taken over to the next rollout
        stats = agent.update(rollout, 0.0)
        assert len(made) == update * sketches
    assert 0 < stats["ihvp_relative_residual"] < 10


@pytest.mark.parametrize(
    "options", [*SINGLE_PASS, {"sketch": "gaussian"}, {"solver": "cg"}], ids=str
)
def test_what_is_for_statistics_alone_is_left_out(
    problem: Problem, options: dict[str, Any]
) -> None:
    actor, critic, batch = problem
    settings = config(**{"solver": "nystrom", "rank": 6, "cross_term": "paper", **options})
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    draw = draw_sketch(settings, batch.targets.numel(), flat(critic).numel(), generator())
    seen, unseen = (
        inverse_hvp(critic, batch, v, settings, draw, checked=torch.tensor(checked))
        for checked in (True, False)
    )
    assert torch.equal(seen.value, unseen.value)
    assert seen.grams.core.abs().sum() > 0 == unseen.grams.core.abs().sum()
    free = options not in SINGLE_PASS  # the solver has made that product for its own use
    residual, left = (float(x.stats["ihvp_relative_residual"]) for x in (seen, unseen))
    assert 0 < residual < 10
    assert left == residual if free else left != left  # NaN


@pytest.mark.parametrize("every", [1, 2])
def test_the_residual_of_an_update_is_that_of_its_last_minibatch_or_of_kept_sketches(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    residuals = []
    solve = hypergrad_rl.inverse._solve

    def seen(*args: Any) -> Any:
        residuals.append(solve(*args).stats["ihvp_relative_residual"])
        return solve(*args)

    monkeypatch.setattr(hypergrad_rl.inverse, "_solve", seen)
    agent, rollout = agent_on(problem, sketch="columns", sketch_every=every)
    stats = agent.update(rollout, 0.0)
    known = [float(x) for x in residuals if not x.isnan()]
    assert len(residuals) == 6
    assert known == [float(x) for x in (residuals if every > 1 else residuals[-1:])]
    assert stats["ihvp_relative_residual"] == pytest.approx(sum(known) / len(known))


@pytest.mark.parametrize("redraw", [True, False])
def test_sketches_are_drawn_anew_unless_told_otherwise(redraw: bool) -> None:
    settings = config(sketch="columns", redraw_sketch=redraw, seed=3)
    source = generator()
    first, second = (draw_sketch(settings, 200, 500, source) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second) is not redraw


@pytest.mark.parametrize("cross", ["suffix", "paper"])
def test_the_curvature_of_the_whole_rollout(problem: Problem, cross: str) -> None:
    """One x for all trajectories; c on those of the minibatch."""
    actor, critic, batch = problem
    settings = config(solver="exact", cross_term=cross, damping=0.5)
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    envs = torch.tensor([1])
    c, _ = correction(POLICY, actor, critic, v, batch, settings, envs=envs)
    dense = dense_curvature(critic, batch, "ggn")
    x = unflatten(
        torch.linalg.solve(dense + 0.5 * torch.eye(len(dense)), flat(v)), shapes_of(critic)
    )
    part = batch.select(envs)
    if cross == "paper":
        expected = published_cross_term(POLICY, actor, critic, x, part, settings)
    else:
        u = torch.func.jvp(lambda w: critic_value(w, part.obs), (critic,), (x,))[1]
        expected = cross_term(POLICY, actor, critic, u, part, cross)
    torch.testing.assert_close(flat(c), flat(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cross", ["suffix", "paper"])
@pytest.mark.parametrize("size", ["minibatch", "rollout"])
def test_an_update_solves_the_system_that_it_is_told_to(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, cross: str, size: str
) -> None:
    sizes = []
    solve = hypergrad_rl.inverse._solve

    def seen(operator: Any, v: Tensor, *args: Any) -> Any:
        sizes.append(len(v))
        return solve(operator, v, *args)

    monkeypatch.setattr(hypergrad_rl.inverse, "_solve", seen)
    agent, rollout = agent_on(problem, curvature_batch=size, cross_term=cross)
    agent.update(rollout, 0.0)
    samples = STEPS if size == "minibatch" else 2 * STEPS
    assert set(sizes) == {samples if cross == "suffix" else agent.critic_state.params.numel()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": "automatic"}, 'damping=.*expected a number > 0 or "auto"'),
        ({"damping": 0.0}, 'damping=.*expected a number > 0 or "auto"'),
        ({"sketch": "rows"}, "sketch=.*one of gaussian, columns, diagonal"),
        ({"sketch_every": 0}, "sketch_every=0: expected an integer >= 1"),
        ({"sketch_shift": -1.0}, "sketch_shift=.*expected a number >= 0"),
        ({"curvature_batch": "all"}, "curvature_batch=.*one of minibatch, rollout"),
        ({"redraw_sketch": "no"}, "redraw_sketch=.*expected True or False"),
    ],
)
def test_bad_options(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
