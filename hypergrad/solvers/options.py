"""What options may be: their checks, which say what was got and what was expected."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

from torch import Tensor

from ..errors import DampingError, SolverOptionError

Damping = float | Literal["auto"]


def check_damping(damping: Any) -> Damping:
    """``damping`` as a float or "auto"; raises :class:`DampingError` on anything else."""
    if isinstance(damping, str) and damping == "auto":
        return "auto"
    if isinstance(damping, Tensor):
        if damping.numel() != 1:
            raise DampingError(
                f"damping must be one number, got a tensor of shape {tuple(damping.shape)}. "
                "Another number for each entry is a diagonal operator, to be added to yours."
            )
        damping = damping.detach().item()
    try:
        # float() would take "0.1" and True, which are mistakes here.
        value = float(None if isinstance(damping, str | bool) else damping)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise DampingError(f"damping must be a number >= 0 or 'auto', got {damping!r}.") from None
    if not math.isfinite(value) or value < 0:
        raise DampingError(
            f"damping must be a finite number >= 0, got {value}. A negative damping makes the "
            "system indefinite; pass damping=0.0 for none."
        )
    return value


def check_option(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise :class:`SolverOptionError` unless ``ok``."""
    if not ok:
        raise SolverOptionError(f"{name} is {got!r}, expected {expected}.")


def is_one_of(value: object, names: tuple[str, ...]) -> bool:
    """Whether ``value`` is one of these names; arrays and tensors have no truth value to ask."""
    return isinstance(value, str) and value in names


def is_count(value: object) -> bool:
    """Whether ``value`` is an integer >= 1."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and value >= 1  # type: ignore[operator]


def is_tolerance(value: object) -> bool:
    """Whether ``value`` is a finite number >= 0."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]
