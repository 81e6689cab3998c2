"""The models that people have, against dense float64 references of torch.func."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from tests.strategies import F32, F64, flat, generator, relative_error, tree_like

MODES = ("auto", "reverse_over_reverse", "forward_over_reverse")
#: Relative, in the Frobenius norm.  Rounding is a few eps (1e-16, 6e-8, 4e-3) at these sizes.
TOLERANCES = {F64: 1e-10, F32: 1e-4, torch.bfloat16: 0.05}
BATCH, CLASSES, SEED = 7, 3, 11
RAGGED = [3, 3, 1]


class Last(nn.Module):
    """Classes from the last output of a recurrent layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


class Transformer(nn.Module):
    """Causal attention written by hand, then PyTorch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.encoder = nn.TransformerEncoderLayer(
            4, 2, 4, dropout=0.0, activation=F.gelu, batch_first=True
        )
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 2)).transpose(1, 3).unbind(dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2)
        return self.out(self.encoder(x).mean(dim=1))


class Tied(nn.Module):
    """One matrix embeds the tokens and decodes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.embed(tokens).tanh().mean(dim=1))


@dataclass(frozen=True)
class Model:
    """A network, the shape of one input, and what is special about it.

    Attributes:
        normalises: whether it has a layer over which torch.func.hessian (jacfwd of jacrev) is
            neither symmetric nor right in PyTorch 2.13; jacfwd of grad is.
        couples: whether an example's loss depends on the others of its batch.
        draws: whether it draws random numbers.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False
    normalises: bool = False
    couples: bool = False
    draws: bool = False


ZOO = {
    "mlp": Model(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (3,)),
    "in_place": Model(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.SiLU(inplace=True), nn.Linear(5, CLASSES)), (3,)
    ),
    "cnn": Model(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, CLASSES)
        ),
        (1, 6, 6),
    ),
    "rnn": Model(lambda: Last(nn.RNN(2, 3, batch_first=True), 3), (3, 2)),
    "lstm": Model(lambda: Last(nn.LSTM(2, 2, batch_first=True), 2), (3, 2)),
    "gru": Model(lambda: Last(nn.GRU(2, 2, batch_first=True), 2), (3, 2)),
    "transformer": Model(Transformer, (3, 4), normalises=True),
    "tied": Model(Tied, (4,), tokens=True),
    "batchnorm_dropout": Model(
        lambda: nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES)
        ),
        (3,),
        normalises=True,
        couples=True,
        draws=True,
    ),
    "batchnorm_dropout_eval": Model(
        lambda: nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES)
        ).eval(),
        (3,),
        normalises=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, and numbers that every dtype holds exactly, so that one reference serves all."""

    module: nn.Module
    params: dict[str, Tensor]
    x: Tensor
    y: Tensor

    def model(self, p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, p, (x,))

    def loss(self, p: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(p, x), y)

    def to(self, dtype: torch.dtype) -> Case:
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        # The buffers too: the statistics of BatchNorm in eval mode.
        module = copy.deepcopy(self.module).to(dtype)
        return Case(module, {k: p.to(dtype) for k, p in self.params.items()}, x, self.y)


def case(name: str) -> Case:
    spec = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = spec.make()
        module = module.to(torch.bfloat16).double()
    params = {k: p.detach() for k, p in module.named_parameters()}
    source = generator(SEED)
    x: Tensor = torch.randn(BATCH, *spec.shape, generator=source).to(torch.bfloat16).double()
    if spec.tokens:
        x = torch.randint(CLASSES, (BATCH, *spec.shape), generator=source)
    y = torch.randint(CLASSES, (BATCH,), generator=source)
    return Case(module, params, x, y)


