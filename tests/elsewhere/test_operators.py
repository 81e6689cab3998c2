"""Operators on another device: the same products, there, wherever their data is at first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import curvlinops
import linear_operator.operators
import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import hypergrad
from tests.elsewhere.device import WIDE, move
from tests.elsewhere.problems import (
    DTYPES,
    MATRIX,
    PARAMS,
    N,
    V,
    X,
    Y,
    assert_same,
    compare,
    compare_errors,
    gaussian,
    loss,
    model,
    seeded,
    squares,
    stay,
    without_forward_mode,
)

LABELS = torch.arange(20) % 3


def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"] + params["b"]) * params["u"].T


def dropping(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """A loss that draws random numbers on the device."""
    return loss(params, torch.nn.functional.dropout(x, 0.3), y)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=6, **options)


def shuffled() -> DataLoader[Any]:
    return loader(shuffle=True, generator=seeded())


def network(to: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(layer, name, torch.nn.Parameter(to(parameter.detach())))
    return module


def kfac(to: Any, **options: Any) -> Any:
    module = network(to)
    return hypergrad.kfac(
        module, torch.nn.MSELoss(), dict(module.named_parameters()), [to((X, Y))], **options
    )


def multiply(to: Any) -> Callable[[Tensor], Tensor]:
    a = to(MATRIX)
    return lambda v: a @ v


def h(to: Any, **options: Any) -> Any:
    return hypergrad.hessian(loss, *to((PARAMS, X, Y)), **options)


def g(to: Any, **options: Any) -> Any:
    return hypergrad.ggn(model, squares, *to((PARAMS, X, Y)), **options)


def fisher(to: Any, likelihood: Any, function: Any = model, **options: Any) -> Any:
    return hypergrad.fisher(function, *to((PARAMS, X)), likelihood=likelihood, **options)


def plain(outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    return outputs.detach().sign()


def of_vector(to: Any, obj: Any) -> Any:
    return hypergrad.as_operator(obj, like=to(V))


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "matrix": lambda to: hypergrad.as_operator(to(MATRIX)),
    "callable": lambda to: of_vector(to, multiply(to)),
    "callable, batchable": lambda to: hypergrad.as_operator(
        multiply(to), like=to(V), batchable=True
    ),
    "scipy": lambda to: of_vector(to, scipy.sparse.csr_array(MATRIX.numpy())),
    "numpy": lambda to: of_vector(to, to(MATRIX) if to is move else MATRIX.numpy()),
    "linear_operator": lambda to: hypergrad.as_operator(
        linear_operator.operators.DenseLinearOperator(to(MATRIX))
    ),
    "curvlinops": lambda to: hypergrad.as_operator(
        curvlinops.HessianLinearOperator(
            (module := network(to)), torch.nn.MSELoss(), list(module.parameters()),
            [to((X, Y))], check_deterministic=False,
        )
    ),
    "sum": lambda to: of_vector(to, multiply(to)) + 0.5 * hypergrad.as_operator(to(MATRIX)),
    "multiple, shift": lambda to: to(torch.tensor(2.0)) * hypergrad.as_operator(to(MATRIX)) + 0.1,
    "hessian": h,
    "hessian, reverse": lambda to: h(to, mode="reverse_over_reverse"),
    "hessian, forward": lambda to: h(to, mode="forward_over_reverse"),
    "hessian, chunks": lambda to: h(to, chunk_size=2),
    "hessian, dropout": lambda to: hypergrad.hessian(dropping, *to((PARAMS, X, Y))),
    "ggn": g,
    "ggn, convex": lambda to: g(to, check_convex=True),
    "ggn, chunks": lambda to: g(to, chunk_size=3),
    "ggn, classes": lambda to: hypergrad.ggn(
        logits, torch.nn.functional.cross_entropy, *to((PARAMS, X, LABELS))
    ),
    "fisher, gaussian": lambda to: fisher(to, "gaussian"),
    "fisher, bernoulli": lambda to: fisher(to, "bernoulli", generator=seeded(), num_samples=3),
    "fisher, categorical": lambda to: fisher(to, "categorical", logits),
    "fisher, categorical, seeded": lambda to: fisher(
        to, "categorical", logits, generator=seeded(), num_samples=2
    ),
    "fisher, distribution": lambda to: fisher(to, lambda out: torch.distributions.Normal(out, 1.0)),
    "fisher, distribution, seeded": lambda to: fisher(
        to, lambda out: torch.distributions.Normal(out, 1.0), generator=seeded()
    ),
    "fisher, sampler": lambda to: fisher(to, (plain, lambda out, y: (out - y) ** 2)),
    "empirical": lambda to: hypergrad.empirical_fisher(
        model, lambda out, y: (out - y) ** 2, *to((PARAMS, X, Y))
    ),
    "minibatch, loader": lambda to: hypergrad.minibatch_hessian(loss, to(PARAMS), loader()),
    "minibatch, shuffled": lambda to: hypergrad.minibatch_hessian(loss, to(PARAMS), shuffled()),
    "minibatch, there": lambda to: hypergrad.minibatch_hessian(
        loss, to(PARAMS), [to((X[:5], Y[:5])), to((X[5:], Y[5:]))]
    ),
    "minibatch, dropout": lambda to: hypergrad.minibatch_hessian(dropping, to(PARAMS), loader()),
    "minibatch, ggn": lambda to: hypergrad.minibatch_ggn(
        model, squares, to(PARAMS), lambda: iter(loader())
    ),
    "sampled": lambda to: hypergrad.SampledOperator(
        to([MATRIX, 2.0 * MATRIX]), weights=[1.0, 3.0], generator=seeded()
    ),
    "sampled, weights": lambda to: hypergrad.SampledOperator(
        to([MATRIX, 2.0 * MATRIX]), weights=to(torch.tensor([1.0, 3.0]))
    ),
    "sampled, loader": lambda to: hypergrad.minibatch_hessian(
        loss, to(PARAMS), loader()
    ).sampled(generator=seeded()),
    "sampled, mean": lambda to: hypergrad.SampledOperator(to([MATRIX, 2.0 * MATRIX])).mean,
    "blocks": lambda to: hypergrad.block_diagonal(h(to) + 2.0),
    "blocks, leaves": lambda to: hypergrad.block_diagonal(g(to) + 1.0, by="leaf"),
    "kfac": kfac,
    "ekfac, sampled": lambda to: kfac(
        to, eigenvalue_corrected=True, fisher="sampled", generator=seeded()
    ),
    "rows": lambda to: hypergrad.root_operator(to({"w": gaussian(5, 3, 2), "b": gaussian(5, 3)})),
}  # fmt: skip
OPERATORS = without_forward_mode(OPERATORS, "hessian, forward")


def like(operator: Any, *batch: int) -> Any:
    """The same random tree for an operator here and for one there."""
    whole = gaussian(*batch, operator.shape[0], seed=6)
    leaves = torch.split(whole, [s.numel() for s in operator.layout.shapes], -1)
    shaped = [
        x.reshape(*batch, *s).to(operator.device, dtype)
        for x, s, dtype in zip(leaves, operator.layout.shapes, operator.layout.dtypes, strict=True)
    ]
    return operator.layout.unflatten_leaves(shaped)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
def test_products_and_their_transposes(make: Any) -> None:
    def products(to: Any) -> Any:
        a = make(to)
        return a @ like(a), a.matmat(like(a, 3))

    compare(products)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
def test_dense_matrices_and_exports(make: Any) -> None:
    """The matrix is there; SciPy's operator takes and gives arrays of the CPU."""
    compare(lambda to: make(to).to_dense())
    found = []
    for to in (stay, move):
        torch.manual_seed(0)
        theirs = make(to).to_scipy()
        found.append(theirs @ np.ones(theirs.shape[0]))
    assert isinstance(found[1], np.ndarray)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


