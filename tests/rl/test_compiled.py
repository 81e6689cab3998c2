"""The compiled update is the eager one: one graph, equal parameters, and what surrounds it."""

import dataclasses
import math
import warnings
from collections import Counter
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hypergrad_rl
from hypergrad_rl import BLPOConfig, ConfigError, Networks, PPOConfig, make_config, train
from hypergrad_rl.agent import Agent
from hypergrad_rl.cli import main
from hypergrad_rl.compiled import WORTH_COMPILING, Compiled, backend_of
from hypergrad_rl.functional import AdamState, adam
from hypergrad_rl.graph_passes import Once
from hypergrad_rl.hypergradient import critic_gradient
from hypergrad_rl.layers import affine, tanh_layer
from hypergrad_rl.networks import (
    CategoricalPolicy,
    Critic,
    GaussianPolicy,
    Policy,
    critic_value,
    init_critic,
)
from hypergrad_rl.objectives import value_loss
from hypergrad_rl.rollout import Rollout
from hypergrad_rl.value_jacobian import ValueJacobian
from tests.rl.small import PAPER

# PyTorch's own, on the way into its compiler.
INNER_DEPRECATIONS = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
OBS = 3
POLICIES: dict[str, Policy] = {"discrete": CategoricalPolicy(3), "continuous": GaussianPolicy(2)}
#: Small enough to compile in seconds.
SMALL: dict[str, Any] = {"num_envs": 2, "num_steps": 8, "hidden": (4,), "epochs": 1}
BLPO = {**SMALL, "nested_steps": 1, "rank": 3, "damping": 1.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {**SMALL, "num_minibatches": 2}),
    "ppo, time limits as ends": (
        "ppo",
        {**SMALL, "num_minibatches": 2, "bootstrap_truncated": False},
    ),
    "uneven minibatches": ("ppo", {**SMALL, "num_minibatches": 3}),
    "nested": ("nested", {**SMALL, "nested_steps": 2}),
    "blpo": ("blpo", {**BLPO, "outer_objective": "advantage", "cross_term": "full"}),
    "cg": ("blpo", {**BLPO, "solver": "cg", "cg_rtol": 0.0, "cg_iters": 3}),
    "cg, which looks at values": ("blpo", {**BLPO, "solver": "cg"}),
    "exact": ("blpo", {**BLPO, "solver": "exact"}),
    "identity": ("blpo", {**BLPO, "solver": "identity"}),
    "paper": (
        "blpo",
        {**BLPO, **PAPER, "bootstrap_truncated": False, "nested_steps": 4, "sketch": "columns"},
    ),
    "kept sketch": ("blpo", {**BLPO, "sketch_every": 2, "sketch": "diagonal"}),
    "rollout": ("blpo", {**BLPO, "curvature_batch": "rollout", "entropy_bonus": 0.01}),
    "preconditioned": ("blpo", {**BLPO, "solver": "nystrom_pcg"}),
    "automatic damping": ("blpo", {**BLPO, **PAPER, "damping": "auto"}),
}
#: Compared by default.
QUICK = (
    ("ppo", "discrete"),
    ("ppo, time limits as ends", "discrete"),
    ("blpo", "continuous"),
    ("paper", "discrete"),
)


def agent_of(arm: str, actions: str, backend: str | None, **settings: Any) -> Agent:
    algo, own = ARMS[arm]
    config = make_config(algo, **{**own, **settings})
    kind = hypergrad_rl.PPO if algo == "ppo" else hypergrad_rl.BLPO
    return kind(config, POLICIES[actions], OBS, torch.Generator().manual_seed(0), backend)


def made_up(agent: Agent, seed: int = 1) -> Rollout:
    """A rollout of random walks in which an episode or two end."""
    config, generator = agent.config, torch.Generator().manual_seed(seed)
    shape = config.num_envs, config.num_steps
    walk = 0.3 * torch.randn(*shape, OBS, generator=generator).cumsum(1)
    noise = agent.policy.noise(*shape, generator)
    done = torch.rand(shape, generator=generator) < 0.1
    return Rollout(
        obs=walk,
        actions=agent.policy.act(agent.actor, walk, noise),
        rewards=torch.rand(shape, generator=generator),
        next_obs=walk.roll(-1, dims=1),
        terminated=done & (torch.rand(shape, generator=generator) < 0.5),
        done=done,
    )


