"""The statistics of a few runs, by known samples and by how often intervals hold the truth."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hypergrad_rl.statistics import Bootstrap, interquartile_mean, probability_of_improvement
from tests.rl.written_runs import FAST


def test_interquartile_mean_of_known_samples() -> None:
    assert interquartile_mean(np.array([4.0, 1.0])) == 2.5  # nothing to cut
    assert interquartile_mean(np.array([9.0, 2.0, 1.0, 4.0, 5.0])) == (2 + 4 + 5) / 3
    two_tasks = interquartile_mean(np.array([0.0, 0.1, 0.2, 0.9]), np.array([0.3, 0.4, 0.5, 1.0]))
    assert two_tasks == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)  # the middle of all eight
    assert np.isnan(interquartile_mean(np.array([1.0, 2.0, 3.0, np.nan])))


@given(st.lists(st.floats(-1e6, 1e6), min_size=8, max_size=8), st.floats(1e6, 1e12))
def test_one_outlier_of_eight_does_not_move_it(returns: list[float], outlier: float) -> None:
    top = np.sort(np.array(returns))
    moved = np.append(top[:-1], outlier)
    assert interquartile_mean(moved) == interquartile_mean(top)
    assert moved.mean() > top.mean() or outlier == top[-1]  # where a mean would


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    st.lists(st.integers(-3, 3), min_size=1, max_size=6),
)
def test_probability_of_improvement_is_the_mann_whitney_statistic(
    first: list[int], second: list[int]
) -> None:
    x, y = np.array(first, float), np.array(second, float)
    expected = scipy.stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y))
    assert probability_of_improvement(x, y) == pytest.approx(expected, abs=1e-12)
    both = probability_of_improvement(x, y) + probability_of_improvement(y, x)
    assert both == pytest.approx(1.0)
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x + 10, y) == 1.0
    # Over tasks it is the mean of theirs, whatever the scale of each.
    tasks = probability_of_improvement(x, 1e3 * y, y, 1e3 * x)
    assert tasks == pytest.approx(0.5)


def test_unknown_returns_are_not_counted_as_losses() -> None:
    x, y = np.array([np.nan, 2.0]), np.array([1.0, 1.0])
    assert np.isnan(probability_of_improvement(x, y))
    assert np.isnan(probability_of_improvement(y, x))
    interval = FAST.interval([np.array([[1.0, np.nan, 2.0], [1.0, 1.0, 1.0]])])
    np.testing.assert_equal(interval, ([np.nan, 1.0], [np.nan, 1.0]))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_an_interval_of_few_runs_is_their_range(n: int) -> None:
    """A resample of n runs has the lowest as its statistic with probability above 2.5%.

    That takes n times the lowest of 2 or 3 (1/4, 1/27), at least 3 times of 4 (13/256).
    """
    runs = np.random.default_rng(0).normal(size=(5, n))
    interval = Bootstrap().interval([runs])
    assert interval is not None
    np.testing.assert_allclose(interval, (runs.min(1), runs.max(1)), rtol=1e-12)


@pytest.mark.parametrize(("n", "share"), [(2, 0.5), (5, 0.9), (10, 0.94)])
def test_intervals_hold_the_truth_as_often_as_documented(n: int, share: float) -> None:
    trials = 1000
    runs = np.random.default_rng(1).normal(3.0, 2.0, (trials, n))
    interval = Bootstrap(resamples=999).interval([runs])
    assert interval is not None
    held = np.mean((interval[0] <= 3.0) & (interval[1] >= 3.0))
    # Four standard errors, and two in a hundred for the rounding of the documented share.
    assert abs(held - share) < 4 * np.sqrt(share * (1 - share) / trials) + 0.02


def test_intervals_of_probabilities_hold_the_truth() -> None:
    rng = np.random.default_rng(2)
    trials, shift = 400, 0.5
    x, y = rng.normal(shift, 1, (trials, 10)), rng.normal(0, 1, (trials, 10))
    interval = FAST.interval([x, y], probability_of_improvement)
    assert interval is not None
    truth = scipy.stats.norm.cdf(shift / np.sqrt(2))
    held = np.mean((interval[0] <= truth) & (truth <= interval[1]))
    assert 0.89 < held < 0.99  # 0.93 to 0.95 in 1,000 trials; four standard errors


def test_the_bootstrap_is_stratified_and_repeats_itself() -> None:
    """Runs of one task never stand in for another's: two constant tasks leave no spread."""
    samples = [np.zeros(5), np.ones(5)]
    np.testing.assert_equal(Bootstrap().interval(samples), (0.5, 0.5))
    assert Bootstrap().interval([np.arange(5.0), np.zeros(1)]) is None
    runs = [np.random.default_rng(3).normal(size=6)]
    np.testing.assert_equal(Bootstrap().interval(runs), Bootstrap().interval(runs))
    wide, narrow = (Bootstrap(confidence=c).interval(runs) for c in (0.95, 0.5))
    assert wide is not None
    assert narrow is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
