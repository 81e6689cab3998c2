"""The command line: train, resume, evaluate, compare, report, plot."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hypergrad_rl.config import ALGOS, BLPOConfig, PPOConfig
from hypergrad_rl.errors import ConfigError, HypergradRLError
from hypergrad_rl.presets import preset
from hypergrad_rl.trainer import CONFIG, METRICS, Config, evaluate, load_config, train

_OUTPUT = "RUNS where it is one directory of runs, runs/report otherwise"
_OWN_FLAGS = ("env", "seed", "total_steps")  # the rest of the hyper-parameters is generated


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 2, with one line on stderr, for an error of the user's."""
    args = _parser().parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        words = sys.argv[1:] if argv is None else argv
        args.command_line = shlex.join(["python", "-m", "hypergrad_rl", *words])
        args.command(args)
    except HypergradRLError as error:
        print(f"hypergrad_rl: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hypergrad_rl", description=__doc__)
    names = "{train,resume,evaluate,compare,report,plot}"
    commands = parser.add_subparsers(required=True, metavar=names)

    sub = commands.add_parser("train", help="train one agent")
    sub.add_argument("--algo", choices=ALGOS, default="blpo")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--run-dir", type=Path, help="default: runs/ENV-ALGO-SEED")
    sub.add_argument("--env", default="CartPole-v1", help="a Gymnasium id")
    _add_common(sub)
    sub.set_defaults(command=_train)

    sub = commands.add_parser("resume", help="continue a run from its checkpoint")
    sub.add_argument("run_dir", type=Path)
    _add_run_flags(sub)
    sub.set_defaults(command=_resume)

    sub = commands.add_parser("evaluate", help="play episodes with a trained policy")
    sub.add_argument("run_dir", type=Path)
    sub.add_argument("--episodes", type=_count, default=20)
    sub.add_argument("--seed", type=_seed, default=1_000_000)
    sub.add_argument("--stochastic", action="store_true", help="sample actions, as in training")
    sub.add_argument("--threads", type=_count, default=1)
    sub.set_defaults(command=_evaluate)

    sub = commands.add_parser("compare", help="train several algorithms and seeds, and report")
    sub.add_argument("--algos", choices=ALGOS, nargs="+", default=list(ALGOS))
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--run-dir", type=Path, default=Path("runs/compare"))
    sub.add_argument("--jobs", type=_count, default=2, help="runs at a time, one thread each")
    sub.add_argument("--env", nargs="+", default=["CartPole-v1"], help="Gymnasium ids")
    _add_common(sub)
    sub.set_defaults(command=_compare)

    sub = commands.add_parser("report", help="compare finished runs, from their directories")
    sub.add_argument("--output", type=Path, help=f"a directory; default: {_OUTPUT}")
    _add_comparison(sub)
    sub.add_argument("--range", nargs=3, metavar=("ENV", "LOW", "HIGH"), action="append",
                     default=[], help="returns that count as 0 and 1 in figures over all tasks; "
                     "once for each task")  # fmt: skip
    sub.set_defaults(command=_report)

    sub = commands.add_parser("plot", help="draw learning curves anew, from run directories")
    default = f"learning_curve.png in a run, otherwise comparison.png in {_OUTPUT}"
    sub.add_argument("--output", type=Path, help=f"a .png, .pdf or .svg; default: {default}")
    _add_comparison(sub)
    sub.set_defaults(command=_plot)
    return parser


def _add_comparison(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", type=Path, nargs="+", help="run directories, or directories of some")
    sub.add_argument("--by", action="append", default=[], metavar="SETTING",
                     help="tells variants of an algorithm apart; may be given again")  # fmt: skip
    sub.add_argument("--mix", action="append", default=[], metavar="SETTING",
                     help="may differ within an algorithm; may be given again")  # fmt: skip
    sub.add_argument("--steps", type=int, help="read every run only up to here")
    sub.set_defaults(threads=1)


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--total-steps", type=int, default=argparse.SUPPRESS, help="default: the task's preset"
    )
    _add_run_flags(sub)
    group = sub.add_argument_group(
        "hyper-parameters (default: the task's preset)", argument_default=argparse.SUPPRESS
    )
    parsers: dict[str, Callable[[str], Any]]
    parsers = {
        "int": int,
        "float": float,
        "float | None": _float_or_none,
        "float | Literal['auto']": lambda text: text if text == "auto" else float(text),
        "bool | Literal['auto']": _true_false_auto,
    }
    fields = {f.name: f for c in (PPOConfig, BLPOConfig) for f in dataclasses.fields(c)}
    for name, field in fields.items():
        if name not in _OWN_FLAGS:
            flag, kind = "--" + name.replace("_", "-"), str(field.type)
            if kind == "bool":
                group.add_argument(flag, action=argparse.BooleanOptionalAction)
            elif kind.startswith("tuple"):
                group.add_argument(flag, type=int, nargs="+")
            else:
                group.add_argument(flag, type=parsers.get(kind, str))


def _count(text: str) -> int:
    return _at_least(1, text)