def assert_equal_after(eager: Agent, compiled: Agent, updates: int) -> None:
    """Parameters to 1e-5 relative, after updates on fresh rollouts each."""
    for seed in range(updates):
        rollout = made_up(eager, seed)
        stats, others = eager.update(rollout, 0.0), compiled.update(rollout, 0.0)
    for mine, other in (
        (eager.actor_state, compiled.actor_state),
        (eager.critic_state, compiled.critic_state),
    ):
        error = (mine.params - other.params).norm() / mine.params.norm()
        assert error < 1e-5
        assert mine.step == other.step > 0
    assert stats.keys() == others.keys()
    for name, value in stats.items():
        assert others[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    ("arm", "actions"),
    [
        *QUICK,
        *(
            pytest.param(arm, actions, marks=pytest.mark.slow)
            for arm in ARMS
            for actions in POLICIES
            if (arm, actions) not in QUICK
        ),
    ],
)
def test_the_update_is_one_graph_with_the_eager_result(arm: str, actions: str) -> None:
    """The backend runs the captured graph without a compiler; a graph break is an error."""
    eager, compiled = (agent_of(arm, actions, backend) for backend in (None, "aot_eager"))
    assert compiled.warm_up() > 0
    assert eager.warm_up() == 0
    for mine, other in zip(eager.actor_state, compiled.actor_state, strict=True):
        assert torch.equal(mine, other)  # warming up leaves no trace
    assert torch.equal(eager.generator.get_state(), compiled.generator.get_state())
    assert_equal_after(eager, compiled, updates=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings(INNER_DEPRECATIONS)
@pytest.mark.parametrize(
    ("arm", "actions"),
    [
        ("ppo", "discrete"),
        ("nested", "continuous"),
        ("blpo", "discrete"),
        ("cg", "continuous"),
        ("paper", "discrete"),  # whose mean over a single trajectory once crashed
        ("exact", "discrete"),  # of whose scaling no code could be made
    ],
)
def test_eager_and_compiled_agree_after_100_updates(arm: str, actions: str) -> None:
    settings = {"num_steps": 16, "hidden": (8, 8)}
    eager, compiled = (
        agent_of(arm, actions, backend, **settings) for backend in (None, "inductor")
    )
    compiled.warm_up()
    assert_equal_after(eager, compiled, updates=100)


@pytest.mark.filterwarnings(INNER_DEPRECATIONS)
def test_without_a_compiler_there_is_one_warning_and_the_eager_result() -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return (x.sin() + 1.2345).square()  # of this test alone: nothing cached serves it

    x = torch.ones(3)
    compiled = Compiled(function, "inductor")
    # Not pytest's monkeypatch: to undo it, that deletes the setting.
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.warns(RuntimeWarning, match="updates run uncompiled, with equal results"),
    ):
        assert torch.equal(compiled(x), function(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(x), function(x))


def test_an_older_compiler_without_errors_of_its_own_may_fail_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch._inductor.exc

    def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no code for this graph")

    monkeypatch.delattr(torch._inductor.exc, "InductorError")
    compiled = Compiled(torch.sin, failing)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="updates run uncompiled, with equal results"):
        assert torch.equal(compiled(torch.ones(3)), torch.ones(3).sin())


def test_a_network_that_is_no_graph_trains_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(torch.nn.Linear):
        def forward(self, obs: Tensor) -> Tensor:
            torch._dynamo.graph_break()  # what a branch on values comes to
            return super().forward(obs)

    monkeypatch.setattr("hypergrad_rl.trainer.backend_of", lambda config: "aot_eager")
    config = PPOConfig(**{**SMALL, "num_minibatches": 2, "total_steps": 32})
    networks = Networks(critic=lambda obs_dim: Branching(obs_dim, 1))
    with pytest.warns(RuntimeWarning, match=r"torch.compile failed .*updates run uncompiled"):
        result = train(config, networks=networks)
    monkeypatch.undo()
    eager = train(dataclasses.replace(config, compile=False), networks=networks)
    assert torch.equal(result.agent.critic_state.params, eager.agent.critic_state.params)


