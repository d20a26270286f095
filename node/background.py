"""Tasks that run beside the work: what fails in one is logged and tried again, and none ends unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from node.ports import Clock
from protocol.errors import TallyError

log = logging.getLogger("tally.background")

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
"""Pauses after failures in a row. Unit: s. Each is twice the one before. The longest is what a node may be late by
once the fault is gone; an exit leaves a provider minutes at least."""


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row (at least 1)."""
    return float(min(FIRST_PAUSE_S * 2 ** min(failures - 1, 16), LONGEST_PAUSE_S))


@dataclass(slots=True)
class _Facts:
    state: str = "running"
    failures: int = 0
    last_error: str = ""


class Background:
    """Starts tasks and knows how they fare; whoever starts one cancels it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._facts: dict[str, _Facts] = {}

    def start(self, name: str, work: Callable[[], Awaitable[None]], kept: str) -> asyncio.Task[None]:
        """Run `work`, again after a pause when it raises a TallyError, until it returns or is cancelled.

        `kept`: what is safe meanwhile, for the log. Anything else that it raises is a bug: it ends the task, and is in
        the log and in `status`.
        """
        facts = self._facts[name] = _Facts()
        task = asyncio.create_task(self._keep(name, facts, work, kept), name=name)
        task.add_done_callback(lambda ended: self._ended(facts, ended))
        return task

    def status(self) -> dict[str, object]:
        """Plain JSON values: per task its state (running, pausing, done, ended), failures so far, and the last one."""
        return {
            name: {"state": facts.state, "failures": facts.failures, "last_error": facts.last_error}
            for name, facts in self._facts.items()
        }

    async def _keep(self, name: str, facts: _Facts, work: Callable[[], Awaitable[None]], kept: str) -> None:
        in_a_row = 0
        while True:
            began = self._clock.monotonic()
            try:
                return await work()
            except TallyError as exc:
                in_a_row = 1 if self._clock.monotonic() - began > LONGEST_PAUSE_S else in_a_row + 1
                wait = pause(in_a_row)
                log.warning("%s failed, %s; again in %g s: %s", name, kept, wait, exc)
                facts.state, facts.last_error = "pausing", str(exc)
                facts.failures += 1
            await self._clock.sleep(wait)
            facts.state = "running"

    def _ended(self, facts: _Facts, task: asyncio.Task[None]) -> None:
        bug = log_bug(task)
        facts.state = "done" if bug is None else "ended"
        if bug is not None:
            facts.failures += 1
            facts.last_error = repr(bug)


def log_bug(task: asyncio.Task[None]) -> BaseException | None:
    """For a done callback: what a task raised is logged with its traceback and returned."""
    bug = None if task.cancelled() else task.exception()
    if bug is not None:
        log.error("the task '%s' was ended by a bug", task.get_name(), exc_info=bug)
    return bug
