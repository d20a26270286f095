"""The engine benchmark: ratios repeat by repeat, rivals that are not there, and one whole run at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from devnet.bench import engine
from devnet.bench.engine_report import evaluate


def test_each_rival_counts_at_its_best_number_of_threads() -> None:
    """Ratios pair the values of one repeat, so that a machine that slows for all changes none."""
    rates = {"1": {"tally": {1: [100.0, 50.0], 2: [10.0, 10.0]}, "llama.cpp": {1: [10.0, 10.0], 2: [50.0, 25.0]}}}
    result = evaluate(rates, weight_bytes=1000, bytes_per_s=150_000.0)
    assert result["waves"]["1"]["tally"]["threads"] == 1
    assert result["waves"]["1"]["llama.cpp"]["threads"] == 2
    ratio = result["ratios"]["1"]["llama.cpp"]
    assert (ratio["median"], ratio["iqr"], ratio["aim"], ratio["met"]) == (2.0, [2.0, 2.0], 0.8, True)
    assert result["share_of_memory_bound"] == 0.5


def test_an_aim_that_is_missed_is_said_to_be_missed() -> None:
    result = evaluate({"32": {"tally": {1: [109.0]}, "llama.cpp": {1: [100.0]}}}, 1, None)
    assert result["ratios"]["32"]["llama.cpp"]["met"] is False
    assert "share_of_memory_bound" not in result


@pytest.mark.slow
def test_a_rival_that_is_not_there_is_named_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama_cpp is hidden from the rivals' processes by a module of that name that cannot be imported."""
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('hidden by the test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    target = tmp_path / "result.json"
    arguments = ["--quick", "--rivals", "tally", "--rivals", "llama.cpp", "--json", str(target)]
    done = CliRunner().invoke(engine.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    model = json.loads(target.read_text())["models"]["15m"]
    assert "hidden by the test" in model["missing"]["llama.cpp, 1 threads"]
    assert model["waves"]["2"]["tally"]["tokens_per_s"]["n"] == 2
    assert "missing: llama.cpp, 1 threads" in done.output
    assert set(model["sampling_share"]) == {"1", "2"}
    assert model["shared_prompt"]["sooner"]["n"] == 2
