from __future__ import annotations

import sys
from typing import Any, ClassVar

import curvlinops
import pytest
import torch
from torch import Tensor

import hypergrad
from tests.operators import networks
from tests.strategies import DTYPES, F64, flat, gaussian, generator, relative_error, tree_like


def ggn_of(module: torch.nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> Any:
    params = {name: p.detach() for name, p in module.named_parameters()}

    def call(p: Any, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (inputs,))

    return hypergrad.ggn(call, loss_fn, params, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("corrected", [False, True])
def test_it_is_exact_for_one_linear_layer_with_squared_error(
    corrected: bool, reduction: str, dtype: torch.dtype
) -> None:
    module = networks.mlp(3, 2, dtype=dtype)
    x, y = gaussian(7, 3).to(dtype), gaussian(7, 2, seed=1).to(dtype)
    loss = torch.nn.MSELoss(reduction=reduction)
    params = dict(module.named_parameters())
    operator = hypergrad.kfac(
        module, loss, params, [(x[:4], y[:4]), (x[4:], y[4:])],
        eigenvalue_corrected=corrected, separate_bias=False,
    )  # fmt: skip
    expected = ggn_of(module, loss, x, y).to_dense()
    assert relative_error(operator.to_dense(), expected) <= (1e-10 if dtype == F64 else 1e-4)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_products_and_inverses_agree_with_curvlinops(corrected: bool, loss: str) -> None:
    module = networks.mlp(4, 5, 3)
    x = gaussian(9, 4)
    y = networks.labels(9, classes=3) if loss == "cross_entropy" else gaussian(9, 3)
    modules = {"cross_entropy": torch.nn.CrossEntropyLoss, "mse_loss": torch.nn.MSELoss}
    function = getattr(torch.nn.functional, loss)
    params = list(module.parameters())
    theirs: Any = (curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator)(
        module, modules[loss](), params, [(x, y)], fisher_type="type-2"
    )
    eye = torch.eye(theirs.shape[0], dtype=F64)
    operator = hypergrad.kfac(module, function, params, [(x, y)], eigenvalue_corrected=corrected)
    dense = operator.to_dense()
    assert relative_error(dense, theirs @ eye) <= 1e-12
    damped = dense + 0.01 * torch.eye(len(dense), dtype=F64)
    inverse = operator.preconditioner(0.01).to_dense()
    assert relative_error(inverse, torch.linalg.inv(damped)) <= 1e-10
    v = tree_like(params, gaussian(len(dense), seed=3))
    assert relative_error(flat(operator.solve(v, 0.01)), inverse @ flat(v)) <= 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_cg_needs_fewer_iterations_with_it(corrected: bool) -> None:
    op, params, module, batch = networks.correlated()
    v, damping = tree_like(params, gaussian(op.shape[0], seed=1)), 1e-6
    plain = hypergrad.solve(op, v, hypergrad.CG(rtol=1e-6), damping=damping)
    curvature = hypergrad.kfac(
        module,
        torch.nn.functional.cross_entropy,
        dict(module.named_parameters()),
        [batch],
        eigenvalue_corrected=corrected,
        separate_bias=False,
    )
    inverse = curvature.preconditioner(damping)
    better = hypergrad.solve(
        op, v, hypergrad.CG(rtol=1e-6, preconditioner=inverse), damping=damping
    )
    assert plain.info.converged
    assert better.info.converged
    assert better.info.iterations < 0.4 * plain.info.iterations


def test_convolutions_with_either_treatment_of_shared_weights() -> None:
    made = networks.case("cnn, classes")
    params = dict(made.module.named_parameters())
    sharings: tuple[Any, ...] = ("expand", "reduce")
    for sharing in sharings:
        operator = hypergrad.kfac(
            made.module, made_loss(), params, [(made.inputs, made.targets)],
            weight_sharing=sharing,
        )  # fmt: skip
        dense = operator.to_dense()
        assert relative_error(dense, dense.T) <= 1e-14
        assert float(torch.linalg.eigvalsh(0.5 * (dense + dense.T))[0]) >= -1e-14


def made_loss() -> torch.nn.Module:
    return torch.nn.CrossEntropyLoss()


def test_a_part_of_the_parameters_in_any_tree() -> None:
    module = networks.mlp(3, 4, 2)
    x, y = gaussian(6, 3), gaussian(6, 2)
    batches = [(x, y)]
    params = dict(module.named_parameters())
    whole = hypergrad.kfac(module, torch.nn.MSELoss(), params, batches).to_dense()
    part = {"head": {"w": params["2.weight"].detach(), "b": params["2.bias"].detach()}}
    got = hypergrad.kfac(module, torch.nn.MSELoss(), part, batches).to_dense()
    assert relative_error(got, whole[16:, 16:]) <= 1e-13


def test_drawn_targets_come_from_the_generator() -> None:
    module, x = networks.mlp(3, 4, 2), gaussian(6, 3)
    batches, loss = [(x, networks.labels(6, classes=2))], torch.nn.CrossEntropyLoss()

    def dense(seed: int) -> Tensor:
        return hypergrad.kfac(
            module, loss, dict(module.named_parameters()), batches,
            fisher="sampled", num_samples=2, generator=generator(seed),
        ).to_dense()  # fmt: skip

    assert torch.equal(dense(1), dense(1))
    assert not torch.equal(dense(1), dense(2))


def test_it_stays_that_of_the_parameters_it_was_made_at() -> None:
    module, x = networks.mlp(3, 2, 2), gaussian(6, 3)
    params = dict(module.named_parameters())
    batches = [(x, networks.labels(6, classes=2))]
    operator = hypergrad.kfac(module, torch.nn.CrossEntropyLoss(), params, batches)
    before = operator.to_dense()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0)
    assert torch.equal(operator.to_dense(), before)
    assert all(p.grad is None for p in module.parameters())


def test_without_the_package_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "curvlinops"]:
        monkeypatch.delitem(sys.modules, name)
    # None stops an import as a missing package does.
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    module = networks.mlp(2, 1)
    with pytest.raises(hypergrad.MissingPackageError, match=r"hypergrad-torch\[kfac\]") as caught:
        hypergrad.kfac(module, torch.nn.MSELoss(), dict(module.named_parameters()), [])
    assert isinstance(caught.value, ImportError)


