"""What is multiplied: self-adjoint linear operators on trees of tensors."""

from .base import LinearOperator
from .export import to_linear_operator
from .gauss_newton import GaussNewtonOperator, ggn
from .hessian import HessianOperator, hessian
from .interop import as_operator
from .root import RootOperator, RowsOperator, root_operator
from .sampled import SampledOperator

__all__ = [
    "GaussNewtonOperator",
    "HessianOperator",
    "LinearOperator",
    "RootOperator",
    "RowsOperator",
    "SampledOperator",
    "as_operator",
    "ggn",
    "hessian",
    "root_operator",
    "to_linear_operator",
]
