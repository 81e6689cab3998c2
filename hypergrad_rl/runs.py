"""Many runs: trained at once, found below directories, and put together by task and algorithm.

Runs of one algorithm on one task are samples of the same thing only if their settings are the same
but for the seed; what differs is either named, and then sets variants apart, or refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import shlex
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hypergrad_rl.errors import ConfigError, RunDirectoryError
from hypergrad_rl.report import Metrics, read_metrics, summarize
from hypergrad_rl.run_directory import CONFIG, METRICS, Config, load_info
from hypergrad_rl.trainer import train

_MISSING = "(not recorded)"
#: What run_info.json knows that tells runs apart as a setting does; how train calls it.
OWN = {"own_networks": "networks=", "own_environment": "env_fn="}


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, metrics and figures, and what tells it from others.

    ``settings`` are those of its config.json and whether networks or environments were the user's
    own; ``stop_at_return`` is what it was to stop at.
    """

    path: Path
    settings: dict[str, Any]
    stop_at_return: float | None
    metrics: Metrics
    final_return: float
    area: float
    steps_per_second: float

    @property
    def command(self) -> str:
        """The command that makes this run again, every setting given whatever the presets say."""
        settings = {name: x for name, x in self.settings.items() if name not in OWN}
        goal = self.stop_at_return
        stop = [] if goal is None else ["--stop-at-return", str(goal)]
        line = shlex.join([*train_command(settings, self.path), *stop])
        own = [words for name, words in OWN.items() if self.settings[name]]
        return f"{line} # and, from Python, {' and '.join(own)} of one's own" if own else line


def train_command(settings: Mapping[str, Any], run_dir: Path) -> list[str]:
    """The words of the command that trains with these settings."""
    words = ["python", "-m", "hypergrad_rl", "train"]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and name != "compile":  # which is no switch: it may be "auto"
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{flag}", *map(str, value)]
        else:
            plain = value is None or isinstance(value, bool)
            words += [f"--{flag}", str(value).lower() if plain else str(value)]
    return [*words, "--run-dir", str(run_dir)]


def continuation(run_dir: Path, config: Config) -> list[str]:
    """The words of the command that finishes a run, begun or not."""
    if (run_dir / CONFIG).exists():
        return ["python", "-m", "hypergrad_rl", "resume", str(run_dir)]
    return train_command({"algo": config.algo, **dataclasses.asdict(config)}, run_dir)


Tasks = dict[str, dict[str, list[Run]]]  # of each environment, the runs of each algorithm


def find_runs(paths: Sequence[str | Path], steps: int | None = None) -> tuple[list[Run], list[str]]:
    """The finished runs in ``paths``, and a sentence for each unfinished one that is left out.

    Args:
        paths: run directories, and directories that hold some at any depth.
        steps: read every run only up to here; then a run counts as finished that came so far.

    Raises:
        RunDirectoryError: a path without a finished run, or a run that cannot be read.
    """
    runs: dict[Path, Run] = {}
    left_out = []
    for path in map(Path, paths):
        found = sorted(file.parent for file in path.rglob("config.json"))
        if not found:
            raise RunDirectoryError(
                f"{path} holds no run: there is no config.json in it or below; give the "
                "directories that `train`, `compare` or `sweep` wrote"
            )
        read = {directory.resolve(): _read_run(directory, steps) for directory in found}
        unfinished = [run for run in read.values() if isinstance(run, str)]
        if len(unfinished) == len(read):
            raise RunDirectoryError(
                f"{path} holds no finished run: {'; '.join(unfinished)}; `resume` continues a "
                "run, --steps compares at fewer steps"
            )
        runs |= {directory: run for directory, run in read.items() if isinstance(run, Run)}
        left_out += unfinished
    return list(runs.values()), list(dict.fromkeys(left_out))


def _read_run(directory: Path, steps: int | None) -> Run | str:
    """The run, or what is missing of it."""
    try:
        settings = json.loads((directory / "config.json").read_text())
        needed = settings["total_steps"] if steps is None else steps
        for name in ("algo", "env", "seed"):
            settings[name]
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{directory / 'config.json'} is damaged or no run's: expected the settings of a run "
            f"({type(error).__name__}: {error})"
        ) from error
    table = directory / "metrics.csv"
    if not table.is_file() or table.read_bytes().count(b"\n") < 2:  # a header, or not even that
        return f"{directory} has made no step of {needed:,}"
    info = load_info(directory)
    settings |= {name: info.get(name) or False for name in OWN}
    metrics = read_metrics(directory)
    unknown = {"env_steps", "seconds", "episodes", "episode_return"} - set(metrics)
    if unknown:
        raise RunDirectoryError(f"{directory / 'metrics.csv'} lacks {', '.join(sorted(unknown))}")
    done = int(metrics["env_steps"][-1])
    stopped = steps is None and info.get("ended")  # early, which is an end too
    if done < needed and not stopped:
        return f"{directory} has made {done:,} of {needed:,} steps"
    if steps is not None:
        kept = metrics["env_steps"] <= steps
        if not kept.any():
            raise RunDirectoryError(
                f"{directory}: the first row is at {metrics['env_steps'][0]:,.0f} steps, beyond "
                f"--steps {steps}; give more"
            )
        metrics = {name: column[kept] for name, column in metrics.items()}
    goal, figures = info.get("stop_at_return"), dataclasses.asdict(summarize(metrics))
    return Run(directory, settings, goal, metrics, **figures)


