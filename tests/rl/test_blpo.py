"""The pieces of a BLPO update on a fixed batch, against independent computations in float64."""

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from hypergrad_rl import BLPO, RolloutError
from hypergrad_rl.functional import AdamState, shapes_of, unflatten
from hypergrad_rl.hypergradient import (
    act,
    combine,
    correction,
    critic_advantages,
    cross_term,
    direct_gradient,
    follower_gradient,
    follower_pass,
    published_cross_term,
)
from hypergrad_rl.inverse import critic_response, draw_sketch, inverse_hvp
from hypergrad_rl.networks import Critic, Params, critic_value
from hypergrad_rl.rollout import Batch, Rollout, make_batch
from tests.rl.small import (
    CLIP,
    GAMMA,
    LAMBDA,
    OBS,
    POLICY,
    STEPS,
    Problem,
    config,
    dense_curvature,
    flat,
    gradient,
    outer_gradients,
    shifted,
)


def naive_advantages(critic: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """GAE by its recursion, differentiable in the critic."""
    values, next_values = critic_value(critic, batch.obs), critic_value(critic, batch.next_obs)
    rows = []
    for n in range(len(values)):
        following = torch.zeros((), dtype=torch.float64)
        row: list[Tensor] = []
        for t in reversed(range(STEPS)):
            bootstrap = 0.0 if batch.terminated[n, t] else GAMMA * next_values[n, t]
            delta = batch.rewards[n, t] + bootstrap - values[n, t]
            following = delta + (0.0 if batch.done[n, t] else GAMMA * LAMBDA) * following
            row.insert(0, following)
        rows.append(torch.stack(row))
    return torch.stack(rows), values


def naive_ratio(actor: Params, batch: Batch) -> Tensor:
    return (POLICY.log_prob(actor, batch.obs, batch.actions)[0] - batch.log_probs).exp()


def naive_surrogate(ratio: Tensor, advantages: Tensor) -> Tensor:
    return torch.maximum(-ratio * advantages, -ratio.clip(1 - CLIP, 1 + CLIP) * advantages)


@pytest.mark.parametrize("objective", ["return", "advantage"])
def test_direct_gradient_and_v(problem: Problem, objective: str) -> None:
    actor, critic, batch = problem
    d, v, stats = outer_gradients(actor, critic, batch, config(outer_objective=objective))
    advantages, values = naive_advantages(critic, batch)
    ratio = naive_ratio(actor, batch)
    f = naive_surrogate(ratio, advantages.detach()).mean()
    if objective == "return":
        outer = -(ratio.detach() * (advantages + values)).mean()
    else:
        outer = naive_surrogate(ratio.detach(), advantages).mean()
    torch.testing.assert_close(flat(d), flat(gradient(f, actor)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(v), flat(gradient(outer, critic)), rtol=1e-9, atol=1e-12)
    assert stats["policy_loss"] == pytest.approx(f.item())


def test_the_entropy_bonus_is_in_the_direct_gradient_alone(problem: Problem) -> None:
    actor, critic, batch = problem
    plain, with_bonus = config(), config(entropy_bonus=0.3)
    d, v, stats = outer_gradients(actor, critic, batch, plain)
    other_d, other_v, others = outer_gradients(actor, critic, batch, with_bonus)
    entropy = POLICY.log_prob(actor, batch.obs, batch.actions)[1].mean()
    expected = flat(d) - 0.3 * flat(gradient(entropy, actor))
    torch.testing.assert_close(flat(other_d), expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(leaf, v[name]) for name, leaf in other_v.items())
    assert others == stats  # the logged loss is f itself
    assert stats["entropy"] == pytest.approx(entropy.item())


def test_v_by_finite_differences(problem: Problem) -> None:
    actor, critic, batch = problem
    settings = config(outer_objective="return")
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    direction = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
        for n, p in critic.items()
    }

    def f(step: float) -> float:
        moved = {n: p.detach() + step * direction[n] for n, p in critic.items()}
        advantages, values = naive_advantages(moved, batch)
        return -(naive_ratio(actor, batch) * (advantages + values)).mean().item()

    difference = (f(1e-5) - f(-1e-5)) / 2e-5  # central: error about 1e-10
    assert flat(v).dot(flat(direction)).item() == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize(
    ("solver", "curvature"), list(itertools.product(["exact", "nystrom", "cg"], ["ggn", "hessian"]))
)
def test_inverse_hvp_and_response_against_the_dense_solve(
    problem: Problem, solver: str, curvature: str
) -> None:
    actor, critic, batch = problem
    dense = dense_curvature(critic, batch, curvature)
    damping = 0.1 + max(0.0, -2 * torch.linalg.eigvalsh(dense)[0].item())
    settings = config(
        solver=solver, curvature=curvature, damping=damping,
        rank=len(dense), cg_iters=10 * len(dense), cg_rtol=1e-12,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    expected = torch.linalg.solve(dense + damping * torch.eye(len(dense)), flat(v))
    samples, params = batch.targets.numel(), len(dense)
    paper = dataclasses.replace(settings, cross_term="paper")  # which solves for x itself
    omega = draw_sketch(paper, samples, params, generator)
    solved = inverse_hvp(critic, batch, v, settings, omega)
    assert solved.stats["ihvp_relative_residual"] < 1e-8
    torch.testing.assert_close(solved.value, expected, rtol=1e-7, atol=1e-9)
    x = unflatten(solved.value, shapes_of(critic))
    change = torch.func.jvp(lambda w: critic_value(w, batch.obs), (critic,), (x,))[1]
    omega = draw_sketch(settings, samples, params, generator)
    solved = critic_response(critic, batch, v, settings, omega)
    assert solved.stats["ihvp_relative_residual"] < 1e-8
    torch.testing.assert_close(solved.value, change, rtol=1e-7, atol=1e-9)


def test_identity_is_v_over_damping(problem: Problem) -> None:
    actor, critic, batch = problem
    settings = config(solver="identity", damping=2.0)
    _, v, _ = outer_gradients(actor, critic, batch, settings)
    solved = inverse_hvp(critic, batch, v, settings)
    assert torch.equal(solved.value, flat(v) / 2)


def naive_cross_term(actor: Params, critic: Params, u: Tensor, batch: Batch, mode: str) -> Tensor:
    """mean over samples of grad log pi_k W_k, one gradient per step."""
    total = torch.zeros_like(flat(actor))
    values = critic_value(critic, batch.obs)
    for n in range(len(u)):
        for k in range(STEPS):
            weight = torch.zeros((), dtype=torch.float64)
            for t in range(k + 1):
                if not batch.done[n, t:k].any():
                    decay = (GAMMA * LAMBDA) ** (k - t)
                    weight += -2 * batch.advantages[n, k] * decay * u[n, t]
            if mode == "full":
                for t in range(k + 1, STEPS):
                    weight += -2 * (batch.targets[n, t] - values[n, t]) * u[n, t]
            log_prob, _ = POLICY.log_prob(actor, batch.obs[n, k], batch.actions[n, k])
            total += weight.detach() * flat(gradient(log_prob, actor))
    return total / u.numel()


@pytest.mark.parametrize("mode", ["suffix", "full"])
def test_cross_term(problem: Problem, mode: str) -> None:
    actor, critic, batch = problem
    u = torch.randn(2, STEPS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    c = cross_term(POLICY, actor, critic, u, batch, mode)
    naive = naive_cross_term(actor, critic, u, batch, mode)
    torch.testing.assert_close(flat(c), naive, rtol=1e-9, atol=1e-12)
    with pytest.raises(AssertionError):  # the comparison notices a wrong sign
        torch.testing.assert_close(flat(c), -naive, rtol=1e-9, atol=1e-12)


def test_published_cross_term_by_finite_differences(problem: Problem) -> None:
    actor, critic, batch = problem
    settings = config(cross_term="paper")
    x = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype)
        for n, p in critic.items()
    }
    c = published_cross_term(POLICY, actor, critic, x, batch, settings)

    def actor_gradient(step: float) -> Tensor:
        moved = {n: p.detach() + step * x[n] for n, p in critic.items()}
        advantages, values = naive_advantages(moved, batch)
        losses = -naive_ratio(actor, batch) * advantages  # not clipped, and summed over the steps
        surrogate = 2 * (losses * (batch.targets - values)).sum(-1)
        return flat(gradient(surrogate.mean(), actor))

    difference = (actor_gradient(1e-5) - actor_gradient(-1e-5)) / 2e-5
    torch.testing.assert_close(flat(c), difference, rtol=1e-6, atol=1e-8)


def test_pieces_refuse_next_states_that_are_not_those_of_the_steps_after(problem: Problem) -> None:
    """The batch has a time limit that is no end, which ``bootstrap_truncated=False`` denies."""
    actor, critic, batch = problem
    settings = config(cross_term="paper", solver="exact", bootstrap_truncated=False)
    log_ratio, v = batch.log_probs.detach(), {n: torch.ones_like(p) for n, p in critic.items()}

    def pieces() -> None:
        follower_pass(critic, log_ratio, batch, settings)
        correction(POLICY, actor, critic, v, batch, settings)

    for piece in (
        lambda: follower_pass(critic, log_ratio, batch, settings),
        lambda: correction(POLICY, actor, critic, v, batch, settings),
        lambda: published_cross_term(POLICY, actor, critic, v, batch, settings),
    ):
        with pytest.raises(RolloutError, match=r"next_obs\[1, 7\] is not obs\[1, 8\].*terminated"):
            piece()
    batch.terminated = batch.done
    pieces()


def test_combine_bounds_the_correction() -> None:
    d, c = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 20.0])}
    step, stats = combine(d, c, None)
    assert step["w"].tolist() == [3.0, -16.0]
    assert stats["correction_ratio"] == 4.0
    assert stats["bound_active"] == 0.0
    torch.testing.assert_close(stats["correction_cosine"], torch.tensor(0.8))
    step, stats = combine(d, c, 0.5)
    assert step["w"].tolist() == [3.0, 1.5]
    assert stats["bound_active"] == 1.0
    assert combine(d, {"w": torch.zeros(2)}, 0.5)[0]["w"].tolist() == [3.0, 4.0]
    step, stats = combine({"w": torch.zeros(2)}, c, 0.5)
    assert step["w"].tolist() == [0.0, 0.0]
    assert stats["correction_ratio"].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bonus", [0.0, 0.3])
