"""The doctor finds what is wrong, says how to mend it, and changes nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.node.cli.conftest import Tally
from tests.node.cli.sticks import DOMAIN


class Rpc:
    """A JSON-RPC endpoint that says what it is told to."""

    def __init__(self) -> None:
        self.chain_id, self.code, self.held, self.age_s, self.broken = DOMAIN.chain_id, "0x60", 10**18, 1, False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                error = {"code": -1, "message": "no"}
                answer = {"error": error} if outer.broken else {"result": outer.answer(call["method"])}
                body = json.dumps({"jsonrpc": "2.0", "id": call["id"], **answer}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, method: str) -> Any:
        return {
            "eth_chainId": hex(self.chain_id),
            "eth_getCode": self.code,
            "eth_getBlockByNumber": {"number": "0x10", "timestamp": hex(int(time.time()) - self.age_s)},
            "eth_getBalance": hex(self.held),
            "eth_call": hex(self.held),
        }[method]


@pytest.fixture
def rpc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rpc]:
    running = Rpc()
    monkeypatch.setenv("TALLY_CHAIN_RPC_URL", running.url)
    monkeypatch.setenv("TALLY_TRANSPORT_LISTEN_PORT", "0")
    monkeypatch.setenv("TALLY_CLIENT_GATEWAY_PORT", "0")
    yield running
    running.server.shutdown()
    running.server.server_close()


def levels(tally: Tally) -> dict[str, str]:
    result = tally("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["ok"] else 1)
    for check in found["checks"]:
        assert check["level"] == "ok" or check["mend"], check
    return {check["check"]: check["level"] for check in found["checks"]}


def test_a_sound_home(furnished: Path, tally: Tally, rpc: Rpc) -> None:
    before = sorted(path.name for path in furnished.iterdir())
    found = levels(tally)
    assert found.pop("bootstrap") == "warn"
    assert set(found.values()) == {"ok"}, found
    assert {"keys", "journal", "deployment", "rpc", "contracts", "clock", "TALLY", "gas", "torch", "gmp"} <= set(found)
    left = {path.name for path in furnished.iterdir()} - {"journal.db-shm", "journal.db-wal"}
    assert left == set(before)
    text = tally("doctor")
    assert text.exit_code == 0 and "none failed" in text.stdout and "mend: set transport.bootstrap" in text.stdout


def test_an_empty_home_lists_what_is_missing(home: Path, tally: Tally, rpc: Rpc) -> None:
    found = levels(tally)
    assert found["password file"] == found["deployment"] == "FAIL"
    assert tally("doctor").exit_code == 1


@pytest.mark.parametrize(
    ("changes", "check", "level"),
    [
        ({"chain_id": 1}, "rpc", "FAIL"),
        ({"code": "0x"}, "contracts", "FAIL"),
        ({"held": 0}, "TALLY", "warn"),
        ({"held": 0}, "gas", "warn"),
        ({"age_s": -60}, "clock", "FAIL"),
        ({"age_s": 3600}, "clock", "warn"),
        ({"broken": True}, "rpc", "FAIL"),
    ],
)
def test_a_chain_that_is_off(
    furnished: Path, tally: Tally, rpc: Rpc, changes: dict[str, Any], check: str, level: str
) -> None:
    vars(rpc).update(changes)
    assert levels(tally)[check] == level


def test_an_rpc_that_is_down(
    furnished: Path, tally: Tally, rpc: Rpc, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setenv("TALLY_CHAIN_RPC_URL", f"http://127.0.0.1:{unused_tcp_port}")
    assert levels(tally)["rpc"] == "FAIL"


def test_damage_in_the_home(furnished: Path, tally: Tally, rpc: Rpc, tmp_path: Path) -> None:
    (furnished / "journal.db").write_bytes(b"not a database at all" * 100)
    (furnished / "password").write_text("wrong\n")
    (furnished / "config.toml").write_text(f'[provider]\nmodel_dir = "{tmp_path}"\n')
    furnished.chmod(0o755)
    found = levels(tally)
    assert found["journal"] == found["keys"] == found["model"] == "FAIL"
    assert found["home"] == "warn"


def test_a_port_in_use_is_a_warning(furnished: Path, tally: Tally, rpc: Rpc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_CLIENT_GATEWAY_PORT", str(rpc.server.server_port))
    assert levels(tally)["gateway port"] == "warn"


def test_a_settings_file_that_does_not_parse(home: Path, tally: Tally) -> None:
    (home / "config.toml").write_text("[provider]\nslotz = 3\n")
    result = tally("doctor")
    assert result.exit_code == 1 and "did you mean" in result.stdout and "mend:" in result.stdout
