"""A node that must not run says so, names the next step, changes nothing, and exits with status 1."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devnet.cluster import SCRYPT_N
from node.chain.deployment import Deployment
from node.keys import load_or_create
from protocol.units import Address
from tests.faults.adversary import MODEL

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TALLY_SCRYPT_N": str(SCRYPT_N)}
PATIENCE_S = 60


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data directory with keys, whose chain does not answer."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "password").touch(mode=0o600)
    (home / "password").write_text("a password\n")
    for name in ("wallet", "node", "session"):
        load_or_create(home / "keys", name, "a password", scrypt_n=SCRYPT_N)
    addresses = [Address(bytes([n]) * 20) for n in range(1, 7)]
    Deployment(31337, *addresses, 1).save(home / "deployment.json")
    (home / "config.toml").write_text(
        '[chain]\nrpc_url = "http://127.0.0.1:9"\n'
        f'[provider]\nmodel_dir = "{home}"\nmodel_name = "{MODEL}"\n'
        '[transport]\nlisten_host = "127.0.0.1"\nlisten_port = 0\n'
        "[client]\ngateway_port = 0\n"
    )
    return home


def start(home: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and what it said on standard error."""
    command = [sys.executable, "-m", "tests.faults.adversary", "--home", str(home), *arguments]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=home, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stderr


def garbage_journal(home: Path) -> Path:
    path = home / "journal.db"
    path.write_bytes(b"this is no database, whatever it once was " * 200)
    return path


def lost_journal(home: Path) -> Path:
    path = home / "journal.db-wal"
    path.write_bytes(b"w" * 4096)
    return path


def garbage_key(home: Path) -> Path:
    path = home / "keys" / "wallet.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def flipped_key(home: Path) -> Path:
    path = home / "keys" / "wallet.json"
    text = path.read_text()
    at = text.index('"ciphertext"') + len('"ciphertext": "')
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    return path


def empty_password(home: Path) -> Path:
    path = home / "password"
    path.write_text("\n")
    return path


def other_password(home: Path) -> Path:
    path = home / "password"
    path.write_text("another password\n")
    return path


def open_password(home: Path) -> Path:
    path = home / "password"
    path.chmod(0o644)
    return path


def no_deployment(home: Path) -> Path:
    path = home / "deployment.json"
    path.write_text("{")
    return path


DAMAGES: list[tuple[Callable[[Path], Path], str]] = [
    (garbage_journal, "copy the newest file of"),
    (lost_journal, "Put the journal back"),
    (garbage_key, "Restore it from your copy"),
    (flipped_key, "password does not open"),
    (empty_password, "write the password into its first line"),
    (other_password, "password does not open"),
    (open_password, "chmod 600"),
    (no_deployment, "deployment.json"),
]


EVERY = [("provider", *damage) for damage in DAMAGES] + [("gateway", *damage) for damage in DAMAGES[::2][:2]]


@pytest.mark.slow
@pytest.mark.parametrize(("role", "damage", "step"), EVERY, ids=lambda value: getattr(value, "__name__", None))
def test_damaged_files(home: Path, role: str, damage: Callable[[Path], Path], step: str) -> None:
    damaged = damage(home)
    before = damaged.read_bytes()
    status, said = start(home, role, "run")
    assert status == 1, said
    assert "error:" in said and step in said and "Traceback" not in said
    assert damaged.read_bytes() == before, "it was left as it is"


@pytest.mark.slow
def test_a_provider_whose_port_is_taken(home: Path, taken: int) -> None:
    status, said = start(home, "provider", "run", "--listen", f"127.0.0.1:{taken}")
    assert status == 1, said
    assert str(taken) in said and "next:" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_gateway_whose_port_is_taken(home: Path, taken: int) -> None:
    status, said = start(home, "gateway", "run", "--port", str(taken))
    assert status == 1, said
    assert str(taken) in said and "Traceback" not in said


@pytest.mark.slow
def test_a_second_node_in_one_home(home: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.adversary", "--home", str(home), "gateway", "run"]
    ready = home / "ready.json"
    with subprocess.Popen([*command, "--ready-file", str(ready)], env=ENVIRONMENT, stderr=subprocess.DEVNULL) as first:
        try:
            _wait_for(ready, first)
            status, said = start(home, "provider", "run")
        finally:
            first.terminate()
    assert status == 1, said
    assert str(first.pid) in said and "in use by process" in said


def _wait_for(ready: Path, process: subprocess.Popen[bytes]) -> None:
    import time

    deadline = time.monotonic() + PATIENCE_S
    while not ready.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
