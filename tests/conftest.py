"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from hypergrad.operators import compilation

# `ci`: the same examples at each run, so that a failure is the change's and not the day's.
# No deadline: the first call of a PyTorch function is far slower than the next.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
# `slow`: new examples at each run, and many more of them.
settings.register_profile(
    "slow",
    deadline=None,
    max_examples=1000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Run by test_elsewhere.py, in processes of their own.
collect_ignore = [] if "HYPERGRAD_ELSEWHERE" in os.environ else ["elsewhere"]


@pytest.fixture
def capture_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and run, without code from them; none is left to other tests."""
    torch._dynamo.reset()
    compilation.forget_compiled()
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    compilation.forget_compiled()
