"""Run one adapter on a file of systems; called in the package's own environment.

python -m benchmarks.peers.run scipy cases.npz scipy.csv
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from ..atlas.cases import load
from ..atlas.records import Record, write
from .protocol import run


def main(adapter: str, cases: Path, output: Path) -> None:
    module = import_module(f"{__package__}.adapters.{adapter}")
    records: list[Record] = []
    systems = load(cases)
    for number, system in enumerate(systems, 1):
        records += run(module.OWNER, module.PEERS, [system])
        if number % 20 == 0 or number == len(systems):
            print(f"  {module.OWNER}: {number} of {len(systems)} systems", flush=True)
    write(records, output)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