@pytest.mark.parametrize("objective", ["return", "advantage"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cross", ["suffix", "paper"])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_shared_passes_give_what_separate_ones_do(
    problem: Problem, bootstrap: bool, cross: str, own: bool, objective: str, bonus: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """One pass of the actor and one of the critic, of tanh layers and of a network of one's own."""
    actor, critic, batch = problem
    value_fn = Critic()
    if own:
        value_fn = Critic(lambda obs_dim: torch.nn.Linear(obs_dim, 1))
        critic = value_fn.init(OBS, (), torch.Generator().manual_seed(0))
    actor, critic = ({n: p.detach().to(dtype) for n, p in x.items()} for x in (actor, critic))
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    batch = Batch(**{n: x.to(dtype) if x.is_floating_point() else x for n, x in fields.items()})
    if not bootstrap:
        batch.terminated = batch.done
    settings = config(
        outer_objective=objective, entropy_bonus=bonus, solver="cg", cg_rtol=0.0, cg_iters=5,
        cross_term=cross,
    )  # fmt: skip
    advantages, _ = critic_advantages(critic, batch, GAMMA, value_fn)
    d, stats = direct_gradient(POLICY, actor, batch, advantages, settings)
    v = follower_gradient(critic, stats["log_ratio"], batch, settings, value_fn)
    c, solved = correction(POLICY, actor, critic, v, batch, settings, value_fn=value_fn)

    # The values of next states are those of the steps after, but for the last step.
    settings = dataclasses.replace(settings, bootstrap_truncated=bootstrap)
    acted = act(POLICY, actor, batch)
    log_ratio = acted.log_probs - batch.log_probs
    again, shared_v, jacobian = follower_pass(critic, log_ratio, batch, settings, value_fn)
    shared_d, _ = direct_gradient(POLICY, actor, batch, again, settings, acted)
    shared_c, other = correction(
        POLICY, actor, critic, shared_v, batch, settings, None, None, value_fn, acted, jacobian
    )
    states = batch.targets.numel() + (batch.targets.numel() if bootstrap else len(batch.targets))
    assert jacobian.values.shape == (states,)
    # Sums of 24 terms in another order, then five steps of CG, of a condition of about ten.
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for mine, theirs in (
        (again, advantages), (flat(shared_d), flat(d)), (flat(shared_v), flat(v)),
        (other.value, solved.value), (flat(shared_c), flat(c)),
    ):  # fmt: skip
        assert (mine - theirs).norm() <= rtol * theirs.norm()
        assert theirs.norm() > 0


def test_one_update_is_the_algorithm(problem: Problem) -> None:
    """One epoch, one trajectory a minibatch: the parameters after ``update`` are those of the
    algorithm in the module's documentation, written out with dense matrices and naive loops."""
    actor, critic, batch = problem
    rollout = Rollout(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(Rollout)})
    settings = config(
        num_envs=2, num_steps=STEPS, epochs=1, nested_steps=3, solver="exact", damping=0.5,
        correction_bound=0.7,
    )  # fmt: skip
    agent = BLPO(settings, POLICY, OBS, torch.Generator().manual_seed(0))
    agent.actor_shapes, agent.critic_shapes = shapes_of(actor), shapes_of(critic)
    agent.actor_state, agent.critic_state = AdamState.of(actor), AdamState.of(critic)
    theta, w = (shifted(p, torch.Generator(), 0.0) for p in (actor, critic))
    theta_adam = torch.optim.Adam(theta.values(), settings.learning_rate, eps=settings.adam_eps)
    w_adam = torch.optim.Adam(w.values(), settings.critic_learning_rate, eps=settings.adam_eps)

    def step(optimizer: torch.optim.Optimizer, params: Params, grads: Iterable[Tensor]) -> None:
        for p, g in zip(params.values(), grads, strict=True):
            p.grad = g
        optimizer.step()

    whole = make_batch(POLICY, theta, w, rollout, GAMMA, LAMBDA)
    # The agent's generator has drawn its initial parameters first: read the order from a copy.
    order_source = torch.Generator()
    order_source.set_state(agent.generator.get_state())
    order = torch.randperm(2, generator=order_source)
    agent.update(rollout, progress=0.0)

    for env in order:
        b = whole.select(env[None])
        for _ in range(3):
            g = (b.targets - critic_value(w, b.obs)).square().mean()
            step(w_adam, w, gradient(g, w).values())
        advantages, values = naive_advantages(w, b)
        ratio = naive_ratio(theta, b)
        d = gradient(naive_surrogate(ratio, advantages.detach()).mean(), theta)
        v = flat(gradient(-(ratio.detach() * (advantages + values)).mean(), w))
        dense = dense_curvature(w, b, "ggn")
        x = torch.linalg.solve(dense + 0.5 * torch.eye(len(dense)), v)
        jacobian = torch.stack([flat(gradient(critic_value(w, s), w)) for s in b.obs[0]])
        c = naive_cross_term(theta, w, (jacobian @ x)[None], b, "suffix")
        c = c * min(1.0, 0.7 * flat(d).norm() / c.norm())
        total = flat(d) - c
        parts = total.split([p.numel() for p in theta.values()])
        step(
            theta_adam, theta, [x.view(p.shape) for x, p in zip(parts, theta.values(), strict=True)]
        )
    torch.testing.assert_close(flat(agent.critic), flat(w), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(flat(agent.actor), flat(theta), rtol=1e-8, atol=1e-10)
