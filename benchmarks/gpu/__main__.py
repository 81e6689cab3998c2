"""The solvers on one device: right, how fast, how far from what its arithmetic and memory allow.

    python -m benchmarks.gpu [--output runs/gpu.md] [--device cuda] [--sizes 10000 1000000]

Needs PyTorch and this repository, and runs unattended.  Writes the table to FILE.md and, with all
that was measured, to FILE.json.  Exit code 0: every result agrees with the float64 one of the CPU;
1: one does not; 3: there is no such device, and nothing was measured.

The Hessian is that of a network of two tanh layers on many samples of which only 16 differ, so that
float64 products need 16 samples, and a sketch of rank 20 holds all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from .core import DISTINCT, Core, Row
from .device import CPU, Rates, host_syncs, least_seconds, measured_rates, one_thread

#: Parameters, by the kind of device.
SIZES = {"cuda": (10_000, 1_000_000, 30_000_000), "cpu": (1_000, 10_000, 100_000)}
#: Environments and steps of the agents' rollouts.
ROLLOUTS = ((4, 128), (16, 128))
#: No such device: its own exit code, for whoever runs this unattended.
NO_DEVICE = 3


def update_rows(wanted: torch.device, rates: Rates) -> Iterator[Row]:
    """One update of each agent on a stored rollout, on the CPU: agents know no other device."""
    try:
        from ..benchmarks.updates import one_update
    except ImportError as error:
        why = f"not measured: hypergrad_rl cannot be imported ({error}); pip install '.[rl]'"
        yield Row("update", 0, "eager", str(CPU), note=why)
        return
    note = "" if wanted == CPU else f"agents run on the CPU only, not on {wanted}"
    for algo in ("ppo", "nested", "blpo"):
        for num_envs, num_steps in ROLLOUTS:
            update = one_update(algo, num_envs=num_envs, num_steps=num_steps, epochs=1)
            row = Row(f"{algo} update", num_envs * num_steps, "eager", str(CPU), note=note)
            row.ms = 1e3 * least_seconds(update, CPU, repeats=10)
            with FlopCounterMode(display=False) as counter:
                update()
            row.arithmetic_ms = 1e3 * counter.get_total_flops() / rates.flops
            row.syncs = host_syncs(update, CPU)
            yield row


def markdown(rows: Sequence[Row], rates: Mapping[str, Rates]) -> str:
    """The table, and above it what each device was measured to do."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    known = [
        f"{name}: {1e-12 * rate.flops:.3g} TFLOP/s in a large float32 matrix product, "
        f"{1e-9 * rate.bytes:.3g} GB/s in a large copy."
        for name, rate in rates.items()
    ]
    lines = [
        f"PyTorch {torch.__version__}. {' '.join(known)}",
        "",
        "| work | size | | on | ms | arithmetic floor, ms | bandwidth floor, ms | over the floor "
        "| error | allowed | host syncs | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.work, f"{row.size:,}", row.way, row.where, cell(row.ms, ".3g"),
            cell(row.arithmetic_ms, ".2g"), cell(row.bandwidth_ms, ".2g"),
            cell(row.over_floor, ".3g"), cell(row.error, ".1e"), cell(row.allowed, ".1e"),
            cell(row.syncs, "d"), ("WRONG " if row.wrong else "") + row.note.replace("|", "/"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def core_rows(options: argparse.Namespace, rates: Rates) -> Iterator[Row]:
    """Of every size, eager and compiled; a size that does not fit says so."""
    device: torch.device = options.device
    for size in options.sizes or SIZES[device.type]:
        try:
            core = Core(size, options.batch, device, rates)
            for compiled in (False,) if options.eager else (False, True):
                yield from core.rows(compiled)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            yield Row("the rest of this size", size, "", str(device), note=reason)


def write(rows: Sequence[Row], rates: Mapping[str, Rates], output: Path) -> None:
    output.with_suffix(".md").write_text(markdown(rows, rates), encoding="utf-8")
    record = {
        "torch": torch.__version__,
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "rows": [asdict(row) | {"over_floor": row.over_floor, "wrong": row.wrong} for row in rows],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.md"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of parameters")
    parser.add_argument("--batch", type=int, default=1024, help=f"samples: {DISTINCT}, 32, 48 ...")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    options = parser.parse_args(argv)
    if options.device.type not in SIZES:
        parser.error(f"--device is {options.device}, expected cuda, cuda:N or cpu")
    if options.batch < DISTINCT or options.batch % DISTINCT:
        parser.error(f"--batch is {options.batch}, expected a multiple of {DISTINCT}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    device: torch.device = options.device
    on_cuda = device.type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        print(
            f"No CUDA device is visible to PyTorch {torch.__version__}: nothing was measured. "
            "Pass --device cpu to run the same on the processor.",
            file=sys.stderr,
        )
        return NO_DEVICE
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")  # TF32 has three digits
    with one_thread():
        cpu = measured_rates(CPU)
    rates = {"CPU, one thread": cpu}
    if on_cuda:
        torch.cuda.set_device(device)
        rates[torch.cuda.get_device_name(device)] = measured_rates(device)
    rows: list[Row] = []

    def keep(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            print(markdown([row], rates).splitlines()[-1], flush=True)
            # After each row, so that what was measured outlives whatever ends the run.
            write(rows, rates, options.output)

    with nullcontext() if on_cuda else one_thread():
        keep(core_rows(options, list(rates.values())[-1]))
    with one_thread():
        keep(update_rows(device, cpu))
    wrong = sum(row.wrong for row in rows)
    told = f"{wrong} results differ from the CPU's by more than they may" if wrong else (
        "Every result agrees with the float64 one of the CPU"
    )  # fmt: skip
    print(f"\n{told}. The table is in {options.output.with_suffix('.md')}, the rest beside it.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
