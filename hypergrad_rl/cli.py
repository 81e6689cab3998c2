"""The command line: train, resume, evaluate, watch, export, compare, report, plot."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import multiprocessing
import operator
import re
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from hypergrad_rl import play
from hypergrad_rl.config import BLPOConfig, PPOConfig
from hypergrad_rl.errors import ConfigError, HypergradRLError
from hypergrad_rl.presets import preset
from hypergrad_rl.run_directory import CONFIG, METRICS, Config, load_config
from hypergrad_rl.trainer import train

Algo = Literal["ppo", "nested", "blpo"]
Style = Literal["tuned", "paper"]
_OWN = ("env", "seed")  # each command has these itself; the rest of the hyper-parameters are shared
_HINT = "(default: the task's preset)"
_FIELDS = {
    name: (get_type_hints(kind)[name], field.default)
    for kind in (PPOConfig, BLPOConfig)
    for name, field in kind.__dataclass_fields__.items()
    if name not in _OWN
}
#: Every hyper-parameter as a flag; those that are given override the preset.
_Parameters: Any = dataclasses.make_dataclass(
    "_Parameters",
    [
        (name, Annotated[kind, arg(help_behavior_hint=_HINT)], dataclasses.field(default=default))
        for name, (kind, default) in _FIELDS.items()
    ],
    namespace={"__doc__": "Hyper-parameters; those that are given override the task's preset."},
)
HyperParameters: TypeAlias = OmitArgPrefixes[_Parameters]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one agent."""

    parameters: HyperParameters
    algo: Algo = "blpo"
    """nested is BLPO without the correction"""
    env: str = "CartPole-v1"
    """a Gymnasium id"""
    seed: int = 0
    style: Style = "tuned"
    """the task's preset: ours, or the published one"""
    run_dir: Path | None = None
    """default: runs/ENV-ALGO-SEED"""
    stop_at_return: float | None = None
    """end when the mean return of the last 20 episodes reaches it"""
    checkpoint_every: float = 10.0
    """seconds between checkpoints"""
    tensorboard: bool = True
    wandb: str | None = None
    """a project of Weights & Biases to log to"""
    threads: int = 1
    """of PyTorch; 1 is fastest for small networks"""

    def config(self, given: dict[str, Any]) -> Config:
        """The preset with the hyper-parameters that were given."""
        return preset(self.algo, self.env, self.style, seed=self.seed, **given)

    def _do(self, given: dict[str, Any], line: str) -> None:
        name = f"{self.env.replace('/', '-')}-{self.algo}-{self.seed}"
        config, run_dir = self.config(given), self.run_dir or Path("runs") / name
        _run(run_dir, config, tensorboard=self.tensorboard, threads=self.threads,
             wandb=self.wandb, checkpoint_every=self.checkpoint_every,
             stop_at_return=self.stop_at_return)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Resume:
    """Continue a run from its checkpoint: it ends as if it had not been interrupted."""

    run_dir: Positional[Path]
    checkpoint_every: float = 10.0
    """seconds between checkpoints"""
    tensorboard: bool = True
    threads: int = 1

    def _do(self, given: dict[str, Any], line: str) -> None:
        _run(self.run_dir, load_config(self.run_dir), resume=True, tensorboard=self.tensorboard,
             threads=self.threads, checkpoint_every=self.checkpoint_every)  # fmt: skip


