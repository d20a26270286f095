"""Running a command's coroutine: the first Ctrl-C or SIGTERM stops it cleanly, the second one at once.

A clean stop is a cancellation before the role serves, and an event once it does; both leave through the same context
managers, which drain, pay and settle. Forcing is safe too (the journal is written before anything is signed), it only
leaves for the next start what a clean stop would have settled.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, TypeVar

from node.cli.failures import Interrupted

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """What the process's signals ask of one coroutine."""

    def __init__(self, notice: str) -> None:
        self._notice = notice
        self._signal: signal.Signals | None = None
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Event | None = None

    @property
    def code(self) -> int:
        """Exit code for having been stopped: 128 + the signal's number (SIGINT's when none came)."""
        return 128 + (self._signal or signal.SIGINT)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it. SIGTERM is how supervisors end what did its work well."""
        return self._signal is signal.SIGINT

    def attach(self, task: asyncio.Task[Any]) -> None:
        """`task` is what a signal cancels."""
        self._task, self._loop = task, asyncio.get_running_loop()
        if self._signal is not None:
            task.cancel()

    async def wait(self) -> None:
        """Return at the first signal; from now on it cancels nothing."""
        self._waiting = asyncio.Event()
        await self._waiting.wait()

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread, so a busy event loop cannot keep a second signal out."""
        if self._signal is not None:
            _say("forced: stopping at once; the next start continues from the journal")
            os._exit(128 + number)
        self._signal = signal.Signals(number)
        _say(f"{self._notice} (again: stop at once)")
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._waiting is not None:
            self._waiting.set()
        elif self._task is not None:
            self._task.cancel()


def _say(text: str) -> None:
    # Not a buffered stream: a signal may have come in the middle of a write to it.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    before = [(number, signal.signal(number, stop.on_signal)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def run(work: Coroutine[Any, Any, T], stop: Stop | None = None) -> T:
    """Run `work` to its end. Raises: Interrupted when a signal ended it first, and what `work` raises."""
    watch = stop or Stop("stopping")

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        watch.attach(task)
        return await work

    with _signals(watch):
        try:
            return asyncio.run(watched())
        except asyncio.CancelledError:
            raise Interrupted(watch.code) from None
