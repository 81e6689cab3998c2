"""Networks of one's own: any module as a function of its parameters, and its Jacobian."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad_rl import BLPO as BLPOAgent
from hypergrad_rl import (
    CheckpointError,
    Networks,
    RunDirectoryError,
    evaluate,
    export,
    load_policy,
    make_config,
    train,
)
from hypergrad_rl.errors import ConfigError
from hypergrad_rl.functional import flatten, shapes_of, unflatten
from hypergrad_rl.inverse import critic_response, inverse_hvp
from hypergrad_rl.modules import ModuleJacobian, ModuleNetwork
from hypergrad_rl.networks import (
    CategoricalPolicy,
    Critic,
    GaussianPolicy,
    critic_value,
    init_critic,
    init_mlp,
)
from hypergrad_rl.trainer import make_agent, make_collector
from hypergrad_rl.value_jacobian import ValueJacobian
from tests.rl import small

OBS = 12


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


@pytest.mark.parametrize("hidden", [(), (5,), (4, 6), (3, 5, 4), (3, 4, 5, 2)], ids=str)
@pytest.mark.parametrize("reordered", [False, True])
def test_columns_of_the_default_critics_hessian(hidden: tuple[int, ...], reordered: bool) -> None:
    params = {
        name: (leaf + 0.3 * torch.randn(leaf.shape, generator=seeded(1))).double()
        for name, leaf in init_critic(3, hidden, seeded(0)).items()
    }
    if reordered:
        params = dict(reversed(params.items()))
    obs = torch.randn(7, 3, generator=seeded(2), dtype=torch.float64)
    targets = 5 + torch.randn(7, generator=seeded(3), dtype=torch.float64)  # far from the values
    w, shapes = flatten(params), shapes_of(params)

    def loss(w: Tensor) -> Tensor:
        return (critic_value(unflatten(w, shapes), obs) - targets).square().mean()

    expected = torch.func.hessian(loss)(w)
    order = torch.randperm(len(w), generator=seeded(4))
    units = torch.eye(len(w), dtype=torch.float64)[order]
    columns = ValueJacobian(params, obs).hessian_columns(targets, units)
    error = (columns - expected[order]).abs().max() / expected.abs().max()
    assert error <= 1e-14  # sums of 7 products of layers


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
    weights = torch.randn(5, generator=seeded(3), dtype=torch.float64)
    pulled = torch.cat([leaf.flatten() for leaf in jacobian.pull(weights).values()])
    torch.testing.assert_close(pulled, dense.T @ weights, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(jacobian.values, critic(params, obs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        jacobian.first(3).times(v), dense[:3] @ flat_v, rtol=1e-10, atol=1e-12
    )


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
BLPO: dict[str, Any] = {**SMALL, "nested_steps": 2, "rank": 6, "damping": 10.0}
# Damped above the Hessian's negative curvature, at which CG stops with nothing.
PAPER = {**small.PAPER, "damping": 200.0}


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_the_response_of_any_critic_is_that_of_dense_matrices(curvature: str) -> None:
    value_fn = Critic(lambda obs_dim: layer_norm(obs_dim).double())
    w = value_fn.init(OBS, (), seeded(0))
    _, _, batch = small.small_problem()
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
        assert result.metrics[-1]["correction_ratio"] > 0


def test_a_module_of_tanh_layers_trains_as_the_default_does() -> None:
    """Given the same first parameters, they stay the same up to rounding."""
    config = make_config("blpo", **{**BLPO, "hidden": (8,)})

    def net(head_gain: float) -> Callable[..., nn.Module]:
        def make(obs_dim: int, out_dim: int = 1) -> nn.Module:
            layers = nn.Sequential(nn.Linear(obs_dim, 8), nn.Tanh(), nn.Linear(8, out_dim))
            params = init_mlp([obs_dim, 8, out_dim], head_gain, seeded(1))
            with torch.no_grad():
                for mine, leaf in zip(layers.parameters(), params.values(), strict=True):
                    mine.copy_(leaf)
            return layers

        return make

    collector = make_collector(config, seeded(0), None)
    mine = make_agent(config, collector, seeded(0), None, Networks(net(0.01), net(1.0)))
    rollout, _ = collector.collect(mine.actor)
    default = BLPOAgent(config, CategoricalPolicy(2), 4, seeded(0))
    default.actor_state, default.critic_state = mine.actor_state, mine.critic_state
    default.generator.set_state(mine.generator.get_state())
    start = mine.actor_state.params
    ours, theirs = mine.update(rollout, 0.0), default.update(rollout, 0.0)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    step = (mine.actor_state.params - start).norm()
    assert (mine.actor_state.params - default.actor_state.params).norm() < 1e-3 * step


class Pixels(nn.Module):
    """A small convolutional network on MinAtar's 10 x 10 x 4 observations, which come flat."""

    def __init__(self, obs_dim: int, out_dim: int = 1) -> None:
        super().__init__()
        assert obs_dim == 400
        self.conv, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4 * 8 * 8, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 10, 10, 4).movedim(-1, 1)
        y: Tensor = self.head(self.conv(x).relu().flatten(1))
        return y


