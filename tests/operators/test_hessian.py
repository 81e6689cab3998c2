from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import hypergrad
from hypergrad.transforms import apply
from tests.strategies import F32, F64, flat, gaussian, quick_and_thorough, tree_like, trees

MODES = ("auto", "reverse_over_reverse", "forward_over_reverse")


def mlp() -> tuple[torch.nn.Module, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    ).double()
    return model, dict(model.named_parameters()), gaussian(7, 3, seed=1), gaussian(7, 2, seed=2)


def model_loss(model: torch.nn.Module) -> Callable[..., Tensor]:
    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return ((torch.func.functional_call(model, params, x) - y) ** 2).mean()

    return loss


def reference(loss_of_tree: Callable[[Any], Tensor], tree: Any) -> Tensor:
    """torch.func.hessian in flat coordinates of its own."""
    return torch.func.hessian(lambda vector: loss_of_tree(tree_like(tree, vector)))(flat(tree))


def smooth(tree: Any) -> Tensor:
    """A loss that couples every entry of a tree with every other."""
    vector = flat(tree)
    weights = torch.linspace(0.5, 1.5, len(vector), dtype=vector.dtype)
    return torch.sin(weights @ vector) + (weights * vector**4).sum() + 0.3 * vector.sum() ** 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_network_hessian_is_that_of_torch(mode: Any, chunk_size: int | None) -> None:
    model, params, x, y = mlp()
    loss = model_loss(model)
    got = hypergrad.hessian(loss, params, x, y, mode=mode, chunk_size=chunk_size).to_dense()
    tree = {name: p.detach() for name, p in params.items()}
    expected = reference(lambda t: loss(t, x, y), tree)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@quick_and_thorough
@pytest.mark.parametrize("mode", MODES[1:])
@given(tree=trees())
def test_hessian_over_any_tree(effort: str, mode: Any, tree: Any) -> None:
    expected = reference(smooth, tree)
    got = hypergrad.hessian(smooth, tree, mode=mode)
    torch.testing.assert_close(
        got.to_dense(), expected, rtol=0, atol=1e-10 * float(expected.abs().max())
    )
    assert torch.allclose(got.loss, smooth(tree))


