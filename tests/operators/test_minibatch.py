from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hypergrad
from hypergrad import LoaderError, SampledOperator
from tests.strategies import F32, F64, gaussian, generator, quick_and_thorough, relative_error

N = 11


def data(count: int = N) -> tuple[Tensor, Tensor]:
    return gaussian(count, 3, seed=1), torch.randint(0, 2, (count,), generator=generator(2))


def params() -> dict[str, Tensor]:
    return {"w": 0.5 * gaussian(3, 2, seed=3), "b": gaussian(2, seed=4)}


def outputs(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"]) + p["b"]


def mean_loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs(p, x), y)


def sum_loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs(p, x), y, reduction="sum")


def split(sizes: list[int], count: int = N) -> list[tuple[Tensor, ...]]:
    x, y = data(count)
    return list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))


RAGGED = [4, 4, 3]


def loaders() -> dict[str, Any]:
    x, y = data()
    dataset: Any = TensorDataset(x, y)

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(dataset)

    return {
        "list": split(RAGGED),
        "generator_function": lambda: iter(split(RAGGED)),
        "loader": DataLoader(dataset, batch_size=4),
        "shuffled": DataLoader(dataset, batch_size=4, shuffle=True),
        "own_generator": DataLoader(dataset, batch_size=4, shuffle=True, generator=generator(7)),
        "stream": DataLoader(Stream(), batch_size=4),
        "array_like": [[x[:4], y[:4]], [x[4:8], y[4:8]], [x[8:], y[8:]]],
    }


LOADERS = tuple(loaders())


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_ragged_loader_is_the_full_batch(name: str, reduction: Any) -> None:
    loss = mean_loss if reduction == "mean" else sum_loss
    op = hypergrad.minibatch_hessian(loss, params(), loaders()[name], reduction=reduction)
    expected = hypergrad.hessian(loss, params(), *data()).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12
    assert (op.num_batches, op.size) == (3, N)


@pytest.mark.parametrize("name", LOADERS)
def test_a_ragged_loader_is_the_full_batch_for_ggn(name: str) -> None:
    op = hypergrad.minibatch_ggn(outputs, cross_entropy, params(), loaders()[name])
    expected = hypergrad.ggn(outputs, cross_entropy, params(), *data()).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12
    assert float(torch.linalg.eigvalsh(op.to_dense())[0]) >= -1e-12


def test_an_unweighted_mean_is_not_the_full_batch() -> None:
    expected = hypergrad.hessian(mean_loss, params(), *data()).to_dense()
    parts = [hypergrad.hessian(mean_loss, params(), *batch).to_dense() for batch in split(RAGGED)]
    unweighted = torch.stack(parts).mean(dim=0)
    assert relative_error(unweighted, expected) > 1e-2
    # The same by our operator, told that each batch counts once.
    equal = hypergrad.minibatch_hessian(
        mean_loss, params(), split(RAGGED), batch_size=lambda batch: 1
    )
    assert relative_error(equal.to_dense(), unweighted) <= 1e-12


@quick_and_thorough
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    mode=st.sampled_from(["auto", "reverse_over_reverse", "forward_over_reverse"]),
    chunk_size=st.sampled_from([None, 2]),
)
def test_any_split_is_the_full_batch(
    effort: str, sizes: list[int], mode: Any, chunk_size: int | None
) -> None:
    count = sum(sizes)
    op = hypergrad.minibatch_hessian(
        mean_loss, params(), split(sizes, count), mode=mode, chunk_size=chunk_size
    )
    expected = hypergrad.hessian(mean_loss, params(), *data(count)).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12


def test_float32_sums_are_carried_in_float64() -> None:
    # 1 + 2^-20 + ... : each share is lost against the first in float32, together they are not.
    batches = [torch.full((1,), 1.0)] + [torch.full((1,), 2.0**-25)] * 64
    op = hypergrad.minibatch_hessian(
        lambda p, s: 0.5 * s.sum() * p**2, torch.tensor(1.0), batches, reduction="sum"
    )
    assert float(op @ torch.tensor(1.0)) == 1.0 + 2.0**-19


