"""What the leader of BLPO gains by seeing the critic's response, exactly, on tabular MDPs.

``python -m benchmarks.outer_objective`` compares the total derivative dF/dtheta of each outer
objective with the gradient of the expected discounted return J, over random MDPs, in float64 and
without sampling: every expectation is a sum over states, actions and steps.  It writes a row for
each MDP, a table and a picture.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad
from benchmarks.tabular import GAMMA, STATES, STEPS, TabularMDP

OBJECTIVES = ("return", "advantage")
LAMBDAS = (0.95, 1.0)
#: The probability that the state stays as it is: slowly mixing chains have a longer memory.
STAYS = (0.0, 0.8)
#: V_w is linear in features of the state: all that it takes, or fewer random ones.
CRITICS = {"tabular": STATES, "3 features": 3, "1 feature": 1}


#: stay, critic, lambda, objective, state distribution.
Setting = tuple[float, str, float, str, str]


@dataclass(frozen=True)
class Row:
    """One MDP under one setting; the cosines are those with the gradient of J."""

    seed: int
    stay: float
    critic: str
    gae_lambda: float
    objective: str
    distribution: str
    direct: float  # of -d, the gradient without the response
    total: float  # of -dF/dtheta
    bounded: float  # of -(d - c), with |c| at most half of |d|
    ratio: float  # |c| / |d|


def policy_values(mdp: TabularMDP, theta: Tensor) -> Tensor:
    """V of the policy: discounted by ``GAMMA`` until the episode ends."""
    policy = theta.softmax(-1)
    alive = policy * (1 - mdp.end)
    moves = torch.einsum("sa,sat->st", alive, mdp.transition)
    reward = (policy * mdp.reward).sum(-1)
    solved: Tensor = torch.linalg.solve(torch.eye(len(moves)).to(moves) - GAMMA * moves, reward)
    return solved


def policy_gradient(mdp: TabularMDP) -> Tensor:
    """The gradient of J = E V(s_0) in the logits."""
    theta = mdp.theta.clone().requires_grad_()
    return torch.autograd.grad(mdp.start @ policy_values(mdp, theta), theta)[0]


class Game:
    """f and g of one rollout of T steps under pi_old, as exact sums; V_w = features w."""

    def __init__(
        self,
        mdp: TabularMDP,
        features: Tensor,
        gae_lambda: float,
        objective: str,
        distribution: str,
    ) -> None:
        self.mdp, self.features = mdp, features
        self.gae_lambda, self.objective = gae_lambda, objective
        self.fixed = distribution == "fixed"
        self.visits = torch.stack(mdp.state_distributions(mdp.theta))  # (T, S), under pi_old

    def outer_loss(self, w: Tensor, theta: Tensor) -> Tensor:
        """f = -(1/T) sum_t E rho_t A_w,t, or A_w,t + V_w(s_t) for "return"; rho = 1 at pi_old."""
        values = self.features @ w
        action_values = self.mdp.lambda_action_values(self.mdp.theta, values, self.gae_lambda)
        gains = torch.stack(action_values)  # (T, S, A): rewards and V_w from the next state on
        if self.objective == "advantage":
            gains = gains - values[:, None]
        return -(self.visits[..., None] * theta.softmax(-1) * gains).sum() / STEPS

    def inner_loss(self, w: Tensor, theta: Tensor) -> Tensor:
        """g = (1/T) sum_t E (G_t - V_w(s_t))^2, but for the variance of G_t, in which w is not."""
        visits, targets = self._visits(theta), self._targets(theta)
        return (visits * (targets - self.features @ w).square()).sum() / STEPS

    def best_response(self) -> Tensor:
        """w*: the mean targets of the states, fitted by least squares."""
        weights = self.visits.sum(0)
        targets = (self.visits * self._targets(self.mdp.theta)).sum(0) / weights
        return fit(self.features, targets, weights)

    def _visits(self, theta: Tensor) -> Tensor:
        return self.visits if self.fixed else torch.stack(self.mdp.state_distributions(theta))

    def _targets(self, theta: Tensor) -> Tensor:
        return torch.stack(self.mdp.frozen_targets(theta, self.gae_lambda))


def fit(features: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares."""
    root = weights.sqrt()
    solved: Tensor = torch.linalg.lstsq(root[:, None] * features, (root * values)[:, None]).solution
    return solved[:, 0]


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors as flat vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def measure(
    seed: int, stay: float, critic: str, gae_lambda: float, objective: str, distribution: str
) -> Row:
    """The derivatives of one game at its best response."""
    mdp = TabularMDP.random(seed, stay=stay)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(STATES, CRITICS[critic], generator=generator, dtype=torch.float64)
    # The critic that made the targets is one that has converged before.
    values = policy_values(mdp, mdp.theta)
    frozen = features @ fit(features, values, torch.ones_like(values))
    mdp = replace(mdp, frozen_values=frozen)
    game = Game(mdp, features, gae_lambda, objective, distribution)
    result = hypergrad.hypergradient(
        game.inner_loss, game.outer_loss, game.best_response(), mdp.theta, solver=hypergrad.Exact()
    )
    ascent = policy_gradient(mdp)
    ratio = float(result.implicit.norm() / result.direct.norm())
    bounded = result.direct + min(1.0, 0.5 / ratio) * result.implicit
    return Row(
        seed, stay, critic, gae_lambda, objective, distribution,
        cosine(-result.direct, ascent), cosine(-result.grad, ascent),
        cosine(-bounded, ascent), ratio,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """Mean cosines and the share of positive ones, a line a setting."""
    lines = [
        "| stay | critic | lambda | f | states | -d | -dF/dtheta | positive | bounded | c/d |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in groups(rows).items():
        mean = [
            sum(values) / len(group)
            for values in zip(*((r.direct, r.total, r.total > 0, r.bounded) for r in group),
                              strict=True)
        ]  # fmt: skip
        ratio = sorted(r.ratio for r in group)[len(group) // 2]
        lines.append(
            f"| {' | '.join(map(str, key))} | {mean[0]:.2f} | {mean[1]:.2f} "
            f"| {mean[2]:.0%} | {mean[3]:.2f} | {ratio:.2g} |"
        )
    return "\n".join(lines)


def groups(rows: list[Row]) -> dict[Setting, list[Row]]:
    """Rows by setting, in the order of the settings."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        key = (row.stay, row.critic, row.gae_lambda, row.objective, row.distribution)
        found.setdefault(key, []).append(row)
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Histograms of the cosine, one panel for each chain and lambda."""
    import matplotlib.pyplot as plt

    shown = {
        key: group for key, group in groups(rows).items() if key[1::3] == ("3 features", "fixed")
    }
    panels = list(dict.fromkeys((key[0], key[2]) for key in shown))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.3 * len(panels), 3.2), sharey=True, squeeze=False
    )
    bins = [-1 + 0.1 * i for i in range(21)]
    for axis, (stay, gae_lambda) in zip(axes[0], panels, strict=True):
        for objective, color in zip(OBJECTIVES, ("#2f6fa7", "#c4602b"), strict=True):
            values = [r.total for r in shown[stay, "3 features", gae_lambda, objective, "fixed"]]
            axis.hist(values, bins=bins, color=color, alpha=0.75, label=f'f: "{objective}"')
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_title(f"$\\lambda$ = {gae_lambda:g}, stays with {stay:g}", fontsize=10)
        axis.set_xlabel("cosine of $-dF/d\\theta$ with $\\nabla J$")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("decision processes")
    axes[0][0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.02, 1.0), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print the table, write rows and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mdps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/outer_objective"))
    arguments = parser.parse_args()
    settings = [
        (stay, critic, gae_lambda, objective, distribution)
        for stay in STAYS
        for critic in CRITICS
        for gae_lambda in LAMBDAS
        for objective in OBJECTIVES
        for distribution in ("fixed", "moving")
    ]
    rows = [
        measure(seed, *setting)
        for setting in tqdm(settings, desc="settings")
        for seed in range(arguments.mdps)
    ]
    assert all(math.isfinite(row.total) for row in rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "cosines.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            entry = asdict(row)
            writer.writerow(
                {k: f"{x:.6g}" if isinstance(x, float) else x for k, x in entry.items()}
            )
    print(table(rows))
    draw(rows, arguments.output / "outer_objective.png")
    print(f"rows and picture in {arguments.output}")


if __name__ == "__main__":
    main()
