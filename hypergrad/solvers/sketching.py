"""How a Nyström sketch is made: one block of products, and a second where rounding or signs ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import NegativeCurvatureError, RankError
from ..pytree import Tree
from ..spectrum import lanczos_extremes
from .base import DampedSystem
from .complement import TAIL_THAT_MATTERS, Complement, ComplementKind, measure_complement
from .core import ABOVE, Approximation, Check, Core
from .embedding import DIAGONAL_PROBES, Embedding, SketchKind, extension
from .narrow import FactoredSketch, NarrowSketch, is_narrow
from .ritz import rayleigh_ritz, ritz_pairs
from .sketch import NegativeCurvature, NystromSketch
from .streamed import (
    held_twice,
    streamed_again,
    streamed_approximation,
    streamed_basis,
    streamed_complement,
    worth_streaming,
)

#: Test matrices whose rows have, with probability one, a part along every eigenvector.
_GENERIC = ("gaussian", "structured")
#: Where an automatic rank starts, and its cap when none is given.
FIRST_RANK = 8
MAX_RANK = 256
#: Lanczos steps of the error estimate.
ERROR_STEPS = 10


@dataclass(frozen=True)
class SketchOptions:
    """How a sketch is to be made; see :class:`hypergrad.Nystrom` for each.

    ``any_damping`` asks for the complement whatever the damping is now; ``check`` for a product
    that vouches for the largest eigenvalue.
    """

    rank: int | Literal["auto"]
    sketch: SketchKind = "gaussian"
    generator: torch.Generator | None = None
    negative_curvature: NegativeCurvature = "keep"
    complement: ComplementKind = "zero"
    diagonal: Tree | None = None
    tol: float = 9.0
    max_rank: int | None = None
    any_damping: bool = False
    check: Check = True


def make_sketch(
    system: DampedSystem,
    rank: int | Literal["auto"],
    kind: SketchKind,
    generator: torch.Generator | None,
    policy: NegativeCurvature,
    *,
    complement: ComplementKind = "zero",
    diagonal: Tree | None = None,
    tol: float = 9.0,
    max_rank: int | None = None,
    any_damping: bool = False,
    check: Check = True,
    once: bool = False,
    drawn: NarrowSketch | None = None,
) -> NystromSketch | FactoredSketch:
    """Sketch the system's operator; see :func:`hypergrad.nystrom_sketch`.

    ``once``: for the system's own damping, so that it may come without a basis.  ``drawn``: what
    was drawn, and multiplied, for a narrow one.
    """
    options = SketchOptions(
        rank, kind, generator, policy, complement, diagonal, tol, max_rank, any_damping, check
    )
    n = system.operator.layout.dim
    if options.rank != "auto" and options.rank > n:
        raise RankError(
            f"rank is {options.rank}, but the operator has dimension {n}; expected "
            f"1 <= rank <= {n}."
        )
    before = system.num_hvps - (0 if drawn is None else len(drawn.omega))
    fixed = options.rank if options.rank != "auto" and options.sketch == "gaussian" else None
    large = fixed is not None and worth_streaming(fixed, n)
    narrow_products = fixed is not None and is_narrow(system, fixed)
    if fixed and large and not (once and narrow_products and held_twice(fixed, n)):
        found = streamed_approximation(system, fixed, options.generator, options.check)
        return _finish(system, found, options, before, None, streamed=True)
    if fixed and narrow_products:
        drawn = drawn or NarrowSketch.draw(system, fixed, options.generator)
        narrow = _narrow_approximation(system, drawn, options, large, once)
        if isinstance(narrow, FactoredSketch):
            return narrow
        return _finish(system, narrow, options, before, None, streamed=large)
    source = Embedding(
        options.sketch,
        options.generator,
        n,
        system.b.device,
        system.b.dtype,
        _diagonal(system, options) if options.sketch == "diagonal" else None,
    )
    bound = None
    if options.rank == "auto":
        found, bound = _grown(system, source, options)
    else:
        omega = system.rounded(source.rows(options.rank))  # what the products really are of
        y = system.product(omega)
        found = _approximate(system, omega, y, options.sketch, check=options.check)
    return _finish(system, found, options, before, bound)


def renewed_sketch(
    system: DampedSystem, known: Tensor, fresh: int, options: SketchOptions
) -> NystromSketch:
    """Sketch with the orthonormal rows ``known`` and ``fresh`` random ones as test matrix."""
    before = system.num_hvps
    omega = known
    if fresh:
        n = system.operator.layout.dim
        source = Embedding("gaussian", options.generator, n, known.device, known.dtype)
        omega = torch.cat([known, extension(known, source.rows(fresh))])
    omega = system.rounded(omega)
    found = _approximate(system, omega, system.product(omega), None, generic=fresh > 0)
    return _finish(system, found, options, before, None)


def _diagonal(system: DampedSystem, options: SketchOptions) -> Tensor:
    """The diagonal that columns are drawn by: as given, or estimated by random signs.

    E[z * A z] is the diagonal for independent random signs z (Bekas, Kokiopoulou and Saad, Appl.
    Numer. Math. 57, 2007); the error of an entry is the size of the rest of its row over the root
    of the number of products.  A row of zeros has the estimate zero.
    """
    layout = system.operator.layout
    if options.diagonal is not None:
        given = layout.flatten(options.diagonal, name="diagonal")
        layout.check_finite(given, "diagonal")
        return given.to(system.b.dtype)
    generator = options.generator
    place = system.b.device if generator is None else generator.device
    bits = torch.randint(0, 2, (DIAGONAL_PROBES, layout.dim), generator=generator, device=place)
    signs = (2 * bits - 1).to(system.b)
    return (signs * system.product(signs)).mean(dim=0)


def _grown(
    system: DampedSystem, source: Embedding, options: SketchOptions
) -> tuple[Approximation, float]:
    """Double the rank until the preconditioned condition number is bounded by 1 + tol, or the cap.

    The bound is 1 + (last eigenvalue + |A - A_nys|) / damping (Frangella, Tropp and Udell, arXiv
    2110.02820, proposition 5.3; their section 5.4 adapts the rank so).  The test matrix grows by
    new rows, so that no product is spent twice on a positive operator.
    """
    n = system.operator.layout.dim
    cap = min(n, MAX_RANK if options.max_rank is None else options.max_rank)
    omega = y = system.b.new_zeros(0, n)
    while True:
        more = min(cap, max(FIRST_RANK, 2 * len(omega))) - len(omega)
        fresh = system.rounded(source.rows(more))
        omega, y = torch.cat([omega, fresh]), torch.cat([y, system.product(fresh)])
        last = len(omega) == cap
        if not last and _too_small(system, omega, y, options):
            continue
        found = _approximate(system, omega, y, options.sketch, check=options.check)
        damping = found.damping(system, tail=0.0)
        missed = found.tail
        if found.tail > 0 and (last or found.tail <= options.tol * damping):
            missed += _error(system, found)
        if last or missed <= options.tol * damping:
            return found, 1.0 + missed / damping


def _too_small(system: DampedSystem, omega: Tensor, y: Tensor, options: SketchOptions) -> bool:
    """Whether the last eigenvalue alone, at no further product, asks for a larger rank."""
    core = Core.of(omega, y, system.operator.dtype)
    if core.indefinite:
        return False
    found = Approximation.truncated(*core.decompose(), len(y), None, options.sketch in _GENERIC)
    return found.tail > options.tol * found.damping(system, tail=0.0)


def _error(system: DampedSystem, found: Approximation) -> float:
    """An upper estimate of |A - A_nys|; see :meth:`NystromSketch.error_estimate`."""

    def difference(vector: Tensor) -> Tensor:
        approximate = ((found.basis @ vector) * found.eigenvalues) @ found.basis
        return system.product(vector[None])[0] - approximate

    dim, b = system.operator.layout.dim, system.b
    ends = lanczos_extremes(difference, dim, ERROR_STEPS, b.dtype, b.device)
    return max(ends.largest_bound, -ends.smallest)


def _approximate(
    system: DampedSystem,
    omega: Tensor,
    y: Tensor,
    kind: SketchKind | None,
    *,
    generic: bool = False,
    check: Check = True,
) -> Approximation:
    """The approximation from the products ``y`` of ``omega``, in the form that is safe.

    Args:
        system: whose operator it is.
        omega: test matrix, orthonormal rows.
        y: its products.
        kind: how omega was drawn; None for a basis that was chosen.
        generic: whether a basis that was chosen holds random rows, too.
        check: whether a product may vouch for the largest eigenvalue.
    """
    generic = generic or kind in _GENERIC
    core = Core.of(omega, y, system.operator.dtype)
    eigenvalues, basis = core.decompose()
    if core.indefinite or not _vouched(system, core, eigenvalues, basis, check):
        return rayleigh_ritz(system, omega, y)
    # Drawn uniformly, each row is a random one given the others; columns of zeros tell no more.
    uniform = kind in _GENERIC or (kind == "columns" and bool(core.kept.all()))
    trace = core.trace(float(eigenvalues.sum())) if uniform else None
    found = Approximation.truncated(eigenvalues, basis, len(y), trace, generic)
    damping = found.damping(system, tail=found.tail)
    if core.blurred(damping) or core.noisy(found.largest, damping):
        return _second_pass(system, y, trace, generic)
    return found


def _narrow_approximation(
    system: DampedSystem, drawn: NarrowSketch, options: SketchOptions, large: bool, once: bool
) -> Approximation | FactoredSketch:
    """:func:`_approximate` from inner products; wide blocks are formed where they are needed."""
    core = drawn.core
    eigenvalues, combination = drawn.eigenpairs
    # The residual of the one answer will tell more of it than a product with an eigenvector.
    later = once and options.check is True and options.negative_curvature == "keep"
    check: Check = "estimate" if later else options.check
    asked = system.num_hvps
    if core.indefinite or not drawn.vouched(system, eigenvalues, combination, check):
        return _not_positive(system, drawn, large)
    later = later and system.num_hvps == asked
    found = FactoredSketch.of(drawn, vouched=not later)
    damping = _damping_of(found, system)
    largest = float(eigenvalues[0]) if len(eigenvalues) else 0.0
    vague = core.blurred(damping) or core.noisy(largest, damping)
    outside = options.complement != "zero" and found.tail > TAIL_THAT_MATTERS * damping
    if not (vague or outside) and once and drawn.resolved(eigenvalues):
        return found
    if later and not drawn.vouched(system, eigenvalues, combination, True):
        return _not_positive(system, drawn, large)
    if not vague:
        return _with_basis(found, system, large)
    trace = core.trace(float(eigenvalues.sum()))
    if large:
        return streamed_again(system, core.products, trace, positive=True)
    return _second_pass(system, drawn.wide_blocks(system.b.dtype)[1], trace, generic=True)


def _not_positive(system: DampedSystem, drawn: NarrowSketch, large: bool) -> Approximation:
    if large:
        return streamed_again(system, drawn.core.products, None, positive=False)
    return rayleigh_ritz(system, *drawn.wide_blocks(system.b.dtype))


def doubted_sketch(
    system: DampedSystem, sketch: FactoredSketch, complement: ComplementKind
) -> NystromSketch | None:
    """What to put in the place of a sketch whose answer leaves doubt; None if it holds.

    Cost: one product that vouches for the largest eigenvalue; ``rank`` more where it does not.
    """
    drawn = sketch.drawn
    if drawn.vouched(system, sketch.eigenvalues, sketch.combination, True):
        return None
    options = SketchOptions(len(drawn.omega), complement=complement)
    large = worth_streaming(*drawn.omega.shape)
    found = _not_positive(system, drawn, large)
    return _finish(system, found, options, system.num_hvps, None, streamed=large)


def _damping_of(sketch: FactoredSketch, system: DampedSystem) -> float:
    return sketch.auto_damping() if system.damping == "auto" else float(system.damping)


def _with_basis(sketch: FactoredSketch, system: DampedSystem, large: bool) -> Approximation:
    wide, drawn = system.b.dtype, sketch.drawn
    if large:
        trace = drawn.core.trace(float(sketch.eigenvalues.sum()))
        return streamed_basis(
            system, drawn.core.products, sketch.eigenvalues, sketch.combination, trace
        )
    basis = sketch.drawn.basis(sketch.combination, sketch.eigenvalues, wide)
    values = torch.from_numpy(sketch.eigenvalues.copy()).to(basis.device)
    trace = sketch.drawn.core.trace(float(sketch.eigenvalues.sum()))
    return Approximation(values, basis, sketch.tail, complete=sketch.complete, trace=trace)


def _finish(
    system: DampedSystem,
    found: Approximation,
    options: SketchOptions,
    before: int,
    condition_bound: float | None,
    *,
    streamed: bool = False,
) -> NystromSketch:
    """Look at the signs and at what lies outside, and hand over."""
    operator, eigenvalues = system.operator, found.eigenvalues
    smallest = _smallest(found, torch.finfo(operator.dtype).eps)
    complement: Complement | None = None
    least = TAIL_THAT_MATTERS * found.damping(system, tail=found.tail)
    matters = found.tail > (0.0 if options.any_damping else least)
    if options.complement == "quadrature" and smallest >= 0 and matters:
        size = float(eigenvalues.abs().max())
        if streamed:
            complement, lowest = streamed_complement(system, found.basis, size, options.generator)
        else:
            complement, lowest = measure_complement(
                system.product, found.basis, size, system.rounding, options.generator
            )
        smallest = min(smallest, lowest)
    if smallest < 0:
        eigenvalues = _apply_policy(eigenvalues, smallest, options.negative_curvature)
    else:  # a Ritz value below zero by rounding is zero
        eigenvalues = eigenvalues.clamp(min=0.0)
    return NystromSketch(
        eigenvalues=eigenvalues.to(found.basis.device),
        basis=found.basis,
        layout=operator.layout,
        operator_dtype=operator.dtype,
        smallest_eigenvalue=smallest,
        tail=found.tail,
        num_hvps=system.num_hvps - before,
        negative_curvature=options.negative_curvature,
        complement=complement,
        condition_bound=condition_bound,
        trace_estimate=found.trace,
    )


def _vouched(
    system: DampedSystem, core: Core, eigenvalues: Tensor, basis: Tensor, check: Check = True
) -> bool:
    """Whether the largest eigenvalue of the sketch can be one of a positive operator.

    For positive A, A_nys <= A, so that l = u'A_nys u <= u'A u for the first eigenpair.  For an
    indefinite A whose core is positive by cancellation l can be anything: the core of
    [[e, 1], [1, 0]] on its first coordinate is e, and l is 1/e.
    """
    if len(eigenvalues) == 0:
        return core.silent_throughout
    largest = float(eigenvalues[0])
    # |A| >= |A Omega| for orthonormal Omega, and then no product is needed.
    if check is False or largest <= core.size * (1 + ABOVE):
        return True
    top = system.rounded(basis[:1])
    return float((top * system.product(top)).sum()) >= largest * (1 - ABOVE)


def _second_pass(
    system: DampedSystem, y: Tensor, trace: float | None, generic: bool
) -> Approximation:
    """Sketch once more, with the range Q of Y as test matrix; see :func:`rayleigh_ritz`.

    Q leans towards the eigenvectors that matter, so its core is as well conditioned as A there.
    """
    q: Tensor = torch.linalg.qr(y.T)[0]
    q = system.rounded(q.T.contiguous())
    image = system.product(q)
    core = Core.of(q, image, system.operator.dtype)
    eigenvalues, basis = core.decompose()
    if core.indefinite or not _vouched(system, core, eigenvalues, basis):
        return ritz_pairs(q, image, len(q))
    return Approximation.truncated(eigenvalues, basis, len(y), trace, generic)


def _smallest(found: Approximation, eps: float) -> float:
    """Smallest eigenvalue seen; 0 when that is rounding, or when the sketch met a null space."""
    values = found.eigenvalues
    if len(values) == 0:
        return 0.0
    if found.lowest < -10.0 * eps * float(values.abs().max()):
        return found.lowest
    return 0.0 if found.complete else max(float(values.min()), 0.0)


def _apply_policy(eigenvalues: Tensor, smallest: float, policy: NegativeCurvature) -> Tensor:
    if policy == "raise":
        raise NegativeCurvatureError(
            f"the operator has negative curvature: smallest Ritz value {smallest:.3e}, largest "
            f"kept {float(eigenvalues.max()):.3e}. Solve the inner problem further, use a "
            "Gauss-Newton operator, add damping with negative_curvature='keep', or choose "
            "'absolute' or 'clip'."
        )
    if policy == "absolute":
        return eigenvalues.abs()
    return eigenvalues.clamp(min=0.0) if policy == "clip" else eigenvalues
