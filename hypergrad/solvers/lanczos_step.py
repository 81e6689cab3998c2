"""One step of preconditioned Lanczos with its Givens rotation, for rows side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DampedSystem
from .krylov import Norms, Precondition, over, where_rows

#: A step is checked at once when the rounding of its product may exceed this part of the residual.
RISK = 0.1
#: The recurrence is lost where its residual is off by more than this part of the true one.
DRIFT = 0.1
#: A pivot of the tridiagonal matrix within this many eps of its norm is zero.
PIVOT = 10.0


@dataclass
class Lanczos:
    """One row's worth of scalars and vectors of the recurrence, for each of the rows.

    With the preconditioner M, the Lanczos vectors are pairs p and z = M p with p'z = 1: those of
    M^(1/2) A M^(1/2), seen from both sides.  T is their tridiagonal matrix.

    Attributes:
        p, z: the current pair, shape (m, n).
        p_old: the previous p.
        w, w_old: the last two search directions, columns of Z R^-1 with T = Q R.
        gamma: the entry of T that couples the current pair to the previous one, shape (m,).
        eta: the M-norm of the residual, signed.
        c, s, c_old, s_old: the last two Givens rotations.
        norm: the largest column of T so far, an estimate of its norm.
        size: the largest |A z| / |z| so far, an estimate of |A|.
        theta: the smallest e'M e of the unit vectors e so far; not positive where M is not.
    """

    p: Tensor
    z: Tensor
    p_old: Tensor
    w: Tensor
    w_old: Tensor
    gamma: Tensor
    eta: Tensor
    c: Tensor
    s: Tensor
    c_old: Tensor
    s_old: Tensor
    norm: Tensor
    size: Tensor
    theta: Tensor

    @classmethod
    def begin(cls, precondition: Precondition | None, r: Tensor, norms_of: Norms) -> Lanczos:
        """Start at a residual r."""
        p, z, theta, length = _pair(precondition, r, norms_of)
        zero, one = torch.zeros_like(theta), torch.ones_like(theta)
        blank = torch.zeros_like(r)
        return cls(
            p=p, z=z, p_old=blank, w=blank, w_old=blank, gamma=zero, eta=length,
            c=one, s=zero, c_old=one, s_old=zero, norm=zero, size=zero, theta=theta,
        )  # fmt: skip

    def select(self, rows: Tensor) -> Lanczos:
        """The state of some of the rows."""
        return Lanczos(**{name: value[rows] for name, value in vars(self).items()})

    def where(self, mask: Tensor, other: Lanczos) -> Lanczos:
        """This state at the rows of the mask, the other one elsewhere."""
        return Lanczos(
            **{
                name: where_rows(mask, value, vars(other)[name])
                if value.ndim == 2
                else torch.where(mask, value, vars(other)[name])
                for name, value in vars(self).items()
            }
        )


@dataclass
class LanczosStep:
    """What one iteration would do.

    Attributes:
        state: after it.
        image: (A + damping I) z, shape (m, n).
        sizes: norms of the product and of the damped part, added.
        delta: z'(A + damping I) z, the diagonal entry of T.
        rayleigh: the same over z'z.
        length: by how much x moves along ``state.w``, shape (m,).
        move: the norm of that step.
        null: |A r| / (|T| |r|) for the residual before the step, in the norms of M.
        broken: rows at which the column of T vanishes under the rotations: A r = 0 then.
    """

    state: Lanczos
    image: Tensor
    sizes: Tensor
    delta: Tensor
    rayleigh: Tensor
    length: Tensor
    move: Tensor
    null: Tensor
    broken: Tensor

    def residual(self, r: Tensor) -> Tensor:
        """The next residual, s^2 r + c eta p.

        It is eta P Q'e, with P Q'e = -s (P Q'e)_old + c p and eta = -s eta_old.
        """
        state = self.state
        return (state.s**2)[:, None] * r + (state.c * state.eta)[:, None] * state.p


def _pair(
    precondition: Precondition | None, u: Tensor, norms_of: Norms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A pair p, z = M p along u with p'z = 1; e'M e for e = u/|u|; and the M-norm of u."""
    norms = norms_of(u)
    unit = u * over(torch.ones_like(norms), norms)[:, None]
    if precondition is None:
        return unit, unit, torch.ones_like(norms), norms
    z = precondition(unit)
    theta = torch.linalg.vecdot(unit, z)
    root = theta.clamp(min=0.0).sqrt()
    inverse = over(torch.ones_like(root), root)[:, None]
    return unit * inverse, z * inverse, torch.where(norms > 0, theta, 1.0), norms * root


def lanczos_step(
    state: Lanczos,
    system: DampedSystem,
    damping: float,
    precondition: Precondition | None,
    norms_of: Norms,
) -> LanczosStep:
    """One step of Lanczos, one Givens rotation, one search direction; no branch on values."""
    product = system.product(state.z, later=True)
    z_norms = norms_of(state.z)
    sizes = norms_of(product) + damping * z_norms
    image = torch.add(product, state.z, alpha=damping) if damping else product
    # The previous vector first: the better order in floating point (Paige, 1972).
    u = torch.addcmul(image, state.gamma[:, None], state.p_old, value=-1.0)
    delta = torch.linalg.vecdot(state.z, u)
    u = torch.addcmul(u, delta[:, None], state.p, value=-1.0)
    p, z, theta, gamma = _pair(precondition, u, norms_of)
    # The column (gamma_old, delta, gamma) of T, through the last two rotations and a new one.
    pivot = state.c * delta - state.c_old * state.s * state.gamma
    above = state.s * delta + state.c_old * state.c * state.gamma
    top = state.s_old * state.gamma
    diagonal = torch.hypot(pivot, gamma)
    norm = torch.maximum(state.norm, torch.hypot(torch.hypot(state.gamma, delta), gamma))
    broken = diagonal <= PIVOT * torch.finfo(norm.dtype).eps * norm
    # A r = eta P (pivot e_k + c_old gamma e_(k+1)): Choi, Paige and Saunders, SISC 33 (2011).
    null = over(torch.hypot(pivot, state.c * gamma), norm)
    c, s = over(pivot, diagonal), over(gamma, diagonal)
    w = torch.addcmul(state.z, top[:, None], state.w_old, value=-1.0)
    w = torch.addcmul(w, above[:, None], state.w, value=-1.0)
    w = w * over(torch.ones_like(diagonal), diagonal)[:, None]
    length = torch.where(broken, 0.0, c * state.eta)
    new = Lanczos(
        p=p, z=z, p_old=state.p, w=w, w_old=state.w, gamma=gamma, eta=-s * state.eta,
        c=c, s=s, c_old=state.c, s_old=state.s,
        norm=norm, size=torch.maximum(state.size, over(sizes, z_norms)),
        theta=torch.minimum(state.theta, theta),
    )  # fmt: skip
    rayleigh = torch.where(z_norms > 0, over(over(delta, z_norms), z_norms), torch.inf)
    move = length.abs() * norms_of(w)
    return LanczosStep(new, image, sizes, delta, rayleigh, length, move, null, broken)


def smallest_ritz_value(diagonal: Tensor, beside: Tensor) -> float:
    """The smallest eigenvalue of T, whose column j has ``beside[j]`` above its diagonal."""
    from scipy.linalg import eigvalsh_tridiagonal

    scale = float(torch.maximum(diagonal.abs().max(), beside.abs().max())) or 1.0  # LAPACK squares
    values = eigvalsh_tridiagonal(
        (diagonal / scale).numpy(), (beside[1:] / scale).numpy(), select="i", select_range=(0, 0)
    )
    return float(values[0]) * scale