EXPORTED = ["matrix", "hessian", "ggn", "minibatch, loader", "minibatch, shuffled", "sum"]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of linear_operator
def test_export_to_linear_operator(name: str) -> None:
    def exported(to: Any) -> Any:
        theirs = hypergrad.to_linear_operator(OPERATORS[name](to) + 1.0)
        assert theirs.device == to(V).device
        rhs = to(gaussian(theirs.shape[0], 2))
        return theirs @ rhs, theirs.to_dense(), theirs.solve(rhs), theirs.diagonal()

    compare(exported, rtol=1e-4)


SYMMETRIC = [name for name in OPERATORS if not name.startswith("sampled") or name.endswith("mean")]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetry_is_checked_there(name: str) -> None:
    hypergrad.check_symmetric(OPERATORS[name](move))
    hypergrad.check_symmetric(OPERATORS[name](move), generator=seeded(), num_pairs=1)


def test_what_is_not_symmetric_is_told_as_on_the_cpu() -> None:
    def check(to: Any) -> None:
        hypergrad.check_symmetric(to(gaussian(N, N)))

    def check_block(to: Any) -> None:
        hypergrad.block_diagonal(to(gaussian(N, N))).preconditioner(50.0)

    compare_errors(check, hypergrad.NotSymmetricError)
    compare_errors(check_block, hypergrad.NotSymmetricError)


