"""The follower's linear system (H + damping I) x = v: where it is solved, how, and how well.

H is the curvature of g in the critic, its Hessian or its Gauss-Newton matrix (2/N) J'J, with J the
Jacobian of the values at the N samples. What a cross term needs decides the space:

- the whole x (the published one): parameter space, n x n;
- only u = J x, with the Gauss-Newton matrix: sample space, N x N (128 against 4,545 by default), by

      J ((2/N) J'J + damping I)^-1 v  =  ((2/N) J J' + damping I)^-1 J v

  with J J' formed once, without J. Both matrices have the same non-zero eigenvalues, hence the same
  Nyström rank serves. A sketch to be kept over minibatches (``sketch_every``) needs parameter
  space: every minibatch has its own J J'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import hypergrad
from hypergrad_rl.config import BLPOConfig
from hypergrad_rl.functional import flatten, shapes_of, unflatten
from hypergrad_rl.networks import DEFAULT_CRITIC, Critic, Jacobian, Params, ValueFn
from hypergrad_rl.objectives import value_loss
from hypergrad_rl.rollout import Batch
from hypergrad_rl.value_jacobian import ValueJacobian

#: Columns of a matrix, (k, n), from unit vectors (k, n).
Columns = Callable[[Tensor], Tensor]
Mode = Literal["forward_over_reverse", "reverse_over_reverse"]
#: Ritz values are read off this many of the vectors that a solve has multiplied, the last ones.
RITZ_VECTORS = 16
#: Directions of their span below this share of the longest, squared: rounding, times its inverse.
_DEPENDENT = 1e-3


class Sketch(NamedTuple):
    """A Nyström sketch from one block of products: A_nys = Y' W^+ Y.

    Args:
        products: Y = Omega A, (k, n). For the columns' sketch they are k columns of A.
        core: W = Omega A Omega', (k, k).
    """

    products: Tensor
    core: Tensor

    def solve(self, v: Tensor, damping: float, shift: float = 0.0) -> Tensor:
        """(A_nys + damping I)^-1 v by Woodbury's identity, as in Hataya and Yamada (2023).

            x = (v - Y' (damping W + Y Y')^-1 Y v) / damping

        Summed in float64: the k x k matrix squares the condition of Y. A direction in which Y
        vanishes (the weights of an input that is always zero) has no part in it. ``shift`` is
        added to the diagonal of W.
        """
        y, w, wide = self.products.double(), self.core.double(), v.double()
        eye = torch.eye(len(w), dtype=w.dtype)
        inner = damping * (0.5 * (w + w.T) + shift * eye) + y @ y.T
        small = torch.linalg.pinv(inner, hermitian=True) @ (y @ wide)
        x: Tensor = ((wide - small @ y) / damping).to(v.dtype)
        return x


class Grams(NamedTuple):
    """Inner products of vectors b of norm one and of their products A b: float64, (m, m) each.

    Args:
        gram: b_i' b_j.
        core: b_i' A b_j.
    """

    gram: Tensor
    core: Tensor

    @classmethod
    def of(cls, vectors: Tensor, products: Tensor) -> Grams:
        """Of rows of any length, zeros among them, and their products with A."""
        b, y = vectors.double(), products.double()
        size = b.norm(dim=1, keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
        b, y = b / size, y / size
        return cls(b @ b.T, b @ y.T)


class Solved(NamedTuple):
    """The answer to a damped system, with what there is to say about it.

    Args:
        value: shaped like the right-hand side.
        stats: ``ihvp_relative_residual``, |v - (H + damping I) x| / |v| by a product with H
            itself, NaN where that was not asked for and the solver does without; ``damping`` where
            it is found automatically.
        sketch: the sketch that was used, if one is to be kept.
        grams: of what the solve has multiplied, for :func:`ritz_extremes`; zeros where that was
            not asked for.
    """

    value: Tensor
    stats: dict[str, Tensor]
    sketch: Sketch | None
    grams: Grams


def in_sample_space(config: BLPOConfig) -> bool:
    """Whether the system is as large as the batch, and not as the critic."""
    return config.curvature == "ggn" and config.cross_term != "paper" and config.sketch_every == 1


def draw_sketch(
    config: BLPOConfig, num_samples: int, num_params: int, generator: torch.Generator
) -> Tensor | None:
    """The random numbers that a sketch is made with; None if the solver needs none.

    Gaussian rows (rank, size), the indices of columns (rank,), what weighted columns are sorted
    by (size,), or the seed of a preconditioner. They are drawn here, and not in the solver, because
    what is drawn within a compiled graph is not what is drawn outside.
    """
    if config.solver not in ("nystrom", "nystrom_pcg"):
        return None
    if not config.redraw_sketch:
        # Of another stream than the first parameters, which are drawn with the seed itself.
        generator = torch.Generator().manual_seed(2**32 + config.seed)
    if config.solver == "nystrom_pcg":
        return torch.randint(2**31, (), generator=generator)
    size = num_samples if in_sample_space(config) else num_params
    rank = min(config.rank, size)
    if config.sketch == "gaussian":
        return torch.randn(rank, size, generator=generator)
    if config.sketch == "columns":
        return torch.randperm(size, generator=generator)[:rank]
    return torch.empty(size).exponential_(generator=generator)


def inverse_hvp(
    critic: Params,
    batch: Batch,
    v: Params,
    config: BLPOConfig,
    sketch: Tensor | Sketch | None = None,
    value_fn: ValueFn = DEFAULT_CRITIC,
    checked: Tensor | None = None,
    jacobian: Jacobian | None = None,
) -> Solved:
    """Solve (H + damping I) x = v, H the curvature of g at w on the batch; x as a flat vector.

    The Gauss-Newton matrix is positive semi-definite; the Hessian is indefinite away from the
    optimum, where CG stops early and says so in its residual.

    Args:
        critic: the parameters w.
        batch: with ``obs`` (..., obs_dim) and ``targets`` (...).
        v: shaped like the critic.
        config: of it, the options of the solver and the curvature.
        sketch: from :func:`draw_sketch`, or one that is made.
        value_fn: V_w.
        checked: a bool, whether what is only for statistics is to be computed; None: it is.
        jacobian: of V_w, at ``batch.obs``, where there is one already.
    """
    shapes, w = shapes_of(critic), flatten(critic).detach()

    def values(w: Tensor, obs: Tensor) -> Tensor:
        return value_fn(unflatten(w, shapes), obs)

    def loss(w: Tensor, obs: Tensor, targets: Tensor) -> Tensor:
        return value_loss(values(w, obs), targets)

    # Flat, so that a graph sees one pass where there would be two that differ in their views.
    obs, targets = batch.obs.flatten(0, -2), batch.targets.flatten()
    curvature: hypergrad.LinearOperator
    columns: Columns | None = None
    if config.curvature == "ggn":
        curvature = hypergrad.ggn(values, value_loss, w, obs, targets)
    else:
        # Blocks at once for a sketch, else single products, in the way that is quicker for them.
        # Never the mode that was fastest today: a resumed run repeats the other to the last bit.
        sketching = config.solver in ("nystrom", "nystrom_pcg")
        mode: Mode = "forward_over_reverse" if sketching else "reverse_over_reverse"
        curvature = hypergrad.hessian(loss, w, obs, targets, mode=mode)
        by_units = sketching and config.sketch in ("columns", "diagonal")
        if by_units and jacobian is None and isinstance(value_fn, Critic):
            jacobian = value_fn.jacobian(unflatten(w, shapes), obs)
        if by_units and isinstance(jacobian, ValueJacobian):
            columns = functools.partial(jacobian.hessian_columns, targets)
    diagonal = None
    if config.solver == "nystrom" and config.sketch == "diagonal" and isinstance(sketch, Tensor):
        # Of the Gauss-Newton matrix also for the Hessian, whose own costs a product an entry.
        rows = torch.func.vmap(torch.func.grad(values), (None, 0))(w, obs)
        diagonal = rows.square().sum(0)
    return _solve(curvature, flatten(v), config, sketch, diagonal, checked, columns)


def critic_response(
    critic: Params,
    batch: Batch,
    v: Params,
    config: BLPOConfig,
    sketch: Tensor | Sketch | None = None,
    value_fn: Critic = DEFAULT_CRITIC,
    jacobian: Jacobian | None = None,
    checked: Tensor | None = None,
) -> Solved:
    """How x changes the critic's values on the batch: u = J x, shaped like ``batch.targets``.

    It is all that the cross term needs of x; the arguments are those of :func:`inverse_hvp`, with
    the Jacobian of V_w too: ``jacobian``, at ``batch.obs``, where there is one already. The
    residual is that of the system that is solved.
    """
    if jacobian is None:
        critic = {name: leaf.detach() for name, leaf in critic.items()}
        jacobian = value_fn.jacobian(critic, batch.obs.flatten(0, -2))
    if in_sample_space(config):
        rhs = jacobian.times(v)
        kernel = (2 / len(rhs)) * jacobian.kernel()
        operator = hypergrad.as_operator(kernel)
        solved = _solve(operator, rhs, config, sketch, kernel.diagonal(), checked)
        u = solved.value
    else:
        solved = inverse_hvp(critic, batch, v, config, sketch, value_fn, checked, jacobian)
        u = jacobian.times(unflatten(solved.value, shapes_of(critic)))
    return solved._replace(value=u.view_as(batch.targets))


def _if(checked: Tensor | None, function: Callable[[], Any], instead: Callable[[], Any]) -> Any:
    """The results of one of two functions, in a graph, too; those of the first for None."""
    if checked is None:
        return function()
    if torch.compiler.is_compiling():
        return torch.cond(checked, function, instead)
    return function() if checked else instead()


class _Watched(hypergrad.LinearOperator):
    """An operator on flat vectors that keeps what it has multiplied, and the products."""

    def __init__(self, operator: hypergrad.LinearOperator, of_units: Columns | None = None) -> None:
        super().__init__(operator.layout)
        self.operator, self.of_units = operator, of_units
        self.vectors: list[Tensor] = []
        self.products: list[Tensor] = []

    def _apply(self, block: Tensor) -> Tensor:
        products = self.operator.matmat(block)
        assert isinstance(products, Tensor)
        return self._seen(block, products)

    def columns(self, units: Tensor) -> Tensor:
        """The products with unit vectors, in the quicker way for them if there is one."""
        if self.of_units is None:
            return self._apply(units)
        return self._seen(units, self.of_units(units))

    def _seen(self, block: Tensor, products: Tensor) -> Tensor:
        self.vectors.append(block)
        self.products.append(products)
        return products


def _solve(
    operator: hypergrad.LinearOperator,
    v: Tensor,
    config: BLPOConfig,
    sketch: Tensor | Sketch | None,
    diagonal: Tensor | None,
    checked: Tensor | None,
    columns: Columns | None = None,
) -> Solved:
    curvature, damping = _Watched(operator, columns), config.damping
    relative: Tensor | None = None
    single_pass = config.solver == "nystrom" and (
        config.sketch != "gaussian" or config.sketch_every > 1
    )
    if damping == "auto" and (single_pass or config.solver == "identity"):
        # The rule of the solvers that need no sketch: 20 steps of Lanczos, and this one's check.
        found = hypergrad.solve(curvature, v, hypergrad.Identity(), damping="auto")
        damping = found.info.damping
    if single_pass:
        assert sketch is not None
        assert not isinstance(damping, str)
        if isinstance(sketch, Tensor):
            sketch = _sketch(curvature, sketch, config, diagonal)
        x = sketch.solve(v, damping, config.sketch_shift)
    else:
        solver = _solver(config, damping, sketch, len(v))
        # An inexact answer is no failure here: its residual is logged for every update.
        solution = hypergrad.solve(curvature, v, solver, damping=damping, on_failure="ignore")
        x, damping = solution.value, solution.info.damping
        relative = torch.as_tensor(solution.info.relative_residual, dtype=v.dtype)
    vectors, products, size = curvature.vectors, curvature.products, (RITZ_VECTORS,) * 2

    def look() -> tuple[Tensor, ...]:
        if relative is not None:
            return (*_grams(vectors, products),)
        product = operator.matvec(x)
        residual = v - product - damping * x
        grams = _grams([*vectors, x[None]], [*products, product[None]])
        return *grams, residual.norm() / v.norm()

    def unseen() -> tuple[Tensor, ...]:
        gram, core = (v.new_zeros(size, dtype=torch.float64) for _ in range(2))
        nan = torch.full_like(v[0], torch.nan)
        return (gram, core) if relative is not None else (gram, core, nan)

    gram, core, *own = _if(checked, look, unseen)
    stats = {"ihvp_relative_residual": own[0] if relative is None else relative}
    if config.damping == "auto":
        stats["damping"] = torch.tensor(damping, dtype=v.dtype)
    kept = sketch if config.sketch_every > 1 and isinstance(sketch, Sketch) else None
    return Solved(x, stats, kept, Grams(gram, core))


def _grams(vectors: list[Tensor], products: list[Tensor]) -> Grams:
    """Of the last ``RITZ_VECTORS`` rows of some blocks; zeros stand for those that are missing."""
    b, y = (torch.cat(blocks[-RITZ_VECTORS:])[-RITZ_VECTORS:] for blocks in (vectors, products))
    missing = RITZ_VECTORS - len(b)
    pad = torch.nn.functional.pad
    return Grams(*(pad(x, (missing, 0, missing, 0)) for x in Grams.of(b, y)))


def _sketch(
    curvature: _Watched, draw: Tensor, config: BLPOConfig, diagonal: Tensor | None
) -> Sketch:
    """The sketch from one block of ``rank`` products."""
    size = curvature.layout.dim
    if config.sketch == "diagonal":
        assert diagonal is not None
        # The smallest of E_i / w_i, E_i exponential: drawn in proportion to the weights w, without
        # replacement (Efraimidis and Spirakis 2006); those of weight zero last.
        order = (draw.log() - diagonal.abs().log()).argsort()
        draw = order[: min(config.rank, size)]
    if config.sketch == "gaussian":
        omega = draw.to(curvature.dtype)
        products = curvature.matmat(omega)
        return Sketch(products, products @ omega.T)
    # Not one_hot, nor scatter: a compiled graph would compare the indices at each use of a number.
    one = torch.ones((), dtype=curvature.dtype)
    omega = one.new_zeros(len(draw), size).index_put((torch.arange(len(draw)), draw), one)
    products = curvature.columns(omega)
    return Sketch(products, products[:, draw])


def _solver(
    config: BLPOConfig, damping: float | str, sketch: Tensor | Sketch | None, size: int
) -> hypergrad.Solver:
    if config.solver == "cg":
        return hypergrad.CG(max_iters=config.cg_iters, rtol=config.cg_rtol)
    if config.solver == "exact":
        return hypergrad.Exact()
    if config.solver == "identity":
        return hypergrad.Identity(scale=1 / float(damping))
    assert isinstance(sketch, Tensor)
    if config.solver == "nystrom_pcg":
        generator = torch.Generator().manual_seed(int(sketch))
        return hypergrad.NystromPCG(
            min(config.rank, size), rtol=config.cg_rtol, max_iters=config.cg_iters,
            sketch=config.sketch, generator=generator,
        )  # fmt: skip
    return hypergrad.Nystrom(len(sketch), test_matrix=sketch, complement="zero")


def ritz_extremes(gram: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest Ritz value of A on the span of vectors that have these :class:`Grams`.

    The eigenvalues of A reach at least as far down and up: a negative smallest one proves that A is
    indefinite, a positive one proves nothing. It costs no product. Directions that the vectors
    hardly span are left out.
    """
    lengths, directions = torch.linalg.eigh(gram)
    kept = lengths > _DEPENDENT * lengths[-1]
    whiten = directions * torch.where(kept, lengths, torch.inf).rsqrt()
    core = whiten.T @ (0.5 * (core + core.T)) @ whiten
    # In the place of a direction left out, whose row is zero: a value that is there anyway.
    core = core + torch.diag(torch.where(kept, 0.0, core[-1, -1]))
    values = torch.linalg.eigvalsh(core)
    return values[0], values[-1]