@pytest.mark.parametrize("settings", [{}, PAPER])
def test_a_convolutional_network_plays_breakout(settings: dict[str, Any]) -> None:
    pytest.importorskip("minatar")
    config = make_config("blpo", **{**BLPO, **settings, "env": "MinAtar/Breakout-v1"})
    result = train(config, networks=Networks(Pixels, Pixels))
    assert result.agent.critic["conv.weight"].shape == (4, 4, 3, 3)
    assert result.metrics[-1]["correction_ratio"] > 0


def test_continuous_actions() -> None:
    config = make_config("ppo", **{**SMALL, "env": "Pendulum-v1", "normalize_observations": True})
    actor = train(config, networks=Networks(actor=layer_norm)).agent.actor
    assert list(actor)[-1] == "log_std"
    assert actor["log_std"].item() != 0


def test_a_run_is_resumed_evaluated_and_exported_with_its_networks(tmp_path: Path) -> None:
    def fail(update: int, metrics: dict[str, float], agent: Any) -> None:
        raise ZeroDivisionError

    config, run = make_config("ppo", **SMALL), tmp_path / "run"
    whole = train(config, networks=LAYER_NORM).agent
    with pytest.raises(ZeroDivisionError):
        train(config, run, networks=LAYER_NORM, callbacks=[fail])
    for other in (Networks(), Networks(actor=layer_norm)):
        with pytest.raises(RunDirectoryError, match="trained with a network of one's own as"):
            train(config, run, resume=True, networks=other)
    with pytest.raises(ZeroDivisionError):  # at the second update again, after the first
        train(config, run, resume=True, networks=LAYER_NORM, callbacks=[fail])
    agent = train(config, run, resume=True, networks=LAYER_NORM).agent
    assert torch.equal(agent.actor_state.params, whole.actor_state.params)
    assert torch.equal(agent.critic_state.params, whole.critic_state.params)

    actor = Networks(actor=layer_norm)  # the critic is needed no more
    policy, obs = load_policy(run, networks=actor), torch.randn(7, 4, generator=seeded(0))
    torch.testing.assert_close(policy(obs), agent.policy.act(agent.actor, obs, None))
    exported = torch.export.load(export(run, networks=actor)).module()
    assert torch.equal(exported(obs), policy(obs))
    assert len(evaluate(run, 2, networks=actor)) == 2
    with pytest.raises(RunDirectoryError, match="of one's own as actor") as missing:
        evaluate(run, 2)
    assert "\n" not in str(missing.value)
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        load_policy(run, networks=Networks(lambda obs_dim, out_dim: nn.Linear(obs_dim, out_dim)))


def test_a_default_run_is_not_taken_for_one_with_networks(tmp_path: Path) -> None:
    train(make_config("ppo", **SMALL), tmp_path)
    with pytest.raises(RunDirectoryError, match="trained with the default network as actor"):
        evaluate(tmp_path, 1, networks=LAYER_NORM)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, PAPER])
def test_compiled_updates_are_the_eager_ones(options: dict[str, Any]) -> None:
    config = make_config("blpo", **{**BLPO, **options, "nested_steps": 1, "num_steps": 8})
    agents = []
    for backend in (None, "aot_eager"):
        collector = make_collector(config, seeded(0), None)
        agents.append(make_agent(config, collector, seeded(0), backend, LAYER_NORM))
    rollout, _ = collector.collect(agents[0].actor)
    eager, compiled = (agent.update(rollout, 0.0) for agent in agents)
    assert eager == pytest.approx(compiled, rel=1e-3, abs=1e-5)
    for one, other in (
        (agents[0].actor_state, agents[1].actor_state),
        (agents[0].critic_state, agents[1].critic_state),
    ):
        assert (one.params - other.params).norm() < 1e-5 * one.params.norm()
