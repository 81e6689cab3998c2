"""How (A + damping I) x = v is solved: one file a solver."""

from .alone import nystrom_sketch
from .base import Solution, SolveInfo, Solver, Status
from .cg import CG
from .choice import Auto
from .exact import Exact
from .gmres import GMRES
from .gram import Gram
from .identity import Identity
from .minres import MINRES
from .neumann import Neumann
from .nystrom import Nystrom
from .nystrom_pcg import NystromPCG
from .reused import ReusedSketch
from .sketch import NystromSketch
from .solve import solve

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "Exact",
    "Gram",
    "Identity",
    "Neumann",
    "Nystrom",
    "NystromPCG",
    "NystromSketch",
    "ReusedSketch",
    "Solution",
    "SolveInfo",
    "Solver",
    "Status",
    "nystrom_sketch",
    "solve",
]
