"""What products alone tell of an operator's spectrum: its ends, density, trace and diagonal."""

from .density import SpectralDensity, spectral_density
from .diagonals import DiagonalEstimate, diagonal
from .extremes import (
    AUTO_DAMPING_CONDITION,
    AUTO_DAMPING_MARGIN,
    AUTO_DAMPING_TAIL,
    ExtremeEigenvalues,
    damping_from_extremes,
    extreme_eigenvalues,
    lanczos_extremes,
)
from .traces import TraceEstimate, trace

__all__ = [
    "AUTO_DAMPING_CONDITION",
    "AUTO_DAMPING_MARGIN",
    "AUTO_DAMPING_TAIL",
    "DiagonalEstimate",
    "ExtremeEigenvalues",
    "SpectralDensity",
    "TraceEstimate",
    "damping_from_extremes",
    "diagonal",
    "extreme_eigenvalues",
    "lanczos_extremes",
    "spectral_density",
    "trace",
]
