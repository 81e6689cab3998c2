"""Gradients of an outer loss through the solution of an inner minimisation."""

from .certificate import HypergradientCertificate, hypergradient_certificate
from .check import HypergradientCheck, Verdict, check_hypergradient
from .constraints import (
    project_box,
    project_simplex,
    sigmoid_box,
    sigmoid_box_inverse,
    softmax_simplex,
    softmax_simplex_inverse,
)
from .darts import darts_hypergradient
from .games import StackelbergCheck, check_stackelberg, stackelberg_gradient
from .hypergradient import Hypergradient, hypergradient
from .implicit import ImplicitFunction, ImplicitSolution, implicit
from .optimizers import SGD, Adam, InnerOptimizer
from .single_loop import (
    F2SA,
    SABA,
    SOBA,
    AmIGO,
    PowerSchedule,
    SingleLoop,
    SingleLoopState,
    StocBiO,
)
from .unroll import UnrolledHypergradient, unrolled_hypergradient

__all__ = [
    "F2SA",
    "SABA",
    "SGD",
    "SOBA",
    "Adam",
    "AmIGO",
    "Hypergradient",
    "HypergradientCertificate",
    "HypergradientCheck",
    "ImplicitFunction",
    "ImplicitSolution",
    "InnerOptimizer",
    "PowerSchedule",
    "SingleLoop",
    "SingleLoopState",
    "StackelbergCheck",
    "StocBiO",
    "UnrolledHypergradient",
    "Verdict",
    "check_hypergradient",
    "check_stackelberg",
    "darts_hypergradient",
    "hypergradient",
    "hypergradient_certificate",
    "implicit",
    "project_box",
    "project_simplex",
    "sigmoid_box",
    "sigmoid_box_inverse",
    "softmax_simplex",
    "softmax_simplex_inverse",
    "stackelberg_gradient",
    "unrolled_hypergradient",
]