def test_auto_compiles_long_trainings_only() -> None:
    assert backend_of(PPOConfig(total_steps=10_000)) is None
    assert backend_of(BLPOConfig()) == "inductor"
    for config in (PPOConfig(), BLPOConfig(), BLPOConfig(solver="none")):
        assert backend_of(dataclasses.replace(config, compile=True)) == "inductor"
        assert backend_of(dataclasses.replace(config, compile=False)) is None
    gradients = BLPOConfig(total_steps=512, epochs=1, nested_steps=10).gradient_steps
    assert gradients == 4 * (10 + 1 + 1 + 1)  # critic, d, v and cross term of four minibatches
    assert PPOConfig(total_steps=1).gradient_steps == 2 * 16
    long = BLPOConfig(total_steps=512 * WORTH_COMPILING, epochs=1)
    assert backend_of(long) == "inductor"
    with pytest.raises(ConfigError, match=r'compile=.*expected True or False or "auto"'):
        PPOConfig(compile="yes")  # type: ignore[arg-type]


def test_the_flag_reaches_the_configuration(tmp_path: Any) -> None:
    command = ["train", "--algo", "ppo", "--total-steps", "512", "--no-tensorboard"]
    assert main([*command, "--compile", "false", "--run-dir", str(tmp_path / "a")]) == 0
    assert hypergrad_rl.load_config(tmp_path / "a").compile is False
    assert main([*command, "--compile", "maybe", "--run-dir", str(tmp_path / "b")]) == 2


