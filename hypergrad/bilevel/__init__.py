"""Gradients of an outer loss through the solution of an inner minimisation."""

from .certificate import HypergradientCertificate, hypergradient_certificate
from .hypergradient import Hypergradient, hypergradient
from .optimizers import SGD, Adam, InnerOptimizer
from .unroll import UnrolledHypergradient, unrolled_hypergradient

__all__ = [
    "SGD",
    "Adam",
    "Hypergradient",
    "HypergradientCertificate",
    "InnerOptimizer",
    "UnrolledHypergradient",
    "hypergradient",
    "hypergradient_certificate",
    "unrolled_hypergradient",
]
