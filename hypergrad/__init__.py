"""hypergrad: gradients of an outer loss through the solution of an inner minimisation.

The call it is known by:

    x, info = hypergrad.nystrom_ihvp(hvp_fn, v, rank=20, return_info=True)
"""

from importlib.metadata import PackageNotFoundError, version

from .bilevel import (
    SGD,
    Adam,
    Hypergradient,
    HypergradientCertificate,
    HypergradientCheck,
    InnerOptimizer,
    UnrolledHypergradient,
    Verdict,
    check_hypergradient,
    darts_hypergradient,
    hypergradient,
    hypergradient_certificate,
    unrolled_hypergradient,
)
from .errors import (
    ConvergenceError,
    ConvergenceWarning,
    DampingError,
    DeviceError,
    EmptyTreeError,
    HypergradError,
    HypergradWarning,
    InnerProblemWarning,
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
from .ihvp import cg_ihvp, exact_ihvp, neumann_ihvp, nystrom_ihvp
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
    Exact,
    Identity,
    Neumann,
    Nystrom,
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
    "SGD",
    "Adam",
    "ConvergenceError",
    "ConvergenceWarning",
    "DampingError",
    "DeviceError",
    "EmptyTreeError",
    "Exact",
    "ExtremeEigenvalues",
    "GaussNewtonOperator",
    "HessianOperator",
    "HypergradError",
    "HypergradWarning",
    "Hypergradient",
    "HypergradientCertificate",
    "HypergradientCheck",
    "Identity",
    "InnerOptimizer",
    "InnerProblemWarning",
    "LeafTypeError",
    "LinearOperator",
    "LossError",
    "NegativeCurvatureError",
    "Neumann",
    "NonFiniteError",
    "NotSymmetricError",
    "Nystrom",
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
    "UnrolledHypergradient",
    "UnusedParameterWarning",
    "Verdict",
    "as_operator",
    "cg_ihvp",
    "check_hypergradient",
    "darts_hypergradient",
    "exact_ihvp",
    "extreme_eigenvalues",
    "ggn",
    "hessian",
    "hypergradient",
    "hypergradient_certificate",
    "neumann_ihvp",
    "nystrom_ihvp",
    "nystrom_sketch",
    "solve",
    "unrolled_hypergradient",
]