def test_a_weight_of_its_own_masked_tokens() -> None:
    x, y = data()
    y = y.clone()
    y[torch.tensor([0, 1, 5])] = -100
    batches = list(zip(torch.split(x, RAGGED), torch.split(y, RAGGED), strict=True))
    op = hypergrad.minibatch_hessian(
        mean_loss, params(), batches, batch_size=lambda batch: (batch[1] != -100).sum()
    )
    expected = hypergrad.hessian(mean_loss, params(), x, y).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12
    assert op.size == 8


def test_a_batch_that_is_a_dict_or_one_tensor_is_one_argument() -> None:
    x, y = data()

    def of_dict(p: Any, batch: dict[str, Tensor]) -> Tensor:
        return mean_loss(p, batch["x"], batch["y"])

    batches = [{"x": a, "y": b} for a, b in split(RAGGED)]
    op = hypergrad.minibatch_hessian(of_dict, params(), batches)
    expected = hypergrad.hessian(mean_loss, params(), x, y).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12
    single = hypergrad.minibatch_hessian(
        lambda p, x: outputs(p, x).square().mean(), params(), torch.split(x, RAGGED)
    )
    whole = hypergrad.hessian(lambda p, x: outputs(p, x).square().mean(), params(), x)
    assert relative_error(single.to_dense(), whole.to_dense()) <= 1e-12


