"""How (A + damping I) x = v is solved: one file a solver."""

from .base import Solution, SolveInfo, Solver, Status
from .cg import CG
from .exact import Exact
from .identity import Identity
from .neumann import Neumann
from .nystrom import Nystrom, nystrom_sketch
from .sketch import NystromSketch
from .solve import solve

__all__ = [
    "CG",
    "Exact",
    "Identity",
    "Neumann",
    "Nystrom",
    "NystromSketch",
    "Solution",
    "SolveInfo",
    "Solver",
    "Status",
    "nystrom_sketch",
    "solve",
]