def group_runs(
    runs: Sequence[Run],
    by: Sequence[str] = (),
    mix: Sequence[str] = (),
    label: Callable[[Run], str] | None = None,
) -> Tasks:
    """Runs by environment and algorithm.

    Args:
        runs: in the order in which algorithms are to be reported.
        by: settings whose values set variants of an algorithm apart, and name them.
        mix: settings that may differ between the runs of one algorithm.
        label: what a run's algorithm is called in the report; None for its ``algo``.

    Raises:
        ConfigError: runs of an algorithm differ in a setting that neither ``by`` nor ``mix`` has,
            two of them have the same seed, or no run has a setting that was named.
    """
    known = set().union(*(run.settings for run in runs))
    for name in (*by, *mix):
        if name not in known:
            raise ConfigError(
                f"{name}: no run has this setting; they have {', '.join(sorted(known))}"
            )
    tasks: Tasks = {}
    for run in runs:
        name = run.settings["algo"] if label is None else label(run)
        tasks.setdefault(run.settings["env"], {}).setdefault(name, []).append(run)
    grouped: Tasks = {}
    for env, algorithms in tasks.items():
        labelled = grouped.setdefault(env, {})
        for algo, members in algorithms.items():
            # A variant has one name on all tasks, of the settings that vary on some task.
            peers = [others[algo] for others in tasks.values() if algo in others]
            names = [n for n in by if any(len(set(_values(runs, n))) > 1 for runs in peers)]
            for run in members:
                settings = [f"{n}={run.settings.get(n, _MISSING)}" for n in names]
                labelled.setdefault(" ".join([algo, *settings]), []).append(run)
        for title, members in labelled.items():
            _check_alike(title, env, members, {*by, *mix})
    return grouped


def _values(runs: Iterable[Run], name: str) -> list[str]:
    return [json.dumps(run.settings.get(name, _MISSING)) for run in runs]


def _check_alike(label: str, env: str, runs: Sequence[Run], named: set[str]) -> None:
    for name in dict.fromkeys(itertools.chain.from_iterable(run.settings for run in runs)):
        values = _values(runs, name)
        different = next((i for i, value in enumerate(values) if value != values[0]), None)
        if different is not None and name not in {"seed", *named}:
            raise ConfigError(
                f"runs of {label} on {env} differ in {name}: {values[0]} in {runs[0].path}, "
                f"{values[different]} in {runs[different].path}; report them apart with "
                f"--by {name}, take them for the same with --mix {name}, or leave some out"
            )
    seeds: dict[str, Run] = {}
    for run, seed in zip(runs, _values(runs, "seed"), strict=True):
        if seed in seeds:
            raise ConfigError(
                f"{seeds[seed].path} and {run.path} are both {label} on {env} with seed {seed}: "
                "the same run twice would make the interval too short; leave one out"
            )
        seeds[seed] = run


def train_all(
    runs: Mapping[Path, Config], jobs: int, tensorboard: bool, begun: Collection[Path] = ()
) -> dict[Path, BaseException]:
    """Train every run in a process of its own on one thread, ``jobs`` at a time.

    One progress bar is for all. A run that fails is no reason to stop the others; an exception
    here, such as Ctrl-C, stops all of them as it would stop each, and none begins after it. Those
    that have ``begun`` are continued.

    Returns:
        What the runs that failed raised.
    """
    total = sum(c.num_updates * c.num_envs * c.num_steps for c in runs.values())
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    # What a shell begins in the background ignores Ctrl-C, and so do its processes then.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    with (
        tqdm(
            total=total,
            initial=sum(map(_steps_done, begun)),
            unit="step",
            unit_scale=True,
            desc=f"{len(runs)} runs",
        ) as bar,
        ProcessPoolExecutor(jobs, context, _begin, (stop, handler)) as pool,
    ):
        with _ignoring_interrupts():  # which the processes inherit: they begin without a Ctrl-C
            waiting = {
                path: pool.submit(_train, config, path, tensorboard, path in begun)
                for path, config in runs.items()
            }
        done = 0
        try:
            while done < len(waiting):
                time.sleep(0.5)
                done = sum(future.done() for future in waiting.values())
                bar.update(sum(map(_steps_done, runs)) - bar.n)
                bar.set_postfix(finished=f"{done}/{len(runs)}", refresh=False)
        except BaseException:
            # What waits in the pool's own queue cannot be cancelled: it sees the event. Those that
            # train save their last update; leaving the pool waits for them.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {path: e for path, future in waiting.items() if (e := future.exception()) is not None}


#: In a process that trains: whether it is to stop, and what it does at a Ctrl-C.
_stop: Any = None
_handler: Any = None


def _begin(stop: Any, handler: Any) -> None:
    global _stop, _handler
    _stop, _handler = stop, handler


def _train(config: Config, run_dir: Path, tensorboard: bool, resume: bool) -> None:
    # Only while it trains does a Ctrl-C, which a terminal sends to every process, reach this one.
    before = signal.signal(signal.SIGINT, _handler)
    try:
        _go_on()
        train(config, run_dir, resume=resume, tensorboard=tensorboard, threads=1,
              callbacks=[_go_on])  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def _go_on(*_: Any) -> None:
    if _stop.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another thread's
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _steps_done(run_dir: Path) -> int:
    """env_steps of the last whole row of a run's metrics, read from the end of the file."""
    path = run_dir / METRICS
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        rows = file.read().split(b"\n")[:-1]
    cells: list[Any] = rows[-1].split(b",") if rows else []
    return int(cells[1]) if len(cells) > 1 and cells[1].isdigit() else 0