class Counting:
    """A loader that counts its passes, and how many batches it has handed out."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes, self.loaded = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for batch in self.batches:
            self.loaded += 1
            yield batch


def test_a_block_takes_one_pass() -> None:
    loader = Counting(split(RAGGED))
    op = hypergrad.minibatch_hessian(mean_loss, params(), loader)
    assert loader.passes == 2  # the probe
    op.matmat({"w": gaussian(6, 3, 2), "b": gaussian(6, 2)})
    assert loader.passes == 3
    hypergrad.minibatch_hessian(mean_loss, params(), loader, probe=False)
    assert loader.passes == 3


def test_one_batch_at_a_time_is_alive() -> None:
    alive: set[int] = set()
    most = 0

    class Mark(torch.autograd.Function):
        """Counts the graphs that hold it."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal most
            ctx.mark = Token()
            most = max(most, len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Token:
        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def loss(p: Tensor, x: Tensor) -> Tensor:
        marked: Tensor = Mark.apply(p)  # type: ignore[no-untyped-call]
        return (x @ marked).square().square().mean()

    v = gaussian(3).requires_grad_()
    p = gaussian(3, seed=5).requires_grad_()
    op = hypergrad.minibatch_hessian(loss, p, torch.split(gaussian(40, 3), 5))
    op @ v
    assert most == 1
    x = hypergrad.solve(op, v, hypergrad.CG(rtol=1e-8), damping=0.1).value
    most = 0
    x.sum().backward()
    # An operator keeps the graph of its gradient, and the derivative is of another one.
    assert 1 <= most <= 3


SOLVERS: dict[str, hypergrad.Solver] = {
    "exact": hypergrad.Exact(),
    "cg": hypergrad.CG(rtol=1e-10),
    "minres": hypergrad.MINRES(rtol=1e-10),
    "gmres": hypergrad.GMRES(rtol=1e-10),
    "neumann": hypergrad.Neumann(num_terms=80),
    "nystrom": hypergrad.Nystrom(rank=8, generator=generator(0)),
    "nystrom_pcg": hypergrad.NystromPCG(rank=4, rtol=1e-10, generator=generator(0)),
    "auto": hypergrad.Auto(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name: str) -> None:
    op = hypergrad.minibatch_ggn(outputs, cross_entropy, params(), split(RAGGED))
    v = {"w": gaussian(3, 2, seed=8), "b": gaussian(2, seed=9)}
    x = hypergrad.solve(op, v, SOLVERS[name], damping=0.3).value
    whole = hypergrad.ggn(outputs, cross_entropy, params(), *data())
    expected = hypergrad.solve(whole, v, hypergrad.Exact(), damping=0.3).value
    for key in v:
        tolerance = 1e-4 if name == "auto" else 1e-7
        assert relative_error(x[key], expected[key]) <= tolerance


def solved(op: Any, p: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
    x = hypergrad.solve(op, v, hypergrad.CG(rtol=1e-12), damping=0.5).value
    return (x["w"] ** 2).sum() + x["b"].sin().sum()


def test_a_solve_is_differentiable_in_the_parameters_any_number_of_times() -> None:
    results = []
    for make in (
        lambda p: hypergrad.minibatch_hessian(mean_loss, p, split(RAGGED)),
        lambda p: hypergrad.hessian(mean_loss, p, *data()),
    ):
        p = {k: x.requires_grad_() for k, x in params().items()}
        v = {"w": gaussian(3, 2, seed=8).requires_grad_(), "b": gaussian(2, seed=9)}
        leaves = [p["w"], p["b"], v["w"]]
        first = torch.autograd.grad(solved(make(p), p, v), leaves, create_graph=True)
        second = torch.autograd.grad([g.square().sum() for g in first], leaves)
        results.append([*first, *second])
    for mine, other in zip(*results, strict=True):
        assert relative_error(mine.detach(), other.detach()) <= 1e-8


def test_a_solve_is_differentiable_in_a_closure_and_in_batches() -> None:
    x, y = data()
    grads = []
    for whole in (True, False):
        weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
        inputs = x.clone().requires_grad_()

        def loss(p: Any, x: Tensor, y: Tensor, weight: Tensor = weight) -> Tensor:
            return mean_loss(p, x, y) + weight.exp() * p["w"].square().sum()

        batches = list(zip(torch.split(inputs, RAGGED), torch.split(y, RAGGED), strict=True))
        op: Any = (
            hypergrad.hessian(loss, params(), inputs, y)
            if whole
            else hypergrad.minibatch_hessian(loss, params(), batches)
        )
        v = {"w": gaussian(3, 2, seed=8), "b": gaussian(2, seed=9)}
        grads.append(torch.autograd.grad(solved(op, params(), v), [weight, inputs]))
    for mine, other in zip(*grads, strict=True):
        assert relative_error(mine, other) <= 1e-8


def test_forward_mode_and_torch_func() -> None:
    v = {"w": gaussian(3, 2, seed=8), "b": gaussian(2, seed=9)}

    def of(make: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
        return lambda p: solved(make(p), p, v)

    mine = of(lambda p: hypergrad.minibatch_hessian(mean_loss, p, split(RAGGED), probe=False))
    other = of(lambda p: hypergrad.hessian(mean_loss, p, *data()))
    left, right = torch.func.grad(mine)(params()), torch.func.grad(other)(params())
    for key in v:
        assert relative_error(left[key], right[key]) <= 1e-8
    slopes = [torch.func.jvp(f, (params(),), (v,))[1] for f in (mine, other)]
    assert relative_error(slopes[0], slopes[1]) <= 1e-8


def test_the_probe_runs_under_transforms() -> None:
    v = {"w": gaussian(3, 2, seed=8), "b": gaussian(2, seed=9)}
    batches, whole = split(RAGGED), data()
    stacked = {key: torch.stack([x, 2 * x]) for key, x in params().items()}

    def solution(p: Any) -> Tensor:
        return solved(hypergrad.minibatch_hessian(mean_loss, p, batches), p, v)

    def reference(p: Any) -> Tensor:
        return solved(hypergrad.hessian(mean_loss, p, *whole), p, v)

    left, right = torch.func.vmap(solution)(stacked), torch.func.vmap(reference)(stacked)
    assert relative_error(left, right) <= 1e-8
    mine, other = torch.func.jacfwd(solution)(params()), torch.func.jacfwd(reference)(params())
    for key in v:
        assert relative_error(mine[key], other[key]) <= 1e-8

    noise = torch.rand(100, generator=generator(0), dtype=F64).tolist()

    def unsteady(p: Any) -> Tensor:
        loss = lambda p, x, y: mean_loss(p, x, y) * noise.pop()  # noqa: E731
        return solved(hypergrad.minibatch_hessian(loss, p, batches), p, v)

    with pytest.raises(LoaderError, match="two passes over batches"):
        torch.func.vmap(unsteady)(stacked)


def test_the_caller_s_random_numbers_and_tensors_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.double()
    own = dict(model.named_parameters())
    before = {k: x.clone() for k, x in model.state_dict().items()}
    state = torch.get_rng_state()
    op = hypergrad.minibatch_hessian(
        lambda p, x, y: cross_entropy(torch.func.functional_call(model, p, (x,)), y),
        own,
        DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True),
    )
    op.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert all(x.requires_grad and x.grad is None for x in own.values())


def test_a_loader_s_own_generator_is_untouched_and_its_order_kept() -> None:
    own = generator(7)
    dataset: Any = TensorDataset(*data())
    loader: Any = DataLoader(dataset, batch_size=4, shuffle=True, generator=own, drop_last=True)
    before = own.get_state()
    op = hypergrad.minibatch_hessian(mean_loss, params(), loader)  # the probe passes
    assert op.size == 8
    assert relative_error(op.to_dense(), op.to_dense()) <= 1e-13
    op.sampled(generator=generator(0)) @ params()
    assert torch.equal(own.get_state(), before)


def dropout_loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(nn.functional.dropout(x, 0.5) @ p["w"] + p["b"], y)


@pytest.mark.parametrize("name", ["list", "shuffled", "own_generator"])
def test_dropout_is_frozen_by_the_seed(name: str) -> None:
    ops = [
        hypergrad.minibatch_hessian(dropout_loss, params(), loaders()[name], seed=seed).to_dense()
        for seed in (0, 0, 1)
    ]
    assert relative_error(ops[0], ops[1]) <= 1e-13
    assert relative_error(ops[2], ops[0]) > 1e-3
    assert relative_error(ops[0], ops[0].T) <= 1e-14


def test_every_batch_has_a_mask_of_its_own() -> None:
    x, y = data(1)
    op = hypergrad.minibatch_hessian(dropout_loss, params(), [(x, y)] * 40)
    mean = hypergrad.minibatch_hessian(dropout_loss, params(), [(x, y)])
    assert relative_error(op.to_dense(), mean.to_dense()) > 1e-2


def test_modes_have_the_same_masks() -> None:
    modes: Any = ("reverse_over_reverse", "forward_over_reverse")
    left, right = (
        hypergrad.minibatch_hessian(dropout_loss, params(), split(RAGGED), mode=mode).to_dense()
        for mode in modes
    )
    assert relative_error(left, right) <= 1e-13


def test_augmentation_from_another_generator_is_refused() -> None:
    source = np.random.default_rng(0)

    def augmented() -> Iterator[Any]:
        for x, y in split(RAGGED):
            yield x + torch.from_numpy(0.1 * source.standard_normal(x.shape)), y

    with pytest.raises(LoaderError, match=r"differ by .*augmentation"):
        hypergrad.minibatch_hessian(mean_loss, params(), augmented)
    op = hypergrad.minibatch_hessian(mean_loss, params(), augmented, probe=False)
    assert relative_error(op.to_dense(), op.to_dense()) > 1e-3


def test_augmentation_from_torch_s_generator_is_frozen() -> None:
    def augmented() -> Iterator[Any]:
        for x, y in split(RAGGED):
            yield x + 0.1 * torch.randn_like(x), y

    op = hypergrad.minibatch_hessian(mean_loss, params(), augmented)
    assert relative_error(op.to_dense(), op.to_dense()) <= 1e-13


def test_a_loader_that_changes_its_length_is_named() -> None:
    counts = iter([3, 3, 2])

    def shrinking() -> Iterator[Any]:
        return iter(split(RAGGED)[: next(counts)])

    op = hypergrad.minibatch_hessian(mean_loss, params(), shrinking)
    with pytest.raises(LoaderError, match="this pass over batches had 2 of 8 examples in all"):
        op @ params()


def one_shot() -> Callable[[], Iterator[Any]]:
    iterator = iter(split(RAGGED))
    return lambda: iterator


def several(*batches: Any) -> list[Any]:
    return [*split(RAGGED), *batches]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter(split(RAGGED)), "gone through once only"),
        (zip(*data(), strict=True), "zip, which can be gone through once only"),
        (one_shot(), "empty this time"),
        ([], "batches is empty"),
        (list, "batches is empty"),
        (lambda: 3, r"batches\(\) returned a int"),
        (3, "batches is a int"),
        (data()[0], "batches is a Tensor"),
        ({"x": data()[0]}, "hypergrad.hessian"),
        (several((gaussian(0, 3), torch.zeros(0).long())), "batch 3 has size 0"),
        (several((gaussian(2, 3),)), "batch 3 has another structure than the first"),
        ([(torch.tensor(1.0, dtype=F64), data()[1])], "first tensor without dimensions"),
        ([("a", "b")], "no tensor"),
    ],
)
def test_bad_loaders_are_named(batches: Any, message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        hypergrad.minibatch_hessian(mean_loss, params(), batches)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_bad_sizes_are_named(size: float) -> None:
    with pytest.raises(LoaderError, match="batch 0 has size"):
        hypergrad.minibatch_hessian(
            mean_loss, params(), split(RAGGED), batch_size=lambda batch: size
        )


def test_other_errors_say_in_which_batch() -> None:
    bad = (torch.full((2, 3), torch.inf, dtype=F64), torch.zeros(2).long())
    with pytest.raises(hypergrad.NonFiniteError, match="batch 3: the loss is nan"):
        hypergrad.minibatch_hessian(mean_loss, params(), several(bad))
    with pytest.raises(hypergrad.LossError, match="batch 0: the loss has shape"):
        hypergrad.minibatch_hessian(lambda p, x, y: outputs(p, x), params(), split(RAGGED))
    with pytest.raises(hypergrad.SolverOptionError, match="reduction is 'none'"):
        hypergrad.minibatch_hessian(mean_loss, params(), split(RAGGED), reduction="none")  # type: ignore[arg-type]


def test_parameters_changed_in_place_make_it_stale() -> None:
    p = params()
    op = hypergrad.minibatch_hessian(mean_loss, p, split(RAGGED))
    p["w"].add_(1.0)
    with pytest.raises(hypergrad.StaleOperatorError, match=r"params\['w'\]"):
        op @ params()
    with pytest.raises(hypergrad.StaleOperatorError, match=r"params\['w'\]"):
        op.sampled() @ params()


def test_a_leaf_that_some_batches_do_not_use_is_no_matter() -> None:
    def routed(p: Any, x: Tensor, expert: Tensor) -> Tensor:
        return (x @ p["ab"[int(expert[0])]]).square().mean()

    tree = {"a": gaussian(3), "b": gaussian(3), "c": gaussian(1)}
    batches = [(gaussian(4, 3, seed=i), torch.full((4,), i % 2)) for i in range(3)]
    with pytest.warns(hypergrad.UnusedParameterWarning, match=r"\['c'\]") as caught:
        op = hypergrad.minibatch_hessian(
            lambda p, x, e: routed(p, x, e) + 0.0 * p["a"].sum(), tree, batches
        )
    assert len(caught) == 1
    assert "'b'" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert relative_error(op.to_dense(), op.to_dense()) <= 1e-13  # and no more warnings


def test_progress_wraps_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def watched(batches: Any) -> Iterator[Any]:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        passes.append(count)

    hypergrad.minibatch_hessian(mean_loss, params(), split(RAGGED), progress=watched)
    assert passes == [3, 3]
    hypergrad.minibatch_hessian(mean_loss, params(), split(RAGGED), progress=True)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(LoaderError, match="tqdm, which is not installed"):
        hypergrad.minibatch_hessian(mean_loss, params(), split(RAGGED), progress=True)


@pytest.mark.slow
def test_torch_compile_is_refused() -> None:
    op = hypergrad.minibatch_hessian(mean_loss, params(), split(RAGGED))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda v: hypergrad.solve(op, v, hypergrad.CG(rtol=0.0, max_iters=2)).value,
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="LoaderError"):
        compiled(params())


