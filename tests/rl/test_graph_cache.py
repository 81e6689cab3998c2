"""Graphs on disk: found by all that they depend on, by nothing else, and harmless if damaged."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import hypergrad_rl
from hypergrad_rl import graph_cache
from hypergrad_rl.agent import Agent
from hypergrad_rl.compiled import Compiled
from hypergrad_rl.config import AgentConfig
from hypergrad_rl.functional import AdamState
from hypergrad_rl.graph_cache import Uncacheable, code_of, evict, key_of, signature_of
from hypergrad_rl.networks import CategoricalPolicy
from hypergrad_rl.tensor_envs import TASKS, ArrayCollector
from hypergrad_rl.trainer import compile_agent
from tests.rl.test_compiled import ARMS, agent_of, made_up

Inputs = tuple[AdamState, dict[str, Tensor | None]]
Rows = dict[str, Tensor | None]


def step(state: AdamState, rows: Rows) -> tuple[AdamState, Rows]:
    assert rows["grad"] is not None
    mean = torch.lerp(state.mean, rows["grad"], 0.1)
    after = AdamState(state.params - mean, mean, 2 * state.square, state.step + 1)
    return after, {"norm": mean.norm(), "params": after.params}


step.__module__ = "hypergrad_rl.functional"  # as if it were code of the package


def inputs(seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    params, mean, square, grad = torch.randn(4, 5, generator=generator)
    return AdamState(params, mean, square, torch.zeros((), dtype=torch.float64)), {
        "grad": grad, "none": None,
    }  # fmt: skip


def assert_as_eager(compiled: Callable[..., Any], given: Inputs) -> None:
    torch.testing.assert_close(compiled(*given), step(*given))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for graphs; what PyTorch's compiler keeps stays where it is."""
    monkeypatch.setattr(graph_cache, "directory", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The graph of ``step``, made of two inputs that are one tensor."""
    torch.set_num_threads(1)
    (state, rows), folder = inputs(), tmp_path_factory.mktemp("graph")
    with torch.no_grad():
        same = state._replace(square=state.params)
        made = graph_cache.compile_graph(step, (same, rows), folder)
    assert list(folder.iterdir()) == []
    return made


@pytest.fixture
def compilations(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When something was compiled: at no cost."""
    times: list[float] = []

    def compile_graph(*_: Any) -> bytes:
        times.append(time.monotonic())
        time.sleep(0.1)
        return content

    monkeypatch.setattr(graph_cache, "compile_graph", compile_graph)
    return times


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith("lock-")]