@pytest.mark.parametrize("mode", MODES)
def test_a_0d_parameter(mode: Any) -> None:
    op = hypergrad.hessian(lambda p: p**3, torch.tensor(2.0, dtype=F64), mode=mode)
    product = op @ torch.tensor(1.0, dtype=F64)
    assert product.shape == ()
    assert float(product) == pytest.approx(12.0, rel=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_a_linear_loss_has_no_curvature(mode: Any) -> None:
    tree = {"w": gaussian(3), "b": torch.tensor(1.0, dtype=F64)}
    op = hypergrad.hessian(lambda t: t["w"].sum() + 2 * t["b"], tree, mode=mode)
    assert torch.equal(op.to_dense(), torch.zeros(4, 4, dtype=F64))


@pytest.mark.parametrize("mode", MODES)
def test_a_leaf_in_which_the_loss_is_linear_has_zero_rows(mode: Any) -> None:
    tree = {"w": gaussian(3), "b": torch.tensor(1.0, dtype=F64)}
    op = hypergrad.hessian(lambda t: (t["w"] ** 2).sum() + 2 * t["b"], tree, mode=mode)
    expected = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=F64))
    assert torch.equal(op.to_dense(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_unused_leaf_is_reported_and_has_zero_rows(mode: Any) -> None:
    tree = {"used": gaussian(2), "unused": gaussian(1)}
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['unused'\]") as caught:
        op = hypergrad.hessian(lambda t: (t["used"] ** 2).sum(), tree, mode=mode)
    assert caught[0].filename == __file__
    assert torch.equal(op.to_dense(), torch.diag(torch.tensor([2.0, 2.0, 0.0], dtype=F64)))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_modified_in_place_makes_the_operator_stale(mode: Any) -> None:
    x, p = gaussian(4, 3), gaussian(3, seed=1)
    op = hypergrad.hessian(lambda p, b: (b["x"] @ p).tanh().sum(), p, {"x": x}, mode=mode)
    op @ p
    x.mul_(2.0)
    with pytest.raises(hypergrad.StaleOperatorError, match=r"tensor of the batch, of shape \(4, 3"):
        op @ p


@pytest.mark.parametrize("mode", MODES)
def test_params_modified_in_place_make_the_operator_stale(mode: Any) -> None:
    tree = {"w": gaussian(3).requires_grad_(), "b": gaussian(1).requires_grad_()}
    op = hypergrad.hessian(lambda t: (t["w"] ** 4).sum() + (t["b"] ** 2).sum(), tree, mode=mode)
    v = {"w": torch.ones(3, dtype=F64), "b": torch.ones(1, dtype=F64)}
    op @ v
    tree["w"].grad = torch.ones(3, dtype=F64)
    torch.optim.SGD([tree["w"]], lr=0.1).step()
    with pytest.raises(hypergrad.StaleOperatorError, match=r"params\['w'\] was modified in place"):
        op @ v


@pytest.mark.parametrize("mode", MODES)
def test_flags_gradients_and_values_of_the_caller_are_untouched(mode: Any) -> None:
    frozen, trained = gaussian(2), gaussian(2).requires_grad_()
    trained.grad = torch.full((2,), 7.0, dtype=F64)
    values = frozen.clone(), trained.detach().clone()
    op = hypergrad.hessian(smooth, [frozen, trained], mode=mode)
    product = op @ [torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)]
    assert not frozen.requires_grad
    assert frozen.grad is None
    assert trained.requires_grad
    assert torch.equal(trained.grad, torch.full((2,), 7.0, dtype=F64))
    assert torch.equal(frozen, values[0])
    assert torch.equal(trained.detach(), values[1])
    assert not any(leaf.requires_grad for leaf in product)


@pytest.mark.parametrize("mode", MODES)
def test_works_under_no_grad(mode: Any) -> None:
    tree = [gaussian(3)]
    with torch.no_grad():
        op = hypergrad.hessian(smooth, tree, mode=mode)
        dense = op.to_dense()
    torch.testing.assert_close(dense, reference(smooth, tree), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_dtypes_keep_their_own(mode: Any) -> None:
    tree = {"single": gaussian(2).to(F32), "double": gaussian(2)}

    def loss(t: Any) -> Tensor:
        return (t["single"].double() * t["double"]).sum() ** 2 + (t["double"] ** 2).sum()

    op = hypergrad.hessian(loss, tree, mode=mode)
    product = op @ {"single": torch.ones(2), "double": torch.ones(2, dtype=F64)}
    assert product["single"].dtype == F32
    assert product["double"].dtype == F64
    wide = {name: leaf.double() for name, leaf in tree.items()}
    expected = reference(loss, wide) @ torch.ones(4, dtype=F64)
    # The rows of the float32 leaf are rounded once to it.
    torch.testing.assert_close(
        torch.cat([product["single"].double(), product["double"]]), expected, rtol=1e-6, atol=1e-6
    )


def test_modes_agree_on_blocks_of_vectors() -> None:
    model, params, x, y = mlp()
    modes: Any = MODES[1:]
    ops = [hypergrad.hessian(model_loss(model), params, x, y, mode=mode) for mode in modes]
    block = {name: gaussian(6, *p.shape, seed=i) for i, (name, p) in enumerate(params.items())}
    left, right = (op.matmat(block) for op in ops)
    for name in params:
        torch.testing.assert_close(left[name], right[name], rtol=1e-10, atol=1e-12)


def test_a_loss_of_one_entry_is_a_scalar() -> None:
    op = hypergrad.hessian(lambda p: (p**2).sum().reshape(1, 1), gaussian(2))
    assert torch.equal(op.to_dense(), 2 * torch.eye(2, dtype=F64))


def test_the_batch_reaches_the_loss() -> None:
    scale = torch.tensor([1.0, 4.0], dtype=F64)
    op = hypergrad.hessian(lambda p, s: (s * p**2).sum() / 2, gaussian(2), scale)
    assert torch.equal(op.to_dense(), torch.diag(scale))


def test_forward_mode_names_the_remedy_for_losses_it_cannot_differentiate() -> None:
    x, y = torch.randn(5, 3), torch.randn(5)
    operator = hypergrad.hessian(
        lambda w: torch.nn.functional.mse_loss(x @ w, y), torch.ones(3), mode="forward_over_reverse"
    )
    with pytest.raises(hypergrad.LossError, match='mode="reverse_over_reverse"'):
        operator @ torch.ones(3)


def test_inference_mode_is_refused_with_the_remedy() -> None:
    with torch.inference_mode():
        params = torch.ones(3)
    with pytest.raises(hypergrad.LossError, match="inference"):
        hypergrad.hessian(lambda w: (w**2).sum(), params)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_blocks_go_through_the_graph_at_once(chunk_size: int | None) -> None:
    model, params, x, y = mlp()
    op = hypergrad.hessian(model_loss(model), params, x, y, chunk_size=chunk_size)
    one_by_one = hypergrad.hessian(model_loss(model), params, x, y, mode="reverse_over_reverse")
    block = gaussian(10, op.layout.dim, seed=4)
    torch.testing.assert_close(op._apply(block), one_by_one._apply(block), rtol=1e-12, atol=1e-12)
    assert op.chosen(10)[1] > 1


def test_a_loss_that_vmap_cannot_batch_is_multiplied_one_by_one() -> None:
    class Square(torch.autograd.Function):
        """Looks at a value on the way back, which no vmap can."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return apply(Half, 2 * grad * x)

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x / 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2 if bool((grad < torch.inf).all()) else grad

    op = hypergrad.hessian(lambda p: apply(Square, p).sum(), gaussian(5))
    assert torch.equal(op.to_dense(), torch.eye(5, dtype=F64))
    assert op.chosen(5) == ("reverse_over_reverse", 1)


def test_leaves_that_products_do_not_reach_have_zeros_in_a_block_too() -> None:
    tree = {"a": gaussian(3), "b": gaussian(2)}
    op = hypergrad.hessian(lambda t: (t["a"] ** 2).sum() + t["b"].sum() ** 1, tree)
    assert torch.equal(op.to_dense(), torch.diag(torch.tensor([2.0] * 3 + [0.0] * 2, dtype=F64)))


def low_precision_problem(dtype: torch.dtype) -> tuple[Callable[..., Tensor], Any, Tensor, Tensor]:
    params = {"first": gaussian(12, 6, seed=1) / 3, "last": gaussian(6, seed=2) / 2}
    x, y = gaussian(20, 12, seed=3), gaussian(20, seed=4)
    params = {name: leaf.to(dtype) for name, leaf in params.items()}

    def loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (torch.tanh(x @ p["first"]) @ p["last"] - y).square().mean()

    return loss, params, x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_products_are_as_good_as_their_dtype(mode: Any, dtype: torch.dtype) -> None:
    loss, params, *batch = low_precision_problem(dtype)
    op = hypergrad.hessian(loss, params, *batch, mode=mode)
    wide = {name: leaf.double() for name, leaf in params.items()}
    reference = hypergrad.hessian(loss, wide, *[x.double() for x in batch])
    block = gaussian(5, op.layout.dim, seed=5).to(dtype)
    got, expected = op._apply(block), reference._apply(block.double())
    assert got.dtype == dtype
    # Some ten operations deep, each rounded once.
    error = float((got.double() - expected).norm() / expected.norm())
    assert error <= 20 * torch.finfo(dtype).eps


def test_recurrences_on_narrow_products_are_wider() -> None:
    loss, params, *batch = low_precision_problem(torch.bfloat16)
    op = hypergrad.hessian(loss, params, *batch)
    v = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    damping = 1.0
    solution = hypergrad.solve(op, v, hypergrad.CG(rtol=1e-2), damping=damping)
    assert solution.info.converged
    assert solution.value["first"].dtype == torch.bfloat16
    sketch = hypergrad.nystrom_sketch(op, 3, damping=damping)
    assert sketch.eigenvalues.dtype == F32


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_subset_of_the_parameters(mode: Any, frozen: bool) -> None:
    model, params, x, y = mlp()
    loss = model_loss(model)
    if frozen:
        model.requires_grad_(False)
    whole = hypergrad.hessian(loss, params, x, y).to_dense()
    head = {name: p for name, p in params.items() if name.startswith("2.")}
    op = hypergrad.hessian(loss, head, x, y, mode=mode)
    count = sum(p.numel() for p in head.values())
    assert op.shape == (count, count)
    torch.testing.assert_close(op.to_dense(), whole[-count:, -count:], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_an_adapter_of_low_rank() -> None:
    model, params, x, y = mlp()
    model.requires_grad_(False)
    adapter = {"down": gaussian(1, 3, seed=6), "up": gaussian(5, 1, seed=7)}

    def loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
        tuned = {"0.weight": params["0.weight"] + p["up"] @ p["down"]}
        return ((torch.func.functional_call(model, tuned, x) - y) ** 2).mean()

    got = hypergrad.hessian(loss, adapter, x, y).to_dense()
    torch.testing.assert_close(got, reference(lambda t: loss(t, x, y), adapter))


def test_a_fault_of_the_loss_s_own_is_passed_on_in_forward_mode() -> None:
    calls = []

    def loss(w: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the disk with the images is gone")
        return (w**3).sum()

    operator = hypergrad.hessian(loss, torch.ones(2), mode="forward_over_reverse")
    with pytest.raises(RuntimeError, match="disk with the images"):
        operator @ torch.ones(2)
