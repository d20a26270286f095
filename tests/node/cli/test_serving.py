"""A serving role as a process: what it prints, its ready file, and what signals do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cli.conftest import Tally
from tests.node.cli.sticks import NODE, WALLET

Started = subprocess.Popen[str]


class Nodes:
    """Starts fake nodes and leaves none behind."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[Started] = []

    def start(self, *words: str, hang: str = "", role: str = "provider") -> Started:
        env = {**os.environ, "TALLY_TEST_HANG": hang, "PYTHONUNBUFFERED": "1"}
        command = [
            sys.executable,
            "-m",
            "tests.node.cli.fake_node",
            "--home",
            str(self.home),
            role,
            "run",
            *words,
        ]
        process = subprocess.Popen(
            command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self.started.append(process)
        return process


def read_until(process: Started, word: str) -> str:
    """Standard output up to the line that contains `word`."""
    assert process.stdout is not None
    seen = ""
    while word not in seen:
        line = process.stdout.readline()
        assert line, seen + (process.stderr.read() if process.stderr else "")
        seen += line
    return seen


@pytest.fixture
def nodes(home: Path) -> Iterator[Nodes]:
    started = Nodes(home)
    yield started
    for process in started.started:
        process.kill()
        process.communicate()


def test_it_prints_what_others_need_and_writes_the_ready_file(nodes: Nodes, home: Path, tally: Tally) -> None:
    ready = home / "ready.json"
    process = nodes.start("--ready-file", str(ready), "--price-completion", "0.25", "--price-prompt", "0.000001")
    text = read_until(process, "Ctrl-C")
    for part in (
        "16Uiu2HAmTest",
        "--bootstrap /ip4/127.0.0.1/tcp/4001/p2p/16Uiu2HAmTest",
        WALLET.address.hex(),
        "tiny",
    ):
        assert part in text
    assert "prompt 0.000001, cached 0.02, completion 0.25, reasoning 0.25" in text
    facts = json.loads(ready.read_text())
    assert facts["pid"] == process.pid
    assert facts["addresses"] == ["/ip4/127.0.0.1/tcp/4001/p2p/16Uiu2HAmTest"]
    assert (facts["wallet"], facts["node_key"]) == ("0x" + WALLET.address.hex(), "0x" + NODE.address.hex())
    assert ready.stat().st_mode & 0o777 == 0o600
    status = json.loads(tally("status", "--json").stdout)
    assert status["running"] is True and status["role"] == "provider"
    assert "1.5 TALLY" in tally("status").stdout
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (home / "drained").exists() and not (home / "control.sock").exists()


def test_ctrl_c_drains_and_exits_130(nodes: Nodes, home: Path) -> None:
    process = nodes.start()
    read_until(process, "Ctrl-C")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopping:" in err and (home / "drained").exists()


@pytest.mark.parametrize("hang", ["drain", "busy"])
def test_a_second_ctrl_c_forces(nodes: Nodes, home: Path, hang: str) -> None:
    process = nodes.start(hang=hang)
    read_until(process, "Ctrl-C")
    process.send_signal(signal.SIGINT)
    read_until(process, "draining")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "forced" in err and not (home / "drained").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_it_serves_cancels_the_start(nodes: Nodes, home: Path, number: int, code: int) -> None:
    process = nodes.start("--json", hang="start")
    read_until(process, "starting")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert (home / "cleaned").exists() and out == ""


def test_a_second_node_in_one_home_is_refused(nodes: Nodes) -> None:
    read_until(nodes.start(), "Ctrl-C")
    second = nodes.start()
    _, err = second.communicate(timeout=20)
    assert second.returncode == 1 and "another node already runs" in err


def test_a_gateway_makes_its_first_key_and_shows_it_once(nodes: Nodes, home: Path) -> None:
    ready = home / "ready.json"
    words = ("--port", "8499", "--ready-file", str(ready))
    first = nodes.start(*words, role="gateway")
    text = read_until(first, "Ctrl-C")
    facts = json.loads(ready.read_text())
    assert facts["url"] == "http://127.0.0.1:8499/v1" and facts["api_key"].startswith("sk-tally-")
    assert f'curl http://127.0.0.1:8499/v1/models -H "Authorization: Bearer {facts["api_key"]}"' in text
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    second = nodes.start(*words, role="gateway")
    text = read_until(second, "Ctrl-C")
    assert "api_key" not in json.loads(ready.read_text())
    assert facts["api_key"] not in text and "Bearer $TALLY_API_KEY" in text
