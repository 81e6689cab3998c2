"""The command line: train, resume, evaluate, watch, export, compare, sweep, report, plot."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import operator
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.conf import Positional, UseAppendAction, arg

from hypergrad_rl import play
from hypergrad_rl.config import BLPOConfig, PPOConfig
from hypergrad_rl.errors import ConfigError, HypergradRLError
from hypergrad_rl.flags import Algo, HyperParameters, Style, settings
from hypergrad_rl.grid import plan
from hypergrad_rl.presets import preset
from hypergrad_rl.run_directory import CONFIG, METRICS, Config, has_ended, load_config
from hypergrad_rl.trainer import train

PROGRAM = ("python", "-m", "hypergrad_rl")


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
    """the preset of the task: ours, the published one, or the quickest of equal returns"""
    run_dir: Path | None = None
    """default: runs/ENV-ALGO-SEED"""
    stop_at_return: float | None = None
    """end when the mean return of the last 20 episodes reaches it"""
    checkpoint_every: float = 10.0
    """seconds between checkpoints"""
    tensorboard: bool = True
    wandb: str | None = None
    """a project of Weights & Biases to log to"""
    threads: int | None = None
    """of PyTorch; by default 1 for small networks, where it is fastest"""

    def config(self) -> Config:
        """The preset with the hyper-parameters that were given."""
        given = settings(self.parameters)
        return preset(self.algo, self.env, self.style, seed=self.seed, **given)

    def _do(self, line: str) -> None:
        name = f"{self.env.replace('/', '-')}-{self.algo}-{self.seed}"
        config, run_dir = self.config(), self.run_dir or Path("runs") / name
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
    threads: int | None = None

    def _do(self, line: str) -> None:
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
class _Played:
    run_dir: Positional[Path]
    episodes: int = 20
    seed: int = 1_000_000
    stochastic: bool = False
    """sample actions, as in training"""


@dataclasses.dataclass(frozen=True)
class Evaluate(_Played):
    """Play episodes with a trained policy."""

    def _do(self, line: str) -> None:
        returns = play.evaluate(
            self.run_dir, self.episodes, seed=self.seed, deterministic=not self.stochastic
        )
        print(
            f"{len(returns)} episodes: mean return {np.mean(returns):.1f}, standard deviation "
            f"{np.std(returns):.1f}, lowest {min(returns):.1f}, highest {max(returns):.1f}"
        )


@dataclasses.dataclass(frozen=True)
class Watch(_Played):
    """Play episodes with a trained policy into a GIF or a video."""

    episodes: int = 1
    output: Path | None = None
    """a .gif, or a .mp4 where imageio-ffmpeg is installed; default: episode.gif in the run"""

    def _do(self, line: str) -> None:
        # Pictures need no display; where there is none SDL would tell of an error that is none.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        output, returns = play.watch(self.run_dir, self.output, self.episodes, seed=self.seed,
                                     deterministic=not self.stochastic)  # fmt: skip
        print(f"{output}: return {', '.join(f'{value:.1f}' for value in returns)}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a trained policy to a file that PyTorch alone reads."""

    run_dir: Positional[Path]
    output: Path | None = None
    """default: policy.pt2 in the run"""

    def _do(self, line: str) -> None:
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

    def _do(self, line: str) -> int:
        from hypergrad_rl.runs import continuation, train_all

        _check_lists(self.jobs, algos=self.algos, seeds=self.seeds, env=self.env)
        runs: dict[Path, Config] = {}
        given = settings(self.parameters)
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
        try:
            failed = train_all(runs, self.jobs, self.tensorboard)
        except KeyboardInterrupt:
            unfinished = [path for path in runs if not has_ended(path)]
            print(f"interrupted; these, and `report {self.run_dir}`, go on:", file=sys.stderr)
            for path in unfinished:
                print(shlex.join(continuation(path, runs[path])), file=sys.stderr)
            raise
        _raise_if_none_began(runs, failed)
        if finished := [run_dir for run_dir in runs if run_dir not in failed]:
            _write_report(finished, self.run_dir, line)
        return _tell_of(failed, runs)


def _check_lists(jobs: int, **lists: Sequence[Any]) -> None:
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: expected an integer >= 1")
    for flag, values in lists.items():
        # A run that counts twice would make the spread over seeds too small.
        if not values:
            raise ConfigError(f"--{flag}: expected one or more")
        if len(set(values)) < len(values):
            words = " ".join(map(str, values))
            raise ConfigError(f"--{flag} {words}: expected each of them once")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train every point of a grid of hyper-parameters and rank them; given again, it goes on."""

    parameters: HyperParameters
    grid: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME=VALUE,VALUE")] = ()
    """a hyper-parameter and its values, widths as 64x64; given again, every combination"""
    algo: Algo = "blpo"
    env: str = "CartPole-v1"
    """a Gymnasium id"""
    seeds: tuple[int, ...] = (0, 1, 2)
    style: Style = "tuned"
    run_dir: Path = Path("runs/sweep")
    jobs: int = 2
    """runs at a time, one thread each"""
    tensorboard: bool = True

    def _do(self, line: str) -> int:
        from hypergrad_rl import sweep

        _check_lists(self.jobs, seeds=self.seeds)
        points = plan(self.grid, self.run_dir, self.seeds, algo=self.algo, env=self.env,
                      style=self.style, fixed=settings(self.parameters))  # fmt: skip
        try:
            failed = sweep.train_points(points, self.jobs, self.tensorboard)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on: {line}", file=sys.stderr)
            raise
        runs = {path: config for point in points for path, config in point.runs.items()}
        _raise_if_none_began(runs, failed)
        if len(failed) < len(runs):
            print(sweep.write_sweep(sweep.rank_points(points, command=line), self.run_dir))
        return _tell_of(failed, runs)


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

    def _do(self, line: str) -> None:
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

    def _do(self, line: str) -> None:
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
        for kind in (Train, Resume, Evaluate, Watch, Export, Compare, Sweep, Report, Plot)
    ],
)


def parse(words: Sequence[str]) -> Any:
    """The command that the words are.

    Raises:
        ConfigError: words that are no command.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(_COMMANDS, args=words, prog=" ".join(PROGRAM))
    except SystemExit as ended:
        if not ended.code:
            raise  # --help
        text = told.getvalue().partition("\n")[2]  # without the box's title
        boxless = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─|+]|-{4,}", " ", text)
        raise ConfigError(" ".join(boxless.split())) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    It is 2, with one line on stderr, for an error of the user's, and 1 where runs of a comparison
    or a sweep failed, with a line for each.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        command = parse(words)
        if getattr(command, "runs", None) == ():
            raise ConfigError("expected run directories, or directories of some")
        return command._do(shlex.join([*PROGRAM, *words])) or 0
    except HypergradRLError as error:
        print(_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _line(error: BaseException) -> str:
    return f"hypergrad_rl: {' '.join(str(error).split())}"


def _raise_if_none_began(runs: Iterable[Path], failed: Mapping[Path, BaseException]) -> None:
    if not any((run_dir / CONFIG).exists() for run_dir in runs):
        raise next(iter(failed.values()))


def _tell_of(failed: Mapping[Path, BaseException], runs: Mapping[Path, Config]) -> int:
    """Say how what failed goes on; the exit status."""
    from hypergrad_rl.runs import continuation

    for path, error in failed.items():
        command = shlex.join(continuation(path, runs[path]))
        print(f"{_line(error)}; {path} is not finished: {command}", file=sys.stderr)
    return int(bool(failed))
