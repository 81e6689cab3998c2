"""A small actor, critic and batch in float64, and dense computations on them."""

from typing import Any

import torch
from torch import Tensor

from hypergrad_rl import BLPOConfig
from hypergrad_rl.hypergradient import critic_advantages, direct_gradient, follower_gradient
from hypergrad_rl.networks import CategoricalPolicy, Params, critic_value, init_critic
from hypergrad_rl.rollout import Batch, Rollout, make_batch

OBS, ACTIONS, STEPS = 3, 3, 12
GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
POLICY = CategoricalPolicy(ACTIONS)
Problem = tuple[Params, Params, Batch]
#: The options of the published update.
PAPER: dict[str, Any] = {
    "curvature": "hessian", "cross_term": "paper", "outer_objective": "advantage",
    "sketch": "columns", "correction_bound": 1.4,
}  # fmt: skip


def double(params: Params) -> Params:
    return {name: p.detach().double().requires_grad_() for name, p in params.items()}


def shifted(params: Params, generator: torch.Generator, size: float) -> Params:
    """The same tree a little elsewhere, so that ratios differ from 1 and w from w0."""
    noise = {
        n: size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in params.items()
    }
    return {n: (p + noise[n]).detach().requires_grad_() for n, p in params.items()}


def small_problem() -> Problem:
    """Actor, critic and a batch of two trajectories with ends of both kinds."""
    generator = torch.Generator().manual_seed(0)
    old_actor = double(POLICY.init(OBS, (5,), generator))
    old_actor["weight1"] = (100 * old_actor["weight1"]).detach().requires_grad_()
    old_critic = double(init_critic(OBS, (6, 5), generator))
    obs, next_obs = torch.randn(2, 2, STEPS, OBS, generator=generator, dtype=torch.float64)
    done = torch.zeros(2, STEPS, dtype=torch.bool)
    done[0, 4] = done[1, 7] = True
    terminated = done.clone()
    terminated[1] = False
    next_obs[:, :-1] = torch.where(done[:, :-1, None], next_obs[:, :-1], obs[:, 1:])
    rollout = Rollout(
        obs=obs,
        actions=torch.randint(ACTIONS, (2, STEPS), generator=generator),
        rewards=torch.randn(2, STEPS, generator=generator, dtype=torch.float64),
        next_obs=next_obs,
        terminated=terminated,
        done=done,
    )
    batch = make_batch(POLICY, old_actor, old_critic, rollout, GAMMA, LAMBDA)
    return shifted(old_actor, generator, 0.05), shifted(old_critic, generator, 0.05), batch


def gradient(loss: Tensor, params: Params) -> Params:
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def flat(tree: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def dense_curvature(critic: Params, batch: Batch, kind: str) -> Tensor:
    """H of g as a matrix, entry by entry through double differentiation."""
    shapes = {n: p.shape for n, p in critic.items()}

    def unflatten(w: Tensor) -> Params:
        parts = torch.split(w, [s.numel() for s in shapes.values()])
        return {n: x.view(s) for (n, s), x in zip(shapes.items(), parts, strict=True)}

    w = flat(critic).detach()
    if kind == "ggn":
        jacobian = torch.func.jacrev(lambda w: critic_value(unflatten(w), batch.obs).reshape(-1))(w)
        return 2 / len(jacobian) * jacobian.T @ jacobian
    hessian: Tensor = torch.func.hessian(
        lambda w: (batch.targets - critic_value(unflatten(w), batch.obs)).square().mean()
    )(w)
    return hessian


def config(**settings: Any) -> BLPOConfig:
    return BLPOConfig(gamma=GAMMA, gae_lambda=LAMBDA, clip=CLIP, **settings)


def outer_gradients(
    actor: Params, critic: Params, batch: Batch, settings: BLPOConfig
) -> tuple[Params, Params, dict[str, Tensor]]:
    """d, v and statistics, of the pieces as a minibatch update calls them."""
    advantages = critic_advantages(critic, batch, GAMMA)[0].detach()
    d, stats = direct_gradient(POLICY, actor, batch, advantages, settings)
    v = follower_gradient(critic, stats.pop("log_ratio"), batch, settings)
    return d, v, stats


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A checkpoint's state by paths, without the time that it took."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{key}/")
        elif key != "seconds":
            flat[prefix + key] = value.tolist() if isinstance(value, Tensor) else value
    return flat
