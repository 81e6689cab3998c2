"""Gradients of an outer loss through the solution of an inner minimisation."""

from .hypergradient import Hypergradient, hypergradient
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

__all__ = [
    "F2SA",
    "SABA",
    "SOBA",
    "AmIGO",
    "Hypergradient",
    "PowerSchedule",
    "SingleLoop",
    "SingleLoopState",
    "StocBiO",
    "hypergradient",
]
