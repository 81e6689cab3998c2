"""Runs the Python blocks of the README and of the documentation's pages as tests."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from xdist.scheduler import LoadScopeScheduling

# The blocks of one page share a namespace and run in order; each page begins with an empty one.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    fixtures=["page_directory"],
).pytest()


@pytest.fixture(scope="module")
def page_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run a page in an empty directory, so that what its examples write stays out of the tree."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        directory = tmp_path_factory.mktemp("page")
        monkeypatch.chdir(directory)
        yield directory


class PagesTogether(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist is untyped here
    """Spreads tests over processes one by one, but keeps the blocks of a page in one process.

    Later blocks use names of earlier ones. Marking them with ``xdist_group`` is no way: that
    renames test items in a manner that pytest 9.2 no longer allows, and is then ignored.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return path if path.endswith(".md") else nodeid


@pytest.hookimpl(optionalhook=True)  # tests also run without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> PagesTogether:
    """Take the place of whatever ``--dist`` says."""
    return PagesTogether(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Draw the same numbers for a test at each run, whatever ran before it in its process.

    A failure is then the change's and not the day's.  The slow profile draws fresh ones.
    """
    if os.environ.get("HYPOTHESIS_PROFILE") != "slow":
        torch.manual_seed(zlib.crc32(item.nodeid.encode()))
