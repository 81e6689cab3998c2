"""Influence functions: which training digits made this prediction?

Softmax regression on scikit-learn's handwritten digits, with an L2 term. How would the loss of a
test digit change if one training digit were left out? To first order in 1/n, by Koh and Liang
(2017, arXiv 1703.04730),

    loss_t(W without i) - loss_t(W)  ~  1/n <grad loss_t, H^-1 grad loss_i>

with H the Hessian of the training loss at its minimiser W: one inverse-Hessian-vector product a
test digit answers it for every training digit. They come from ``hypergrad.solve``, with an exact
solver, by CG and by Nyström-preconditioned CG, and all of them are compared with the truth: every
training digit is in fact left out, and the model trained again until its gradient has a norm of
1e-12.

    python docs/examples/influence.py --run-dir runs/influence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import (
    begin,
    csv_table,
    parser_of,
    save_picture,
    shuffled_digits,
    with_constant,
    write_json,
)
from influence_output import draw, print_table
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad


@dataclass(frozen=True)
class Config:
    """Every choice that is made.

    Attributes:
        num_train: training digits.
        num_test: test digits whose predictions are explained.
        num_retrained: training digits that are left out, one by one: the first so many.
        l2: strength of the L2 term.
        other_l2: strengths for which the comparison is made once more, with the exact solver.
        rtol: relative residual at which CG stops, with and without a sketch.
        rank: of the Nyström sketch, of 650 parameters.
        gradient_tolerance: norm of the gradient at which a training has converged.
        seed: of the split and of the sketch.
    """

    num_train: int = 1000
    num_test: int = 100
    num_retrained: int = 1000
    l2: float = 3e-3
    other_l2: tuple[float, ...] = (3e-2, 1e-2, 1e-3, 3e-4, 1e-4)
    rtol: float = 1e-6
    rank: int = 200
    gradient_tolerance: float = 1e-12
    seed: int = 0


# --------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Images of shape (n, 65), 64 pixels in [0, 1] and a constant; labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def make_data(config: Config) -> Data:
    """Split the digits at random."""
    generator = torch.Generator().manual_seed(config.seed)
    parts = shuffled_digits([config.num_train, config.num_test], generator)
    train, test, _ = ((with_constant(x), y) for x, y in parts)
    return Data(*train, *test)


def losses(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example, shape (n,)."""
    return cross_entropy(x @ w, y, reduction="none")


