"""The benchmarks run and say what they are to say; no test looks at how fast anything was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devnet.bench.workload import prompt, prompts, quantile, summary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, "-m", "devnet.bench", "--quick", "--json", str(target)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Tokens/s" in ran.stdout and "Settlement gas" in ran.stdout
    return json.loads(target.read_text())


@pytest.mark.slow
def test_ratios_stand_beside_what_they_are_made_of(result: Any) -> None:
    assert set(result["throughput"]) == {"1", "2"}
    for row in result["throughput"].values():
        assert row["bare_tokens_per_s"]["median"] > 0 and row["full_tokens_per_s"]["median"] > 0
        assert row["ratio"]["n"] == 2 and row["aim"] == 0.95 and row["met"] in (True, False)
        assert set(row["cpu_s_per_1k_tokens"]) == {"bare_engine", "provider", "gateway", "client"}


@pytest.mark.slow
def test_first_token_signatures_and_gas(result: Any) -> None:
    added = result["first_token"]["added_ms"]
    assert added["n"] == 3 and added["p95"] >= added["median"] and result["first_token"]["aim_ms"] == 15
    for document in ("WorkReceipt", "Voucher", "ReceiptAck"):
        assert set(result["signatures"][document]) == {"digest", "sign", "verify", "pack", "unpack"}
    assert set(result["gas"]["gas_per_pair"]) == {"1", "2"}
    assert result["gas"]["gas_per_pair"]["2"] < result["gas"]["gas_per_pair"]["1"] < 60_000


@pytest.mark.slow
def test_the_machine_and_its_load_are_stated(result: Any) -> None:
    assert {"processor", "cores", "python", "torch", "fsync_ms"} <= set(result["machine"])
    assert len(result["load"]["start"]) == len(result["load"]["end"]) == 3


def test_no_prompt_begins_another() -> None:
    texts = [prompt(number) for number in range(200)]
    assert len({text[:80] for text in texts}) == len(texts)
    assert prompts(5, 2, 3)[1][0] == prompt(8)


def test_summary() -> None:
    assert summary([4, 1, 3, 2]) == {"median": 2.5, "iqr": [1.75, 3.25], "n": 4}
    assert quantile([7], 0.95) == 7