@pytest.mark.parametrize("name", ["blocks", "blocks, leaves", "kfac", "ekfac, sampled"])
def test_inverses_and_blocks(name: str) -> None:
    def inverses(to: Any) -> Any:
        a = OPERATORS[name](to)
        found = [a.solve(like(a), 0.5), a.preconditioner(0.5).matmat(like(a, 2))]
        found.append(
            hypergrad.solve(
                a, like(a), hypergrad.CG(preconditioner=a.preconditioner(0.5)), damping=0.5
            ).value
        )
        return found, a.dense_blocks() if name.startswith("blocks") else None

    compare(inverses)


def test_negative_curvature_of_a_block_is_told_as_on_the_cpu() -> None:
    compare_errors(
        lambda to: hypergrad.block_diagonal(-hypergrad.as_operator(to(MATRIX))).preconditioner(0.1),
        hypergrad.NegativeCurvatureError,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_leaves(dtype: torch.dtype) -> None:
    """Mixed ones too, and a solve carried in a wider dtype than theirs."""

    def solved(to: Any) -> Any:
        params, x, y = to(({k: p.to(dtype) for k, p in PARAMS.items()}, X.to(dtype), Y.to(dtype)))
        a = hypergrad.hessian(loss, params, x, y)
        return a @ params, hypergrad.solve(a, params, hypergrad.CG(rtol=1e-1), damping=1.0).value

    def mixed(to: Any) -> Any:
        params = to({**PARAMS, "u": PARAMS["u"].to(dtype)})

        def widened(p: Any, x: Tensor, y: Tensor) -> Tensor:
            return loss({k: q.to(torch.float64) for k, q in p.items()}, x.double(), y.double())

        return hypergrad.hessian(widened, params, *to((X, Y))) @ params

    rounding = torch.finfo(dtype).eps
    compare(solved, rtol=max(10 * rounding, 1e-5))
    if WIDE:
        compare(mixed, rtol=max(2 * rounding, 1e-5))


def test_data_that_stayed_behind_is_told() -> None:
    """Tensors given by hand are not moved: the place that they have is an error, and says so."""
    for build in (
        lambda: hypergrad.hessian(loss, move(PARAMS), X, Y),
        lambda: hypergrad.ggn(model, squares, move(PARAMS), X, Y),
    ):
        with pytest.raises(RuntimeError, match="device"):
            build() @ move(PARAMS)
    with pytest.raises(hypergrad.DeviceError):
        h(move) @ PARAMS
    with pytest.raises(hypergrad.DeviceError):
        hypergrad.as_operator(MATRIX, like=move(V))
    with pytest.raises(hypergrad.DeviceError):
        hypergrad.hessian(loss, {**PARAMS, "b": move(PARAMS["b"])}, X, Y)
    with pytest.raises(hypergrad.HypergradError):
        hypergrad.as_operator(MATRIX) + hypergrad.as_operator(move(MATRIX))


def test_the_random_numbers_of_a_loss_there_are_put_back() -> None:
    a = hypergrad.hessian(dropping, *move((PARAMS, X, Y)))
    first = a @ move(PARAMS)
    state = torch.get_rng_state()
    again = a @ move(PARAMS)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same({name: p.cpu() for name, p in first.items()}, again)
