"""Layers and kernels of real models that PyTorch differentiates once only, or not at all alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import hypergrad
from hypergrad import LossError
from tests.strategies import F64, flat, gaussian, relative_error, tree_like

MODES = ("auto", "reverse_over_reverse", "forward_over_reverse")
REVERSE = MODES[:2]


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def loss_of(module: nn.Module) -> Callable[..., Tensor]:
    def loss(p: Any, *inputs: Tensor) -> Tensor:
        outputs = torch.func.functional_call(module, p, inputs)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs.square().square().mean() + outputs.sum()

    return loss


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def reference(loss: Callable[..., Tensor], tree: Any, *inputs: Tensor) -> Tensor:
    """The dense Hessian by torch.func, with attention that it can differentiate.

    Not torch.func.hessian: it is jacfwd of jacrev, whose inner vmap gives a matrix over BatchNorm
    and LayerNorm that is neither symmetric nor what differences of gradients give (PyTorch 2.13).
    """
    gradient = torch.func.grad(lambda vector: loss(tree_like(tree, vector), *inputs))
    with sdpa_kernel([SDPBackend.MATH]):
        return torch.func.jacfwd(gradient)(flat(tree))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, **self.options)


class Forced(nn.Module):
    """Asks for a fused kernel itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return self.inner(x)


# Attention --------------------------------------------------------------------------------------


def test_fused_attention_has_no_second_derivative_by_itself() -> None:
    module = made(Attention)
    leaves = list(module.parameters())
    grads = torch.autograd.grad(module(gaussian(2, 3, 4)).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention"):
        torch.autograd.grad(grads[0].sum(), leaves)


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "plain": Attention,
    "causal": lambda: Attention(is_causal=True),
    "forced": Forced,
    "multi_head": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "encoder_in_eval": lambda: nn.TransformerEncoderLayer(
        4, 2, 8, batch_first=True, activation=F.gelu
    ).eval(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_works_out_of_the_box(name: str, mode: Any) -> None:
    module, x = made(ATTENTION[name]), gaussian(2, 3, 4)
    inputs = (x, x, x) if name == "multi_head" else (x,)
    plain = made(Attention) if name == "forced" else module
    loss, p = loss_of(module), parameters(module)
    with torch.no_grad():  # where inference-only kernels would be taken
        got = hypergrad.hessian(loss, p, *inputs, mode=mode).to_dense()
    expected = reference(loss_of(plain), parameters(plain), *inputs)
    assert relative_error(got, expected) <= 1e-12


def test_attention_in_a_scripted_function() -> None:
    def attend(w: Tensor, x: Tensor) -> Tensor:
        q = (x @ w).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        scripted = torch.jit.script(attend)
    w, x = gaussian(4, 4), gaussian(2, 3, 4)
    got = hypergrad.hessian(scripted, w, x).to_dense()
    assert relative_error(got, reference(attend, w, x)) <= 1e-12


def test_attention_in_a_gauss_newton_operator() -> None:
    module, x = made(Forced), gaussian(2, 3, 4)
    p = parameters(module)

    def model(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x,))

    got = hypergrad.ggn(model, lambda out: out.square().sum(), p, x).to_dense()
    plain = made(Attention)
    with sdpa_kernel([SDPBackend.MATH]):
        jacobian = torch.func.jacrev(
            lambda vector: torch.func.functional_call(
                plain, tree_like(parameters(plain), vector), (x,)
            ).reshape(-1)
        )(flat(parameters(plain)))
    assert relative_error(got, 2 * jacobian.T @ jacobian) <= 1e-12


@pytest.mark.slow
def test_a_compiled_solve_over_attention() -> None:
    module, x = made(Attention), gaussian(2, 3, 4)
    p = parameters(module)
    operator = hypergrad.hessian(loss_of(module), p, x)
    solver = hypergrad.CG(rtol=0.0, max_iters=1)
    torch._dynamo.reset()
    solved = torch.compile(
        lambda v: hypergrad.solve(operator, v, solver, damping=1.0).value, backend="aot_eager"
    )
    expected = hypergrad.solve(operator, p, solver, damping=1.0).value
    got = solved(p)
    for name in p:
        assert relative_error(got[name], expected[name]) <= 1e-10


def switches() -> tuple[Any, ...]:
    cuda: Any = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


def test_the_caller_s_switches_are_put_back_also_after_an_error() -> None:
    before = switches()
    seen = []

    def loss(p: Tensor) -> Tensor:
        seen.append(switches())
        if len(seen) > 1:
            raise KeyError("mine")
        return (p**4).sum()

    operator = hypergrad.hessian(loss, gaussian(3), mode="forward_over_reverse")
    with pytest.raises(KeyError, match="mine"):
        operator @ gaussian(3)
    assert switches() == before
    assert seen[0][:4] == seen[1][:4] == (False, False, False, True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        inside = switches()
        hypergrad.hessian(lambda p: (p**4).sum(), gaussian(3)) @ gaussian(3)
        assert switches() == inside


# Recurrent layers -------------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """What is switched on when a recurrent layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            self.seen.append((torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("mode", MODES)
def test_recurrent_layers_run_without_fused_kernels(layer: Any, mode: Any) -> None:
    # In float32, which has a fused LSTM on the CPU as well.
    module = made(lambda: layer(3, 4)).float()
    x = gaussian(2, 2, 3).float()
    with Recorder() as recorder:
        got = hypergrad.hessian(loss_of(module), parameters(module), x, mode=mode).to_dense()
    assert recorder.seen
    assert set(recorder.seen) == {(False, False)}
    wide = copy.deepcopy(module).double()
    expected = reference(loss_of(wide), parameters(wide), x.double())
    assert relative_error(got, expected) <= 1e-5


# Random layers ----------------------------------------------------------------------------------


class Permuted(nn.Module):
    """Drops entries of a tensor whose memory is not in the order of its indices."""

    def __init__(self, inplace: bool = False, layer: Any = nn.Dropout) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), layer(0.4, inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x).transpose(0, 1))


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": Permuted,
    "in_place": lambda: Permuted(inplace=True),
    "alpha": lambda: Permuted(layer=nn.AlphaDropout),
    "channels": lambda: Permuted(layer=nn.Dropout1d),
    "attention": lambda: Attention(dropout_p=0.4),
    "multi_head": lambda: nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 2, num_layers=2, dropout=0.4),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_draw_once(name: str) -> None:
    module, x = made(RANDOM[name]), gaussian(3, 2, 4)
    inputs = (x, x, x) if name == "multi_head" else (x,)
    loss, p = loss_of(module), parameters(module)
    modes: Any = MODES[1:]
    found = []
    for mode in modes:
        torch.manual_seed(5)
        operator = hypergrad.hessian(loss, p, *inputs, mode=mode, chunk_size=7)
        state = torch.get_rng_state()
        found.append(operator.to_dense())
        # Products draw nothing that is seen outside; one by one they are the same.
        assert torch.equal(torch.get_rng_state(), state)
        row = operator._apply(torch.eye(operator.layout.dim, dtype=F64)[3:4])[0]
        assert relative_error(row, found[-1][3]) <= 1e-12
    torch.manual_seed(5)
    loss(p, *inputs)
    assert torch.equal(torch.get_rng_state(), state)  # as after a plain evaluation
    assert relative_error(found[1], found[0]) <= 1e-12
    assert relative_error(found[0], found[0].T) <= 1e-12
    torch.manual_seed(6)
    other = hypergrad.hessian(loss, p, *inputs).to_dense()
    assert relative_error(other, found[0]) > 1e-3


