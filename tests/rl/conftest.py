"""What the tests of training share."""

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import pytest
import torch

from hypergrad_rl import trainer
from tests.rl.small import Problem, small_problem

#: The id of an environment of this class, made with these arguments, with a time limit.
Register = Callable[..., str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_draw", lambda directory: None)  # a second of Matplotlib


@pytest.fixture
def problem() -> Problem:
    return small_problem()


@pytest.fixture
def registered() -> Iterator[Register]:
    """Registers environments for one test, as Class0-v0, Class1-v0 and so on."""
    ids: list[str] = []

    def register(kind: type[gym.Env[Any, Any]], limit: int | None = None, **kwargs: Any) -> str:
        name = f"{kind.__name__}{len(ids)}-v0"
        gym.register(
            name, lambda render_mode=None, **kw: kind(**kw), max_episode_steps=limit, kwargs=kwargs
        )
        ids.append(name)
        return name

    yield register
    for name in ids:
        del gym.registry[name]
