"""Gradients of an outer loss through the solution of an inner minimisation."""

from .hypergradient import Hypergradient, hypergradient
from .optimizers import SGD, Adam, InnerOptimizer
from .unroll import UnrolledHypergradient, unrolled_hypergradient

__all__ = [
    "SGD",
    "Adam",
    "Hypergradient",
    "InnerOptimizer",
    "UnrolledHypergradient",
    "hypergradient",
    "unrolled_hypergradient",
]