@pytest.mark.parametrize("name", ["dropout", "encoder"])
def test_random_layers_in_a_gauss_newton_operator(name: str) -> None:
    module, x = made(RANDOM[name]), gaussian(3, 2, 4)

    def model(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x,))

    operator = hypergrad.ggn(model, lambda out: out.square().sum(), parameters(module), x)
    dense = operator.to_dense()
    assert relative_error(dense, dense.T) <= 1e-12  # J and J' have one mask
    assert relative_error(operator._apply(torch.eye(len(dense), dtype=F64)[2:3])[0], dense[2]) <= (
        1e-12
    )


def test_a_solve_over_dropout_is_differentiable() -> None:
    module, x = made(Permuted), gaussian(3, 2, 4)
    p = {name: leaf.requires_grad_() for name, leaf in parameters(module).items()}
    operator = hypergrad.hessian(loss_of(module), p, x)
    v = {name: torch.ones_like(leaf) for name, leaf in p.items()}
    value = hypergrad.solve(operator, v, hypergrad.CG(rtol=1e-12), damping=5.0).value
    grads = torch.autograd.grad(value["linear.weight"].sum(), list(p.values()))
    flat_p = torch.cat([leaf.detach().reshape(-1) for leaf in p.values()])

    def dense(point: Tensor) -> Tensor:  # with the masks of the operator
        with operator._evaluating():
            matrix = torch.func.jacrev(torch.func.grad(of_tree))
            curvature = matrix(point) + 5.0 * torch.eye(len(point), dtype=F64)
            return torch.linalg.solve(curvature, torch.ones_like(point))[:16].sum()

    def of_tree(q: Tensor) -> Tensor:
        return loss_of(module)({"linear.weight": q[:16].reshape(4, 4), "linear.bias": q[16:]}, x)

    expected = torch.func.grad(dense)(flat_p)
    assert relative_error(torch.cat([g.reshape(-1) for g in grads]), expected) <= 1e-8


