"""The devnet as a person runs it: the demo's figures, Ctrl-C at any moment, a second devnet, what is left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from devnet.cluster import STAKE, VALIDATOR_STAKE
from devnet.demo import CHEATER, CHEATS, EXHIBITS, JOBS, LIAR

pytestmark = pytest.mark.slow

CPU_S = 200.0
"""Computing that the demo takes at most, over all its processes: two cores have 300 s of it in its 150 s. Unit: s."""

PROMISED = {
    "jobs_ok",
    "jobs_failed",
    "prompt_tokens",
    "completion_tokens",
    "receipts_signed",
    "receipts_acknowledged",
    "settled_wei",
    "paid_wei",
    "protocol_fee_wei",
    "gas_per_pair",
    "audits",
    "cheaters",
    "cheaters_slashed",
    "honest_slashed",
    "slashed_wei",
    "audit_cost_ratio",
    "conservation_ok",
    "failover_text_identical",
    "seconds",
}


def tally(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "node", *arguments]


def descendants(home: Path) -> list[psutil.Process]:
    """Every living process that was started for this home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(home) in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "market"
    for process in descendants(tmp_path):
        process.kill()


def test_demo_serves_kills_settles_counts_and_judges(home: Path) -> None:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = used.ru_utime + used.ru_stime
    done = subprocess.run(
        tally("devnet", "demo", "--json", "--home", str(home)), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    result = json.loads(done.stdout)
    assert result.keys() >= PROMISED
    assert result["conservation_ok"] and result["failover_text_identical"], result["problems"]
    assert result["jobs_failed"] == 0 and result["jobs_ok"] + result["jobs_cancelled"] == JOBS
    assert result["settled_wei"] + result["lost_to_kill_wei"] == result["paid_wei"] > 0
    fee_up = result["settled_wei"] * 12 // 100
    assert fee_up - len(result["parties"]) <= result["protocol_fee_wei"] <= fee_up  # rounded down once per batch
    assert result["receipts_acknowledged"] <= result["receipts_signed"]
    _check_justice(result)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime - before <= CPU_S  # the clock says more about what else runs here
    assert not descendants(home)


def _check_justice(result: dict[str, Any]) -> None:
    """The cheat and the liar lost stake, nobody else did, and it shows why."""
    assert result["cheaters"] == result["cheaters_slashed"] == len(CHEATS) and result["honest_slashed"] == 0
    assert result["audits"] == len(result["cases"]) >= 3 and 0 < result["audit_cost_ratio"] < 2
    assert sum(case["jobs"] for case in result["cases"]) >= JOBS
    lost = {stake["name"]: stake for stake in result["stakes"] if stake["slashed_wei"]}
    assert lost.keys() == CHEATS.keys() and all(stake["transactions"] for stake in lost.values())
    assert lost[CHEATER]["held_wei"] == 0 and lost[CHEATER]["slashed_wei"] == STAKE
    assert 0 < lost[LIAR]["slashed_wei"] < VALIDATOR_STAKE
    assert result["slashed_wei"] == sum(stake["slashed_wei"] for stake in lost.values())
    for case in result["cases"]:
        honest = {vote["outcome"] for vote in case["votes"] if vote["validator"] not in CHEATS}
        assert honest == {"IMPROBABLE" if case["provider"] == CHEATER else "PASS"} == {case["verdict"]}
        measured = {(vote["tokens"], vote["flags"]) for vote in case["votes"] if vote["validator"] not in CHEATS}
        assert measured == {(case["tokens"], case["flags"])}  # every honest member counts the same
    assert len(result["exhibits"]) == EXHIBITS and any(token["text"].strip() for token in result["exhibits"])


def test_up_prints_what_is_needed_and_ctrl_c_leaves_no_process(home: Path) -> None:
    with subprocess.Popen(
        tally("devnet", "up", "--home", str(home), "--providers", "1", "--validators", "3", "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as up:
        assert up.stdout is not None
        shown = [up.stdout.readline() for _ in range(3)]
        assert [line.split()[0] for line in shown] == ["URL", "KEY", "RPC"]
        second = subprocess.run(
            tally("devnet", "up", "--home", str(home)), capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1 and "already runs" in second.stderr
        status = subprocess.run(
            tally("devnet", "status", "--home", str(home), "--json"),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        alive = json.loads(status.stdout)["alive"]
        assert alive.keys() == {"provider-1", "gateway", "validator-1", "validator-2", "validator-3"}
        assert all(alive.values())
        up.send_signal(signal.SIGINT)
        assert up.wait(90) == 0
    assert not descendants(home)


def test_ctrl_c_while_starting_leaves_no_process(home: Path) -> None:
    with subprocess.Popen(
        tally("devnet", "demo", "--home", str(home)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stderr is not None
        demo.stderr.readline()  # it has begun
        demo.send_signal(signal.SIGINT)
        assert demo.wait(90) == 130
        assert demo.stderr.read().endswith("\ninterrupted; every process was stopped\n")
    assert not descendants(home)


def test_supervisor_that_is_killed_takes_its_nodes_along(home: Path) -> None:
    with subprocess.Popen(
        tally("devnet", "up", "--home", str(home), "--providers", "1", "--validators", "0", "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as up:
        assert up.stdout is not None
        assert up.stdout.readline().startswith("URL")
        up.kill()
        up.wait(30)
    gone, alive = psutil.wait_procs(descendants(home), timeout=60)
    assert not alive, gone
