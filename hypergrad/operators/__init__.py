"""What is multiplied: self-adjoint linear operators on trees of tensors."""

from .base import LinearOperator
from .blocks import BlockDiagonalOperator, block_diagonal
from .export import to_linear_operator
from .fisher import EmpiricalFisherOperator, FisherOperator, empirical_fisher, fisher
from .gauss_newton import GaussNewtonOperator, ggn
from .hessian import HessianOperator, hessian
from .interop import as_operator
from .invertible import InvertibleOperator
from .kronecker import KroneckerOperator, kfac
from .minibatch import MinibatchOperator, minibatch_ggn, minibatch_hessian
from .narrow_products import transpose_narrow
from .root import RootOperator, RowsOperator, root_operator
from .sampled import SampledOperator
from .small_products import direct_products
from .symmetry import check_symmetric

__all__ = [
    "BlockDiagonalOperator",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "InvertibleOperator",
    "KroneckerOperator",
    "LinearOperator",
    "MinibatchOperator",
    "RootOperator",
    "RowsOperator",
    "SampledOperator",
    "as_operator",
    "block_diagonal",
    "check_symmetric",
    "direct_products",
    "empirical_fisher",
    "fisher",
    "ggn",
    "hessian",
    "kfac",
    "minibatch_ggn",
    "minibatch_hessian",
    "root_operator",
    "to_linear_operator",
    "transpose_narrow",
]
