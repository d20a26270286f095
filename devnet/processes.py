"""Child processes of the devnet: started with a log file and a ready file, watched, killed, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from protocol.errors import TallyError

START_SECONDS: Final = 90.0
"""For a node to become ready: importing torch, loading the model, registering, and one tariff epoch, on busy cores."""

STOP_SECONDS: Final = 40.0
"""For a node to drain and settle after SIGTERM before it is killed."""

_PR_SET_PDEATHSIG: Final = 1


class ProcessFailed(TallyError):
    """A node did not start or ended by itself; carries the end of its log."""


def die_with(parent: int, niceness: int = 0) -> Callable[[], None]:
    """A preexec function: the child gets SIGTERM when the thread that starts it ends, however that ends.

    `niceness`: added to the parent's, so that what can wait leaves the processor to what cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        os.nice(niceness)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return prepare


def free_port() -> int:
    """A TCP port that is free now; the system does not give it out again soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class NodeProcess:
    """`tally ...` as a child, with its own data directory. `ready`: what it wrote into its ready file.

    `program`: what is run instead of `node` where a node has a flaw on purpose: a module, and words it takes before
    the node's own. `niceness`: as in `die_with`.
    """

    def __init__(
        self,
        name: str,
        home: Path,
        arguments: Sequence[str],
        env: Mapping[str, str],
        program: Sequence[str] = ("node",),
        niceness: int = 0,
    ) -> None:
        self.name = name
        self.home = home
        self._arguments = list(arguments)
        self._program = list(program)
        self._niceness = niceness
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self.ready: dict[str, Any] = {}

    @property
    def log_file(self) -> Path:
        return self.home / "node.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """None while it runs; the negative signal number when one killed it."""
        return None if self._process is None else self._process.poll()

    def start(self, **extra_env: str) -> None:
        """Start it, or start it again. `extra_env`: for this run only."""
        ready_file = self.home / "ready.json"
        ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", *self._program, "--home", str(self.home), *self._arguments]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--ready-file", str(ready_file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what it prints for a person holds its API key
                stderr=log,
                env={**os.environ, **self._env, **extra_env},
                preexec_fn=die_with(os.getpid(), self._niceness) if sys.platform == "linux" else None,
                start_new_session=True,  # a Ctrl-C on the terminal is for the supervisor, which stops us in order
            )

    async def wait_ready(self) -> None:
        """Until it serves. Raises: ProcessFailed."""
        ready_file = self.home / "ready.json"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while not ready_file.exists():
                    if not self.running:
                        raise ProcessFailed(f"{self.name} ended before it was ready:\n{self.log_tail()}")
                    await asyncio.sleep(0.02)
                self.ready = json.loads(ready_file.read_text())
                return
        raise ProcessFailed(f"{self.name} was not ready after {START_SECONDS:.0f} s:\n{self.log_tail()}")

    async def wait_gone(self, limit_s: float) -> None:
        """Until it has ended by itself. Raises: ProcessFailed when it still runs after `limit_s`."""
        assert self._process is not None
        try:
            await asyncio.to_thread(self._process.wait, limit_s)
        except subprocess.TimeoutExpired as exc:
            raise ProcessFailed(f"{self.name} still runs after {limit_s:.0f} s:\n{self.log_tail()}") from exc

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        if not self.log_file.exists():
            return "(no log)"
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self._process is not None and self.running:
            self._process.send_signal(number)

    async def stop(self) -> int:
        """SIGTERM, then wait; kill -9 past STOP_SECONDS. Returns the exit status; never raises."""
        process = self._process
        if process is None:
            return 0
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL
        finally:
            if process.poll() is None:  # cancelled while waiting
                process.kill()
                process.wait()


def wait_gone(pid: int, limit_s: float) -> bool:
    """Wait until a process that is not our child has ended; whether it did within the limit."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            return bool(select.select([descriptor], [], [], limit_s)[0])
        finally:
            os.close(descriptor)
    return True
