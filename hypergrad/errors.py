"""Every exception and warning that the library raises, in one place.

All exceptions derive from :class:`HypergradError`, and each also derives from the built-in
exception that a reader would expect (``ValueError``, ``TypeError`` ...), so that existing
``except`` clauses keep working.  Messages say what was got, what was expected, what to do.

Examples:
    >>> import torch, hypergrad
    >>> try:
    ...     hypergrad.cg_ihvp(lambda v: v, torch.ones(3), damping=-1.0)
    ... except hypergrad.DampingError as error:
    ...     print(error)
    damping must be a finite number >= 0, got -1.0. A negative damping makes the system \
indefinite; pass damping=0.0 for none.
"""

from __future__ import annotations

import sys
import warnings


class HypergradError(Exception):
    """Base class of every exception of the library."""


class TreeStructureError(HypergradError, ValueError):
    """A tree has other keys, leaves or leaf shapes than the operator's."""


class EmptyTreeError(HypergradError, ValueError):
    """A tree holds no number at all: no leaf, or only leaves of size zero."""


class LeafTypeError(HypergradError, TypeError):
    """A leaf is not a real floating-point tensor, or has an unexpected dtype."""


class DeviceError(HypergradError, ValueError):
    """Leaves, or an operator and its argument, live on different devices."""


class NonFiniteError(HypergradError, ArithmeticError):
    """A nan or an infinity in the input, in an operator's output or in an answer."""


class LossError(HypergradError, ValueError):
    """A loss is not a real scalar tensor, or does not depend on the parameters."""


class LoaderError(HypergradError, ValueError):
    """Minibatches that no mean can be taken over: none at all, of size zero, or gone or changed."""


class StaleOperatorError(HypergradError, RuntimeError):
    """Parameters or data were modified in place after the operator that uses them was made."""


class StateError(HypergradError, ValueError):
    """A stepper's state is another method's, or its memory has moved on with a later state."""


class NotSymmetricError(HypergradError, ValueError):
    """Products show that the operator is not symmetric, or not the same from call to call."""


class NegativeCurvatureError(HypergradError, ValueError):
    """Negative curvature where a sketch's policy, a factor or a preconditioner refuses it."""


class DampingError(HypergradError, ValueError):
    """Damping is negative, not finite, or zero where a positive one is needed."""


class RankError(HypergradError, ValueError):
    """A sketch's rank is below one or above the dimension."""


class SolverOptionError(HypergradError, ValueError):
    """A solver was configured with a value outside its range."""


class ConstraintError(HypergradError, ValueError):
    """Bounds that leave no point, or a point outside of a constraint that it was said to meet."""


class PreconditionerError(HypergradError, ValueError):
    """A preconditioner is not positive definite."""


class OperatorTooLargeError(HypergradError, MemoryError):
    """A dense matrix of the operator would not fit in the memory allowed for it."""


class MissingPackageError(HypergradError, ImportError):
    """An optional package is asked for and not installed."""


class DifferentiationError(HypergradError, RuntimeError):
    """A derivative of a solve was asked for that cannot be made right; never a silent zero."""


class ConvergenceError(HypergradError, RuntimeError):
    """A solve failed and the caller asked for ``on_failure="raise"``.

    Attributes:
        solution: the best answer found, a :class:`hypergrad.Solution`; nothing is lost.
    """

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class HypergradWarning(UserWarning):
    """Base class of every warning of the library."""


class ConvergenceWarning(HypergradWarning):
    """A solve failed and the caller asked for ``on_failure="warn"`` (the default)."""


class InnerProblemWarning(HypergradWarning):
    """The inner problem is visibly not solved: the hypergradient is that of another point."""


class CompilationWarning(HypergradWarning):
    """``compile=True`` was asked for and cannot be had: the work is done eagerly."""


class UnusedParameterWarning(HypergradWarning):
    """A loss does not depend on some leaves: their curvature and gradient are zero."""


def warn(message: str, category: type[HypergradWarning]) -> None:
    """Warn at the line of the first caller outside the library, however deep this call is.

    Python shows a warning once a line by default, so that one attributed to a line of the library
    would hide those of every later caller.
    """
    # Frames of torch lie between a backward pass and the line that asked for it.
    inside = (__name__.partition(".")[0], "torch")
    level, frame = 2, sys._getframe(1)  # level 1 is this function
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