# The stochastic variant -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list", "loader", "shuffled", "array_like"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_of_the_sampled_is_the_whole(name: str, reduction: Any) -> None:
    loss = mean_loss if reduction == "mean" else sum_loss
    op = hypergrad.minibatch_hessian(loss, params(), loaders()[name], reduction=reduction)
    drawn = op.sampled(generator=generator(0))
    assert isinstance(drawn, SampledOperator)
    assert relative_error(drawn.mean.to_dense(), op.to_dense()) <= 1e-12


def test_a_draw_is_one_batch_s_product_by_its_size() -> None:
    op = hypergrad.minibatch_hessian(mean_loss, params(), split([8, 3]), probe=False)
    drawn = op.sampled(generator=generator(0))
    assert drawn.probabilities.tolist() == pytest.approx([8 / N, 3 / N])
    parts = [hypergrad.hessian(mean_loss, params(), *batch) for batch in split([8, 3])]
    expected = [part._apply(torch.ones(1, 8, dtype=F64)) for part in parts]
    products = [drawn._apply(torch.ones(1, 8, dtype=F64)) for _ in range(300)]
    hits = [sum(torch.allclose(x, e, rtol=1e-12) for x in products) for e in expected]
    assert sum(hits) == 300
    assert abs(hits[0] - 300 * 8 / N) <= 4 * (300 * 8 * 3 / N**2) ** 0.5


