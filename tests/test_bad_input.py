"""Each bad input has a named error that says what was got, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

import hypergrad as hg
from tests.strategies import SOLVERS, gaussian

F32, F64 = torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
ONES = torch.ones(3)
EYE = torch.eye(3)
TREE = {"a": torch.ones(3), "b": torch.ones(2)}
every_solver = pytest.mark.parametrize("name", SOLVERS)


def identity(v: Any) -> Any:
    return v


def returns(value: Any) -> Any:
    return lambda *args: value


def squares(tree: Any) -> Tensor:
    return (tree["a"] ** 2).sum() + (tree["b"] ** 2).sum()


def model_loss(params: Any) -> Tensor:
    own = torch.nn.Linear(3, 1)
    return own(ONES).sum()


#: name: (call, error, message).
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # The right-hand side.
    "empty dict": (lambda: hg.cg_ihvp(identity, {}), hg.EmptyTreeError, "v has no leaves"),
    "empty list": (lambda: hg.cg_ihvp(identity, []), hg.EmptyTreeError, "at least one tensor"),
    "no entries": (
        lambda: hg.cg_ihvp(identity, torch.zeros(0, 2)), hg.EmptyTreeError, "no entries",
    ),
    "integer leaf": (
        lambda: hg.cg_ihvp(identity, {"a": torch.ones(2), "n": torch.arange(2)}),
        hg.LeafTypeError, r"v\['n'\] has dtype torch.int64.*Convert it",
    ),
    "bool": (lambda: hg.cg_ihvp(identity, ONES > 0), hg.LeafTypeError, r"dtype torch\.bool"),
    "complex": (
        lambda: hg.cg_ihvp(identity, ONES.to(torch.complex64)), hg.LeafTypeError,
        "complex64, expected a real",
    ),
    "string": (lambda: hg.cg_ihvp(identity, "v"), hg.LeafTypeError, "v is a str"),
    "None": (lambda: hg.cg_ihvp(identity, None), hg.LeafTypeError, "v is a NoneType"),
    "number": (lambda: hg.cg_ihvp(identity, [1.0]), hg.LeafTypeError, r"v\[0\] is a float"),
    "array": (lambda: hg.cg_ihvp(identity, np.ones(3)), hg.LeafTypeError, "v is a ndarray"),
    "module": (
        lambda: hg.cg_ihvp(identity, torch.nn.Linear(2, 1)), hg.LeafTypeError,
        "functional_call",
    ),
    "two devices": (
        lambda: hg.cg_ihvp(identity, {"a": ONES, "b": torch.ones(2, device="meta")}),
        hg.DeviceError, "several devices.*on cpu.*on meta",
    ),
    "wrong keys": (
        lambda: hg.solve(hg.hessian(squares, TREE), {"a": ONES, "c": torch.ones(2)}),
        hg.TreeStructureError, r"missing \['b'\], unexpected \['c'\]",
    ),
    "missing key": (
        lambda: hg.solve(hg.hessian(squares, TREE), {"a": ONES}),
        hg.TreeStructureError, r"missing \['b'\], unexpected nothing",
    ),
    "tensor for a tree": (
        lambda: hg.solve(hg.hessian(squares, TREE), ONES), hg.TreeStructureError, "missing",
    ),
    "wrong shape": (
        lambda: hg.solve(hg.hessian(squares, TREE), {"a": ONES, "b": torch.ones(2, 1)}),
        hg.TreeStructureError, r"\['b'\] has shape \(2, 1\), expected \(2,\)",
    ),
    "wrong dtype": (
        lambda: hg.solve(hg.hessian(squares, TREE), {"a": ONES, "b": torch.ones(2, dtype=F64)}),
        hg.LeafTypeError, r"\['b'\] has dtype torch.float64, expected torch.float32",
    ),
    "wrong device": (
        lambda: hg.solve(
            hg.hessian(squares, TREE), {k: x.to("meta") for k, x in TREE.items()}
        ),
        hg.DeviceError, "is on meta, expected cpu",
    ),
    "matrix on another device": (
        lambda: hg.solve(EYE, torch.ones(3, device="meta")), hg.DeviceError,
        "the matrix is on cpu, but v is on meta",
    ),
    "x0 of another shape": (
        lambda: hg.cg_ihvp(EYE, ONES, x0=torch.ones(2)), hg.TreeStructureError, "x0 has shape",
    ),
    "x0 of another dtype": (
        lambda: hg.cg_ihvp(EYE, ONES, x0=ONES.double()), hg.LeafTypeError, "x0 has dtype",
    ),
    "x0 of another batch": (
        lambda: hg.solve(EYE, torch.ones(4, 3), x0=torch.ones(2, 3), batched=True),
        hg.TreeStructureError, "x0 stacks 2 trees, but v stacks 4",
    ),
    "x0 with nan": (lambda: hg.cg_ihvp(EYE, ONES, x0=ONES * NAN), hg.NonFiniteError, "x0 holds"),
    "batched 0-d": (
        lambda: hg.solve(EYE, torch.tensor(1.0), batched=True), hg.TreeStructureError,
        "same leading size",
    ),
    "ragged batch": (
        lambda: hg.solve(
            identity, {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}, batched=True
        ),
        hg.TreeStructureError, r"\['a'\]: \(2, 3\), \['b'\]: \(3, 2\)",
    ),
    "empty batch": (
        lambda: hg.solve(EYE, torch.ones(0, 3), batched=True), hg.EmptyTreeError,
        "zero right-hand sides",
    ),
    "forgotten batched": (
        lambda: hg.solve(EYE, torch.ones(4, 3)), hg.TreeStructureError, "12 entries",
    ),
    # The operator.
    "hvp gives None for a tree": (
        lambda: hg.cg_ihvp(lambda v: None, TREE), hg.LeafTypeError,
        "the output of hvp_fn is a NoneType",
    ),
    "hvp gives None": (
        lambda: hg.cg_ihvp(lambda v: None, ONES), hg.LeafTypeError,
        "the output of hvp_fn is a NoneType",
    ),
    "hvp gives a number": (
        lambda: hg.cg_ihvp(lambda v: 1.0, ONES), hg.LeafTypeError, "hvp_fn is a float",
    ),
    "hvp gives another structure": (
        lambda: hg.cg_ihvp(lambda v: v["a"], TREE), hg.TreeStructureError,
        "the output of hvp_fn has another structure",
    ),
    "hvp gives another shape": (
        lambda: hg.cg_ihvp(lambda v: v[:2], ONES), hg.TreeStructureError,
        r"hvp_fn has shape \(2,\), expected \(3,\)",
    ),
    "hvp gives a matrix": (
        lambda: hg.nystrom_ihvp(lambda v: v[:, None], ONES, rank=1), hg.TreeStructureError,
        r"shape \(3, 1\)",
    ),
    "hvp gives another dtype": (
        lambda: hg.cg_ihvp(lambda v: v.double(), ONES), hg.LeafTypeError,
        "hvp_fn has dtype torch.float64, expected torch.float32",
    ),
    "hvp gives another device": (
        lambda: hg.cg_ihvp(lambda v: v.to("meta"), ONES), hg.DeviceError, "is on meta",
    ),
    "operator of unknown kind": (
        lambda: hg.solve("A", ONES), hg.LeafTypeError, "cannot make an operator of a str",
    ),
    "operator None": (lambda: hg.solve(None, ONES), hg.LeafTypeError, "of a NoneType"),
    "operator a module": (
        lambda: hg.solve(torch.nn.Linear(3, 3), ONES), hg.LeafTypeError, r"use hypergrad\.hessian",
    ),
    "matrix not square": (
        lambda: hg.solve(torch.ones(3, 2), ONES), hg.TreeStructureError, "not square",
    ),
    "vector for a matrix": (lambda: hg.solve(ONES, ONES), hg.TreeStructureError, "not square"),
    "0-d for a matrix": (
        lambda: hg.solve(torch.tensor(2.0), ONES), hg.TreeStructureError, "not square",
    ),
    "sparse not square": (
        lambda: hg.as_operator(scipy.sparse.eye_array(3, 4)), hg.TreeStructureError, "not square",
    ),
    "matrix of another size": (
        lambda: hg.solve(torch.eye(4), ONES), hg.TreeStructureError, "v, which has 3 entries",
    ),
    "matrix of another dtype": (
        lambda: hg.solve(EYE.double(), ONES), hg.LeafTypeError, r"but v has torch\.float32",
    ),
    "integer matrix": (
        lambda: hg.solve(torch.eye(3, dtype=torch.int64), ONES), hg.LeafTypeError, "int64",
    ),
    "complex matrix": (
        lambda: hg.solve(EYE.to(torch.complex64), ONES), hg.LeafTypeError, "complex64",
    ),
    "complex sparse matrix": (
        lambda: hg.as_operator(scipy.sparse.eye_array(3, dtype=complex)), hg.LeafTypeError,
        "expected a real one",
    ),
    "callable without like": (
        lambda: hg.as_operator(identity), hg.TreeStructureError, "pass like=v",
    ),
    # Losses and params.
    "loss not scalar": (
        lambda: hg.hessian(lambda p: p**2, ONES), hg.LossError, r"shape \(3,\).*\.mean\(\)",
    ),
    "loss a number": (lambda: hg.hessian(returns(3.0), ONES), hg.LossError, "a float, expected"),
    "loss None": (lambda: hg.hessian(returns(None), ONES), hg.LossError, "a NoneType"),
    "loss complex": (
        lambda: hg.hessian(lambda p: (p * 1j).sum(), ONES), hg.LossError, "complex64",
    ),
    "loss integer": (
        lambda: hg.hessian(lambda p: (p > 0).sum(), ONES), hg.LossError, "int64",
    ),
    "loss detached": (
        lambda: hg.hessian(lambda p: (p**2).sum().detach(), ONES), hg.LossError,
        "does not depend on params",
    ),
    "loss of the model's own parameters": (
        lambda: hg.hessian(model_loss, ONES), hg.LossError, "functional_call",
    ),
    "loss not finite": (
        lambda: hg.hessian(lambda p: (p * INF).sum(), ONES), hg.NonFiniteError, "the loss is inf",
    ),
    "params with nan": (
        lambda: hg.hessian(lambda p: (p**2).sum(), ONES * NAN), hg.NonFiniteError, "is nan",
    ),
    "params empty": (
        lambda: hg.hessian(lambda p: torch.zeros(()), {}), hg.EmptyTreeError, "params has no",
    ),
    "params a module": (
        lambda: hg.hessian(lambda p: torch.zeros(()), torch.nn.Linear(2, 1)), hg.LeafTypeError,
        "functional_call",
    ),
    "a sparse embedding": (
        lambda: hg.hessian(
            lambda p: torch.nn.functional.embedding(
                torch.tensor([1]), p["weight"], sparse=True
            ).square().sum(),
            {"weight": torch.ones(3, 2)},
        ),
        hg.LossError, r"params\['weight'\] is sparse.*sparse=False",
    ),
    "a sparse embedding of an implicit solution": (
        lambda: hg.implicit(
            lambda w, y: torch.nn.functional.embedding(torch.tensor([1]), w, sparse=True).sum()
        )(returns(torch.ones(3, 2)))(None, ONES.clone().requires_grad_()),
        hg.LossError, "gradient of inner_loss.*sparse=False",
    ),
    "a sparse embedding of a single-loop method": (
        lambda: (soba := hg.SOBA(
            lambda w, y: torch.nn.functional.embedding(torch.tensor([1]), w, sparse=True).sum(),
            lambda w, y: w.sum(), inner_lr=0.1, outer_lr=0.1,
        )).step(soba.init(torch.ones(3, 2), ONES)),
        hg.LossError, "gradient of inner_loss.*sparse=False",
    ),
    "batch_size a number": (
        lambda: hg.minibatch_hessian(
            lambda p, x: (p * x).sum(), ONES, [(ONES,)], batch_size=16,  # type: ignore[arg-type]
        ),
        hg.SolverOptionError, "batch_size is 16, expected None or a function",
    ),
    "params a generator": (
        lambda: hg.hessian(lambda p: torch.zeros(()), torch.nn.Linear(2, 1).parameters()),
        hg.LeafTypeError, r"params is a generator.*named_parameters\(\)",
    ),
    "params integer": (
        lambda: hg.hessian(lambda p: p.sum(), torch.arange(3)), hg.LeafTypeError, "int64",
    ),
    "unknown mode": (
        lambda: hg.hessian(lambda p: (p**2).sum(), ONES, mode="backward"),  # type: ignore[arg-type]
        hg.SolverOptionError, "mode is 'backward', expected one of .*forward_over_reverse",
    ),
    "chunk_size zero": (
        lambda: hg.hessian(lambda p: (p**2).sum(), ONES, chunk_size=0), hg.SolverOptionError,
        "chunk_size is 0",
    ),
    "chunk_size a float": (
        lambda: hg.hessian(lambda p: (p**2).sum(), ONES, chunk_size=1.5),  # type: ignore[arg-type]
        hg.SolverOptionError, r"chunk_size is 1\.5",
    ),
    "ggn without inputs": (
        lambda: hg.ggn(lambda p: p, lambda out: out.sum(), ONES), hg.LossError,
        "at least the model's inputs",
    ),
    "ggn model not a tensor": (
        lambda: hg.ggn(returns((ONES,)), lambda out: out.sum(), ONES, ONES), hg.LossError,
        "model_fn returned a tuple",
    ),
    "ggn loss not scalar": (
        lambda: hg.ggn(lambda p, x: p * x, lambda out: out**2, ONES, ONES), hg.LossError,
        r"loss_fn returned \(3,\)",
    ),
    "ggn loss not finite": (
        lambda: hg.ggn(lambda p, x: p * x, lambda out: out.sum(), ONES * NAN, ONES),
        hg.NonFiniteError, "the loss is nan",
    ),
    # Options.
    "rank zero": (lambda: hg.nystrom_ihvp(EYE, ONES, rank=0), hg.RankError, "rank is 0"),
    "rank negative": (lambda: hg.Nystrom(-1), hg.RankError, "rank is -1"),
    "rank a float": (lambda: hg.Nystrom(2.0), hg.RankError, r"rank is 2\.0"),  # type: ignore[arg-type]
    "rank a bool": (lambda: hg.Nystrom(True), hg.RankError, "rank is True"),
    "rank over the dimension": (
        lambda: hg.nystrom_ihvp(EYE, ONES, rank=4), hg.RankError,
        "rank is 4, but the operator has dimension 3",
    ),
    "sketch rank over the dimension": (
        lambda: hg.nystrom_sketch(EYE, 4), hg.RankError, "expected 1 <= rank <= 3",
    ),
    "a preconditioner that returns nothing": (
        lambda: hg.cg_ihvp(EYE, ONES, preconditioner=returns(None)), hg.LeafTypeError,
        "the output of the preconditioner is a NoneType",
    ),
    "a preconditioner of another shape": (
        lambda: hg.cg_ihvp(EYE, ONES, preconditioner=returns(torch.ones(2))),
        hg.TreeStructureError, "the output of the preconditioner has shape",
    ),
    "damping negative": (
        lambda: hg.cg_ihvp(EYE, ONES, damping=-0.1), hg.DampingError, r"got -0\.1.*indefinite",
    ),
    "damping nan": (lambda: hg.exact_ihvp(EYE, ONES, damping=NAN), hg.DampingError, "got nan"),
    "damping inf": (lambda: hg.neumann_ihvp(EYE, ONES, damping=INF), hg.DampingError, "got inf"),
    "damping None for a verb": (
        lambda: hg.nystrom_ihvp(EYE, ONES, rank=1, damping=0.0), hg.DampingError,
        "Nyström needs a positive damping",
    ),
    "damping a typo": (
        lambda: hg.cg_ihvp(EYE, ONES, damping="Auto"), hg.DampingError, "got 'Auto'",  # type: ignore[arg-type]
    ),
    "damping a string of a number": (
        lambda: hg.cg_ihvp(EYE, ONES, damping="0.1"), hg.DampingError, r"got '0\.1'",  # type: ignore[arg-type]
    ),
    "damping a bool": (
        lambda: hg.cg_ihvp(EYE, ONES, damping=True), hg.DampingError, "got True",
    ),
    "damping of each entry": (
        lambda: hg.cg_ihvp(EYE, ONES, damping=ONES), hg.DampingError,  # type: ignore[arg-type]
        r"one number, got a tensor of shape \(3,\)",
    ),
    "damping complex": (
        lambda: hg.cg_ihvp(EYE, ONES, damping=1j), hg.DampingError, "got 1j",  # type: ignore[arg-type]
    ),
    "damping of a sketch zero": (
        lambda: hg.nystrom_sketch(EYE, 1).solve(ONES, 0.0), hg.DampingError, "positive damping",
    ),
    "damping of a preconditioner zero": (
        lambda: hg.nystrom_sketch(EYE, 1).preconditioner(0.0), hg.DampingError, "positive damping",
    ),
    "rtol negative": (lambda: hg.CG(rtol=-1.0), hg.SolverOptionError, r"rtol is -1\.0"),
    "rtol nan": (lambda: hg.CG(rtol=NAN), hg.SolverOptionError, "rtol is nan"),
    "rtol a string": (lambda: hg.CG(rtol="x"), hg.SolverOptionError, "rtol is 'x'"),  # type: ignore[arg-type]
    "rtol a bool": (lambda: hg.CG(rtol=True), hg.SolverOptionError, "rtol is True"),
    "atol infinite": (lambda: hg.CG(atol=INF), hg.SolverOptionError, "atol is inf"),
    "max_iters zero": (lambda: hg.CG(max_iters=0), hg.SolverOptionError, "max_iters is 0"),
    "max_iters a float": (
        lambda: hg.CG(max_iters=3.0), hg.SolverOptionError, "an integer >= 1",  # type: ignore[arg-type]
    ),
    "no tolerance and no count": (
        lambda: hg.CG(rtol=0.0), hg.SolverOptionError, "a fixed number of iterations",
    ),
    "num_terms zero": (lambda: hg.Neumann(0), hg.SolverOptionError, "num_terms is 0"),
    "step_size zero": (lambda: hg.Neumann(step_size=0.0), hg.SolverOptionError, "step_size"),
    "step_size a typo": (
        lambda: hg.Neumann(step_size="Auto"), hg.SolverOptionError, "step_size is 'Auto'",  # type: ignore[arg-type]
    ),
    "max_bytes zero": (lambda: hg.Exact(max_bytes=0), hg.SolverOptionError, "max_bytes is 0"),
    "max_bytes a string": (
        lambda: hg.Exact(max_bytes="4GB"), hg.SolverOptionError, "max_bytes is '4GB'",  # type: ignore[arg-type]
    ),
    "unknown sketch": (
        lambda: hg.nystrom_ihvp(EYE, ONES, rank=1, sketch="gauss"),  # type: ignore[arg-type]
        hg.SolverOptionError, "sketch is 'gauss', expected one of .*gaussian.*columns",
    ),
    "unknown policy": (
        lambda: hg.Nystrom(1, negative_curvature="abs"),  # type: ignore[arg-type]
        hg.SolverOptionError, "negative_curvature is 'abs'.*absolute",
    ),
    "on_failure a typo": (
        lambda: hg.solve(EYE, ONES, on_failure="error"),  # type: ignore[arg-type]
        hg.SolverOptionError, "on_failure is 'error', expected one of .*raise.*warn.*ignore",
    ),
    "solver a class": (
        lambda: hg.solve(EYE, ONES, hg.CG),  # type: ignore[arg-type]
        hg.SolverOptionError, r"expected a configuration such as hypergrad\.CG\(\)",
    ),
    "solver a string": (
        lambda: hg.solve(EYE, ONES, "cg"), hg.SolverOptionError, "solver is 'cg'",  # type: ignore[arg-type]
    ),
    "num_steps zero": (
        lambda: hg.extreme_eigenvalues(hg.as_operator(EYE), num_steps=0), hg.SolverOptionError,
        "num_steps is 0",
    ),
    "num_steps a float": (
        lambda: hg.extreme_eigenvalues(hg.as_operator(EYE), num_steps=2.5),  # type: ignore[arg-type]
        hg.SolverOptionError, r"num_steps is 2\.5",
    ),
    # Hypergradients.
    "outer loss not scalar": (
        lambda: hg.hypergradient(lambda w, y: (w**2).sum(), lambda w, y: w * y, ONES, ONES),
        hg.LossError, "outer_loss has shape",
    ),
    "inner loss not scalar": (
        lambda: hg.hypergradient(lambda w, y: w * y, lambda w, y: w.sum(), ONES, ONES),
        hg.LossError, "inner_loss: the loss has shape",
    ),
    "inner loss nan": (
        lambda: hg.hypergradient(lambda w, y: (w * NAN).sum(), lambda w, y: w.sum(), ONES, ONES),
        hg.NonFiniteError, "inner_loss: the loss is nan",
    ),
    "a hypergradient in inference mode": (
        lambda: torch.inference_mode()(hg.hypergradient)(
            lambda w, y: (w**2).sum(), lambda w, y: w.sum(), ONES, ONES
        ),
        hg.LossError, "Leave inference mode",
    ),
    "inner_params of inference mode": (
        lambda: hg.hypergradient(
            lambda w, y: (w**2).sum(), lambda w, y: w.sum(), torch.inference_mode()(ONES.clone)(),
            ONES,
        ),
        hg.LossError, "clone",
    ),
    "outer loss of neither": (
        lambda: hg.hypergradient(
            lambda w, y: (w**2).sum(), lambda w, y: torch.tensor(1.0), ONES, ONES
        ),
        hg.LossError, "depends on neither inner_params nor outer_params",
    ),
    "outer loss a number": (
        lambda: hg.hypergradient(lambda w, y: (w**2).sum(), returns(1.0), ONES, ONES),
        hg.LossError, "outer_loss is a float",
    ),
    "inner loss without inner_params": (
        lambda: hg.hypergradient(lambda w, y: (y**2).sum(), lambda w, y: w.sum(), ONES, ONES),
        hg.LossError, "does not depend on params",
    ),
    "inner_params with nan": (
        lambda: hg.hypergradient(
            lambda w, y: (w**2).sum(), lambda w, y: w.sum(), ONES * NAN, ONES
        ),
        hg.NonFiniteError, "inner_params holds nan",
    ),
    "outer_params with inf": (
        lambda: hg.hypergradient(
            lambda w, y: (w**2).sum(), lambda w, y: w.sum(), ONES, ONES * INF
        ),
        hg.NonFiniteError, "outer_params holds nan or inf",
    ),
    "outer_params empty": (
        lambda: hg.hypergradient(lambda w, y: (w**2).sum(), lambda w, y: w.sum(), ONES, {}),
        hg.EmptyTreeError, "outer_params has no leaves",
    ),
    "levels on two devices": (
        lambda: hg.hypergradient(
            lambda w, y: (w**2).sum(), lambda w, y: w.sum(), ONES, ONES.to("meta")
        ),
        hg.DeviceError, "inner_params is on cpu, outer_params on meta",
    ),
    "x0 of another structure": (
        lambda: hg.hypergradient(
            lambda w, y: ((w - y) ** 2).sum(), lambda w, y: w.sum(), ONES, ONES, x0={"w": ONES}
        ),
        hg.TreeStructureError, "x0 has another structure",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_has_its_named_error_and_message(case: str) -> None:
    call, error, message = CASES[case]
    assert issubclass(error, hg.HypergradError)
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@every_solver
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["v", "x0", "output"])
def test_nothing_that_is_not_finite_passes(name: str, bad: float, where: str) -> None:
    poisoned = {"a": torch.ones(2), "b": torch.tensor([1.0, bad])}
    clean = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(hg.NonFiniteError, match=r"1 of 2 entries of leaf \['b'\]"):
        hg.solve(
            (lambda t: poisoned) if where == "output" else identity,
            poisoned if where == "v" else clean,
            SOLVERS[name](4),
            damping=0.5,
            x0=poisoned if where == "x0" else None,
            on_failure="ignore",
        )


@pytest.mark.parametrize("name", ["exact", "cg", "nystrom"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", ["random", "rotation", "triangular"])
def test_an_operator_that_is_not_symmetric_is_refused(
    name: str, dtype: torch.dtype, kind: str
) -> None:
    matrix = {
        "random": gaussian(8, 8, seed=1) + 6 * torch.eye(8, dtype=F64),
        "rotation": torch.linalg.qr(gaussian(8, 8, seed=1))[0] + 2 * torch.eye(8, dtype=F64),
        "triangular": torch.triu(gaussian(8, 8, seed=1).abs()) + torch.eye(8, dtype=F64),
    }[kind].to(dtype)
    with pytest.raises(hg.NotSymmetricError, match=r"antisymmetric part.*Common causes"):
        hg.solve(
            lambda v: matrix @ v, gaussian(8).to(dtype), SOLVERS[name](8), damping=0.5,
            on_failure="ignore",
        )  # fmt: skip


def test_rounding_is_not_taken_for_asymmetry() -> None:
    noise = 1e-6 * gaussian(8, 8, seed=2)
    matrix = (gaussian(8, 8, seed=1) @ gaussian(8, 8, seed=1).T + noise).to(F32)
    for make in SOLVERS.values():
        hg.solve(matrix, gaussian(8).to(F32), make(8), damping=1.0, on_failure="ignore")


def test_numpy_numbers_are_numbers() -> None:
    solver = hg.CG(rtol=np.float32(1e-3), max_iters=np.int64(7))  # type: ignore[arg-type]
    assert hg.solve(EYE, ONES, solver, damping=np.float64(1.0)).info.converged
    assert hg.Nystrom(np.int64(2)).rank == 2  # type: ignore[arg-type]
    assert hg.solve(EYE, ONES, damping=torch.tensor(1.0)).info.damping == 1.0


def test_every_error_is_also_the_builtin_that_a_reader_expects() -> None:
    assert issubclass(hg.TreeStructureError, ValueError)
    assert issubclass(hg.LeafTypeError, TypeError)
    assert issubclass(hg.NonFiniteError, ArithmeticError)
    assert issubclass(hg.ConvergenceError, RuntimeError)
    assert issubclass(hg.ConvergenceWarning, UserWarning)


@pytest.mark.parametrize(
    "make",
    [
        lambda wrong: hg.Nystrom(wrong),
        lambda wrong: hg.Nystrom(2, sketch=wrong),
        lambda wrong: hg.Nystrom(2, negative_curvature=wrong),
        lambda wrong: hg.Nystrom(2, complement=wrong),
        lambda wrong: hg.NystromPCG(wrong),
        lambda wrong: hg.NystromPCG(2, sketch=wrong),
        lambda wrong: hg.Exact(fallback=wrong),
        lambda wrong: hg.Neumann(step_size=wrong),
        lambda wrong: hg.Neumann(acceleration=wrong),
        lambda wrong: hg.solve(EYE, ONES, on_failure=wrong),
        lambda wrong: hg.solve(EYE, ONES, wrong),
    ],
)
@pytest.mark.parametrize("wrong", [np.ones(2), torch.ones(2), ["auto"]])
def test_an_array_is_no_name_of_an_option(make: Any, wrong: Any) -> None:
    with pytest.raises(hg.HypergradError):
        make(wrong)
