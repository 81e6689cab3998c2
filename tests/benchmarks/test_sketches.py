from __future__ import annotations

import pytest

from benchmarks import sketches


@pytest.mark.parametrize("name", ["update", "error-estimate", "automatic-rank"])
def test_every_table_has_a_row_for_each_spectrum(name: str) -> None:
    small = {
        "update": lambda: sketches.update(dim=12, seeds=1, rank=3),
        "error-estimate": lambda: sketches.error_estimate(dim=80, seeds=1),
        "automatic-rank": lambda: sketches.automatic_rank(dim=20, seeds=1),
    }
    header, rule, *rows = small[name]().splitlines()
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    assert len(rows) >= 4


def test_the_complement_is_compared_at_equal_rank_and_at_equal_products() -> None:
    header, _, *rows = sketches.complement(dim=20, seeds=1, ranks=(2,)).splitlines()
    assert header.split(" | ")[2:] == ["1e-06", "1e-04", "1e-02", "1e+00 |"]
    assert len(rows) == len(sketches.SPECTRA)
    # Of a flat spectrum the complement is all that matters.
    same, equal, plain = (float(x) for x in rows[0].split(" | ")[2].split(" / "))
    assert max(same, equal, plain) < 1e-4