def _seed(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= {least}")
    return value


def _float_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _true_false_auto(text: str) -> bool | str:
    """The configuration refuses what is none of the three."""
    return {"true": True, "false": False}.get(text, text)


def _add_run_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--threads", type=_count, default=1, help="threads of PyTorch; 1 is fastest here"
    )
    sub.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True)


def _config(args: argparse.Namespace, env: str, algo: str, seed: int) -> Config:
    """The preset with the flags given; of several algorithms, a flag goes to those that have it."""
    fields = {f.name for kind in (PPOConfig, BLPOConfig) for f in dataclasses.fields(kind)}
    given = {n: value for n, value in vars(args).items() if n in fields - {"env", "seed"}}
    if hasattr(args, "algos"):
        kind = PPOConfig if algo == "ppo" else BLPOConfig
        given = {n: v for n, v in given.items() if n in kind.__dataclass_fields__}
        if algo == "nested":
            given.pop("solver", None)
    return preset(algo, env, seed=seed, **given)


def _train(args: argparse.Namespace) -> None:
    config = _config(args, args.env, args.algo, args.seed)
    run_dir = args.run_dir or Path("runs") / f"{args.env.replace('/', '-')}-{args.algo}-{args.seed}"
    train(config, run_dir, progress=True, tensorboard=args.tensorboard, threads=args.threads)
    _print_summary(run_dir)


def _resume(args: argparse.Namespace) -> None:
    config = load_config(args.run_dir)
    train(
        config, args.run_dir, resume=True, progress=True, tensorboard=args.tensorboard,
        threads=args.threads,
    )  # fmt: skip
    _print_summary(args.run_dir)


def _print_summary(run_dir: Path) -> None:
    from hypergrad_rl.report import read_metrics, summarize

    summary = summarize(read_metrics(run_dir))
    print(
        f"return over the last tenth {summary.final_return:.1f}, area under the curve "
        f"{summary.area:.1f}, {summary.steps_per_second:.0f} steps/s; see {run_dir}"
    )


def _evaluate(args: argparse.Namespace) -> None:
    returns = evaluate(
        args.run_dir, args.episodes, seed=args.seed, deterministic=not args.stochastic
    )
    print(
        f"{len(returns)} episodes: mean return {np.mean(returns):.1f}, standard deviation "
        f"{np.std(returns):.1f}, lowest {min(returns):.1f}, highest {max(returns):.1f}"
    )


def _compare(args: argparse.Namespace) -> None:
    for flag, values in (("--algos", args.algos), ("--seeds", args.seeds), ("--env", args.env)):
        # A run that counts twice would make the spread over seeds too small.
        if len(set(values)) < len(values):
            given = " ".join(map(str, values))
            raise ConfigError(f"{flag} {given}: expected each of them once")
    runs = {}
    for env in args.env:
        parent = args.run_dir / env.replace("/", "-") if len(args.env) > 1 else args.run_dir
        for algo, seed in itertools.product(args.algos, args.seeds):
            runs[parent / f"{algo}-{seed}"] = _config(args, env, algo, seed)
    for run_dir in runs:
        if (run_dir / METRICS).exists():
            raise HypergradRLError(
                f"{run_dir} already holds a run, which is left as it is; choose another --run-dir, "
                f"or `report {args.run_dir}`"
            )
    train_all(runs, args.jobs, args.threads, args.tensorboard)
    _write_report(list(runs), args.run_dir, args.command_line)


def _report(args: argparse.Namespace) -> None:
    try:
        ranges = {env: (float(low), float(high)) for env, low, high in args.range}
    except ValueError as error:
        raise HypergradRLError(f"--range: expected ENV LOW HIGH, {error}") from error
    _write_report(args.runs, args.output or _output(args.runs), args.command_line, by=args.by,
                  mix=args.mix, steps=args.steps, ranges=ranges)  # fmt: skip


def _output(runs: Sequence[Path]) -> Path:
    alone = len(runs) == 1 and not (runs[0] / CONFIG).exists()
    return runs[0] if alone else Path("runs/report")


def _write_report(runs: Sequence[Path], output: Path, command: str, **options: Any) -> None:
    from hypergrad_rl.comparison import compare_runs, write_comparison  # SciPy and Matplotlib

    print(write_comparison(compare_runs(runs, command=command, **options), output))
    print(f"\ncurves and intervals: {output / 'comparison.png'}; figures, and the command of every "
          f"run: {output / 'results.json'}, results.csv, runs.csv")  # fmt: skip


def _plot(args: argparse.Namespace) -> None:
    from hypergrad_rl.comparison import compare_runs
    from hypergrad_rl.report import plot_comparison, plot_run

    one = len(args.runs) == 1 and (args.runs[0] / CONFIG).exists()
    default = args.runs[0] / "learning_curve.png" if one else _output(args.runs) / "comparison.png"
    output = args.output or default
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if one:
            plot_run(args.runs[0], output)
        else:
            results = compare_runs(args.runs, by=args.by, mix=args.mix, steps=args.steps)
            plot_comparison(results, output)
            print(*(f"note: {note}\n" for note in results["notes"]), sep="", end="")
    except HypergradRLError:
        raise
    except (OSError, ValueError) as error:  # the latter: a format that Matplotlib does not write
        raise HypergradRLError(f"cannot draw {output}: {error}") from error
    print(output)


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
