"""Run the library's half of the atlas and draw it.

    python -m benchmarks.atlas [--output runs/atlas] [--solvers CG ...] [--slices damping ...]
    python -m benchmarks.atlas --draw-only

Writes ``cases.npz`` (the systems, for other packages' solvers), ``ours.csv``, and the pictures;
with the peers' CSV files beside them (``make peers``) also the comparison, ``wins.csv``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from ..benchmarks.timing import single_threaded
from . import compare, ours, pictures
from .cases import System, load, save
from .records import Record, read, write


def solve(output: Path, solvers: Sequence[str] | None, slices: Sequence[str] | None) -> None:
    """The library's half of the table."""
    start = time.perf_counter()
    entries, systems = ours.chosen(solvers), ours.make_systems(slices)
    save(systems, output / "cases.npz")
    records: list[Record] = []
    for number, system in enumerate(systems, 1):
        records += ours.run([system], entries)
        if number % 10 == 0 or number == len(systems):
            took = time.perf_counter() - start
            print(f"{number} of {len(systems)} systems, {took:.0f} s", flush=True)
    write(records, output / "ours.csv")


def compare_with(output: Path, solvers: Sequence[str] | None) -> None:
    """Set the peers' records against the library's at the products that they spent."""
    mine, theirs = read(output / "ours.csv"), read_peers(output)
    entries = {entry.name: entry for entry in ours.chosen(solvers)}
    systems = {_cell(system): system for system in load(output / "cases.npz")}

    def rerun(cell: tuple[object, ...], name: str, hvps: int) -> Record | None:
        entry = entries[name]
        if hvps < entry.least:
            return None
        return ours.record(systems[cell], entry, "budget", hvps)

    families = {entry.name: entry.family for entry in entries.values()}
    found = compare.wins(mine, theirs, families, rerun)
    compare.write(found, output / "wins.csv")
    for against in ("any", "kind"):
        some = [win for win in found if win.against == against]
        what = "the best solver" if against == "any" else "the solver of its kind"
        print(f"{len(some)} of {len(theirs)} answers of peers beat {what} of the library.")


def read_peers(output: Path) -> list[Record]:
    """Every record of every package that was run."""
    files = sorted((output / "peers").glob("*.csv"))
    return [record for file in files if file.stem != "versions" for record in read(file)]


def _cell(system: System) -> tuple[object, ...]:
    case = system.case
    return (case.slice, case.spectrum, case.condition, case.damping, case.dtype, case.size)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/atlas"))
    parser.add_argument("--solvers", nargs="+", help="some of the library's, by name")
    parser.add_argument("--slices", nargs="+", choices=("condition", "damping", "size", "curve"))
    parser.add_argument("--draw-only", action="store_true", help="from the CSV files that exist")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    single_threaded()
    mpl.use("Agg")
    if not options.draw_only:
        solve(options.output, options.solvers, options.slices)
    peers = read_peers(options.output)
    if peers:
        compare_with(options.output, options.solvers)
    pictures.draw_all(read(options.output / "ours.csv"), peers, options.output)
    print(f"Pictures and CSV files are in {options.output}.")


if __name__ == "__main__":
    main()
