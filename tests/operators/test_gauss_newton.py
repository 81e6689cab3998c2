from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvlinops.examples.functorch import functorch_ggn
from hypothesis import given
from torch import Tensor

import hypergrad
from tests.operators import networks
from tests.strategies import (
    DTYPES,
    F32,
    F64,
    flat,
    gaussian,
    quick_and_thorough,
    relative_error,
    tree_like,
    trees,
)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets.abs().softmax(1))


def linear(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).sum()


def nonconvex(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.sin(outputs * targets).sum()


LOSSES = (squared, cross_entropy, linear, nonconvex)


def reference(
    model_fn: Callable[[Any], Tensor], loss_fn: Callable[[Tensor], Tensor], tree: Any
) -> Tensor:
    """J'HJ with dense J and H."""
    point = flat(tree)

    def outputs(vector: Tensor) -> Tensor:
        return model_fn(tree_like(tree, vector))

    value = outputs(point)
    jacobian = torch.func.jacrev(outputs)(point).reshape(value.numel(), -1)
    inner = torch.func.hessian(loss_fn)(value).reshape(value.numel(), value.numel())
    return jacobian.T @ inner @ jacobian


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_network_ggn_is_jacobian_hessian_jacobian(loss_fn: Any, chunk_size: int | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = gaussian(5, 3, seed=1), gaussian(5, 3, seed=2)

    def call(p: Any, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, inputs)

    op = hypergrad.ggn(call, loss_fn, params, x, y, chunk_size=chunk_size)
    expected = reference(lambda p: call(p, x), lambda out: loss_fn(out, y), params)
    size = float(expected.abs().max())
    torch.testing.assert_close(op.to_dense(), expected, rtol=0, atol=1e-10 * size)
    v = {name: gaussian(*p.shape, seed=i) for i, (name, p) in enumerate(params.items())}
    torch.testing.assert_close(flat(op @ v), expected @ flat(v), rtol=0, atol=1e-10 * (size + 1))


@quick_and_thorough
@given(tree=trees())
def test_ggn_over_any_tree(effort: str, tree: Any) -> None:
    weights = gaussian(4, len(flat(tree)), seed=1)

    def model_fn(params: Any, scale: Tensor) -> Tensor:
        return torch.tanh(scale * (weights @ flat(params)))

    scale = torch.tensor(0.7, dtype=F64)
    targets = gaussian(4, seed=2)
    got = hypergrad.ggn(model_fn, squared, tree, scale, targets).to_dense()
    expected = reference(lambda p: model_fn(p, scale), lambda out: squared(out, targets), tree)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * (float(expected.norm()) + 1e-3))


def test_a_convex_loss_gives_no_negative_curvature() -> None:
    targets, inputs = gaussian(6, seed=1), gaussian(6, 4, seed=2)
    params = gaussian(4, seed=3)

    def model_fn(p: Tensor, x: Tensor) -> Tensor:
        return torch.sin(3 * (x @ p))

    full = hypergrad.hessian(lambda p: squared(model_fn(p, inputs), targets), params).to_dense()
    assert float(torch.linalg.eigvalsh(full)[0]) < -0.1  # or the test would show nothing
    dense = hypergrad.ggn(model_fn, squared, params, inputs, targets).to_dense()
    values = torch.linalg.eigvalsh(0.5 * (dense + dense.T))
    assert float(values[0]) >= -1e-13 * float(values[-1])


def test_of_a_linear_model_it_is_the_hessian() -> None:
    inputs, targets = gaussian(6, 3, seed=2), gaussian(6, seed=1)
    params = gaussian(3, seed=3)

    def model_fn(p: Tensor, x: Tensor) -> Tensor:
        return x @ p

    got = hypergrad.ggn(model_fn, squared, params, inputs, targets).to_dense()
    torch.testing.assert_close(got, inputs.T @ inputs / 3, rtol=1e-12, atol=1e-12)


def test_caller_is_untouched_and_no_grad_does_not_matter() -> None:
    params = gaussian(3).requires_grad_()
    inputs, targets = gaussian(6, 3, seed=2), gaussian(6, seed=1)
    with torch.no_grad():
        op = hypergrad.ggn(lambda p, x: x @ p, squared, params, inputs, targets)
        product = op @ torch.ones(3, dtype=F64)
    assert params.grad is None
    assert params.requires_grad
    assert not product.requires_grad
    expected = inputs.T @ inputs @ torch.ones(3, dtype=F64) / 3
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def test_params_modified_in_place_make_the_operator_stale() -> None:
    params = {"w": gaussian(3)}
    op = hypergrad.ggn(
        lambda p, x: x @ p["w"], squared, params, gaussian(6, 3, seed=2), gaussian(6, seed=1)
    )
    params["w"].mul_(2.0)
    with pytest.raises(hypergrad.StaleOperatorError, match=r"params\['w'\] was modified in place"):
        op @ {"w": torch.ones(3, dtype=F64)}


def test_a_model_that_ignores_params_is_refused() -> None:
    model = torch.nn.Linear(3, 1).double()
    params = dict(model.named_parameters())
    with pytest.raises(hypergrad.LossError, match="functional_call"):
        hypergrad.ggn(
            lambda p, x: model(x), squared, params, gaussian(6, 3), gaussian(6, 1, seed=1)
        )


def test_an_unused_leaf_is_reported_and_has_zero_rows() -> None:
    tree = {"used": gaussian(2), "unused": gaussian(1)}
    inputs, targets = gaussian(4, 2, seed=1), gaussian(4, seed=2)
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['unused'\]") as caught:
        op = hypergrad.ggn(lambda p, x: x @ p["used"], squared, tree, inputs, targets)
    assert caught[0].filename == __file__
    assert torch.equal(op.to_dense()[2], torch.zeros(3, dtype=F64))
    assert float(op.to_dense()[0, 0]) > 0


#: Relative to the largest entry.
AGREEMENT = {F64: 1e-10, F32: 1e-4}


def assert_agrees(got: Tensor, expected: Tensor, dtype: torch.dtype = F64) -> None:
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(got.to(F64), expected, rtol=0, atol=AGREEMENT[dtype] * size)


def ggn_of(made: networks.Case, **options: Any) -> hypergrad.GaussNewtonOperator:
    return hypergrad.ggn(
        made.model_fn, made.loss_fn, made.params, made.inputs, made.targets, **options
    )


def dense_ggn(made: networks.Case) -> Tensor:
    return reference(
        lambda p: made.model_fn(p, made.inputs),
        lambda out: made.loss_fn(out, made.targets),
        made.params,
    )


class OfList(torch.nn.Module):
    """What curvlinops calls: a loss of outputs and targets."""

    def __init__(self, made: networks.Case) -> None:
        super().__init__()
        self.made = made

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.made.loss_fn(outputs, targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", networks.NAMES)
def test_networks_agree_with_the_dense_matrix(name: str, dtype: torch.dtype) -> None:
    expected = dense_ggn(networks.case(name))
    op = ggn_of(networks.case(name, dtype), check_convex=True)
    assert_agrees(op.to_dense(), expected, dtype)
    factor = op._factor()
    assert len(factor) <= op.num_rows
    assert_agrees((factor.T @ factor), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp, squared", "mlp, classes"])
def test_narrow_dtypes_agree_to_their_rounding(name: str, dtype: torch.dtype) -> None:
    expected = dense_ggn(networks.case(name))
    op = ggn_of(networks.case(name, dtype))
    rounding = 8 * torch.finfo(dtype).eps
    assert relative_error(op.to_dense(), expected) <= rounding
    factor = op._factor().to(F64)  # its sums are wider
    assert relative_error(factor.T @ factor, expected) <= rounding


@pytest.mark.parametrize(
    "name", ["mlp, squared", "mlp, classes", "cnn, classes", "lstm, classes", "pixels, classes"]
)
def test_networks_agree_with_the_reference_of_curvlinops(name: str) -> None:
    made = networks.case(name)
    params = list(made.module.parameters())
    theirs = functorch_ggn(made.module, OfList(made), params, [(made.inputs, made.targets)])
    assert_agrees(ggn_of(made).to_dense(), theirs.detach())


@pytest.mark.parametrize("name", ["mlp, classes", "mlp, coupled", "transformer, positions"])
def test_rows_of_single_samples_are_those_of_the_batch(name: str) -> None:
    op = ggn_of(networks.case(name))
    built = op._build()
    roots = op._roots(built.outputs)
    whole = op._rows(built.outputs, built.pull_back, roots)
    alone = op._rows_by_sample(roots)
    if name == "mlp, coupled":  # one group: there is no sample by itself
        assert len(roots) == 1
        assert alone is None
    else:
        assert alone is not None
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-14)


def test_softmax_needs_a_row_less_than_classes() -> None:
    op = ggn_of(networks.case("mlp, classes"))
    assert len(op._factor()) == 5 * 2
    assert op.num_rows == 5 * 3


def test_samples_that_the_model_couples_are_not_taken_apart() -> None:
    made = networks.case("mlp, squared")
    norm = torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False).double()

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return made.model_fn(p, norm(x + p["0.bias"][:3]))

    op = hypergrad.ggn(model_fn, made.loss_fn, made.params, made.inputs, made.targets)
    assert op._rows_by_sample(op._roots(op.outputs)) is None
    expected = reference(
        lambda p: model_fn(p, made.inputs),
        lambda out: made.loss_fn(out, made.targets),
        made.params,
    )
    assert_agrees(op._factor().T @ op._factor(), expected)


def test_a_loss_that_is_not_convex_is_refused_on_request() -> None:
    made = networks.case("mlp, squared")
    batch = (made.model_fn, nonconvex, made.params, made.inputs, made.targets)
    op = hypergrad.ggn(*batch)  # as such it is J'HJ
    with pytest.raises(hypergrad.NegativeCurvatureError, match=r"not convex .* \(sample \d\)"):
        hypergrad.ggn(*batch, check_convex=True)
    with pytest.raises(hypergrad.NegativeCurvatureError, match="no factor F'F"):
        hypergrad.solve(op, made.params, hypergrad.Gram(), damping=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sure", [1.0, 10.0, 20.0, 30.0, 45.0, 1000.0])
def test_a_softmax_that_is_sure_is_convex(dtype: torch.dtype, sure: float) -> None:
    inputs = torch.eye(3, dtype=dtype).repeat(2, 1)
    op = hypergrad.ggn(
        lambda p, x: x @ p,
        networks.cross_entropy,
        sure * torch.eye(3, dtype=dtype),
        inputs,
        torch.arange(3).repeat(2),
        check_convex=True,
    )
    rounding = 10 * torch.finfo(dtype).eps
    assert float(torch.linalg.eigvalsh(op.to_dense().to(F64))[0]) >= -rounding
    factor = op._factor().to(F64)
    torch.testing.assert_close(factor.T @ factor, op.to_dense().to(F64), rtol=0, atol=rounding)


class ReverseOnly(torch.autograd.Function):
    """The square, without a forward-mode derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_an_operation_without_forward_mode_is_named_with_the_remedy() -> None:
    def model_fn(p: Tensor, x: Tensor) -> Tensor:
        return x @ ReverseOnly.apply(p)  # type: ignore[no-untyped-call]

    op = hypergrad.ggn(model_fn, squared, gaussian(3), gaussian(4, 3), gaussian(4))
    with pytest.raises(hypergrad.LossError, match=r"forward-mode derivative .* give it a jvp"):
        op @ gaussian(3)


def test_a_batch_modified_in_place_makes_the_operator_stale() -> None:
    x, p = torch.ones(4, 3), torch.ones(3)
    op = hypergrad.ggn(lambda p, x: (x @ p).tanh(), lambda out: out.square().sum(), p, x)
    op @ p
    x.mul_(2.0)
    with pytest.raises(hypergrad.StaleOperatorError, match=r"tensor of the batch, of shape \(4, 3"):
        op @ p
