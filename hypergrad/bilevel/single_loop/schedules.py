"""Step sizes of the single-loop methods: numbers, or functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ...errors import SolverOptionError
from ...solvers.options import check_option, is_tolerance

#: A number for every step, or a callable from the step's number (0, 1, ...) to a number.
Schedule: TypeAlias = float | Callable[[int], float]


@dataclass(frozen=True)
class PowerSchedule:
    """A step size that falls, or a multiplier that grows, as a power of the step.

    Its value at step k = 0, 1, ... is ``initial * (offset / (k + offset)) ** exponent``.

    Attributes:
        initial: value at step 0, > 0.
        exponent: of the decay; a negative one grows, as the multiplier of :class:`F2SA` does.
        offset: steps for which the value stays about where it began, > 0.

    Raises:
        SolverOptionError: at construction, for a value outside its range.

    Examples:
        The two time scales of SOBA, rho^t = t^(-2/5) and gamma^t = t^(-3/5) (arXiv 2201.13409,
        theorem 2 of an early version):

        >>> import hypergrad
        >>> rho, gamma = hypergrad.PowerSchedule(1.0, 2 / 5), hypergrad.PowerSchedule(1.0, 3 / 5)
        >>> rho(0), round(rho(31), 6), round(gamma(31), 6)
        (1.0, 0.25, 0.125)
    """

    initial: float
    exponent: float
    offset: float = 1.0

    def __post_init__(self) -> None:
        for name in ("initial", "offset"):
            value = getattr(self, name)
            check_option(is_tolerance(value) and value > 0, name, value, "a finite number > 0")
        size = abs(self.exponent) if isinstance(self.exponent, int | float) else self.exponent
        check_option(is_tolerance(size), "exponent", self.exponent, "a finite number")

    def __call__(self, step: int) -> float:
        """The value at ``step``."""
        return float(self.initial * (self.offset / (step + self.offset)) ** self.exponent)


def check_schedule(schedule: object, name: str) -> None:
    """Raise :class:`SolverOptionError` unless ``schedule`` is a number >= 0 or a callable."""
    ok = callable(schedule) or is_tolerance(schedule)
    check_option(ok, name, schedule, "a finite number >= 0, or a function of the step")


def value_at(schedule: Schedule, step: int, name: str) -> float:
    """The schedule's value at a step.

    Raises:
        SolverOptionError: a callable returned anything but a finite number >= 0.
    """
    if not callable(schedule):
        return float(schedule)
    value = schedule(step)
    if not is_tolerance(value):
        raise SolverOptionError(
            f"{name}({step}) is {value!r}, expected a finite number >= 0. A schedule maps the "
            "number of the step, 0 for the first, to the value there."
        )
    return float(value)