def test_lissa_over_a_loader() -> None:
    dataset: Any = TensorDataset(gaussian(40, 3, seed=1))

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (x @ p).square().mean() + 0.5 * p.square().sum()

    op = hypergrad.minibatch_hessian(
        loss, torch.zeros(3, dtype=F64), DataLoader(dataset, batch_size=10)
    )
    v = gaussian(3, seed=5)
    solver = hypergrad.Neumann(num_terms=20, step_size=0.2, num_samples=4)
    info = hypergrad.solve(op.sampled(generator=generator(1)), v, solver).info
    # The true residual with the mean: 0.08 on average and 0.25 at most over 200 seeds.
    assert info.relative_residual < 0.3
    assert info.num_hvps == 4 * 19 + 4


def test_examples_one_by_one() -> None:
    dataset: Any = TensorDataset(*data())
    op = hypergrad.minibatch_hessian(
        lambda p, x, y: mean_loss(p, x[None], y[None]),
        params(),
        DataLoader(dataset, batch_size=None),
        batch_size=lambda batch: 1,
    )
    expected = hypergrad.hessian(mean_loss, params(), *data()).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12
    assert relative_error(op.sampled().mean.to_dense(), expected) <= 1e-12


def test_no_random_access_is_named() -> None:
    for name in ("generator_function", "stream"):
        op = hypergrad.minibatch_hessian(mean_loss, params(), loaders()[name])
        with pytest.raises(LoaderError, match=r"no random access.*list\(batches\)"):
            op.sampled()