def _run(run_dir: Path, config: Config, **options: Any) -> None:
    from hypergrad_rl.report import read_metrics, summarize

    try:
        ended = train(config, run_dir, progress=True, **options).ended
    except KeyboardInterrupt:
        if (run_dir / CONFIG).exists():
            print(f"interrupted; `resume {run_dir}` continues", file=sys.stderr)
        raise
    summary = summarize(read_metrics(run_dir))
    print(
        f"{ended}; return over the last tenth {summary.final_return:.1f}, area under the curve "
        f"{summary.area:.1f}, {summary.steps_per_second:.0f} steps/s; see {run_dir}"
    )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Play episodes with a trained policy."""

    run_dir: Positional[Path]
    episodes: int = 20
    seed: int = 1_000_000
    stochastic: bool = False
    """sample actions, as in training"""
    threads: int = 1

    def _do(self, given: dict[str, Any], line: str) -> None:
        returns = play.evaluate(
            self.run_dir, self.episodes, seed=self.seed, deterministic=not self.stochastic
        )
        print(
            f"{len(returns)} episodes: mean return {np.mean(returns):.1f}, standard deviation "
            f"{np.std(returns):.1f}, lowest {min(returns):.1f}, highest {max(returns):.1f}"
        )


@dataclasses.dataclass(frozen=True)
class Watch:
    """Play episodes with a trained policy into a GIF or a video."""

    run_dir: Positional[Path]
    output: Path | None = None
    """a .gif, or a .mp4 where imageio-ffmpeg is installed; default: episode.gif in the run"""
    episodes: int = 1
    seed: int = 1_000_000
    stochastic: bool = False
    """sample actions, as in training"""

    def _do(self, given: dict[str, Any], line: str) -> None:
        output, returns = play.watch(self.run_dir, self.output, self.episodes, seed=self.seed,
                                     deterministic=not self.stochastic)  # fmt: skip
        print(f"{output}: return {', '.join(f'{value:.1f}' for value in returns)}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a trained policy to a file that PyTorch alone reads."""

    run_dir: Positional[Path]
    output: Path | None = None
    """default: policy.pt2 in the run"""

    def _do(self, given: dict[str, Any], line: str) -> None:
        output = play.export(self.run_dir, self.output)
        print(f"{output}: torch.export.load(path).module() takes observations to actions")


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train several algorithms and seeds, and report."""

    parameters: HyperParameters
    algos: tuple[Algo, ...] = ("ppo", "nested", "blpo")
    seeds: tuple[int, ...] = (0, 1, 2)
    env: tuple[str, ...] = ("CartPole-v1",)
    """Gymnasium ids"""
    style: Style = "tuned"
    run_dir: Path = Path("runs/compare")
    jobs: int = 2
    """runs at a time, one thread each"""
    tensorboard: bool = True
    threads: int = 1

    def _do(self, given: dict[str, Any], line: str) -> None:
        for flag, values in (("algos", self.algos), ("seeds", self.seeds), ("env", self.env)):
            # A run that counts twice would make the spread over seeds too small.
            if len(set(values)) < len(values):
                words = " ".join(map(str, values))
                raise ConfigError(f"--{flag} {words}: expected each of them once")
        runs: dict[Path, Config] = {}
        taken: set[str] = set()
        for env in self.env:
            parent = self.run_dir / env.replace("/", "-") if len(self.env) > 1 else self.run_dir
            for algo, seed in itertools.product(self.algos, self.seeds):
                # Of several algorithms, a flag goes to those that have it.
                kind = PPOConfig if algo == "ppo" else BLPOConfig
                own = {n: v for n, v in given.items() if n in kind.__dataclass_fields__}
                if algo == "nested":
                    own.pop("solver", None)
                taken |= set(own)
                runs[parent / f"{algo}-{seed}"] = preset(algo, env, self.style, seed=seed, **own)
        for name in given:
            if name not in taken:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: none of {', '.join(self.algos)} has it"
                )
        for run_dir in runs:
            if (run_dir / METRICS).exists():
                raise HypergradRLError(
                    f"{run_dir} already holds a run, which is left as it is; choose another "
                    f"--run-dir, or `report {self.run_dir}`"
                )
        train_all(runs, self.jobs, self.threads, self.tensorboard)
        _write_report(list(runs), self.run_dir, line)


@dataclasses.dataclass(frozen=True)
class _Finished:
    """What is compared, and how it is told apart."""

    runs: Positional[tuple[Path, ...]]
    """run directories, or directories of some"""
    by: UseAppendAction[tuple[str, ...]] = ()
    """a setting that tells variants of an algorithm apart"""
    mix: UseAppendAction[tuple[str, ...]] = ()
    """a setting that may differ within an algorithm"""
    steps: int | None = None
    """read every run only up to here"""


@dataclasses.dataclass(frozen=True)
class Report(_Finished):
    """Compare finished runs, from their directories."""

    output: Path | None = None
    """a directory; default: RUNS where it is one directory of runs, runs/report otherwise"""
    range: Annotated[
        UseAppendAction[tuple[tuple[str, str, str], ...]], arg(metavar="ENV LOW HIGH")
    ] = ()
    """returns that count as 0 and 1 in figures over all tasks; once for each task"""

    def _do(self, given: dict[str, Any], line: str) -> None:
        try:
            ranges = {env: (float(low), float(high)) for env, low, high in self.range}
        except ValueError as error:
            raise ConfigError(f"--range: expected ENV LOW HIGH, {error}") from error
        _write_report(self.runs, self.output or _output(self.runs), line, by=self.by,
                      mix=self.mix, steps=self.steps, ranges=ranges)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plot(_Finished):
    """Draw learning curves anew, from run directories."""

    output: Path | None = None
    """a .png, .pdf or .svg; default: learning_curve.png in a run, else comparison.png"""

    def _do(self, given: dict[str, Any], line: str) -> None:
        from hypergrad_rl.comparison import compare_runs
        from hypergrad_rl.report import plot_comparison, plot_run

        one = len(self.runs) == 1 and (self.runs[0] / CONFIG).exists()
        default = "learning_curve.png" if one else "comparison.png"
        output = self.output or (self.runs[0] if one else _output(self.runs)) / default
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            if one:
                plot_run(self.runs[0], output)
            else:
                results = compare_runs(self.runs, by=self.by, mix=self.mix, steps=self.steps)
                plot_comparison(results, output)
                print(*(f"note: {note}\n" for note in results["notes"]), sep="", end="")
        except HypergradRLError:
            raise
        except (OSError, ValueError) as error:  # the latter: a format Matplotlib does not write
            raise HypergradRLError(f"cannot draw {output}: {error}") from error
        print(output)


def _output(runs: Sequence[Path]) -> Path:
    alone = len(runs) == 1 and not (runs[0] / CONFIG).exists()
    return runs[0] if alone else Path("runs/report")


def _write_report(runs: Sequence[Path], output: Path, command: str, **options: Any) -> None:
    from hypergrad_rl.comparison import compare_runs, write_comparison  # SciPy and Matplotlib

    print(write_comparison(compare_runs(runs, command=command, **options), output))
    print(f"\ncurves and intervals: {output / 'comparison.png'}; figures, and the command of every "
          f"run: {output / 'results.json'}, results.csv, runs.csv")  # fmt: skip


_COMMANDS: Any = functools.reduce(
    operator.or_,
    [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())]
        for kind in (Train, Resume, Evaluate, Watch, Export, Compare, Report, Plot)
    ],
)


def parse(words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The command, and the hyper-parameters that were given.

    Raises:
        ConfigError: words that are no command.
    """
    flags = {f"--{prefix}{n.replace('_', '-')}": n for n in _FIELDS for prefix in ("", "no-")}
    words, flag = list(words), None
    names: dict[str, None] = {}
    # "none" and "true" as they are elsewhere than in Python; "none" is also a solver.
    python = {"none": "None", "true": "True", "false": "False"}
    for i, word in enumerate(words):
        start, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if start:
            flag = flags.get(start.replace("_", "-"))
            if flag is not None:
                names[flag] = None
        if flag is not None and _FIELDS[flag][0] is not str:
            words[i] = start + equals + python.get(value, value)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            command = tyro.cli(_COMMANDS, args=words, prog="python -m hypergrad_rl")
    except SystemExit as ended:
        if not ended.code:
            raise  # --help
        text = told.getvalue().partition("\n")[2]  # without the box's title
        boxless = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─|+]|-{4,}", " ", text)
        raise ConfigError(" ".join(boxless.split())) from None
    parameters = getattr(command, "parameters", None)
    return command, {name: getattr(parameters, name) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 2, with one line on stderr, for an error of the user's."""
    words = sys.argv[1:] if argv is None else argv
    before = torch.get_num_threads()
    try:
        command, given = parse(words)
        for name, least in (("threads", 1), ("jobs", 1)):
            if (value := getattr(command, name, least)) < least:
                raise ConfigError(f"--{name} {value}: expected an integer >= {least}")
        if getattr(command, "runs", None) == ():
            raise ConfigError("expected run directories, or directories of some")
        torch.set_num_threads(getattr(command, "threads", 1))
        command._do(given, shlex.join(["python", "-m", "hypergrad_rl", *words]))
    except HypergradRLError as error:
        print(f"hypergrad_rl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        torch.set_num_threads(before)
    return 0


def train_all(runs: dict[Path, Config], jobs: int, threads: int, tensorboard: bool) -> None:
    """Train every run in its own process, ``jobs`` at a time, with one progress bar for all."""
    total = sum(c.num_updates * c.num_envs * c.num_steps for c in runs.values())
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=total, unit="step", unit_scale=True, desc=f"{len(runs)} runs") as bar,
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        waiting: dict[Future[None], Path] = {
            pool.submit(_train_quietly, config, run_dir, threads, tensorboard): run_dir
            for run_dir, config in runs.items()
        }
        done = 0
        try:
            while done < len(waiting):
                time.sleep(0.5)
                done = sum(future.done() for future in waiting)
                bar.update(sum(_steps_done(path) for path in runs) - bar.n)
                bar.set_postfix(finished=f"{done}/{len(runs)}", refresh=False)
                for future in waiting:
                    if future.done():
                        future.result()  # raises what the run raised
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train_quietly(config: Config, run_dir: Path, threads: int, tensorboard: bool) -> None:
    train(config, run_dir, tensorboard=tensorboard, threads=threads)


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