class TestBadInput:
    module = networks.mlp(3, 2)
    params: ClassVar = dict(module.named_parameters())
    batches = ((gaussian(4, 3), gaussian(4, 2)),)
    loss = torch.nn.MSELoss()

    def test_options(self) -> None:
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({"fisher": "type-2"}, "fisher is 'type-2'"),
            ({"weight_sharing": "sum"}, "weight_sharing is 'sum'"),
            ({"num_samples": 2}, "1 unless targets are drawn"),
            ({"num_samples": 0, "fisher": "sampled"}, "num_samples is 0"),
        )
        for wrong, message in cases:
            with pytest.raises(hypergrad.SolverOptionError, match=message):
                hypergrad.kfac(self.module, self.loss, self.params, self.batches, **wrong)

    def test_a_loss_that_has_no_factors(self) -> None:
        for loss in (torch.nn.L1Loss(), torch.nn.MSELoss, lambda out, y: out.sum()):
            with pytest.raises(hypergrad.SolverOptionError, match="binary_cross_entropy"):
                hypergrad.kfac(self.module, loss, self.params, self.batches)

    def test_batches_that_end(self) -> None:
        with pytest.raises(hypergrad.SolverOptionError, match=r"Use list\(batches\)"):
            hypergrad.kfac(self.module, self.loss, self.params, iter(self.batches))

    def test_parameters_of_something_else(self) -> None:
        copies = {name: p.detach().clone() for name, p in self.params.items()}
        with pytest.raises(hypergrad.LeafTypeError, match="not a parameter of the module"):
            hypergrad.kfac(self.module, self.loss, copies, self.batches)
        normed = torch.nn.Sequential(networks.mlp(3, 2), torch.nn.LayerNorm(2).double())
        with pytest.raises(hypergrad.SolverOptionError, match=r"1\.weight.*LayerNorm"):
            hypergrad.kfac(normed, self.loss, dict(normed.named_parameters()), self.batches)
        frozen = networks.mlp(3, 2)
        frozen[0].bias.requires_grad_(False)
        with pytest.raises(hypergrad.LeafTypeError, match=r"0\.bias\) is frozen"):
            hypergrad.kfac(frozen, self.loss, dict(frozen.named_parameters()), self.batches)

    def test_no_damping(self) -> None:
        operator = hypergrad.kfac(self.module, self.loss, self.params, self.batches)
        with pytest.raises(hypergrad.DampingError, match="damping is 0"):
            operator.preconditioner(0.0)

    def test_inputs_that_are_not_finite(self) -> None:
        batches = [(torch.nan * gaussian(4, 3), gaussian(4, 2))]
        with pytest.raises(hypergrad.NonFiniteError, match="Kronecker factor"):
            hypergrad.kfac(self.module, self.loss, self.params, batches)


@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [
        (torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), "weight="),
        (torch.nn.CrossEntropyLoss(ignore_index=1), "ignore_index=1"),
        (torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), "pos_weight="),
    ],
)
def test_a_weighted_loss_is_refused(loss_fn: Any, what: str) -> None:
    module = torch.nn.Linear(3, 2)
    batches = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(hypergrad.SolverOptionError, match=what):
        hypergrad.kfac(module, loss_fn, dict(module.named_parameters()), batches)


def test_tied_parameters_are_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    batches = [(torch.ones(4, 3), torch.ones(4, 3))]
    with pytest.raises(hypergrad.SolverOptionError, match=r"tied: it is 0\.weight and 2\.weight"):
        hypergrad.kfac(module, torch.nn.MSELoss(), dict(module.named_parameters()), batches)
