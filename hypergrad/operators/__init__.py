"""What is multiplied: self-adjoint linear operators on trees of tensors."""

from .base import LinearOperator
from .export import to_linear_operator
from .gauss_newton import GaussNewtonOperator, ggn
from .hessian import HessianOperator, hessian
from .interop import as_operator
from .minibatch import MinibatchOperator, minibatch_ggn, minibatch_hessian
from .sampled import SampledOperator
from .symmetry import check_symmetric

__all__ = [
    "GaussNewtonOperator",
    "HessianOperator",
    "LinearOperator",
    "MinibatchOperator",
    "SampledOperator",
    "as_operator",
    "check_symmetric",
    "ggn",
    "hessian",
    "minibatch_ggn",
    "minibatch_hessian",
    "to_linear_operator",
]
