"""A decision process whose leader has to anticipate its critic: two moves that have to match.

From the start, the first move leads into the left or the right room; there the second move earns a
reward of 1 if it is the same.  The actor has one softmax policy for the start and one for both
rooms, which look alike to it; the linear critic V_w knows the rooms.  The leader judges a policy by
the first move and what the critic says of the rooms, with an entropy bonus tau,

    f(theta, w) = -sum_a pi_1(a) V_w(room a) - tau (H(pi_1) + H(pi_2)),

and the follower fits the returns that the policy earns, with probabilities d of being in a state,

    g(theta, w) = 1/2 sum_s d_theta(s) (E[G | s] - V_w(s))^2.

The second move enters f through the critic's answer alone.

    python docs/examples/lsse.py --run-dir runs/lsse
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import hypergrad
from hypergrad_rl.advantages import discount_matrix, gae
from hypergrad_rl.objectives import cross_term_weights

F64 = torch.float64
TAU = 0.4
#: V_w = FEATURES w at start, left, right: a bias, and an indicator for each room.
FEATURES = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=F64)
#: Leader's and follower's steps, each below 2 over the largest curvature: tau / 4 + 1 / 8 of
#: the leader's, at (0, 0), and at most the trace sum_s d(s) |FEATURES_s|^2 = 1.5 of the follower's.
LEADER_STEP, FOLLOWER_STEP = 6.0, 1.0
METHODS = {"blpo": 5, "nested": 5, "simultaneous": 1}  # critic steps for each of the actor
DAMPING = 1e-8
JUDGES = ("first", "every")  # the moves that f counts

#: (theta, w) at the start and after each of the leader's steps.
Trajectory = list[tuple[Tensor, Tensor]]


def entropy(logit: Tensor) -> Tensor:
    """Of a choice between two, with the probability sigmoid(logit) of the first."""
    return -(logit.sigmoid() * logsigmoid(logit) + (-logit).sigmoid() * logsigmoid(-logit))


def state_returns(theta: Tensor) -> Tensor:
    """E[G | s] at start, left and right: what the follower learns."""
    p, q = theta.sigmoid()
    return torch.stack([p * q + (1 - p) * (1 - q), q, 1 - q])


def visits(theta: Tensor) -> Tensor:
    """The share of the steps spent at start, left and right, of two an episode."""
    p = theta.sigmoid()[0]
    return torch.stack([torch.ones_like(p), p, 1 - p]) / 2


def leader_loss(theta: Tensor, w: Tensor) -> Tensor:
    """f: the first move by the critic's values of the rooms, and the entropy bonus."""
    p, values = theta[0].sigmoid(), FEATURES @ w
    return -(p * values[1] + (1 - p) * values[2]) - TAU * entropy(theta).sum()


