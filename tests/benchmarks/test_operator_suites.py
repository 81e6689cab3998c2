"""The benchmarks of operators run, and what they are there to show holds."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.benchmarks import operators, problems
from hypergrad.operators import modes


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    modes.forget_modes()


def measurements(suite: type) -> list[str]:
    names = [name for name, _ in inspect.getmembers(suite, inspect.isfunction)]
    return [name for name in names if name.startswith("track_")]


SUITES = (operators.TenProducts, operators.AutomaticMode, operators.ChunkMemory)


@pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")
@pytest.mark.parametrize("problem", operators.PROBLEMS)
@pytest.mark.parametrize("suite", SUITES)
def test_products(suite: type, problem: str) -> None:
    reduced = {"problems": operators.SMALL_PROBLEMS, "warm_up": 1, "many": 12}
    small = type("Small", (suite,), reduced)()
    small.setup(problem)
    small.problem = problems.Problem(**{**vars(small.problem), "repeats": 1})
    for name in measurements(suite):
        assert 0 < getattr(small, name)(problem) < math.inf


@pytest.mark.filterwarnings("ignore::hypergrad.ConvergenceWarning")
def test_many_right_hand_sides() -> None:
    class Few(operators.ManyRightHandSides):
        problem_of = staticmethod(partial(problems.critic, 8, 3))
        many = 2

    suite = Few()
    suite.setup("reverse, together")
    assert 0 < suite.track_block_over_separate("reverse, together") < math.inf


def test_sketch_memory() -> None:
    suite = operators.SketchMemory()
    suite.width = 40
    assert suite.track_peak("float32") > 10


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "most"), [("critic", 1.0), ("classifier", 0.9), ("cnn", 1.1)])
def test_ten_products_cost_what_they_are_worth(problem: str, most: float) -> None:
    suite = operators.TenProducts()
    suite.setup(problem)
    assert suite.track_best(problem) <= most


@pytest.mark.slow
@pytest.mark.parametrize("problem", operators.PROBLEMS)
def test_the_automatic_mode_is_within_a_tenth_of_the_best(problem: str) -> None:
    suite = operators.AutomaticMode()
    suite.setup(problem)
    assert suite.track_auto_over_best(problem) <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize("problem", operators.PROBLEMS)
def test_chunks_take_no_more_than_the_cap(problem: str) -> None:
    suite = operators.ChunkMemory()
    suite.setup(problem)
    assert suite.track_peak_over_cap(problem) <= 1.0