def seeded(spec: Model, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same masks in each evaluation, without the library's help."""
    if not spec.draws:
        return loss

    def with_masks(*args: Any) -> Tensor:
        torch.manual_seed(SEED)
        return loss(*args)

    return with_masks


def dense(name: str, x: Tensor, y: Tensor) -> Tensor:
    spec, this = ZOO[name], case(name)
    loss = seeded(spec, lambda v: this.loss(tree_like(this.params, v), x, y))
    state = torch.get_rng_state()
    # Running statistics, which BatchNorm moves in training mode, have no place in a reference.
    for layer in this.module.modules():
        if isinstance(layer, nn.BatchNorm1d) and layer.training:
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    with sdpa_kernel([SDPBackend.MATH]):
        if spec.normalises:
            matrix = torch.func.jacfwd(torch.func.grad(loss), randomness="same")(flat(this.params))
        else:
            matrix = torch.func.hessian(loss)(flat(this.params))
    torch.set_rng_state(state)
    return matrix


@cache
def reference(name: str) -> Tensor:
    this = case(name)
    matrix = dense(name, this.x, this.y)
    assert relative_error(matrix, matrix.T) <= 1e-14
    return matrix


def names(*without: str) -> list[str]:
    return [name for name in ZOO if name not in without]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("auto", F64),
        ("auto", F32),
        ("auto", torch.bfloat16),
        ("reverse_over_reverse", F64),
        ("forward_over_reverse", F64),
        ("forward_over_reverse", F32),
        pytest.param("reverse_over_reverse", F32, marks=pytest.mark.slow),
        pytest.param("reverse_over_reverse", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("forward_over_reverse", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_hessian(name: str, dtype: torch.dtype, mode: Any) -> None:
    this = case(name).to(dtype)
    torch.manual_seed(SEED)
    operator = hypergrad.hessian(this.loss, this.params, this.x, this.y, mode=mode)
    assert relative_error(operator.to_dense(), reference(name)) <= TOLERANCES[dtype]
    if dtype == F64:
        assert hypergrad.check_symmetric(operator) <= 1e-14


@pytest.mark.parametrize("name", names("batchnorm_dropout"))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_minibatch_hessian(name: str, dtype: torch.dtype) -> None:
    this = case(name).to(dtype)
    batches = list(zip(torch.split(this.x, RAGGED), torch.split(this.y, RAGGED), strict=True))
    operator = hypergrad.minibatch_hessian(this.loss, this.params, batches)
    assert relative_error(operator.to_dense(), reference(name)) <= TOLERANCES[dtype]


def test_minibatch_hessian_of_a_model_that_couples_examples() -> None:
    this = case("batchnorm_dropout")
    this.module[3].p = 0.0  # type: ignore[index]
    sizes = [4, 3]
    batches = list(zip(torch.split(this.x, sizes), torch.split(this.y, sizes), strict=True))
    operator = hypergrad.minibatch_hessian(this.loss, this.params, batches)
    parts = [hypergrad.hessian(this.loss, this.params, *batch).to_dense() for batch in batches]
    assert relative_error(operator.to_dense(), (4 * parts[0] + 3 * parts[1]) / 7) <= 1e-12
    # That is the Hessian of the mean of the minibatches' losses, not of the full batch's.
    whole = hypergrad.hessian(this.loss, this.params, this.x, this.y)
    assert relative_error(operator.to_dense(), whole.to_dense()) > 1e-2


@pytest.mark.parametrize("name", ZOO)
def test_gauss_newton(name: str) -> None:
    spec, this = ZOO[name], case(name)
    torch.manual_seed(SEED)
    operator = hypergrad.ggn(this.model, F.cross_entropy, this.params, this.x, this.y)
    got = operator.to_dense()
    for layer in this.module.modules():
        if isinstance(layer, nn.BatchNorm1d) and layer.training:
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None

    def outputs(v: Tensor) -> Tensor:
        return this.model(tree_like(this.params, v), this.x).reshape(-1)

    point = flat(this.params)
    with sdpa_kernel([SDPBackend.MATH]):
        jacobian = torch.func.jacfwd(seeded(spec, outputs), randomness="same")(point)
        probabilities = seeded(spec, outputs)(point).reshape(BATCH, CLASSES).softmax(dim=1)
    inner = torch.diag_embed(probabilities)  # the Hessian of cross-entropy, example by example
    inner = inner - probabilities[:, :, None] * probabilities[:, None, :]
    blocks = jacobian.reshape(BATCH, CLASSES, -1)
    expected = torch.einsum("bim,bij,bjn->mn", blocks, inner, blocks) / BATCH
    assert relative_error(got, expected) <= 1e-10
    assert float(torch.linalg.eigvalsh(got)[0]) >= -1e-12


@pytest.mark.parametrize("name", names("batchnorm_dropout"))
def test_minibatch_gauss_newton(name: str) -> None:
    this = case(name)
    batches = list(zip(torch.split(this.x, RAGGED), torch.split(this.y, RAGGED), strict=True))
    operator = hypergrad.minibatch_ggn(this.model, F.cross_entropy, this.params, batches)
    whole = hypergrad.ggn(this.model, F.cross_entropy, this.params, this.x, this.y)
    assert relative_error(operator.to_dense(), whole.to_dense()) <= 1e-10


@pytest.mark.parametrize("name", ZOO)
def test_nothing_of_the_model_s_is_modified(name: str) -> None:
    this = case(name)
    before = {key: value.clone() for key, value in this.module.state_dict().items()}
    flags = [p.requires_grad for p in this.module.parameters()]
    own = dict(this.module.named_parameters())
    for mode in MODES:
        operator = hypergrad.hessian(this.loss, own, this.x, this.y, mode=mode)  # type: ignore[arg-type]
        operator @ this.params
    after = this.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [p.requires_grad for p in this.module.parameters()] == flags
    assert all(p.grad is None for p in this.module.parameters())
