"""What is multiplied: self-adjoint linear operators on trees of tensors."""

from .base import LinearOperator
from .export import to_linear_operator
from .fisher import EmpiricalFisherOperator, FisherOperator, empirical_fisher, fisher
from .gauss_newton import GaussNewtonOperator, ggn
from .hessian import HessianOperator, hessian
from .interop import as_operator
from .root import RootOperator, RowsOperator, root_operator
from .sampled import SampledOperator

__all__ = [
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "LinearOperator",
    "RootOperator",
    "RowsOperator",
    "SampledOperator",
    "as_operator",
    "empirical_fisher",
    "fisher",
    "ggn",
    "hessian",
    "root_operator",
    "to_linear_operator",
]
