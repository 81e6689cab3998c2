"""The state of single-loop methods: saved, resumed, branched, projected."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

import hypergrad
from tests.bilevel.steppers import METHODS, W, Y, batches, every_method
from tests.strategies import F64


@every_method
def test_a_saved_state_goes_on_to_the_bit(name: str) -> None:
    method = METHODS[name]

    def advance(state: hypergrad.SingleLoopState, steps: range) -> hypergrad.SingleLoopState:
        for k in steps:
            inner = batches(method.num_inner_batches, 100 * k)
            state = method.step(state, inner, batches(method.num_outer_batches, 100 * k + 50))
        return state

    half = advance(method.init({"w": W}, [Y]), range(3))
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    through = advance(half, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    anew = method.init({"w": torch.zeros_like(W)}, [torch.zeros_like(Y)]).load_state_dict(saved)
    assert (anew.step, anew.num_gradients, anew.num_hvps) == (
        half.step, half.num_gradients, half.num_hvps,
    )  # fmt: skip
    resumed = advance(anew, range(3, 6))
    assert resumed.step == 6
    for key, value in through.vectors.items():
        assert torch.equal(resumed.vectors[key], value), key


def test_a_state_dict_does_not_move_on_with_the_memory() -> None:
    method = METHODS["SABA"]
    state = method.step(method.init(W, Y))
    saved = state.state_dict()
    before = {key: value.clone() for key, value in saved["tables"].items()}
    method.step(state)
    assert all(torch.equal(saved["tables"][key], value) for key, value in before.items())


@pytest.mark.parametrize("other", [{"w": W, "b": W}, {"v": W}, {"w": W[:2]}, {"w": W.float()}])
def test_a_saved_state_of_other_trees_is_refused(other: Any) -> None:
    method = METHODS["SOBA"]
    saved = method.init({"w": W}, Y).state_dict()
    with pytest.raises(hypergrad.StateError, match="same method from trees of the same structure"):
        method.init(other, Y).load_state_dict(saved)


def test_a_state_of_another_method_is_refused() -> None:
    state = METHODS["SOBA"].init(W, Y)
    with pytest.raises(hypergrad.StateError, match="state of SOBA, expected one of AmIGO"):
        METHODS["AmIGO"].step(state)
    with pytest.raises(hypergrad.StateError, match="method = 'SOBA', expected 'AmIGO'"):
        METHODS["AmIGO"].init(W, Y).load_state_dict(state.state_dict())
    with pytest.raises(hypergrad.StateError, match="no ihvp"):
        _ = METHODS["F2SA"].init(W, Y).ihvp
    with pytest.raises(hypergrad.StateError, match="no ihvp"):
        METHODS["F2SA"].init(W, Y, ihvp=W)


def test_sabas_state_can_be_stepped_from_once_or_cloned() -> None:
    method = METHODS["SABA"]
    assert isinstance(method, hypergrad.SABA)
    state = method.step(method.init(W, Y))
    branch = state.clone()
    first = method.step(state)
    with pytest.raises(hypergrad.StateError, match="stepped from before"):
        method.step(state)
    second = method.step(branch)
    assert torch.equal(first.inner_params, second.inner_params)
    more = replace(method, num_inner_blocks=2)
    with pytest.raises(hypergrad.StateError, match="remembers 1 inner blocks"):
        more.step(first, [batches(1, 0)[0]], [batches(1, 1)[0]], inner_index=1)


def test_a_failed_step_of_saba_leaves_the_memory_as_it_was() -> None:
    method = METHODS["SABA"]
    state = method.step(method.init(W, Y))
    saved = state.state_dict()
    bad = (torch.tensor(float("nan"), dtype=F64),) * 2
    with pytest.raises(hypergrad.NonFiniteError):
        method.step(state, None, [bad])
    assert all(torch.equal(state.memory.tables[k], v) for k, v in saved["tables"].items())  # type: ignore[union-attr]
    assert method.step(state).step == 2


def test_replace_projects_and_checks() -> None:
    state = METHODS["SOBA"].init(W, Y)
    clamped = state.replace(outer_params=state.outer_params.clamp(min=0.0))
    assert torch.equal(clamped.outer_params, Y.clamp(min=0.0))
    assert torch.equal(clamped.inner_params, W)
    assert torch.equal(state.replace(inner_params=W + 1).inner_params, W + 1)
    with pytest.raises(hypergrad.TreeStructureError, match="outer_params has shape"):
        state.replace(outer_params=Y[:2])
    with pytest.raises(hypergrad.NonFiniteError, match="inner_params"):
        state.replace(inner_params=W * float("nan"))