def test_a_batch_of_another_size_than_before_is_named() -> None:
    batches = split(RAGGED)
    drawn = hypergrad.minibatch_hessian(mean_loss, params(), batches).sampled()
    batches[:] = split([1, 1, 9])
    with pytest.raises(LoaderError, match=r"batch \d has size"):
        drawn @ params()


def test_batches_go_to_the_parameters_device() -> None:
    moved = []

    class Bag:
        """What a library's own batch looks like."""

        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: torch.device) -> Bag:
            moved.append(device)
            return self

    op = hypergrad.minibatch_hessian(
        lambda p, bag: (bag.x @ p).square().mean(),
        gaussian(3),
        [Bag(gaussian(4, 3))],
        batch_size=lambda bag: len(bag.x),
    )
    op.to_dense()
    assert moved
    assert set(moved) == {torch.device("cpu")}
    on_meta = torch.ones(2, 3, device="meta")
    loader = hypergrad.operators.loader.Loader(
        [(torch.ones(2, 3), [torch.ones(2)])],
        on_meta.device,
        batch_size=None,
        seed=0,
        progress=False,
    )
    ((arguments, size),) = loader.each()
    assert arguments[0].device == arguments[1][0].device == on_meta.device
    assert size == 2


def test_low_precision() -> None:
    for dtype, tolerance in ((F32, 1e-6), (torch.bfloat16, 3e-2)):
        tree = {k: x.to(dtype) for k, x in params().items()}
        batches = [(x.to(dtype), y) for x, y in split(RAGGED)]
        op = hypergrad.minibatch_hessian(mean_loss, tree, batches)
        wide = {k: x.double() for k, x in tree.items()}
        whole = torch.cat([x for x, _ in batches]).double()
        expected = hypergrad.hessian(mean_loss, wide, whole, data()[1]).to_dense()
        assert op.to_dense().dtype == dtype
        assert relative_error(op.to_dense(), expected) <= tolerance


