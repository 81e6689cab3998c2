"""The published update against an independent implementation of it, in float64.

``published`` below is written from the formulas alone, with no code of the package: flat parameter
vectors, the Hessian by double differentiation as a dense matrix, dense linear algebra, a backward
recursion for the advantages. Rounding: all products are of float64, the core W of the columns has a
condition of about 1e4 here, so that both sides are right to some 1e-11, and agree to 1e-8.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad_rl import BLPO, BLPOConfig
from hypergrad_rl.functional import AdamState, adam, flatten, shapes_of, unflatten
from hypergrad_rl.hypergradient import (
    combine,
    correction,
    critic_advantages,
    direct_gradient,
    follower_gradient,
    published_cross_term,
)
from hypergrad_rl.inverse import inverse_hvp
from hypergrad_rl.networks import CategoricalPolicy
from hypergrad_rl.rollout import Rollout, make_batch

OBS, ACTIONS, WIDTHS, STEPS = 3, 3, (6, 5), 20
GAMMA, LAMBDA, CLIP, RATE, EPS = 0.99, 0.95, 0.2, 2.5e-4, 1e-5
RHO, BOUND, RANK = 0.7, 1.4, 5
POLICY = CategoricalPolicy(ACTIONS)


@dataclass
class Data:
    """One trajectory with everything that is given, and where actor, critic and Adam are."""

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminated: Tensor
    done: Tensor
    old_theta: Tensor
    old_w: Tensor
    theta: Tensor
    w: Tensor
    mean: Tensor
    square: Tensor
    columns: Tensor


def made_up(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_theta = sum((i + 1) * o for i, o in zip((OBS, *WIDTHS), (*WIDTHS, ACTIONS), strict=True))
    num_w = sum((i + 1) * o for i, o in zip((OBS, *WIDTHS), (*WIDTHS, 1), strict=True))
    done = torch.zeros(STEPS, dtype=torch.bool)
    done[[4, 12]] = True
    terminated = done.clone()
    terminated[12] = False
    old_theta, old_w = normal(num_theta, size=0.5), normal(num_w, size=0.7)
    return Data(
        obs=normal(STEPS, OBS),
        actions=torch.randint(ACTIONS, (STEPS,), generator=generator),
        rewards=normal(STEPS),
        next_obs=normal(STEPS, OBS),
        terminated=terminated,
        done=done,
        old_theta=old_theta,
        old_w=old_w,
        theta=old_theta + normal(num_theta, size=0.1),
        w=old_w + normal(num_w, size=0.1),
        mean=normal(num_theta, size=1e-2),
        square=normal(num_theta, size=1e-2).square(),
        columns=torch.randperm(num_w, generator=generator)[:RANK],
    )


@pytest.fixture(scope="module")
def data() -> Data:
    return made_up(0)


# ---- The formulas, independently of the package -------------------------------------------------


def network(parameters: Tensor, x: Tensor, outputs: int) -> Tensor:
    """Two tanh layers and a linear one; weights then biases, layer by layer."""
    start, sizes = 0, (OBS, *WIDTHS, outputs)
    for layer in range(3):
        rows, cols = sizes[layer + 1], sizes[layer]
        weight = parameters[start : start + rows * cols].reshape(rows, cols)
        bias = parameters[start + rows * cols : start + rows * (cols + 1)]
        start += rows * (cols + 1)
        x = x @ weight.T + bias
        x = torch.tanh(x) if layer < 2 else x
    return x


def value(w: Tensor, obs: Tensor) -> Tensor:
    return network(w, obs, 1)[:, 0]


def log_pi(theta: Tensor, data: Data) -> Tensor:
    logits = network(theta, data.obs, ACTIONS)
    rows = torch.arange(STEPS)
    return logits[rows, data.actions] - torch.logsumexp(logits, dim=1)


def advantages(w: Tensor, data: Data) -> Tensor:
    """A_t = delta_t + gamma lambda A_{t+1} within an episode; bootstrapped unless terminated."""
    values, following = value(w, data.obs), value(w, data.next_obs)
    result = []
    tail = torch.zeros((), dtype=torch.float64)
    for t in reversed(range(STEPS)):
        bootstrap = 0.0 if data.terminated[t] else GAMMA * following[t]
        tail = data.rewards[t] + bootstrap - values[t] + GAMMA * LAMBDA * tail * (~data.done[t])
        result.append(tail)
    return torch.stack(result[::-1])


def losses(theta: Tensor, w: Tensor, data: Data) -> Tensor:
    """L_t = -min(rho A, clip(rho) A), the summands of f."""
    ratio = torch.exp(log_pi(theta, data) - log_pi(data.old_theta, data))
    estimate = advantages(w, data)
    clipped = torch.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * estimate, clipped * estimate)


def published(
    data: Data, *, rho: float = RHO, bound: float = BOUND, shift: float = 0.0, step: int = 3
) -> dict[str, Tensor]:
    """d, v, x, c, the bounded c and the actor after Adam's step."""
    targets = (advantages(data.old_w, data) + value(data.old_w, data.obs)).detach()

    def f(theta: Tensor, w: Tensor) -> Tensor:
        return losses(theta, w, data).mean()

    def g(w: Tensor) -> Tensor:
        return ((targets - value(w, data.obs)) ** 2).mean()

    def surrogate(theta: Tensor, w: Tensor) -> Tensor:
        ratio = torch.exp(log_pi(theta, data) - log_pi(data.old_theta, data))
        unclipped = -ratio * advantages(w, data)
        return 2 * (unclipped * (targets - value(w, data.obs))).sum()

    theta = data.theta.clone().requires_grad_()
    w = data.w.clone().requires_grad_()
    (d,) = torch.autograd.grad(f(theta, w.detach()), theta)
    (v,) = torch.autograd.grad(f(theta.detach(), w), w)
    hessian = torch.func.hessian(g)(data.w)
    columns = hessian[:, data.columns]
    core = columns[data.columns] + shift * torch.eye(RANK, dtype=torch.float64)
    approximate = columns @ torch.linalg.inv(core) @ columns.T
    x = torch.linalg.solve(approximate + rho * torch.eye(len(v), dtype=torch.float64), v)
    # d/dw [grad_theta l] x: the mixed second derivative, as a matrix.
    mixed = torch.stack(
        [
            torch.autograd.grad(row, w, retain_graph=True)[0]
            for row in torch.autograd.grad(surrogate(theta, w), theta, create_graph=True)[0]
        ]
    )
    c = mixed @ x
    bounded = c * min(1.0, float(bound * torch.linalg.norm(d) / torch.linalg.norm(c)))
    direction = d - bounded
    mean = 0.9 * data.mean + 0.1 * direction
    square = 0.999 * data.square + 0.001 * direction**2
    corrected = (mean / (1 - 0.9**step)) / (torch.sqrt(square / (1 - 0.999**step)) + EPS)
    moved = data.theta - RATE * corrected
    return {"d": d, "v": v, "x": x, "c": c, "bounded c": bounded, "theta": moved}


