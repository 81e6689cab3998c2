"""``hessian`` and ``ggn`` with ``compile=True``: the same products, of what the tensors hold now.

The backend runs the captured graph without generating code: what is tested is the capture.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor import config

import hypergrad
from hypergrad.operators import compilation

pytestmark = pytest.mark.usefixtures("capture_only")

N = 5


def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ p["w"] + p["b"]) - y).square().mean() + (p["w"] ** 4).sum()


def inputs(seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(N, generator=source), "b": torch.randn((), generator=source)}
    return params, torch.randn(7, N, generator=source), torch.randn(7, generator=source)


def block(count: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(9)
    shapes = {"w": (count, N), "b": (count,)}
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


def assert_close(got: Any, expected: Any) -> None:
    for name, leaf in expected.items():
        torch.testing.assert_close(got[name], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_new_parameters_and_batches_are_multiplied_by_the_same_graph(count: int) -> None:
    for seed in range(3):
        point = inputs(seed)
        compiled = hypergrad.hessian(loss, *point, compile=True)
        assert_close(
            compiled.matmat(block(count)), hypergrad.hessian(loss, *point).matmat(block(count))
        )
        # After the first, an operator is made without a gradient of its own.
        assert (compiled._built is None) == (seed > 0)
        torch.testing.assert_close(compiled.loss, loss(*point))
    assert len(compilation._graphs) == 1


def test_other_shapes_are_other_graphs() -> None:
    params, x, y = inputs(0)
    for rows in (7, 4):
        point = (params, x[:rows], y[:rows])
        compiled = hypergrad.hessian(loss, *point, compile=True)
        assert_close(compiled.matmat(block(2)), hypergrad.hessian(loss, *point).matmat(block(2)))
    assert len(compilation._graphs) == 2


def test_what_a_closure_holds_is_not_frozen() -> None:
    scale = torch.tensor(1.0)
    factor = 1.0

    def scaled(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return factor * scale * loss(p, x, y)

    point, v = inputs(0), {name: leaf[0] for name, leaf in block(1).items()}
    plain = hypergrad.hessian(loss, *point).matvec(v)
    for new_factor, new_scale in ((1.0, 1.0), (1.0, 3.0), (2.0, 3.0)):
        factor, scale = new_factor, torch.tensor(new_scale)
        got = hypergrad.hessian(scaled, *point, compile=True).matvec(v)
        size = new_factor * new_scale
        assert_close(got, {name: size * leaf for name, leaf in plain.items()})


class Settings:
    power = 2.0


SETTINGS = Settings()
GAIN = 1.0


def test_what_a_function_reads_elsewhere_is_not_frozen() -> None:
    global GAIN
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(1.0))

    class Loss:
        shift = 0.0

        def __call__(self, p: Tensor) -> Tensor:
            doubled = 2.0 if net.training else 1.0
            return doubled * GAIN * ((p + self.shift).abs() ** SETTINGS.power).sum()

    function = Loss()

    def curvature() -> float:
        operator = hypergrad.hessian(function, torch.tensor([2.0]), compile=True)
        product = operator.matvec(torch.ones(1))
        assert isinstance(product, Tensor)
        return float(product)

    assert curvature() == pytest.approx(4.0)
    net.eval()
    assert curvature() == pytest.approx(2.0)
    SETTINGS.power = 3.0
    assert curvature() == pytest.approx(12.0)
    GAIN = 2.0
    assert curvature() == pytest.approx(24.0)
    function.shift = 1.0
    assert curvature() == pytest.approx(36.0)
    SETTINGS.power, GAIN = 2.0, 1.0
    assert len(compilation._graphs) == 1


def test_what_requires_grad_in_a_closure_is_known_from_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.tensor(3.0)
    net = torch.nn.Linear(1, 1, dtype=torch.float32).requires_grad_(False)

    def weighted(p: Tensor) -> Tensor:
        return weight * torch.cosh(p).sum() + net(p[:1]).sum() * p[0]

    def looked_at() -> tuple[bool, int]:
        """Whether it depends on more, and how often the loss was evaluated to say so."""
        operator = hypergrad.hessian(weighted, torch.ones(3), compile=True)
        operator.matvec(torch.ones(3))
        looks: list[int] = []
        alone = type(operator)._forward_alone

        def counted(one: Any) -> bool:
            looks.append(1)
            return alone(one)

        with monkeypatch.context() as patch:
            patch.setattr(type(operator), "_forward_alone", counted)
            return operator._depends_on_more(), len(looks)

    looked_at()  # the first operator has a graph of its own
    assert looked_at() == (False, 0)
    weight.requires_grad_()
    assert looked_at() == (True, 1)
    weight.requires_grad_(False)
    net.requires_grad_()
    assert looked_at() == (True, 1)
    net.requires_grad_(False)
    assert looked_at() == (False, 1)  # a graph that was once attached is not relied upon


def test_solvers_check_and_report_as_ever() -> None:
    point = inputs(0)
    v = {name: leaf[0] for name, leaf in block(1).items()}
    compiled = hypergrad.hessian(loss, *point, compile=True)
    x, info = hypergrad.cg_ihvp(compiled, v, damping=20.0, return_info=True)
    assert info.converged
    assert_close(x, hypergrad.cg_ihvp(hypergrad.hessian(loss, *point), v, damping=20.0))
    with torch.no_grad():
        point[0]["w"].add_(1.0)
    with pytest.raises(hypergrad.StaleOperatorError):
        compiled.matvec(v)


def test_without_a_compiler_one_warning_and_the_same_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_compiler(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(compilation, "BACKEND", no_compiler)
    expected = hypergrad.hessian(loss, *inputs(0)).matmat(block(2))
    with pytest.warns(hypergrad.CompilationWarning, match=r"no C\+\+ compiler was found"):
        got = hypergrad.hessian(loss, *inputs(0), compile=True).matmat(block(2))
    assert_close(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(hypergrad.hessian(loss, *inputs(0), compile=True).matmat(block(2)), expected)


def test_a_loss_that_draws_stays_with_its_graph() -> None:
    def noisy(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(p, torch.nn.functional.dropout(x, 0.5), y)

    operator = hypergrad.hessian(noisy, *inputs(0), compile=True)
    with pytest.warns(hypergrad.CompilationWarning, match="draws random numbers"):
        first = operator.matmat(block(2))
    assert_close(operator.matmat(block(2)), first)


def test_compilation_is_logged_and_checked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hypergrad"):
        hypergrad.hessian(loss, *inputs(0), compile=True).matmat(block(2))
    assert [record.message.split()[0] for record in caplog.records] == ["compiling", "compiled"]
    with pytest.raises(hypergrad.SolverOptionError, match="compile is 'yes'"):
        hypergrad.hessian(loss, *inputs(0), compile="yes")  # type: ignore[arg-type]


def outputs(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"] + p["b"])


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_gauss_newton_products_are_compiled_too(count: int, dtype: torch.dtype) -> None:
    vectors = {name: leaf.to(dtype) for name, leaf in block(count).items()}
    for seed in range(3):
        params, x, y = inputs(seed)
        point = {name: leaf.to(dtype) for name, leaf in params.items()}, x.to(dtype), y.to(dtype)
        compiled = hypergrad.ggn(outputs, squares, *point, compile=True)
        expected = hypergrad.ggn(outputs, squares, *point).matmat(vectors)
        assert_close(compiled.matmat(vectors), expected)
        # After the first, an operator is made without an evaluation of its own.
        assert (compiled._built is None) == (seed > 0)
        torch.testing.assert_close(compiled.outputs, outputs(*point[:2]))
    assert len(compilation._graphs) == 1
    with torch.no_grad():
        point[0]["w"].add_(1.0)
    with pytest.raises(hypergrad.StaleOperatorError):
        compiled.matmat(vectors)


def test_compiled_gauss_newton_operators_are_solved_with_and_differentiated() -> None:
    params, x, y = inputs(0)
    v = {name: leaf[0] for name, leaf in block(1).items()}
    gradients: list[Tensor] = []
    for compile in (False, True):
        x = x.detach().requires_grad_()
        operator = hypergrad.ggn(outputs, squares, params, x, y, compile=compile)
        solution = hypergrad.solve(operator, v, hypergrad.CG(rtol=1e-6), damping=0.5)
        assert solution.info.converged
        gradients += torch.autograd.grad(solution.value["w"].sum(), x)
        exact = hypergrad.solve(operator, v, hypergrad.Gram(), damping=0.5)
        assert_close(exact.value, solution.value)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_gauss_newton_options_are_looked_at() -> None:
    with pytest.raises(hypergrad.SolverOptionError, match="compile is 1"):
        hypergrad.ggn(outputs, squares, *inputs(0), compile=1)  # type: ignore[arg-type]
    for _ in range(2):
        compiled = hypergrad.ggn(outputs, lambda out, y: -squares(out, y), *inputs(0), compile=True)
        compiled.matmat(block(1))
        with pytest.raises(hypergrad.NegativeCurvatureError):
            hypergrad.ggn(outputs, compiled.loss_fn, *inputs(0), compile=True, check_convex=True)


# What one graph may serve ----------------------------------------------------------------------


def quiet_product(operator: hypergrad.LinearOperator, v: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hypergrad.CompilationWarning)
        return operator.matvec(v)


def test_a_graph_made_anew_is_compared_anew() -> None:
    """A module in training mode is another function than the one that agreed."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    drop = torch.nn.Dropout(0.5)

    def dropped(w: Tensor) -> Tensor:
        return torch.tanh(drop(x) @ w).square().mean() + (w**2).sum()

    drop.eval()
    v = torch.ones(6)
    hypergrad.hessian(dropped, v, compile=True).matvec(v)
    drop.train()
    operator = hypergrad.hessian(dropped, v, compile=True)
    with pytest.warns(hypergrad.CompilationWarning, match="draws random numbers"):
        first = operator.matvec(v)
    assert torch.equal(operator.matvec(v), first)


