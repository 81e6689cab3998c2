"""The command for one device: what it says where there is none, and all of it on the CPU."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import hypergrad
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import core, device
from hypergrad.operators import compilation
from hypergrad_rl import BLPOConfig, PPOConfig

RATES = device.Rates(1e9, 1e9)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROLLOUTS", ((2, 8),))
    monkeypatch.setattr(gpu, "measured_rates", lambda device: RATES)

    def once(run: Callable[[], object], where: torch.device, repeats: int = 1) -> float:
        return device.least_seconds(run, where, repeats=1)

    for module in (gpu, core):
        monkeypatch.setattr(module, "least_seconds", once)


def test_without_a_cuda_device_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "table.md")]) == gpu.NO_DEVICE
    (line,) = capsys.readouterr().err.splitlines()
    assert "No CUDA device" in line
    assert "--device cpu" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--device", "mps"], ["--batch", "20"], ["--batch", "0"]])
def test_options_that_make_no_sense(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(wrong)
    assert "expected" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_all_of_it_on_the_cpu(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    output = tmp_path / "some" / "table.md"
    arguments = ["--device", "cpu", "--eager", "--sizes", "400", "--batch", "32"]
    assert gpu.main([*arguments, "--output", str(output)]) == 0
    assert torch.get_num_threads() == threads
    rows = json.loads(output.with_suffix(".json").read_text("utf-8"))["rows"]
    solved = [row for row in rows if row["error"] is not None]
    works = [row["work"].split(",")[0] for row in solved]
    assert works == ["product", "10 products in one block", "Nyström", "CG", "MINRES", "CG"]
    for row in solved:
        assert 0 < row["error"] <= row["allowed"] < 1e-2  # nothing is exact, and nothing is vague
        assert row["ms"] > 0 < row["over_floor"] < math.inf
    looks = {row["work"]: row["syncs"] for row in solved}
    assert looks["product"] == 0  # a product is tensor code alone
    assert looks["CG, rtol 1e-4"] > 0  # which a solve that stops by its residual cannot be
    assert [row["work"] for row in rows[-3:]] == ["ppo update", "nested update", "blpo update"]
    table = output.read_text("utf-8").splitlines()
    assert len(table) == 4 + len(rows)
    assert {line.count("|") for line in table[2:]} == {13}


def test_a_wrong_product_and_a_wrong_answer_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "least_seconds", lambda run, device: 1.0)
    case = core.Core(400, 32, torch.device("cpu"), RATES)
    assert not any(row.wrong for row in case.rows(compiled=False))
    true = case.operator(False)
    # Off by a thousandth, as products in TF32 are; and for solves, a system of twice the operator.
    off: Any = 1.001 * true
    monkeypatch.setattr(case, "operator", lambda compiled: off)
    assert [row.wrong for row in case.rows(compiled=False)][:2] == [True, True]
    off = 2.0 * true
    assert all(row.wrong for row in case.rows(compiled=False))


def test_an_error_that_is_not_a_number_is_wrong() -> None:
    row = core.Row("product", 1, "eager", "cpu", error=math.nan, allowed=1.0)
    assert row.wrong


def test_reads_of_values_are_counted() -> None:
    x = torch.ones(3)
    cpu = torch.device("cpu")
    assert device.host_syncs(lambda: (x + x).sum(), cpu) == 0
    assert device.host_syncs(lambda: (float(x.sum()), x.tolist(), bool(x[0] > 0)), cpu) == 3


def test_waits_that_pytorch_warns_of_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's words, from a debug mode that is switched on for the run alone."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run() -> None:
        assert modes == ["warn"]
        for text in [device.SYNC, "something else", device.SYNC]:
            warnings.warn(text, UserWarning, stacklevel=1)

    assert device.host_syncs(run, torch.device("cuda")) == 2
    assert modes == ["warn", "default"]


def test_cuda_times_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        made: ClassVar[list[Event]] = []

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0
            self.made.append(self)

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    now, took = [0.0], iter([100.0, 100.0, 7.0, 5.0, 9.0])  # milliseconds; two to warm up

    def run() -> None:
        now[0] += next(took)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    least = device.least_seconds(run, torch.device("cuda"), repeats=3)
    assert least == pytest.approx(5e-3)
    assert len(Event.made) == 6


def test_flops_are_those_of_the_matrix_products() -> None:
    """Per sample and weight 12, of which the first layer, whose inputs are data, needs fewer."""
    case = core.Core(10_000, 64, torch.device("cpu"), RATES)
    assert case.product_flops == pytest.approx(12 * 64 * 10_000, rel=0.1)


def test_it_says_why_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    case = core.Core(400, 32, torch.device("cpu"), RATES)

    def refused(self: object, v: Any) -> Any:
        hypergrad.errors.warn(
            "products are not compiled: no compiler. Install one.", hypergrad.CompilationWarning
        )
        return v

    monkeypatch.setattr(hypergrad.HessianOperator, "matvec", refused)
    monkeypatch.setattr(hypergrad.HessianOperator, "matmat", lambda self, v: v)
    (row,) = case.rows(compiled=True)
    assert row.note == "products are not compiled: no compiler"
    assert row.ms is None


def test_agents_have_no_device() -> None:
    """Once they have one, this command is to measure them on it."""
    for config in (PPOConfig, BLPOConfig):
        assert "device" not in {field.name for field in fields(config)}


@pytest.mark.slow
def test_compiled_products_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # the capture, without code from it
    monkeypatch.setattr(core, "least_seconds", lambda run, device: 1.0)
    rows = list(core.Core(400, 32, torch.device("cpu"), RATES).rows(compiled=True))
    compilation.forget_compiled()
    assert [row.way for row in rows] == ["compiled"] * 6
    assert rows[0].note.startswith("compiled in ")
    assert all(row.error is not None and not row.wrong for row in rows)
