"""Settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

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