def test_a_second_process_would_load_and_trace_nothing(
    folder: Path, compilations: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Compiled(step, "inductor", ())
    assert_as_eager(first, inputs())
    assert first.compiled_here
    assert len(files(folder)) == len(compilations) == 1
    monkeypatch.delattr(torch, "compile")
    second = Compiled(step, "inductor", ())
    for seed in range(3):
        given = inputs(seed)
        assert_as_eager(second, given)
        for mine, other in zip(*(tree_flatten(c(*given))[0] for c in (first, second)), strict=True):
            assert torch.equal(mine, other)
    assert not second.compiled_here
    assert len(compilations) == 1


@pytest.mark.parametrize("here", [True, False])
def test_progress_says_what_was_done(
    here: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = agent_of("ppo", "discrete", "inductor")
    collector = ArrayCollector(TASKS["CartPole-v1"], agent.config, torch.Generator())
    agent._improve.compiled_here = here
    for part in (agent, collector):
        monkeypatch.setattr(part, "warm_up", lambda *_: 2.6)
    assert compile_agent(agent, collector, progress=True) == 5.2
    assert f"{'compiled' if here else 'loaded'} in 5 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"not a graph",
        lambda content: bytes([*content[:3000], content[3000] ^ 1, *content[3001:]]),
    ],
    ids=["half", "almost whole", "empty", "other", "one bit"],
)
def test_a_damaged_file_is_made_again(
    damage: Callable[[bytes], bytes], folder: Path, content: bytes, compilations: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert_as_eager(Compiled(step, "inductor", ()), inputs())
    (path,) = files(folder)
    path.write_bytes(damage(content))
    caplog.set_level("DEBUG", "hypergrad_rl")
    compiled = Compiled(step, "inductor", ())
    assert_as_eager(compiled, inputs(1))
    assert compiled.compiled_here
    assert {record.levelname for record in caplog.records} <= {"DEBUG"}
    assert sum("cannot be used" in record.getMessage() for record in caplog.records) == 2
    assert files(folder) == [path]  # nothing that was unpacked stays
    assert path.read_bytes() == content


def test_of_many_that_want_one_graph_one_compiles(folder: Path, compilations: list[float]) -> None:
    many = [Compiled(step, "inductor", ()) for _ in range(6)]
    threads = [threading.Thread(target=compiled, args=inputs()) for compiled in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(compiled.compiled_here for compiled in many) == len(compilations) == 1
    assert len(files(folder)) == 1


def test_what_cannot_be_written_is_compiled_all_the_same(
    folder: Path, compilations: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    compiled = Compiled(step, "inductor", ())
    assert_as_eager(compiled, inputs())
    assert compiled.compiled_here


def test_without_a_graph_torch_compile_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another PyTorch, code from elsewhere, a directory that cannot be made: as it ever was."""
    seen: list[str] = []

    def traced(function: Callable[..., Any], backend: str, **_: Any) -> Callable[..., Any]:
        seen.append(backend)
        return function

    monkeypatch.setattr("hypergrad_rl.compiled.traced", traced)

    def fails(*_: Any) -> None:
        raise AttributeError("no such function in this PyTorch")

    monkeypatch.setattr(graph_cache, "compile_graph", fails)
    compiled = Compiled(step, "inductor", ())
    for seed in range(3):
        assert_as_eager(compiled, inputs(seed))
    assert compiled.compiled_here
    assert seen == ["inductor"]
    assert_as_eager(Compiled(step, "inductor", (lambda: None,)), inputs())
    assert_as_eager(Compiled(step, "inductor"), inputs())
    monkeypatch.setattr(graph_cache, "directory", lambda: Path("/dev/null/nowhere"))
    assert_as_eager(Compiled(step, "inductor", ()), inputs())
    assert seen == ["inductor"] * 4


def test_tensors_that_are_no_inputs_are_refused(tmp_path: Path) -> None:
    held = torch.ones(5)

    def holds(x: Tensor) -> Tensor:
        return x + held

    with pytest.raises(Exception, match="tensors that are no inputs"):
        graph_cache.compile_graph(holds, (torch.ones(5),), tmp_path)


def test_the_directory_is_the_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "hypergrad_rl").mkdir(mode=0o755)
    assert graph_cache.directory() == tmp_path / "hypergrad_rl"
    assert graph_cache.directory().stat().st_mode & 0o777 == 0o700
    with inductor.patch(force_disable_caches=True), pytest.raises(Uncacheable, match="switched"):
        graph_cache.directory()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    with pytest.raises(Uncacheable, match="not a directory of this user"):
        graph_cache.directory()


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}", (1000 + i, 1000 + i))
    (tmp_path / "lock-a").touch()
    for name in ("tmp-now", "tmp-then"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.so").touch()
    os.utime(tmp_path / "tmp-then", (0, 0))
    evict(tmp_path, 350)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4", "5", "lock-a", "tmp-now"}


def key(agent: Agent) -> str:
    given = agent.actor_state, agent.critic_state, tuple(vars(made_up(agent)).values())
    leaves, structure = tree_flatten(given)
    return key_of(agent._improve.function, agent._baked, structure, signature_of(leaves))


OTHERS: dict[str, Any] = {
    "gamma": 0.9, "gae_lambda": 0.9, "clip": 0.1, "entropy_bonus": 0.1, "adam_eps": 1e-3,
    "bootstrap_truncated": False, "hidden": (5,), "num_steps": 9, "cross_term": "suffix",
    "damping": 2.0, "outer_objective": "return", "solver": "identity", "correction_bound": None,
}  # fmt: skip


def test_a_key_is_of_all_that_a_graph_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    base = key(agent_of("blpo", "discrete", None))
    shared: dict[str, Any] = {
        "seed": 7, "total_steps": 99, "learning_rate": 0.1, "critic_learning_rate": 0.2,
    }  # fmt: skip
    assert base == key(agent_of("blpo", "discrete", None, **shared))
    keys = [base, key(agent_of("blpo", "continuous", None)), key(agent_of("ppo", "discrete", None))]
    keys += [key(agent_of("blpo", "discrete", None, **{n: x})) for n, x in OTHERS.items()]
    agent = agent_of("blpo", "discrete", None)
    with inductor.patch({"cpp.simdlen": 256}):
        keys.append(key(agent))
    torch.set_num_threads(2)  # put back by a fixture
    keys.append(key(agent))
    torch.set_num_threads(1)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    keys.append(key(agent))
    torch.set_float32_matmul_precision(precision)
    agent.critic_state = AdamState(*[x.double() for x in agent.critic_state])
    keys.append(key(agent))
    agent = agent_of("blpo", "discrete", None)
    for change in ("source", "torch"):
        monkeypatch.setattr(graph_cache, "_surroundings", lambda change=change: change)
        keys.append(key(agent))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert base == key(agent)


def test_a_task_s_constants_are_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        structure = tree_flatten(())[1]
        made = [ArrayCollector(task, config, torch.Generator()) for task in TASKS.values()]
        return [key_of(c._graph.function, (c.task, c.policy), structure, ()) for c in made]

    config = hypergrad_rl.PPOConfig()
    before = keys()
    assert len({*before}) == 2
    monkeypatch.setattr(type(TASKS["CartPole-v1"]), "gravity", 1.62)
    assert keys()[0] != before[0]
    assert keys()[1] == before[1]


def test_code_of_one_s_own_has_no_key() -> None:
    class Own(hypergrad_rl.PPO):
        pass

    def module(obs_dim: int) -> torch.nn.Module:
        return torch.nn.Linear(obs_dim, 1)

    config, generator = agent_of("ppo", "discrete", None).config, torch.Generator()
    for agent in (
        Own(config, CategoricalPolicy(3), 3, generator),
        hypergrad_rl.PPO(config, CategoricalPolicy(3), 3, generator, critic_module=module),
        hypergrad_rl.PPO(config, CategoricalPolicy(1, lambda *_: module(3)), 3, generator),
    ):
        with pytest.raises(Uncacheable, match="code from outside of hypergrad_rl"):
            key(agent)
    with pytest.raises(Uncacheable, match="an input of type int"):
        signature_of([torch.ones(2), 3])
    assert signature_of([torch.ones(2, 3)]) != signature_of([torch.ones(3, 2).T])


def test_sources_that_change_change_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(Uncacheable, match="has changed since this process began"):
        code_of(tmp_path)
    monkeypatch.setattr(graph_cache, "_BEGAN", float("inf"))
    hashes = {code_of(tmp_path)}
    (tmp_path / "a.py").write_text("x = 2")
    hashes.add(code_of(tmp_path))
    (tmp_path / "b.py").touch()
    hashes.add(code_of(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    hashes.add(code_of(tmp_path))
    assert len(hashes) == 4


def read_of(function: Callable[..., Any], given: tuple[Any, ...]) -> set[str]:
    """What tracing a method reads of its object, by the guards on it."""
    names: set[str] = set()

    def look(guards: Any) -> list[bool]:
        names.update(guard.name for guard in guards)
        return [True] * len(guards)

    torch._dynamo.reset()
    options: dict[str, Any] = {"guard_filter_fn": look}
    with torch.no_grad():
        torch.compile(function, backend="eager", fullgraph=True, options=options)(*given)
    return {name for name in names if name.startswith("self.")}


@pytest.mark.parametrize(
    "arm",
    [
        arm if arm == "ppo" else pytest.param(arm, marks=pytest.mark.slow)
        for arm in ARMS
        if agent_of(arm, "discrete", None).folds  # else it is several graphs
    ],
)
def test_a_graph_reads_of_an_agent_what_is_in_its_key(arm: str) -> None:
    """And of the configuration nothing that runs with one graph may differ in."""
    agent = agent_of(arm, "discrete", None)
    given = agent.actor_state, agent.critic_state, tuple(vars(made_up(agent)).values())
    read = read_of(agent._all_minibatches, (*given, agent._draw(0.0)))
    parts = ("config", "policy", "value_fn", "actor_shapes", "critic_shapes")
    graphs = ("_minibatch", "_fit", "_lead")  # themselves, all eager within one graph
    assert {name.split(".")[1].partition("[")[0] for name in read} <= {*parts, *graphs}
    fields = {name.split(".")[2] for name in read if name.startswith("self.config.")}
    free = {"seed", "total_steps", "learning_rate", "critic_learning_rate"}
    assert "clip" in fields
    assert not fields & free
    assert free < {field.name for field in dataclasses.fields(AgentConfig)}


def test_a_graph_reads_of_a_collector_what_is_in_its_key() -> None:
    config = hypergrad_rl.PPOConfig(num_envs=2, num_steps=4)
    made = ArrayCollector(TASKS["CartPole-v1"], config, torch.Generator())
    actor = made.policy.init(made.obs_dim, (4,), made.generator)
    noise = made.policy.noise(4, 2, made.generator)
    read = read_of(made._scanned, (actor, made.state, made.age, noise, made._fresh(4)))
    assert {name.split(".")[1] for name in read} <= {"task", "policy"}


TRAIN = """
import json, sys, torch
from torch._dynamo.utils import counters
from hypergrad_rl import make_config, train
algo, settings = sys.argv[1], json.loads(sys.argv[2])
result = train(make_config(algo, compile=True, total_steps=64, **settings))
rows = [{n: x for n, x in row.items() if "second" not in n} for row in result.metrics]
params = [s.params.tolist() for s in (result.agent.actor_state, result.agent.critic_state)]
print(json.dumps([counters["stats"]["unique_graphs"], repr((rows, params))]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arm", ["ppo", "blpo", "kept sketch"])
def test_a_second_process_traces_nothing_and_gives_the_same_bits(arm: str, tmp_path: Path) -> None:
    algo, settings = ARMS[arm]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", TRAIN, algo, json.dumps(settings)]
    results = [
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert results[0][0] > 0
    assert results[1][0] == 0
    assert results[0][1] == results[1][1]


def handing_on(state: AdamState, rows: Rows) -> tuple[AdamState, Rows]:
    assert rows["grad"] is not None
    return state._replace(params=state.params - rows["grad"]), rows


handing_on.__module__ = "hypergrad_rl.functional"


def test_an_input_may_be_handed_on(folder: Path) -> None:
    for compiled in (Compiled(handing_on, "inductor", ()) for _ in range(2)):
        given = inputs(1)
        state, rows = compiled(*given)
        torch.testing.assert_close(state.params, handing_on(*given)[0].params)
        assert state.mean is given[0].mean
        assert rows["grad"] is given[1]["grad"]
        assert compiled.run is None  # nothing by torch.compile