class Options:
    scale = 1.0


def test_objects_of_a_batch_may_change() -> None:
    def scaled(w: Tensor, settings: Options) -> Tensor:
        return settings.scale * (w**4).sum() + (w**2).sum()

    settings, w = Options(), torch.linspace(-1.0, 1.0, 6)
    for scale in (None, 7.0, 3.0):
        if scale is not None:
            settings.scale = scale
        got = quiet_product(hypergrad.hessian(scaled, w, settings, compile=True), w)
        torch.testing.assert_close(got, hypergrad.hessian(scaled, w, settings) @ w)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Equal to every other, whatever it holds."""

    weight: Tensor = dataclasses.field(compare=False)

    def __call__(self, w: Tensor, *batch: Any) -> Tensor:
        return (self.weight * w**4).sum()


def test_equal_is_not_the_same() -> None:
    w = torch.linspace(-1.0, 1.0, 6)

    def typed(w: Tensor, flag: Any) -> Tensor:
        return (3.0 if flag is True else 1.0) * (w**4).sum()

    def signed(w: Tensor, zero: float) -> Tensor:
        return math.copysign(1.0, zero) * (w**4).sum()

    for loss_fn, leaves in ((typed, (1, True, 1.0)), (signed, (0.0, -0.0))):
        for leaf in leaves:
            got = quiet_product(hypergrad.hessian(loss_fn, w, leaf, compile=True), w)
            torch.testing.assert_close(got, hypergrad.hessian(loss_fn, w, leaf) @ w)
    for weight in (1.0, 5.0):
        given = Scaled(torch.full((6,), weight))
        assert hash(given) == hash(Scaled(torch.zeros(6)))
        for operands in ((given,), (lambda w, other: other(w), given)):
            function, *batch = operands
            got = quiet_product(hypergrad.hessian(function, w, *batch, compile=True), w)
            torch.testing.assert_close(got, hypergrad.hessian(function, w, *batch) @ w)


def test_bound_methods_of_one_object_share_a_graph() -> None:
    class Model:
        def loss(self, w: Tensor) -> Tensor:
            return (w**4).sum()

    model, w = Model(), torch.ones(3)
    assert model.loss is not model.loss
    operators = [hypergrad.hessian(model.loss, w, compile=True) for _ in range(2)]
    assert operators[0]._signature() == operators[1]._signature()
    assert (
        operators[0]._signature() != hypergrad.hessian(Model().loss, w, compile=True)._signature()
    )


@pytest.mark.parametrize("kind", ["number that changes", "number of NumPy"])
def test_what_the_compiler_fails_at_runs_eagerly(kind: str) -> None:
    """A number in a closure is part of the graph, and PyTorch makes no more than some of these."""
    scale: Any = 1.0

    def scaled(w: Tensor) -> Tensor:
        return scale * (w**4).sum()

    w = torch.linspace(-1.0, 1.0, 6)
    scales = [1.0 + i for i in range(12)] if kind == "number that changes" else [np.float32(2.0)]
    warned = 0
    for number in scales:
        scale = number
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got = hypergrad.hessian(scaled, w, compile=True).matvec(w)
        warned += sum(x.category is hypergrad.CompilationWarning for x in seen)
        torch.testing.assert_close(got, hypergrad.hessian(scaled, w) @ w)
    assert warned == 1


class _Hidden(torch.autograd.Function):
    """Its derivative depends on a tensor that no forward pass meets."""

    weight: Any = None

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return (w**4).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad * _Hidden.weight * 4.0 * w**3


def test_what_only_the_gradient_reads_is_not_lost() -> None:
    w, v = torch.linspace(0.5, 1.0, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    _Hidden.weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    slopes = []

    def hidden(w: Tensor) -> Tensor:
        return _Hidden.apply(w)  # type: ignore[no-untyped-call]

    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hypergrad.CompilationWarning)
            operator = hypergrad.hessian(hidden, w, compile=True)
            x = hypergrad.solve(operator, v, hypergrad.Exact()).value
        (slope,) = torch.autograd.grad(x.sum(), _Hidden.weight)
        slopes.append(slope)
    torch.testing.assert_close(slopes[0], -(v / (12 * w**2)).sum() / 1.5**2)
    assert slopes[0] == slopes[1] == slopes[2]


def test_the_loss_of_a_modified_point_is_refused() -> None:
    w = torch.ones(3)

    def quartic(w: Tensor) -> Tensor:
        return (w**4).sum()

    hypergrad.hessian(quartic, w, compile=True).matvec(w)
    operator = hypergrad.hessian(quartic, w, compile=True)
    w.add_(1.0)
    with pytest.raises(hypergrad.StaleOperatorError):
        _ = operator.loss


@pytest.mark.parametrize("on_later", [False, True])
@pytest.mark.parametrize("on_when_compiled", [False, True])
def test_results_outlive_the_next_call_of_a_cuda_graph(
    on_when_compiled: bool, on_later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded code writes its results to one place, as the stand-in here does.

    What the switch says when code is generated is what counts, not what it says when that runs.
    """
    params, *batch = inputs(0)
    operator = hypergrad.hessian(loss, params, *batch, compile=True)
    place = torch.zeros(3)

    def generated(module: Any, inputs: Any) -> Any:
        def recorded(*given: Tensor) -> Any:
            threes, total = module(*given)
            return place.copy_(threes), total

        return recorded

    def function(tensors: list[Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
        return value.expand(3).clone(), 3.0 * value

    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: generated)
    monkeypatch.setattr(type(operator), "device", torch.device("cuda"))
    graph = compilation.Graph(function, "a stand-in", "nothing", {})
    with config.patch({"triton.cudagraphs": on_when_compiled}):
        graph.run(operator, torch.tensor(0.0))
    with config.patch({"triton.cudagraphs": on_later}):
        first, total = graph.run(operator, torch.tensor(1.0))
        graph.run(operator, torch.tensor(2.0))
    assert first.tolist() == ([1.0] * 3 if on_when_compiled else [2.0] * 3)
    assert float(total) == 3.0
