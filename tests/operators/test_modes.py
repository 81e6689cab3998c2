"""Which way products go: the choice, its price, and the memory that chunks take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hypergrad
from benchmarks.benchmarks.memory import peak_bytes
from hypergrad.operators import modes
from hypergrad.operators.modes import Choice, Way
from tests.strategies import F32, F64, gaussian


@pytest.fixture(autouse=True)
def _forgetful() -> Any:
    modes.forget_modes()
    yield
    modes.forget_modes()


def run(choice: Choice, cost: dict[Way, float], count: int, blocks: int) -> tuple[float, float]:
    """What ``blocks`` blocks cost as the choice goes, and what they would in its first way."""
    total = 0.0
    for _ in range(blocks):
        way = choice.trial(count) or choice.best
        choice.record(way, count, count * cost[way])
        total += count * cost[way]
    return total, blocks * count * cost[choice.first]


costs = st.fixed_dictionaries({way: st.floats(1e-2, 1e-1) for way in Way})


@settings(max_examples=25)
@given(cost=costs, first=st.sampled_from([Way.ONE_BY_ONE, Way.TOGETHER]))
def test_the_choice_ends_in_the_fastest_way(cost: dict[Way, float], first: Way) -> None:
    choice = Choice(first, tuple(Way))
    run(choice, cost, 10, 3_000)
    assert choice.settled
    # A way must be 5% faster to replace the first.
    assert cost[choice.best] <= min(cost.values()) / modes._BETTER


@settings(max_examples=25)
@given(cost=costs, blocks=st.integers(1, 300))
def test_trials_cost_a_tenth_at_most(cost: dict[Way, float], blocks: int) -> None:
    # One trial may turn out slower than feared, by as much as the ways differ.
    worst = max(cost.values()) / cost[Way.ONE_BY_ONE]
    choice = Choice(Way.ONE_BY_ONE, tuple(Way))
    total, alone = run(choice, cost, 10, blocks)
    slip = len(Way) * 10 * max(cost.values()) if worst > modes._FEARED + 1 else 0.0
    assert total <= (1 + modes._BUDGET) * alone + slip


def test_a_first_block_is_not_experimented_with() -> None:
    choice = Choice(Way.ONE_BY_ONE, tuple(Way))
    assert choice.trial(10) is None
    choice.record(Way.ONE_BY_ONE, 10, 1.0)
    assert choice.trial(10) is None


def test_forward_mode_waits_until_its_first_call_is_paid_for() -> None:
    choice = Choice(Way.ONE_BY_ONE, (Way.ONE_BY_ONE, Way.FORWARD))
    for _ in range(300):
        assert choice.trial(1) is None
        choice.record(Way.ONE_BY_ONE, 1, 0.05)
    run(choice, dict.fromkeys(Way, 0.05), 1, 200)
    assert choice.trials[Way.FORWARD] == modes._TRIALS


def quartic(p: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(x @ p) ** 2).sum() + (p**4).sum()


def operator(mode: Any = "auto", rows: int = 6, **options: Any) -> hypergrad.LinearOperator:
    return hypergrad.hessian(quartic, gaussian(5), gaussian(rows, 5, seed=1), mode=mode, **options)


def test_every_way_is_tried_on_products_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "_BUDGET", 100.0)
    seen = []
    monkeypatch.setattr(modes, "_timed", lambda work, device: (work(), 1.0))
    op, dense = operator(), operator("reverse_over_reverse").to_dense()
    for seed in range(12):
        block = gaussian(20, 5, seed=seed)
        torch.testing.assert_close(op.matmat(block), block @ dense, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(op._apply(block), block @ dense, rtol=1e-12, atol=1e-12)
        seen.append(repr(op))
    (memory,) = modes._memories.values()
    assert memory.choices[16].settled
    assert set(memory.choices[16].trials) == set(Way)


def test_operators_of_the_same_shapes_measure_once() -> None:
    first, second, other = operator(), operator(), operator(rows=7)
    for op in (first, second, other):
        op @ gaussian(5)
    assert isinstance(first, hypergrad.HessianOperator)
    assert isinstance(second, hypergrad.HessianOperator)
    assert isinstance(other, hypergrad.HessianOperator)
    assert first._remembered() is second._remembered()
    assert first._remembered() is not other._remembered()


def test_the_memory_is_bounded() -> None:
    for i in range(modes._REMEMBERED + 5):
        modes.remembered(i, lambda: modes.Footprint(1, 1))
    assert len(modes._memories) == modes._REMEMBERED


def test_a_loss_that_changes_between_calls_stays_on_its_kept_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modes, "_BUDGET", 100.0)
    monkeypatch.setattr(modes, "_FIRST_FORWARD", 0.0)
    calls: list[None] = []

    def drifting(p: Tensor) -> Tensor:
        calls.append(None)
        return len(calls) * (p**4).sum()

    point = gaussian(5)
    op = hypergrad.hessian(drifting, point)
    for seed in range(8):
        block = gaussian(8, 5, seed=seed)
        torch.testing.assert_close(op.matmat(block), 12 * point**2 * block)
    (memory,) = modes._memories.values()
    assert Way.FORWARD in memory.choices[8].refused


def test_nothing_is_timed_under_transforms_or_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("a product was timed")

    monkeypatch.setattr(modes, "_timed", refuse)
    dense = operator("reverse_over_reverse").to_dense()
    block = gaussian(3, 5)
    point, data = gaussian(5), gaussian(6, 5, seed=1)

    def products(v: Tensor) -> Any:
        return hypergrad.hessian(quartic, point, data).matmat(v)

    torch.testing.assert_close(torch.func.vmap(operator().matvec)(block), block @ dense)
    compiled = torch.compile(products, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(block), block @ dense)


def test_the_mode_is_named() -> None:
    op = operator()
    assert "mode auto>" in repr(op)
    op @ gaussian(5)
    assert "mode auto (1: one by one over the kept graph)" in repr(op)
    assert isinstance(op, hypergrad.HessianOperator)
    mode, chunk_size = op.chosen(10)
    fixed = operator(mode, chunk_size=chunk_size)
    assert isinstance(fixed, hypergrad.HessianOperator)
    assert fixed.chosen(10) == (mode, chunk_size)
    assert f"mode {mode}>" in repr(fixed)


@pytest.mark.parametrize("chunk_size", [1, 3, "auto"])
@pytest.mark.parametrize("mode", ["reverse_over_reverse", "forward_over_reverse", "auto"])
def test_chunks_change_nothing(mode: Any, chunk_size: Any) -> None:
    block = gaussian(7, 5)
    whole = operator("reverse_over_reverse").matmat(block)
    for cap in (1, 2**28):
        op = operator(mode, chunk_size=chunk_size, memory_cap=cap)
        torch.testing.assert_close(op.matmat(block), whole, rtol=1e-12, atol=1e-12)


def regression() -> tuple[Callable[..., Tensor], Any, Tensor, Tensor]:
    weights = gaussian(64, 10, seed=1).to(F32)
    x, y = gaussian(100, 64, seed=2).to(F32), torch.arange(100) % 10
    return (lambda p, x, y: torch.nn.functional.cross_entropy(x @ p, y)), weights, x, y


def network() -> tuple[Callable[..., Tensor], Any, Tensor, Tensor]:
    params = [gaussian(20, 40, seed=1).to(F32) / 4, gaussian(40, 5, seed=2).to(F32) / 6]
    x, y = gaussian(200, 20, seed=3).to(F32), gaussian(200, 5, seed=4).to(F32)
    return (lambda p, x, y: ((torch.tanh(x @ p[0]) @ p[1] - y) ** 2).mean()), params, x, y


def convolution() -> tuple[Callable[..., Tensor], Any, Tensor, Tensor]:
    params = [gaussian(8, 1, 3, 3, seed=1).to(F32), gaussian(8 * 16, 3, seed=2).to(F32) / 11]
    x, y = gaussian(4, 1, 6, 6, seed=3).to(F32), gaussian(4, 3, seed=4).to(F32)

    def loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.nn.functional.softplus(torch.nn.functional.conv2d(x, p[0]))
        return ((hidden.flatten(1) @ p[1] - y) ** 2).mean()

    return loss, params, x, y


@pytest.mark.parametrize("mode", ["reverse_over_reverse", "forward_over_reverse"])
@pytest.mark.parametrize("problem", [regression, network, convolution])
def test_the_memory_cap_holds(problem: Callable[[], Any], mode: Any) -> None:
    loss, params, *batch = problem()
    plain = hypergrad.hessian(loss, params, *batch, mode=mode)
    one = 3 * (plain._remembered().footprint.saved + 4 * plain.layout.dim)
    op = hypergrad.hessian(loss, params, *batch, mode=mode, chunk_size="auto", memory_cap=4 * one)
    block = gaussian(40, op.layout.dim).to(F32)
    assert op.chosen(40)[1] == 4
    # Beside the products themselves; forward mode computes the gradient anew, without tangents.
    allowed = 4 * one + 4 * block.numel() + (one if mode == "forward_over_reverse" else 0)
    assert peak_bytes(lambda: op._apply(block)) <= allowed
    if mode == "reverse_over_reverse":
        whole = hypergrad.hessian(loss, params, *batch, mode=mode, chunk_size=40)
        assert peak_bytes(lambda: whole._apply(block)) > allowed


def test_a_product_lives_in_memory_of_its_own() -> None:
    # Autograd passes the direction on as the product here, and the same tensor to both leaves.
    tree = {"p": gaussian(3), "q": gaussian(3, seed=1)}
    op = hypergrad.hessian(lambda t: t["p"] @ t["q"] + 0.5 * (t["p"] + t["q"]).square().sum(), tree)
    v = {"p": gaussian(3, seed=2), "q": gaussian(3, seed=3)}
    before = {name: leaf.clone() for name, leaf in v.items()}
    product = op @ v
    expected = {name: leaf.clone() for name, leaf in product.items()}
    product["p"].zero_()
    assert torch.equal(product["q"], expected["q"])
    assert torch.equal(v["p"], before["p"])
    assert torch.equal(v["q"], before["q"])


@pytest.mark.parametrize("cap", [0, -1, 1.5, True])
def test_a_memory_cap_is_a_number_of_bytes(cap: Any) -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="memory_cap is"):
        operator(memory_cap=cap)


def test_float64_identity_of_functions() -> None:
    assert gaussian(1).dtype == F64
    losses = [lambda p, i=i: i * (p**2).sum() for i in range(2)]
    assert modes.identity(losses[0]) == modes.identity(losses[1])
    assert modes.identity(losses[0]) != modes.identity(lambda p: p.sum())


def test_nothing_is_timed_where_algorithms_must_be_deterministic() -> None:
    params = {"w": gaussian(6, 5), "b": gaussian(5)}
    inputs = gaussian(7, 6, seed=1)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(inputs @ p["w"] + p["b"]).square().sum()

    block = {"w": gaussian(10, 6, 5, seed=2), "b": gaussian(10, 5, seed=3)}
    torch.use_deterministic_algorithms(True)
    try:
        operator = hypergrad.hessian(loss, params)
        first = operator.chosen(10)
        products = [operator.matmat(block)["w"] for _ in range(40)]
        memory = operator._memory
        assert memory is not None
        assert all(not choice.trials for choice in memory.choices.values())
        assert operator.chosen(10) == first
        assert all(torch.equal(products[0], x) for x in products)
        # A best way that was timed before is not taken either.
        memory.choices[8].seconds |= {Way.ONE_BY_ONE: 1.0, Way.TOGETHER: 2.0, Way.FORWARD: 1e-3}
        memory.choices[8].trials |= dict.fromkeys(Way, 3)
        assert operator.chosen(10) == first
    finally:
        torch.use_deterministic_algorithms(False)
    assert operator.chosen(10) != first


def test_nothing_is_timed_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # gradcheck runs it twice, and wants the same to the last bit.
    monkeypatch.setattr(modes, "_BUDGET", 1e6)
    point = gaussian(4)

    def solved(params: Tensor, v: Tensor) -> Tensor:
        h = hypergrad.hessian(lambda p: (p**4).sum() + (p.sum() ** 2), params)
        return hypergrad.solve(h, v, hypergrad.Exact(), damping=1.0).value

    params, v = point.clone().requires_grad_(), gaussian(4, seed=1).requires_grad_()
    tried: list[Any] = []

    def refuse(*arguments: Any) -> bool:
        tried.append(arguments)
        return False

    monkeypatch.setattr(modes, "_tried", refuse)
    for _ in range(3):
        x = solved(params, v)
    assert tried  # in the forward pass it is time to
    del tried[:]
    first = torch.autograd.grad(x.sum(), [params, v], retain_graph=True)
    second = torch.autograd.grad(x.sum(), [params, v])
    assert not tried
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
