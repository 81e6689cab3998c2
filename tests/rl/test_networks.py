"""Networks of one's own: any module as a function of its parameters, and its Jacobian."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad_rl import (
    Networks,
    make_config,
    train,
)
from hypergrad_rl.errors import ConfigError
from hypergrad_rl.functional import flatten, shapes_of, unflatten
from hypergrad_rl.inverse import critic_response, inverse_hvp
from hypergrad_rl.networks import (
    CategoricalPolicy,
    Critic,
    GaussianPolicy,
    ModuleJacobian,
    ModuleNetwork,
    ValueJacobian,
    init_critic,
)
from tests.rl.small import small_problem

OBS = 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tanh_net(obs_dim: int, out_dim: int = 1) -> nn.Module:
    layers = [nn.Linear(obs_dim, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, out_dim)]
    return nn.Sequential(*layers).double()


def conv_net(obs_dim: int, out_dim: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(-1, (1, obs_dim)), nn.Conv1d(1, 3, 4), nn.ReLU(), nn.Flatten(-2),
        nn.LayerNorm(3 * (obs_dim - 3)), nn.Linear(3 * (obs_dim - 3), out_dim),
    ).double()  # fmt: skip


def test_the_jacobian_of_a_module_is_that_of_the_layers() -> None:
    params = {n: p.double() for n, p in init_critic(OBS, (6, 5), seeded(0)).items()}
    names = [f"{2 * i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    renamed = dict(zip(names, params.values(), strict=True))
    network = ModuleNetwork(lambda: tanh_net(OBS), 1, seeded(1))
    obs = torch.randn(7, OBS, generator=seeded(2), dtype=torch.float64)
    v = {n: torch.randn(p.shape, generator=seeded(3), dtype=p.dtype) for n, p in params.items()}
    factored, module = ValueJacobian(params, obs), ModuleJacobian(network, renamed, obs)
    torch.testing.assert_close(module.kernel(), factored.kernel(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        module.times(dict(zip(names, v.values(), strict=True))),
        factored.times(v), rtol=1e-12, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("make", [tanh_net, conv_net])
def test_the_jacobian_of_any_module(make: Callable[[int], nn.Module]) -> None:
    critic = Critic(make)
    params = critic.init(OBS, (), seeded(0))
    obs = torch.randn(5, OBS, generator=seeded(1), dtype=torch.float64)
    rows = []
    for state in obs:  # reverse mode, one state at a time
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        grads = torch.autograd.grad(critic(leaves, state), list(leaves.values()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    dense = torch.stack(rows)
    v = {n: torch.randn(p.shape, generator=seeded(2), dtype=p.dtype) for n, p in params.items()}
    flat_v = torch.cat([leaf.flatten() for leaf in v.values()])
    jacobian = critic.jacobian(params, obs)
    torch.testing.assert_close(jacobian.kernel(), dense @ dense.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(jacobian.times(v), dense @ flat_v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [CategoricalPolicy, GaussianPolicy])
def test_policies_with_a_module(kind: type[CategoricalPolicy] | type[GaussianPolicy]) -> None:
    policy = kind(3, lambda obs_dim, out_dim: conv_net(obs_dim, out_dim).float())
    params = policy.init(OBS, (), seeded(0))
    obs = torch.randn(2, 4, OBS, generator=seeded(1))
    noise = policy.noise(2, 4, seeded(2))
    actions = policy.act(params, obs, noise)
    log_probs, entropy = policy.log_prob(params, obs, actions)
    assert log_probs.shape == entropy.shape == (2, 4)
    taken = policy.numpy_step(params)(obs[0].numpy(), noise[0].numpy())
    torch.testing.assert_close(torch.from_numpy(taken), actions[0])


def test_a_seed_decides_a_modules_parameters_and_disturbs_no_other_numbers() -> None:
    before = torch.get_rng_state()
    first, again, other = (Critic(conv_net).init(OBS, (), seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


class NamedLogStd(nn.Linear):
    def __init__(self) -> None:
        super().__init__(OBS, 1)
        self.log_std = nn.Parameter(torch.zeros(1))


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(-1)


class RandomFeatures(nn.Linear):
    """Weights that no gradient changes, drawn anew whenever it is made."""

    def __init__(self) -> None:
        super().__init__(OBS, 1)
        self.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(OBS, 1), nn.BatchNorm1d(1)), "LayerNorm instead"),
        (lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(OBS, 1)), "the layer Dropout"),
        (nn.Identity, "expected at least one"),
        (NamedLogStd, "none named log_std"),
        (RandomFeatures, "weight is not trained, and not the same"),
        (lambda: nn.Linear(OBS, 2), r"of shape \(4, 2\) .*: expected \(4, 1\)"),
        (lambda: TwoOutputs(OBS, 2), r"of shape \(4,\) .*: expected \(4, 1\)"),
    ],
)
def test_modules_that_cannot_serve_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    def use() -> Tensor:
        network = ModuleNetwork(make, 1, seeded(0))
        return network(network.params, torch.zeros(4, OBS))

    with pytest.raises(ConfigError, match=message):
        use()


def test_frozen_parts_stay_as_they_are_made() -> None:
    def frozen() -> nn.Module:
        first = nn.Linear(OBS, 4).requires_grad_(False)
        nn.init.ones_(first.weight)
        nn.init.zeros_(first.bias)
        return nn.Sequential(first, nn.Linear(4, 1))

    network = ModuleNetwork(frozen, 1, seeded(0))
    assert list(network.params) == ["1.weight", "1.bias"]
    zero = {n: torch.zeros_like(p) for n, p in network.params.items()}
    ones = zero | {"1.weight": torch.ones(1, 4)}
    assert network(ones, torch.ones(1, OBS)).item() == 4 * OBS


def layer_norm(obs_dim: int, out_dim: int = 1) -> nn.Module:
    layers = [nn.Linear(obs_dim, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, out_dim)]
    return nn.Sequential(*layers)


LAYER_NORM = Networks(layer_norm, layer_norm)
SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 16, "total_steps": 64, "epochs": 1, "compile": False,
}  # fmt: skip
BLPO: dict[str, Any] = {**SMALL, "nested_steps": 2, "rank": 6, "damping": 1.0}
PAPER: dict[str, Any] = {
    "curvature": "hessian", "cross_term": "paper", "outer_objective": "advantage",
    "sketch": "columns", "correction_bound": 1.4,
}  # fmt: skip


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_the_response_of_any_critic_is_that_of_dense_matrices(curvature: str) -> None:
    value_fn = Critic(lambda obs_dim: layer_norm(obs_dim).double())
    w = value_fn.init(OBS, (), seeded(0))
    _, _, batch = small_problem()
    obs = torch.randn(*batch.targets.shape, OBS, generator=seeded(1), dtype=torch.float64)
    batch.obs = obs
    shapes, point = shapes_of(w), flatten(w)

    def values(flat: Tensor) -> Tensor:
        return value_fn(unflatten(flat, shapes), obs).reshape(-1)

    def loss(flat: Tensor) -> Tensor:
        return (batch.targets.reshape(-1) - values(flat)).square().mean()

    # Reverse mode alone, row by row: the solver's own products may go forward.
    jacobian = torch.autograd.functional.jacobian(values, point)  # type: ignore[no-untyped-call]
    dense = 2 / len(obs.flatten(0, -2)) * jacobian.T @ jacobian
    if curvature == "hessian":
        dense = torch.autograd.functional.hessian(loss, point)  # type: ignore[no-untyped-call]
    v = torch.randn(point.shape, generator=seeded(2), dtype=point.dtype)
    config: Any = make_config("blpo", **{**BLPO, "solver": "exact", "curvature": curvature,
                                         "damping": 3.0})  # fmt: skip
    x = torch.linalg.solve(dense + 3.0 * torch.eye(len(v), dtype=v.dtype), v)
    tree = unflatten(v, shapes)
    solved = inverse_hvp(w, batch, tree, config, value_fn=value_fn).value
    torch.testing.assert_close(solved, x, rtol=1e-8, atol=1e-10)
    u = critic_response(w, batch, tree, config, value_fn=value_fn).value
    torch.testing.assert_close(u.reshape(-1), jacobian @ x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("ppo", SMALL),
        *(
            ("blpo", {**BLPO, "solver": solver, **options})
            for solver in ("nystrom", "cg", "exact")
            for options in ({}, PAPER)
        ),
        ("blpo", {**BLPO, "sketch": "diagonal", "sketch_every": 2}),
    ],
)
def test_networks_of_ones_own_train(algo: str, settings: dict[str, Any]) -> None:
    config = make_config(algo, **settings)
    result = train(config, networks=LAYER_NORM)
    assert list(result.agent.actor) == list(result.agent.critic)
    before: list[dict[str, Tensor]] = []
    train(config, networks=LAYER_NORM, callbacks=[
        lambda update, metrics, agent: before.append({**agent.critic, "log": agent.actor["0.bias"]})
    ])  # fmt: skip
    for name in ("1.weight", "3.bias"):  # of the LayerNorm, and of the head
        assert not torch.equal(before[0][name], before[-1][name])
        assert torch.equal(before[-1][name], result.agent.critic[name])  # the same seed, again
    if settings.get("solver") == "exact":
        assert result.metrics[-1]["ihvp_relative_residual"] < 1e-5
    if algo == "blpo":
        # CG may end at once, in negative curvature: then it is 0.
        assert result.metrics[-1]["correction_ratio"] >= 0