def test_names_beside_the_data_may_be_fewer_in_the_last_batch() -> None:
    x, y = data()
    samples = [{"x": x[i], "y": y[i], "name": str(i)} for i in range(N)]
    loader: Any = DataLoader(samples, batch_size=4)  # type: ignore[arg-type]
    op = hypergrad.minibatch_hessian(lambda p, b: mean_loss(p, b["x"], b["y"]), params(), loader)
    expected = hypergrad.hessian(mean_loss, params(), x, y).to_dense()
    assert relative_error(op.to_dense(), expected) <= 1e-12


@pytest.mark.parametrize("own", [False, True])
def test_the_parts_of_a_shuffled_loader_are_those_of_a_pass(own: bool) -> None:
    source = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True, generator=source)
    op = hypergrad.minibatch_hessian(dropout_loss, params(), loader)
    sampled = op.sampled(generator=generator(0))
    v = {"w": gaussian(3, 2), "b": gaussian(2)}
    mean = sum(
        size / N * op.layout.flatten(part @ v)
        for part, size in zip(sampled.operators, RAGGED, strict=True)
    )
    assert isinstance(mean, Tensor)
    assert relative_error(mean, op.layout.flatten(op @ v)) <= 1e-12


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("made_anew", [False, True])
def test_workers_that_persist_give_one_order_from_the_first_pass_on(
    own: bool, made_anew: bool
) -> None:
    # They draw their seed once, before the order of the first pass.
    source = torch.Generator().manual_seed(3) if own else None
    loader: Any = DataLoader(
        TensorDataset(*data()),
        batch_size=4,
        shuffle=True,
        generator=source,
        num_workers=1,
        persistent_workers=True,
    )
    sources = [torch.default_generator] if source is None else [torch.default_generator, source]
    before = [source.get_state() for source in sources]
    batches: Any = (lambda: loader) if made_anew and not own else loader
    op = hypergrad.minibatch_hessian(dropout_loss, params(), batches, probe=False)
    v = {"w": gaussian(3, 2), "b": gaussian(2)}
    first, second = op @ v, op @ v
    assert torch.equal(first["w"], second["w"])
    if batches is loader:
        mean = op.sampled().mean @ v
        assert relative_error(mean["w"], first["w"]) <= 1e-12
    for source, state in zip(sources, before, strict=True):
        assert torch.equal(source.get_state(), state)