# Layers with statistics -------------------------------------------------------------------------

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(4),
    "stateless": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
}


def normalised(name: str) -> nn.Module:
    unflatten = [nn.Unflatten(1, (4, 2))] if name == "instance" else []
    width = 8 if unflatten else 4
    return made(lambda: nn.Sequential(nn.Linear(3, width), *unflatten, NORMS[name](), nn.Tanh()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in NORMS if name != "sync"])
def test_running_statistics_stay_where_they_are(name: str, mode: Any) -> None:
    module, x = normalised(name), gaussian(5, 3)
    module(x)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    p = parameters(module)
    got = hypergrad.hessian(loss_of(module), p, x, mode=mode).to_dense()
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    # In training mode the batch's own statistics count: those of a layer that keeps none.
    stateless = normalised("instance" if name == "instance" else "stateless")
    for layer in stateless.modules():
        if isinstance(layer, nn.InstanceNorm1d):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    assert relative_error(got, reference(loss_of(stateless), p, x)) <= 1e-12


@pytest.mark.parametrize("name", ["batch", "cumulative", "instance"])
def test_statistics_in_evaluation_mode_and_in_gauss_newton(name: str) -> None:
    module, x = normalised(name), gaussian(5, 3)
    module(x)
    module.eval()
    p = parameters(module)
    got = hypergrad.hessian(loss_of(module), p, x, mode="forward_over_reverse").to_dense()
    assert relative_error(got, reference(loss_of(module), p, x)) <= 1e-12
    module.train()
    before = {key: value.clone() for key, value in module.state_dict().items()}

    def model(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x,))

    dense = hypergrad.ggn(model, lambda out: out.square().sum(), p, x).to_dense()
    assert float(torch.linalg.eigvalsh(dense)[0]) >= -1e-10 * float(dense.abs().max())
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_in_place_counts_of_one_s_own_are_let_through() -> None:
    def loss(p: Tensor) -> Tensor:
        count = torch.tensor(0)
        for _ in range(3):
            count.add_(1)
        return float(count) * (p**2).sum()

    assert torch.equal(hypergrad.hessian(loss, gaussian(2)).to_dense(), 6 * torch.eye(2, dtype=F64))


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"]
)
def test_spectral_norm_in_training_mode_is_refused_by_name(norm: Any) -> None:
    module = made(lambda: nn.Sequential(nn.Linear(3, 4), norm(nn.Linear(4, 2))))
    x, p = gaussian(5, 3), parameters(module)
    with pytest.raises(LossError, match=r"spectral_norm in training mode.*eval\(\)"):
        hypergrad.hessian(loss_of(module), p, x)
    module.eval()
    got = hypergrad.hessian(loss_of(module), p, x).to_dense()
    assert relative_error(got, got.T) <= 1e-12


def test_other_buffers_moved_in_place_are_named_in_forward_mode() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("steps").add_(1.0)
            return self.linear(x)

    module = made(Moving)
    operator = hypergrad.hessian(
        loss_of(module), parameters(module), gaussian(5, 3), mode="forward_over_reverse"
    )
    with pytest.raises(LossError, match=r"in place.*functional_call"):
        operator @ parameters(module)


# Compiled modules, custom functions, checkpoints ------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_module_runs_as_it_was_written(mode: Any) -> None:
    module, x = made(mlp), gaussian(5, 3)
    expected = reference(loss_of(module), parameters(module), x)
    torch._dynamo.reset()
    compiled: Any = torch.compile(module, backend="aot_eager")
    compiled(x)
    got = hypergrad.hessian(loss_of(compiled), parameters(compiled), x, mode=mode).to_dense()
    assert relative_error(got, expected) <= 1e-12
    # It still is a compiled one outside.
    p = parameters(compiled)
    leaf = p["_orig_mod.0.weight"].requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(compiled)(p, x), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), leaf)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = Once.apply(x)  # type: ignore[no-untyped-call]
        return output


def test_a_function_differentiable_once_is_refused_by_name() -> None:
    module = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(Cube(), nn.Linear(4, 1))))
    p, x = parameters(module), gaussian(5, 3)
    with pytest.raises(LossError, match=r"OnceBackward .*@once_differentiable.*layer '1.0', Cube"):
        hypergrad.hessian(loss_of(module), p, x)
    # Without the check the curvature would be short of a part, without a word.
    cube: Any = Once.apply
    (grad,) = torch.autograd.grad(cube(x.requires_grad_()).sum(), x, create_graph=True)
    assert not grad.requires_grad


