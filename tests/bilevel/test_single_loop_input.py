"""Single-loop methods: bad configurations, batches and losses each have their named error."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.strategies import F64, gaussian

W, Y = gaussian(3, seed=1), gaussian(3, seed=2)


def pull(w: Tensor, y: Tensor, *batch: Tensor) -> Tensor:
    return 0.5 * ((w - y - sum(batch)) ** 2).sum()


RATES: dict[str, Any] = {"inner_lr": 0.1, "outer_lr": 0.1}
BLOCKS: dict[str, Any] = {"num_inner_blocks": 3, "num_outer_blocks": 2}
MAKERS: dict[str, Any] = {
    "SOBA": lambda **k: hypergrad.SOBA(pull, pull, **(RATES | k)),
    "SABA": lambda **k: hypergrad.SABA(pull, pull, **(RATES | BLOCKS | k)),
    "AmIGO": lambda **k: hypergrad.AmIGO(pull, pull, **(RATES | k)),
    "StocBiO": lambda **k: hypergrad.StocBiO(pull, pull, **(RATES | k)),
    "F2SA": lambda **k: hypergrad.F2SA(pull, pull, **(RATES | {"penalty_lr": 0.01} | k)),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("option", ["inner_lr", "outer_lr"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", True, None])
def test_a_step_size_out_of_range(name: str, option: str, value: Any) -> None:
    if value is None and option in ("inner_lr", "outer_lr"):
        value = [0.1]  # None means a default elsewhere
    with pytest.raises(hypergrad.SolverOptionError, match=option):
        MAKERS[name](**{option: value})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("SOBA", "linear_lr", -1.0),
        ("SABA", "num_inner_blocks", 0),
        ("SABA", "num_outer_blocks", 2.0),
        ("AmIGO", "inner_steps", 0),
        ("AmIGO", "linear_steps", 1.5),
        ("StocBiO", "linear_steps", -1),
        ("F2SA", "inner_steps", True),
        ("F2SA", "penalty_lr", "big"),
        ("F2SA", "multiplier", -1.0),
        ("F2SA", "shared_batches", 1),
    ],
)
def test_an_option_out_of_range(name: str, option: str, value: Any) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match=f"{option} is {value!r}"):
        MAKERS[name](**{option: value})


def test_a_loss_that_is_no_function() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="outer_loss"):
        hypergrad.SOBA(pull, torch.ones(()), **RATES)  # type: ignore[arg-type]


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        MAKERS["SOBA"]().inner_lr = 1.0


@pytest.mark.parametrize("value", [-1.0, float("nan"), None, "1"])
def test_a_schedule_is_checked_when_it_is_asked(value: Any) -> None:
    method = MAKERS["SOBA"](inner_lr=lambda step: 0.1 if step == 0 else value)
    state = method.step(method.init(W, Y))
    with pytest.raises(hypergrad.SolverOptionError, match=r"inner_lr\(1\)"):
        method.step(state)


def test_a_power_schedule() -> None:
    falling = hypergrad.PowerSchedule(0.5, 2 / 3, offset=8.0)
    assert falling(0) == 0.5
    assert falling(56) == pytest.approx(0.5 / 4)  # (8 / 64)^(2/3)
    assert hypergrad.PowerSchedule(2.0, -1 / 7)(127) == pytest.approx(4.0)
    for bad in ({"initial": 0.0}, {"exponent": "1"}, {"offset": 0}, {"exponent": float("nan")}):
        with pytest.raises(hypergrad.SolverOptionError, match=next(iter(bad))):
            hypergrad.PowerSchedule(**({"initial": 1.0, "exponent": 0.5} | bad))


def test_a_multiplier_of_zero() -> None:
    for options in ({"multiplier": 0.0}, {"penalty_lr": 0.0}, {"inner_lr": 0.0}):
        method = MAKERS["F2SA"](**options)
        with pytest.raises(hypergrad.SolverOptionError, match="multiplier is 0"):
            method.step(method.init(W, Y))


# ---------------------------------------------------------------------------------------- batches


class Endless:
    """An iterable that begins anew each time, like a DataLoader, and never ends."""

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(W)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (torch.ones(2), "Wrap a single batch"),
        ({"x": 1}, "Wrap a single batch"),
        (3, "is a int"),
        ((W, W), "holds more batches"),
        (Endless(), "holds more batches"),
        ([], "holds 0 batches"),
        (iter([]), "holds 0 batches"),
    ],
)
def test_batches_that_are_not_one_batch(batches: Any, match: str) -> None:
    method = MAKERS["SOBA"]()
    state = method.init(W, Y)
    for arguments in ((batches, None), (None, batches)):
        with pytest.raises(hypergrad.SolverOptionError, match=match):
            method.step(state, *arguments)


def test_a_batch_is_unpacked_or_is_one_argument() -> None:
    method = MAKERS["SOBA"]()
    two = (torch.ones(3, dtype=F64), torch.ones(3, dtype=F64))
    results = [
        method.step(method.init(W, Y), [batch]).inner_params
        for batch in (two, list(two), 2.0, (2.0,))
    ]
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("index", [None, -1, 3, 1.0, True, torch.tensor(1)])
def test_a_block_that_does_not_exist(index: Any) -> None:
    method = MAKERS["SABA"]()
    state = method.init(W, Y)
    with pytest.raises(hypergrad.SolverOptionError, match=r"inner_index .* 0 \.\. 2"):
        method.step(state, None, None, inner_index=index, outer_index=0)
    with pytest.raises(hypergrad.SolverOptionError, match=r"outer_index .* 0 \.\. 1"):
        method.step(state, None, None, inner_index=0, outer_index=2)


# ------------------------------------------------------------------------------------------ trees


def test_trees_that_are_none() -> None:
    method = MAKERS["SOBA"]()
    with pytest.raises(hypergrad.EmptyTreeError, match="inner_params"):
        method.init({}, Y)
    with pytest.raises(hypergrad.LeafTypeError, match="outer_params"):
        method.init(W, torch.ones(2, dtype=torch.int64))
    with pytest.raises(hypergrad.NonFiniteError, match="outer_params"):
        method.init(W, Y * float("inf"))
    with pytest.raises(hypergrad.TreeStructureError, match="ihvp"):
        method.init(W, Y, ihvp=W[:2])
    with pytest.raises(hypergrad.NonFiniteError, match="ihvp"):
        method.init(W, Y, ihvp=W * float("nan"))
    with pytest.raises(hypergrad.DeviceError, match="outer_params on meta"):
        method.init(W, Y.to("meta"))


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda w, y: (w - y) ** 2,
        lambda w, y: 1.0,
        lambda w, y: torch.ones(()),
        lambda w, y: pull(w, y).detach(),
    ],
)
def test_a_loss_of_another_kind(name: str, which: str, loss: Any) -> None:
    method = MAKERS[name]()
    method = replace(method, **{which: loss})
    blocks = {"inner_index": 0, "outer_index": 0} if name == "SABA" else {}
    with pytest.raises(hypergrad.LossError, match=which):
        method.step(method.init(W, Y), **blocks)


@pytest.mark.parametrize("name", MAKERS)
def test_an_inner_loss_of_the_outer_variable_only(name: str) -> None:
    method = replace(MAKERS[name](), inner_loss=lambda w, y: (y**2).sum())
    blocks = {"inner_index": 0, "outer_index": 0} if name == "SABA" else {}
    with pytest.raises(hypergrad.LossError, match="inner_loss does not depend on params"):
        method.step(method.init(W, Y), **blocks)


@pytest.mark.parametrize("name", MAKERS)
def test_too_large_a_step_diverges_aloud(name: str) -> None:
    method = MAKERS[name](inner_lr=1e3)
    blocks = {"inner_index": 0, "outer_index": 0} if name == "SABA" else {}
    state = method.init(W, Y)

    def go() -> None:
        nonlocal state
        for _ in range(400):
            state = method.step(state, **blocks)

    with pytest.raises(hypergrad.NonFiniteError, match=r"nan|inf"):
        go()
    # What it had reached is still there.
    assert bool(torch.isfinite(state.inner_params).all())


@pytest.mark.parametrize("name", ["SOBA", "SABA"])
def test_a_step_that_overflowed_can_be_tried_anew(name: str) -> None:
    blocks = {"inner_index": 0, "outer_index": 0} if name == "SABA" else {}
    method = MAKERS[name](linear_lr=1e308)
    state = method.init(100 * W, Y, ihvp=-100 * W)
    with pytest.raises(hypergrad.NonFiniteError, match="ihvp after step 0"):
        method.step(state, **blocks)
    again = MAKERS[name]()
    fresh = again.step(again.init(100 * W, Y, ihvp=-100 * W), **blocks)
    assert torch.equal(again.step(state, **blocks).ihvp, fresh.ihvp)


def test_unused_leaves_are_reported_once_and_stay() -> None:
    def inner(w: Any, y: Tensor) -> Tensor:
        return pull(w["a"], y)

    method = hypergrad.SOBA(inner, lambda w, y: (w["a"] ** 2).sum(), **RATES)
    state = method.init({"a": W, "b": W}, Y)
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"inner_loss .*\['b'\]"):
        state = method.step(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = method.step(state)
    assert torch.equal(state.inner_params["b"], W)
    assert not torch.equal(state.inner_params["a"], W)


def test_problems_that_nothing_connects() -> None:
    square = lambda w, y: (w**2).sum()  # noqa: E731
    for name in ("SOBA", "AmIGO", "StocBiO", "F2SA"):
        alone = replace(MAKERS[name](), inner_loss=square)
        with pytest.warns(hypergrad.UnusedParameterWarning, match="no implicit part"):
            alone.step(alone.init(W, Y))
    direct = hypergrad.SOBA(pull, lambda w, y: (y**2).sum(), **RATES)
    with pytest.warns(hypergrad.UnusedParameterWarning, match="no implicit part"):
        state = direct.step(direct.init(W, Y))
    torch.testing.assert_close(state.outer_direction, 2 * Y)
    both = hypergrad.SOBA(pull, lambda w, y: (torch.ones(2).requires_grad_() ** 2).sum(), **RATES)
    with pytest.raises(hypergrad.LossError, match="neither"):
        both.step(both.init(W, Y))


def test_an_inner_loss_that_is_linear_in_a_leaf_has_no_curvature_there() -> None:
    inner = lambda w, y: pull(w["a"], y) + w["b"].sum()  # noqa: E731
    method = hypergrad.SOBA(inner, lambda w, y: (w["a"] ** 2).sum() + (w["b"] ** 2).sum(), **RATES)
    state = method.step(method.init({"a": W, "b": W}, Y, ihvp={"a": W, "b": W}))
    # v_b moves by the outer gradient 2 b alone.
    torch.testing.assert_close(state.ihvp["b"], W + 0.1 * 2 * W)


def test_inference_mode_is_refused() -> None:
    method = MAKERS["SOBA"]()
    state = method.init(W, Y)
    with torch.inference_mode(), pytest.raises(hypergrad.LossError, match="inference"):
        method.step(state)
