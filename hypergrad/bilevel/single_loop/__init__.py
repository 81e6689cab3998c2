"""Single-loop stochastic bilevel methods, as steppers that the user's loop drives."""

from .base import SingleLoop
from .f2sa import F2SA
from .saba import SABA
from .schedules import PowerSchedule
from .state import SingleLoopState
from .steppers import SOBA, AmIGO, StocBiO

__all__ = [
    "F2SA",
    "SABA",
    "SOBA",
    "AmIGO",
    "PowerSchedule",
    "SingleLoop",
    "SingleLoopState",
    "StocBiO",
]