def test_compile_time_counts_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypergrad_rl.trainer.backend_of", lambda config: "eager")
    config = PPOConfig(**{**SMALL, "num_minibatches": 2, "total_steps": 32})
    result = train(config)
    assert result.compile_seconds > result.metrics[-1]["seconds"] > 0
    fields = {"actor", "critic", "actor_adam", "critic_adam", "generator"}
    assert result.agent.state_dict().keys() == fields


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    seen = []

    class Spy(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(-1, 1, (1,))
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            seen.append(torch.get_num_threads())
            return self.observation_space.sample() * 0, {}

        def step(self, action: Any) -> Any:
            return self.observation_space.sample() * 0, 0.0, False, False, {}

    gym.register("Spy-v0", lambda **kw: Spy())
    settings: dict[str, Any] = {**SMALL, "env": "Spy-v0", "total_steps": 16, "num_minibatches": 2}
    try:
        torch.set_num_threads(2)
        train(PPOConfig(**settings))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        seen.clear()
        train(PPOConfig(**{**settings, "hidden": (257,)}))
        assert set(seen) == {2}
        seen.clear()
        torch.set_num_threads(1)
        train(PPOConfig(**settings), threads=2)
        assert set(seen) == {2}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        del gym.registry["Spy-v0"]


def test_the_factored_jacobian_is_the_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    for hidden in ((5,), (6, 5), (4, 3, 5)):
        critic = {n: p.double() for n, p in init_critic(OBS, hidden, generator).items()}
        obs = torch.randn(7, OBS, generator=generator, dtype=torch.float64)
        rows = torch.func.vmap(torch.func.grad(critic_value), (None, 0))(critic, obs)
        jacobian = torch.cat([leaf.flatten(1) for leaf in rows.values()], dim=1)
        factored = ValueJacobian(critic, obs)
        kernel = factored.kernel()
        torch.testing.assert_close(kernel, jacobian @ jacobian.T, rtol=1e-12, atol=1e-12)
        v = {n: torch.randn(p.shape, generator=generator).double() for n, p in critic.items()}
        product = jacobian @ torch.cat([leaf.flatten() for leaf in v.values()])
        torch.testing.assert_close(factored.times(v), product, rtol=1e-12, atol=1e-12)
        values = critic_value(critic, obs)
        torch.testing.assert_close(factored.values, values, rtol=1e-12, atol=1e-12)
        weights = torch.randn(7, generator=generator, dtype=torch.float64)
        pulled = torch.cat([leaf.flatten() for leaf in factored.pull(weights).values()])
        torch.testing.assert_close(pulled, jacobian.T @ weights, rtol=1e-12, atol=1e-12)
        part = factored.first(4)
        torch.testing.assert_close(part.kernel(), kernel[:4, :4], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.times(v), product[:4], rtol=1e-12, atol=1e-12)
        assert torch.equal(part.values, factored.values[:4])


@pytest.mark.parametrize("own", [False, True])
def test_the_critic_s_gradient_is_that_of_the_value_loss(own: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    critic = Critic((lambda n: torch.nn.Linear(n, 1)) if own else None)
    params = {n: p.double() for n, p in critic.init(OBS, (6, 5), generator).items()}
    obs = torch.randn(2, 4, OBS, generator=generator, dtype=torch.float64)
    targets = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    expected_loss = value_loss(critic(leaves, obs), targets)
    expected = torch.autograd.grad(expected_loss, list(leaves.values()))
    grads, loss = critic_gradient(params, obs, targets, critic)
    assert list(grads) == list(params)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0.0)
    for mine, theirs in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_a_module_s_jacobian_makes_one_pass() -> None:
    calls = []

    class Counting(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    critic = Critic(lambda n: Counting(n, 1))
    params = critic.init(OBS, (), torch.Generator().manual_seed(0))
    critic_gradient(params, torch.ones(2, 4, OBS), torch.ones(2, 4), critic)
    assert calls == [8]


def test_a_graph_computes_nothing_twice() -> None:
    """But keeps what is random, and results that may share no memory."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = (x @ y).tanh().sum() + (x @ y).tanh().mean()
        return total, torch.rand_like(x) - torch.rand_like(x), x.clone(), x.clone()

    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    module = make_fx(function)(x, x)
    expected = module(x, x)
    Once()(module.graph)
    module.recompile()
    counts = Counter(str(node.target) for node in module.graph.nodes)
    assert counts["aten.mm.default"] == counts["aten.tanh.default"] == 1
    assert counts["aten.rand_like.default"] == counts["aten.clone.default"] == 2
    result = module(x, x)
    assert torch.equal(result[0], expected[0])
    assert float(result[1].abs().max()) > 0
    assert result[2].data_ptr() != result[3].data_ptr()


@pytest.mark.parametrize("rows", [(1,), (2, 4), (9,), (3, 5)], ids=str)
def test_layers_in_a_graph_are_the_layers(rows: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = ((*rows, 6), (5, 6), (5,))
    x, weight, bias = (torch.randn(s, generator=source, dtype=torch.float64) for s in shapes)
    for layer, expected in (
        (affine, x @ weight.T + bias),
        (tanh_layer, torch.tanh(x @ weight.T + bias)),
    ):
        graphs: list[torch.fx.GraphModule] = []

        def kept(graph: torch.fx.GraphModule, _: Any, kept: Any = graphs) -> Any:
            kept.append(graph)
            return graph

        compiled = torch.compile(layer, fullgraph=True, backend=kept)(x, weight, bias)
        torch.testing.assert_close(compiled, expected, rtol=1e-13, atol=1e-14)
        # Of few states sums, which no library is called for.
        sums = "sum" in str(graphs[0].graph)
        assert sums == (math.prod(rows) <= 8)


@pytest.mark.parametrize("actions", POLICIES)
def test_a_rollout_s_policy_is_the_one_that_is_trained(actions: str) -> None:
    """Of NumPy in rollouts, of PyTorch elsewhere."""
    policy, generator = POLICIES[actions], torch.Generator().manual_seed(0)
    actor = policy.init(OBS, (6, 5), generator)
    actor = {n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in actor.items()}
    obs = torch.randn(50, OBS, generator=generator)
    noise = policy.noise(50, 1, generator)[:, 0]
    taken = torch.from_numpy(policy.numpy_step(actor)(obs.numpy(), noise.numpy()))
    torch.testing.assert_close(taken, policy.act(actor, obs, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [0, -1, True])
def test_a_number_of_threads_that_is_none_is_refused(threads: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match=f"threads={threads}: expected an integer >= 1"):
        train(PPOConfig(total_steps=32), threads=threads)
    assert torch.get_num_threads() == before


def test_adam_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.01, eps=1e-5)
    mine = AdamState.of({"p": start})
    for _ in range(20):
        grad = torch.randn(6, generator=generator, dtype=torch.float64)
        theirs.grad = grad
        optimizer.step()
        mine = adam(mine, grad, torch.tensor(0.01, dtype=torch.float64), 1e-5)
    torch.testing.assert_close(mine.params, theirs.detach(), rtol=1e-13, atol=1e-13)
