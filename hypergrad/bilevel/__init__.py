"""Gradients of an outer loss through the solution of an inner minimisation."""

from .hypergradient import Hypergradient, hypergradient

__all__ = ["Hypergradient", "hypergradient"]
