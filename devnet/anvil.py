"""A local chain: Anvil as a child process, on a port the system chose, bound to loopback, gone with its parent.

Its accounts come from a mnemonic the whole world knows: they are test keys, never to hold anything of value.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from contracts import tool
from devnet.processes import die_with
from protocol.errors import TallyError
from protocol.signing import Signer

_START_SECONDS: Final = 20.0
"""Anvil is up in under 0.1 s; the rest is for a machine that is busy with something else."""
_STOP_SECONDS: Final = 10.0
"""Time to write the state file before it is killed."""
_KEY_LINE: Final = re.compile(r"\(\d+\) 0x([0-9a-f]{64})$")
_LISTENING: Final = "Listening on "


class AnvilError(TallyError):
    """Anvil is missing or did not start; says what to do."""


@dataclass(frozen=True, slots=True)
class AnvilOptions:
    """How to start it. `state`: file the chain is loaded from and, on `stop`, written to.

    `port` 0 lets the system choose. `block_seconds` None mines a block per transaction and no
    other; a number mines one at that interval too, as the beacon of an audit needs blocks that nobody asked for.
    `mnemonic` None means Anvil's own well-known one. `timestamp`: of the genesis block, Unix seconds.
    """

    port: int = 0
    chain_id: int = 31337
    accounts: int = 10
    block_seconds: int | None = None
    state: Path | None = None
    mnemonic: str | None = None
    timestamp: int | None = None

    def arguments(self) -> list[str]:
        """Command line, without the binary."""
        out = ["--host", "127.0.0.1", "--port", str(self.port), "--chain-id", str(self.chain_id)]
        out += ["--accounts", str(self.accounts), "--threads", "1", "--no-cors"]
        if self.block_seconds is not None:
            out += ["--block-time", str(self.block_seconds), "--mixed-mining"]
        if self.state is not None:
            out += ["--state", str(self.state)]
        if self.mnemonic is not None:
            out += ["--mnemonic", self.mnemonic]
        if self.timestamp is not None:
            out += ["--timestamp", str(self.timestamp)]
        return out


class Anvil:
    """One running Anvil. A context manager; `stop` is idempotent.

    It receives SIGTERM when the thread that started it ends, so start it from a thread that lives as long as it
    should (usually the main one).
    """

    def __init__(self, options: AnvilOptions | None = None) -> None:
        """Raises: AnvilError when the binary is missing, exits at once, or says nothing for 20 s."""
        self.options = options or AnvilOptions()
        self._process = subprocess.Popen(
            [str(anvil_binary()), *self.options.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with(os.getpid()) if sys.platform == "linux" else None,
        )
        try:
            self.rpc_url, self.accounts = self._wait_until_listening()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End the process, writing the state file if one was asked for. Never raises."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once, as a crash would: no state is written."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it from running, so that requests hang; `thaw` lets it go on. It has stopped when this returns."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Anvil:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)  # a frozen process takes no signal but SIGKILL
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_listening(self) -> tuple[str, tuple[Signer, ...]]:
        stdout = self._process.stdout
        assert stdout is not None
        lines: list[str] = []
        for line in _Lines(stdout, time.monotonic() + _START_SECONDS):
            lines.append(line)
            if line.startswith(_LISTENING):
                threading.Thread(target=_drain, args=(stdout,), daemon=True, name="anvil-log").start()
                keys = [match[1] for match in map(_KEY_LINE.search, lines) if match]
                accounts = tuple(Signer.from_secret(bytes.fromhex(key)) for key in keys)
                return "http://" + line.removeprefix(_LISTENING).strip(), accounts
        said = "; ".join(line for line in lines[-3:] if line) or "nothing"
        raise AnvilError(f"Anvil did not start (it said: {said})")


def anvil_binary() -> Path:
    """The native binary. Raises: AnvilError when it was not installed."""
    try:
        return tool("anvil")
    except FileNotFoundError as exc:
        raise AnvilError("Anvil is not installed: run `make setup` (npm ci --ignore-scripts in contracts/)") from exc


class _Lines:
    """Lines of a pipe until it closes or the deadline passes, read without blocking beyond it."""

    def __init__(self, stdout: IO[bytes], deadline: float) -> None:
        self._descriptor, self._deadline, self._buffer = stdout.fileno(), deadline, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._descriptor, selectors.EVENT_READ)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, self._deadline - time.monotonic())):
                raise StopIteration
            chunk = os.read(self._descriptor, 65536)
            if not chunk:
                raise StopIteration
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode(errors="replace").rstrip()


def _drain(stdout: IO[bytes]) -> None:
    """Anvil logs every request; a full pipe would stop it."""
    with contextlib.suppress(OSError, ValueError):
        while os.read(stdout.fileno(), 65536):
            pass
