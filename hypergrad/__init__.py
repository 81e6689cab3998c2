"""hypergrad: gradients of an outer loss through the solution of an inner minimisation.

The call it is known by:

    x, info = hypergrad.nystrom_ihvp(hvp_fn, v, rank=20, return_info=True)
"""

from importlib.metadata import PackageNotFoundError, version

from .bilevel import Hypergradient, hypergradient
from .errors import (
    ConvergenceError,
    ConvergenceWarning,
    DampingError,
    DeviceError,
    DifferentiationError,
    EmptyTreeError,
    HypergradError,
    HypergradWarning,
    LeafTypeError,
    LossError,
    NegativeCurvatureError,
    NonFiniteError,
    NotSymmetricError,
    OperatorTooLargeError,
    PreconditionerError,
    RankError,
    SolverOptionError,
    StaleOperatorError,
    TreeStructureError,
    UnusedParameterWarning,
)
from .ihvp import (
    cg_ihvp,
    exact_ihvp,
    minres_ihvp,
    neumann_ihvp,
    nystrom_ihvp,
    nystrom_pcg_ihvp,
)
from .operators import (
    GaussNewtonOperator,
    HessianOperator,
    LinearOperator,
    as_operator,
    ggn,
    hessian,
)
from .solvers import (
    CG,
    MINRES,
    Exact,
    Neumann,
    Nystrom,
    NystromPCG,
    NystromSketch,
    Solution,
    SolveInfo,
    Solver,
    Status,
    nystrom_sketch,
    solve,
)
from .spectrum import ExtremeEigenvalues, extreme_eigenvalues

try:
    __version__ = version("hypergrad-torch")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "CG",
    "MINRES",
    "ConvergenceError",
    "ConvergenceWarning",
    "DampingError",
    "DeviceError",
    "DifferentiationError",
    "EmptyTreeError",
    "Exact",
    "ExtremeEigenvalues",
    "GaussNewtonOperator",
    "HessianOperator",
    "HypergradError",
    "HypergradWarning",
    "Hypergradient",
    "LeafTypeError",
    "LinearOperator",
    "LossError",
    "NegativeCurvatureError",
    "Neumann",
    "NonFiniteError",
    "NotSymmetricError",
    "Nystrom",
    "NystromPCG",
    "NystromSketch",
    "OperatorTooLargeError",
    "PreconditionerError",
    "RankError",
    "Solution",
    "SolveInfo",
    "Solver",
    "SolverOptionError",
    "StaleOperatorError",
    "Status",
    "TreeStructureError",
    "UnusedParameterWarning",
    "as_operator",
    "cg_ihvp",
    "exact_ihvp",
    "extreme_eigenvalues",
    "ggn",
    "hessian",
    "hypergradient",
    "minres_ihvp",
    "neumann_ihvp",
    "nystrom_ihvp",
    "nystrom_pcg_ihvp",
    "nystrom_sketch",
    "solve",
]