# ---- The package's pieces ------------------------------------------------------------------------


def settings(**options: Any) -> BLPOConfig:
    return BLPOConfig(**{
        "num_envs": 1, "num_steps": STEPS, "gamma": GAMMA, "gae_lambda": LAMBDA, "clip": CLIP,
        "hidden": WIDTHS, "learning_rate": RATE, "adam_eps": EPS,
        "solver": "nystrom", "sketch": "columns", "rank": RANK, "curvature": "hessian",
        "damping": RHO, "cross_term": "paper", "outer_objective": "advantage",
        "correction_bound": BOUND, "epochs": 1, **options,
    })  # fmt: skip


def pieces(data: Data, config: BLPOConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    agent = BLPO(config, POLICY, OBS, generator)
    theta, w, old_theta, old_w = (
        unflatten(vector, shapes)
        for vector, shapes in (
            (data.theta, agent.actor_shapes),
            (data.w, agent.critic_shapes),
            (data.old_theta, agent.actor_shapes),
            (data.old_w, agent.critic_shapes),
        )
    )
    fields = [field.name for field in dataclasses.fields(Rollout)]
    rollout = Rollout(**{name: getattr(data, name)[None] for name in fields})
    batch = make_batch(POLICY, old_theta, old_w, rollout, config.gamma, LAMBDA)
    estimate = critic_advantages(w, batch, config.gamma)[0].detach()
    d, stats = direct_gradient(POLICY, theta, batch, estimate, config)
    v = follower_gradient(w, stats["log_ratio"], batch, config)
    x = inverse_hvp(w, batch, v, config, data.columns).value
    c, _ = correction(POLICY, theta, w, v, batch, config, data.columns)
    again = published_cross_term(POLICY, theta, w, unflatten(x, shapes_of(w)), batch, config)
    assert torch.equal(flatten(again), flatten(c))
    step, _ = combine(d, c, config.correction_bound)
    state = AdamState(data.theta, data.mean, data.square, torch.tensor(2.0, dtype=torch.float64))
    rate = torch.tensor(RATE, dtype=torch.float64)
    return {
        "d": flatten(d),
        "v": flatten(v),
        "x": x,
        "c": flatten(c),
        "bounded c": flatten(d) - flatten(step),
        "theta": adam(state, flatten(step), rate, EPS).params,
    }


def differences(mine: dict[str, Tensor], theirs: dict[str, Tensor], data: Data) -> dict[str, float]:
    """Relative to the size of each piece; of the parameters, to that of their step."""
    origin = {"theta": data.theta}
    return {
        name: float((mine[name] - other).norm() / (other - origin.get(name, 0.0)).norm())
        for name, other in theirs.items()
    }


@pytest.mark.parametrize(("seed", "bound"), [(0, BOUND), (1, 1e-3), (2, 1e9)])
def test_the_published_update(seed: int, bound: float) -> None:
    data = made_up(seed)
    mine = pieces(data, settings(correction_bound=bound))
    theirs = published(data, bound=bound)
    errors = differences(mine, theirs, data)
    assert errors.keys() == {"d", "v", "x", "c", "bounded c", "theta"}
    assert max(errors.values()) < 1e-8, errors
    active = bool((theirs["bounded c"] - theirs["c"]).norm() > 1e-12 * theirs["c"].norm())
    assert active == (bound == 1e-3) or bound == BOUND  # both branches are compared


def test_the_shifted_core_of_the_authors(data: Data) -> None:
    """One more identity inside Woodbury's solve, which damps what the columns say."""
    errors = differences(pieces(data, settings(sketch_shift=1.0)), published(data, shift=1.0), data)
    assert max(errors.values()) < 1e-8, errors
    errors = differences(pieces(data, settings()), published(data, shift=1.0), data)
    assert errors["x"] > 1e-8


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"damping": 1.0001 * RHO}, {"x", "c"}),
        ({"clip": 0.01}, {"d", "v", "x", "c", "bounded c", "theta"}),
        ({"gamma": 0.999}, {"d", "v", "x", "c", "bounded c", "theta"}),
        ({"curvature": "ggn"}, {"x", "c"}),
        ({"outer_objective": "return"}, {"v", "x", "c"}),
        ({"entropy_bonus": 0.01}, {"d", "bounded c", "theta"}),
        ({"correction_bound": 1e-4}, {"bounded c", "theta"}),
    ],
)
def test_another_setting_fails(data: Data, options: dict[str, Any], wrong: set[str]) -> None:
    errors = differences(pieces(data, settings(**options)), published(data), data)
    assert wrong <= {name for name, error in errors.items() if error > 1e-8}, errors


@pytest.mark.parametrize("factor", [-1.0, 2.0, STEPS, 1 + 1e-6])
def test_another_sign_or_factor_of_the_cross_term_fails(data: Data, factor: float) -> None:
    mine = pieces(data, settings(correction_bound=None))
    theirs = published(data, bound=1e9)
    assert max(differences(mine, theirs, data).values()) < 1e-8
    mine["c"] = factor * mine["c"]
    assert differences(mine, theirs, data)["c"] > 1e-8


def test_other_columns_fail(data: Data) -> None:
    other = dataclasses.replace(data, columns=data.columns.roll(1).flip(0))  # the same set
    errors = differences(pieces(data, settings()), published(other), data)
    assert errors["x"] < 1e-8
    other = dataclasses.replace(data, columns=(data.columns + 1) % len(data.w))
    assert differences(pieces(data, settings()), published(other), data)["x"] > 1e-8