class Ctc(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[1],), x.shape[0])
        targets = torch.ones(x.shape[1], 2, dtype=torch.long)
        return F.ctc_loss(x.log_softmax(-1), targets, lengths, torch.full((x.shape[1],), 2))


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("mode", REVERSE)
def test_a_kernel_without_a_second_derivative_is_named_with_its_layer(mode: Any, size: int) -> None:
    module = made(lambda: nn.Sequential(nn.Linear(3, 4), Ctc()))
    operator = hypergrad.hessian(loss_of(module), parameters(module), gaussian(6, 2, 3), mode=mode)
    with pytest.raises(LossError, match=r"aten::_ctc_loss_backward \(layer '1', Ctc\) has no sec"):
        operator._apply(gaussian(size, operator.layout.dim))


def test_a_kernel_without_a_second_derivative_is_named_under_torch_func() -> None:
    module = made(lambda: nn.Sequential(nn.Linear(3, 4), Ctc()))
    p, v = parameters(module), {name: torch.ones_like(x) for name, x in parameters(module).items()}

    def solved(x: Tensor) -> Tensor:
        operator = hypergrad.hessian(loss_of(module), p, x)
        return hypergrad.solve(operator, v, damping=1.0).value["0.weight"].sum()

    with pytest.raises(LossError, match=r"aten::_ctc_loss_backward"):
        torch.func.grad(solved)(gaussian(6, 2, 3))


def test_what_aot_autograd_compiled_is_named() -> None:
    from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped]

    compiled = aot_function(
        lambda w: (w**3).sum(), fw_compiler=lambda graph, inputs: make_boxed_func(graph)
    )
    operator = hypergrad.hessian(lambda p: compiled(p), gaussian(3))
    with pytest.raises(LossError, match=r"before torch.compile: compiled\._orig_mod"):
        operator @ gaussian(3)


def test_checkpoints_that_run_attention_again() -> None:
    module, x = made(Attention), gaussian(2, 3, 4)
    p = parameters(module)

    def loss(p: Any, x: Tensor, reentrant: bool = False) -> Tensor:
        def run(weight: Tensor, bias: Tensor) -> Tensor:
            own = {"project.weight": weight, "project.bias": bias}
            return torch.func.functional_call(module, own, (x,))

        outputs = torch.utils.checkpoint.checkpoint(run, *p.values(), use_reentrant=reentrant)
        return outputs.square().square().mean() + outputs.sum()

    got = hypergrad.hessian(loss, p, x).to_dense()
    assert relative_error(got, reference(loss_of(module), p, x)) <= 1e-12
    with pytest.raises(LossError, match="use_reentrant=False"):
        hypergrad.hessian(loss, p, x, True)


def test_checkpoints_that_run_batch_norm_again() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, p, before = gaussian(6, 3), parameters(module), copy.deepcopy(module.state_dict())

    def loss(p: Any, again: bool) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return torch.func.functional_call(module, p, (x,))

        outputs = (
            torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if again else run(x)
        )
        return outputs.square().mean()

    operator = hypergrad.hessian(loss, p, True)
    first = operator @ p
    module(x)  # the caller's own evaluation moves the statistics, and they stay moved
    moved = copy.deepcopy(module.state_dict())
    assert not torch.equal(moved["1.running_mean"], before["1.running_mean"])
    expected = hypergrad.hessian(loss, p, False) @ p
    for got in (first, operator @ p):
        assert relative_error(flat(got), flat(expected)) <= 1e-12
    for name, value in module.state_dict().items():
        assert torch.equal(value, moved[name]), name


# Parameters -------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.embed(x).tanh())


@pytest.mark.parametrize("mode", MODES)
def test_tied_weights_are_one_parameter(mode: Any) -> None:
    module, x = made(Tied), torch.tensor([0, 1, 1, 4])
    p = parameters(module)
    assert list(p) == ["embed.weight"]

    def untied(p: Any, x: Tensor) -> Tensor:
        w = p["embed.weight"]
        outputs = w[x].tanh() @ w.T
        return outputs.square().square().mean() + outputs.sum()

    got = hypergrad.hessian(loss_of(module), p, x, mode=mode).to_dense()
    assert relative_error(got, reference(untied, p, x)) <= 1e-12


def test_two_names_of_a_tied_parameter_are_refused() -> None:
    module = made(Tied)
    both = dict(module.named_parameters(remove_duplicate=False))
    with pytest.raises(LossError, match=r"under two names.*named_parameters"):
        hypergrad.hessian(loss_of(module), both, torch.tensor([0, 1]))


def test_a_frozen_part_stays_out() -> None:
    module, x = made(mlp), gaussian(5, 3)
    module[0].requires_grad_(False)  # type: ignore[index]
    head = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert list(head) == ["2.weight", "2.bias"]
    got = hypergrad.hessian(loss_of(module), head, x).to_dense()
    whole = reference(loss_of(module), parameters(module), x)
    assert relative_error(got, whole[16:, 16:]) <= 1e-12