def leader_loss_of_every_move(old: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The f of BLPO's updates: it adds the second move, in the rooms as the old policy visits them.

    -sum_t E_old[rho_t (A_w,t + V_w(s_t))] with lambda = 0, and the entropy bonus.
    """
    before = old.detach().sigmoid()[0]

    def loss(theta: Tensor, w: Tensor) -> Tensor:
        q = theta[1].sigmoid()
        return leader_loss(theta, w) - (before * q + (1 - before) * (1 - q))

    return loss


def follower_loss(theta: Tensor, w: Tensor) -> Tensor:
    """g, but for the variance of the returns, in which w is not."""
    return 0.5 * (visits(theta) * (state_returns(theta) - FEATURES @ w).square()).sum()


def best_response(theta: Tensor) -> Tensor:
    """w*(theta): as many features as states fit any values."""
    solved: Tensor = torch.linalg.solve(FEATURES, state_returns(theta))
    return solved


def objective(theta: Tensor) -> Tensor:
    """What the leader gets for theta once the critic has answered: -f(theta, w*(theta)).

    The expected return plus tau times the entropies, for any theta of shape (..., 2).
    """
    p, q = theta.sigmoid().unbind(-1)
    return p * q + (1 - p) * (1 - q) + TAU * entropy(theta).sum(-1)


def optimum() -> float:
    """theta* > 0: the leader's optima are (theta*, theta*) and (-theta*, -theta*).

    d objective / d theta_1 = sigmoid'(theta_1) (tanh(theta_2 / 2) - tau theta_1), and the same with
    1 and 2 exchanged: all stationary points have theta_1 = theta_2 with tanh(theta / 2) = tau
    theta, which has a positive root for tau < 1/2.
    """
    return float(brentq(lambda x: math.tanh(x / 2) - TAU * x, 0.1, 1 / TAU, xtol=1e-14))


def play(method: str, theta: Tensor, w: Tensor, steps: int, judge: str = "first") -> Trajectory:
    """The critic's steps, then one of the actor along its partial or total derivative; repeated."""
    path = [(theta, w)]
    for _ in range(steps):
        share, returns = visits(theta), state_returns(theta)
        for _ in range(METHODS[method]):  # along grad_w g
            w = w - FOLLOWER_STEP * FEATURES.T @ (share * (FEATURES @ w - returns))
        f = leader_loss if judge == "first" else leader_loss_of_every_move(theta)
        if method == "blpo":
            # All three columns of the critic's Hessian: no error but that of the damping.
            solver = hypergrad.Nystrom(rank=3, sketch="columns")
            got = hypergrad.stackelberg_gradient(
                f, follower_loss, theta, w, solver=solver, damping=DAMPING
            )
            assert isinstance(got.grad, Tensor)
            step = got.grad
        else:  # c = 0: the critic is what it is
            leaf = theta.clone().requires_grad_()
            (step,) = torch.autograd.grad(f(leaf, w), leaf)
        theta = theta - LEADER_STEP * step
        path.append((theta, w))
    return path


def sampled_update(
    theta: Tensor, w: Tensor, rollouts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BLPO's update from sampled episodes: critic steps, then the actor along d - c.

    Nothing is differentiated through the process: G is made by ``gae`` with lambda = 1 and c by
    ``cross_term_weights``, as in ``hypergrad_rl.BLPO``.
    """
    # An action is 1 where it is the one whose probability is sigmoid(theta).
    noise = torch.rand(rollouts, 2, generator=generator, dtype=F64)
    actions = (noise < theta.sigmoid()).long()
    score = actions - theta.sigmoid()  # grad log pi of each step, in its own logit
    room = 2 - actions[:, 0]
    states = torch.stack([torch.zeros_like(room), room], dim=1)
    rewards = torch.zeros(rollouts, 2, dtype=F64)
    rewards[:, 1] = (actions[:, 0] == actions[:, 1]).to(F64)
    over = torch.tensor([False, True]).expand(rollouts, 2)
    features = FEATURES[states]  # (rollouts, 2, 3)
    matrix = discount_matrix(over, 1.0, F64)

    old = features @ w
    following = torch.stack([old[:, 1], torch.zeros(rollouts, dtype=F64)], dim=1)
    advantages = gae(matrix, rewards, old, following, over, 1.0)
    targets = advantages + old
    curvature = torch.einsum("nti,ntj->ij", features, features) / (2 * rollouts)
    for _ in range(METHODS["blpo"]):
        errors = (targets - features @ w)[..., None]
        w = w + FOLLOWER_STEP * (errors * features).sum(1).mean(0) / 2

    values = features @ w
    d = torch.func.grad(lambda logits: -TAU * entropy(logits).sum())(theta)
    d[0] -= (score[:, 0] * (values[:, 1] - values[:, 0])).mean()  # A_w of the first move
    v = -features[:, 1].mean(0)  # of -E[A_w + V_w] at the first move
    # g without its 1/2, of which cross_term_weights are the derivative, has twice the curvature.
    solver = hypergrad.Nystrom(rank=3, sketch="columns", generator=generator)
    x = hypergrad.solve(2 * curvature, v, solver, damping=DAMPING).value
    weights = cross_term_weights("suffix", matrix, advantages, values, targets, features @ x)
    c = (score * weights).mean(0) / 2
    return theta - LEADER_STEP * (d - c), w


def initial(seed: int) -> tuple[Tensor, Tensor]:
    """A random actor and a random critic."""
    generator = torch.Generator().manual_seed(seed)
    theta = 1.5 * torch.randn(2, generator=generator, dtype=F64)
    return theta, torch.randn(3, generator=generator, dtype=F64)


def play_sampled(seed: int, steps: int, rollouts: int = 2000) -> Tensor:
    """The actor after each sampled update, (steps, 2)."""
    generator = torch.Generator().manual_seed(seed)
    theta, w = initial(seed)
    path = []
    for _ in range(steps):
        theta, w = sampled_update(theta, w, rollouts, generator)
        path.append(theta)
    return torch.stack(path)


def measure(method: str, judge: str, paths: list[Trajectory]) -> dict[str, Any]:
    """Where a method ends, the worst of the seeds, and the check at the first one's end."""
    ends = [path[-1] for path in paths]
    thetas = torch.stack([theta for theta, _ in ends])
    star, (theta, w) = optimum(), ends[0]
    f = leader_loss if judge == "first" else leader_loss_of_every_move(theta)
    check = hypergrad.check_stackelberg(f, follower_loss, theta, w)
    to_optimum = (thetas.abs() - star).norm(dim=-1)
    return {
        "method": method,
        "judge": judge,
        "theta": thetas.tolist(),
        "objective": float(objective(thetas).min()),
        "expected_return": float((objective(thetas) - TAU * entropy(thetas).sum(-1)).min()),
        "largest_distance_to_optimum": float(to_optimum.max()),
        "smallest_distance_to_optimum": float(to_optimum.min()),
        "leader_gradient_norm": check.leader_gradient_norm,
        "leader_curvature": check.leader_curvature,
        "follower_gradient_norm": check.follower_gradient_norm,
        "follower_curvature": check.follower_curvature,
        "is_equilibrium": check.is_equilibrium,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each method and judge."""
    lines = [
        "| f counts | method | theta | objective | return | to the optimum | total gradient "
        "| total curvature | equilibrium |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        first = ", ".join(f"{abs(x):.2f}" for x in r["theta"][0])
        lines.append(
            f"| {r['judge']} | {r['method']} | {first} | {r['objective']:.4f} "
            f"| {r['expected_return']:.4f} | {r['largest_distance_to_optimum']:.1e} "
            f"| {r['leader_gradient_norm']:.1e} | {r['leader_curvature']:.4f} "
            f"| {'yes' if r['is_equilibrium'] else 'no'} |"
        )
    return "\n".join(lines)


def draw(paths: dict[str, list[Trajectory]], file: Path) -> None:
    """The leader's paths over what it gets, one panel a method."""
    axis = torch.linspace(-5, 5, 201, dtype=F64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 4.2), sharey=True, layout="constrained")
    levels = torch.linspace(0.6, 1.1, 21).tolist()
    names = {"simultaneous": "simultaneous gradients", "blpo": "BLPO"}
    for panel, (method, name) in zip(panels, names.items(), strict=True):
        filled = panel.contourf(
            axis, axis, objective(grid), levels=levels, cmap="Blues", extend="min"
        )
        for path in paths[method]:
            line = torch.stack([theta for theta, _ in path])
            panel.plot(line[:, 0], line[:, 1], color="#c4602b", linewidth=1)
            panel.plot(line[0, 0], line[0, 1], "o", color="#c4602b", markersize=3)
        for sign in (-1, 1):
            mark = panel.plot(sign * optimum(), sign * optimum(), "*", color="black", markersize=11)
        saddle = panel.plot(0, 0, "X", color="white", markeredgecolor="black", markersize=8)
        panel.set_title(name)
        panel.set_xlabel(r"$\theta_1$, first move")
    panels[0].set_ylabel(r"$\theta_2$, second move")
    marks = [mark[0], saddle[0]]
    panels[1].legend(marks, ["leader's optima", "saddle"], loc="upper left", fontsize=9)
    figure.colorbar(filled, ax=panels, label="what the leader gets", format="%.2f")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Play, print the table, write results and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/lsse"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    paths: dict[str, list[Trajectory]] = {}
    rows = []
    for method, judge in tqdm([(m, j) for j in JUDGES for m in METHODS], desc="cases"):
        # Counting every move leaves the leader flatter minima: fewer starts, more steps.
        every = judge == "every"
        seeds, steps = (2, 3 * options.steps) if every else (options.seeds, options.steps)
        got = [play(method, *initial(seed), steps, judge) for seed in range(seeds)]
        if not every:
            paths[method] = got
        rows.append(measure(method, judge, got))
    # The mean of the second half: what is left of the noise of 2,000 episodes an update.
    means = [
        play_sampled(seed, options.steps)[options.steps // 2 :].mean(0)
        for seed in range(options.seeds)
    ]
    sampled = (torch.stack(means).abs() - optimum()).norm(dim=-1)
    results = {
        "tau": TAU,
        "optimum": optimum(),
        "rows": rows,
        "sampled_distance_to_optimum": sampled.tolist(),
    }
    print(f"optimum: theta = +-({optimum():.6f}, {optimum():.6f})")
    print(table(rows))
    print(f"sampled: {float(sampled.max()):.2f} from an optimum at most, in the mean of the path")
    options.run_dir.mkdir(parents=True, exist_ok=True)
    (options.run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    draw(paths, options.run_dir / "lsse.png")
    return results


if __name__ == "__main__":
    main()