def gradients(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of each example's loss, shape (n, 65, 10)."""
    each = torch.func.grad(lambda w, x, y: cross_entropy(x @ w, y))
    found: Tensor = torch.func.vmap(each, in_dims=(None, 0, 0))(w, x, y)
    return found


# --------------------------------------------------------------------------------------- training


def weighted_loss(w: Tensor, data: Data, weights: Tensor) -> Tensor:
    """Data term of the training loss, 1/n sum_i weights_i loss_i; a weight of 0 leaves one out."""
    return (weights * losses(w, data.train_x, data.train_y)).sum() / len(data.train_y)


def train(
    data: Data,
    weights: Tensor,
    l2: float,
    w: Tensor,
    tolerance: float,
    preconditioner: hypergrad.LinearOperator | None = None,
    max_steps: int = 50,
) -> Tensor:
    """Minimise the data term and l2/2 |W|^2 from ``w`` by Newton's method.

    The loss is strongly convex: at a gradient g the minimiser is within |g| / l2. The Newton
    systems are solved with a relative residual of 1e-4, so a step near the solution takes four
    digits off the gradient.
    """

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        (found,) = torch.autograd.grad(weighted_loss(w, data, weights), w)
        return found + l2 * w.detach()

    solver = hypergrad.CG(rtol=1e-4, preconditioner=preconditioner)
    g = gradient(w)
    for _ in range(max_steps):
        if float(g.norm()) <= tolerance:
            return w
        hessian = hypergrad.hessian(lambda w: weighted_loss(w, data, weights), w)
        step = hypergrad.solve(hessian, g, solver, damping=l2, on_failure="raise").value
        # Far from the solution a whole step can be too long: halve it until the gradient's norm
        # falls by a quarter of what it would in a quadratic.
        scale = 1.0
        while float(gradient(w - scale * step).norm()) > (1.0 - 0.25 * scale) * float(g.norm()):
            scale /= 2.0
            if scale < 1e-6:
                raise RuntimeError(f"no step lowers the gradient, which is {float(g.norm()):.1e}")
        w = w - scale * step
        g = gradient(w)
    raise RuntimeError(f"training stopped at a gradient of {float(g.norm()):.1e}")


def leave_one_out(data: Data, l2: float, w: Tensor, config: Config, progress: Any) -> Tensor:
    """How much each test loss rises when a training digit is left out: the exact answer.

    Shape (num_test, num_retrained). Trains anew for each digit, from the solution with all of
    them. Every Newton system is close to the one there, so one sketch preconditions them all.
    """
    ones = torch.ones(len(data.train_y), dtype=torch.float64)
    sketch = hypergrad.nystrom_sketch(
        hypergrad.hessian(lambda w: weighted_loss(w, data, ones), w),
        config.rank,
        damping=l2,
        generator=torch.Generator().manual_seed(config.seed),
    )
    preconditioner = sketch.preconditioner(l2)
    before = losses(w, data.test_x, data.test_y)
    changes = []
    progress.set_description(f"l2 {l2:g}, leaving one out")
    for left_out in range(config.num_retrained):
        weights = ones.clone()
        weights[left_out] = 0.0
        without = train(data, weights, l2, w, config.gradient_tolerance, preconditioner)
        changes.append(losses(without, data.test_x, data.test_y) - before)
        progress.update()
    return torch.stack(changes, dim=1)


# -------------------------------------------------------------------------------------- influence


def make_solvers(config: Config) -> dict[str, hypergrad.Solver]:
    """The three solvers that are compared."""
    generator = torch.Generator().manual_seed(config.seed)
    return {
        "exact": hypergrad.Exact(),
        "cg": hypergrad.CG(rtol=config.rtol),
        "nystrom_pcg": hypergrad.NystromPCG(config.rank, rtol=config.rtol, generator=generator),
    }


def influence(
    data: Data, l2: float, w: Tensor, solver: hypergrad.Solver
) -> tuple[Tensor, hypergrad.SolveInfo]:
    """1/n <grad loss_t, H^-1 grad loss_i> for each test digit t and training digit i.

    Shape (num_test, num_train). One solve a test digit, all of them in one batch.
    """
    ones = torch.ones(len(data.train_y), dtype=torch.float64)
    # The L2 term adds l2 I to the Hessian: that is known, and goes where multiples of the identity
    # go. It is not a choice of the solver here; the minimiser is that of the loss with it.
    hessian = hypergrad.hessian(lambda w: weighted_loss(w, data, ones), w)
    test_gradients = gradients(w, data.test_x, data.test_y)
    solution = hypergrad.solve(hessian, test_gradients, solver, damping=l2, batched=True)
    train_gradients = gradients(w, data.train_x, data.train_y)
    scores = solution.value.flatten(1) @ train_gradients.flatten(1).T / len(data.train_y)
    return scores, solution.info


def one_newton_step(data: Data, l2: float, w: Tensor, count: int) -> Tensor:
    """How much each test loss rises by the first Newton step of each retraining.

    Shape (num_test, count). The step is 1/n (H - H_i/n)^-1 grad loss_i: what influence leaves out
    is that the Hessian changes, too, and that the test loss is curved (Pregibon 1981). The Hessian
    of one example with probabilities p is the Kronecker product of x x' and diag(p) - p p' = S S',
    of rank 9, so the inverse follows from that of H by the Woodbury identity.
    """
    n, features, classes = len(data.train_y), *w.shape
    ones = torch.ones(n, dtype=torch.float64)
    hessian = hypergrad.hessian(lambda w: weighted_loss(w, data, ones), w) + l2
    inverse = torch.linalg.inv(hessian.to_dense()).reshape(features, classes, features, classes)

    x, y = data.train_x[:count], data.train_y[:count]
    p = torch.softmax(x @ w, dim=1)
    r = p - torch.nn.functional.one_hot(y, classes)  # grad loss_i is the outer product of x_i, r_i
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # S
    # With K_i what H^-1 makes of x_i in its own logits, (H - H_i/n)^-1 grad loss_i is H^-1 times
    # the outer product of x_i and r + S (n I - S'K S)^-1 S'K r.
    own = torch.einsum("na,acbd,nb->ncd", x, inverse, x)
    pulled = root.mT @ own
    small = n * torch.eye(classes, dtype=torch.float64) - pulled @ root
    r = r + (root @ torch.linalg.solve(small, pulled @ r[:, :, None]))[:, :, 0]
    steps = torch.einsum("acbd,nb,nd->nac", inverse, x, r) / n

    before = losses(w, data.test_x, data.test_y)
    after = torch.func.vmap(losses, in_dims=(0, None, None))(w + steps, data.test_x, data.test_y)
    return (after - before).T


# ---------------------------------------------------------------------------------- the comparison


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of all entries."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def compare(predicted: Tensor, exact: Tensor) -> dict[str, Any]:
    """How well the prediction agrees with retraining; both of shape (num_test, num_retrained).

    A correlation for each test digit, over the training digits, and one over all pairs.
    """
    predicted = predicted[:, : exact.shape[1]]  # of the training digits that were left out
    rows = [correlation(*pair) for pair in zip(predicted, exact, strict=True)]
    return {
        "correlation_all_pairs": correlation(predicted, exact),
        "correlation_worst": min(rows),
        "correlation_median": float(torch.tensor(rows).median()),
        # Correlation is blind to a common factor; the slope of exact on predicted is not.
        "slope": float((predicted * exact).sum() / predicted.square().sum()),
        "correlation_by_test_digit": rows,
    }


@dataclass
class Explained:
    """What is known of the test digits at one strength."""

    w: Tensor
    exact: Tensor  # (num_test, num_retrained)
    influence: dict[str, Tensor]  # by solver, (num_test, num_train)
    report: dict[str, Any]


def explain(
    data: Data, l2: float, solvers: dict[str, hypergrad.Solver], config: Config, progress: Any
) -> Explained:
    """Train, predict the changes by each solver, and retrain for the exact ones."""
    ones = torch.ones(len(data.train_y), dtype=torch.float64)
    w = train(data, ones, l2, torch.zeros(65, 10, dtype=torch.float64), config.gradient_tolerance)
    scores, reports = {}, {}
    exact = leave_one_out(data, l2, w, config, progress)
    for name, solver in solvers.items():
        scores[name], info = influence(data, l2, w, solver)
        reports[name] = {
            **compare(scores[name], exact),
            "relative_residual_worst": info.relative_residual,
            "iterations": max((c.iterations for c in info.columns), default=info.iterations),
            "num_hvps": info.num_hvps,
        }
    report = {
        "l2": l2,
        "test_accuracy": float(((data.test_x @ w).argmax(1) == data.test_y).double().mean()),
        "test_loss": float(losses(w, data.test_x, data.test_y).mean()),
        "exact_change_median": float(exact.abs().median()),
        "exact_change_largest": float(exact.abs().max()),
        "solvers": reports,
        "newton_step": compare(one_newton_step(data, l2, w, config.num_retrained), exact),
    }
    return Explained(w, exact, scores, report)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, explain, retrain, print the table, write the results and the picture."""
    parser = parser_of(__doc__, "influence")
    parser.add_argument("--num-retrained", type=int, default=Config.num_retrained)
    parser.add_argument("--other-l2", type=float, nargs="*", default=Config.other_l2)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = begin(parser, arguments)
    config = Config(
        num_retrained=options.num_retrained, other_l2=tuple(options.other_l2), seed=options.seed
    )

    data, solvers = make_data(config), make_solvers(config)
    with tqdm(total=config.num_retrained * (1 + len(config.other_l2)), unit="model") as progress:
        explained = explain(data, config.l2, solvers, config, progress)
        exact = {"exact": solvers["exact"]}
        others = [explain(data, l2, exact, config, progress).report for l2 in config.other_l2]
    strengths = sorted([explained.report, *others], key=lambda report: -report["l2"])
    results = {"config": asdict(config), "main": explained.report, "strengths": strengths}

    write_json(options.run_dir, results)
    with csv_table(
        options.run_dir, ["test_digit", "train_digit", *explained.influence, "retrained"]
    ) as writer:
        for test, row in enumerate(explained.exact.tolist()):
            for left_out, change in enumerate(row):
                scores = [float(s[test, left_out]) for s in explained.influence.values()]
                writer.writerow([test, left_out, *scores, change])
    print_table(results, config)
    figure = draw(data, explained, results)
    save_picture(figure, options.run_dir, "influence")
    return results


if __name__ == "__main__":
    main()
