"""Runs the lines of a batch: a few at a time, each within what is left of the budget, each until it is final.

Nothing here knows HTTP or files: `send` asks the gateway, the book keeps the answers.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from node.cli import money
from node.cli.batchbook import Book, cost_of
from node.cli.batchfile import BatchFile, Line
from node.cli.failures import CommandFailed
from protocol.units import WEI_PER_TALLY, Wei

MAX_TRIES: Final = 8
"""How often a line is sent in one run while everybody is busy. With pauses of up to MAX_PAUSE_S that is some minutes;
what is still refused then is left for the next run."""

MAX_PAUSE_S: Final = 60.0
"""Longest pause between two tries. Unit: s."""

_FINAL: Final = frozenset({400, 404, 405, 413, 415, 422})
"""Statuses that another try would only repeat: the request itself is wrong."""

_STOPPING: Final = frozenset({"insufficient_funds", "invalid_api_key", "gateway_stopping"})
"""Errors that every other line would meet too: no more are sent."""

_NEW_KEY: Final = frozenset({"job_cancelled", "answer_not_kept", "idempotency_key_reused"})
"""Errors of an Idempotency-Key that was used up by a run that was killed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the gateway said. `status` 0: it did not answer, `body` says why in its error."""

    status: int
    body: dict[str, Any]
    request_id: str = ""
    retry: bool = True
    retry_after_s: float | None = None

    @property
    def error(self) -> dict[str, Any]:
        found = self.body.get("error")
        return found if isinstance(found, dict) else {}


Send = Callable[[str, dict[str, Any], str], Awaitable[Reply]]
"""(url, body, idempotency key or "") -> what the gateway said. Never raises for a gateway that cannot be reached."""


class Batch:
    """One run over a batch's lines. `most`: wei that the whole batch may cost, None for no limit of its own.

    `why`: why lines were left, "" when none were for a reason of their own. `on_change`: called after each line.
    """

    def __init__(
        self,
        batch: BatchFile,
        book: Book,
        send: Send,
        *,
        concurrency: int,
        most: Wei | None,
        on_change: Callable[[], None] = lambda: None,
        pause: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
    ) -> None:
        self._batch = batch
        self._book = book
        self._send = send
        self._concurrency = concurrency
        self._most = most
        self._on_change = on_change
        self._pause = pause
        self._reserved: dict[str, int] = {}
        self._freed = asyncio.Condition()
        self._stopping = asyncio.Event()
        self.why = ""

    @property
    def waiting(self) -> list[Line]:
        """Lines that are not finished."""
        return [line for line in self._batch.lines if line.custom_id not in self._book.finished]

    def stop(self, why: str) -> None:
        """Take no more lines; those that run go on to their end."""
        self.why = self.why or why
        self._stopping.set()

    async def run(self) -> None:
        """Send every line that is not finished. Raises: CommandFailed (files), and then cancels what runs."""
        lines = iter(self.waiting)
        workers = [asyncio.ensure_future(self._work(lines)) for _ in range(self._concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, lines: Iterator[Line]) -> None:
        for line in lines:
            if self._stopping.is_set():
                return
            try:
                await self._line(line, self._batch.body(line))
            finally:
                self._reserved.pop(line.custom_id, None)
                async with self._freed:
                    self._freed.notify_all()
            self._on_change()

    async def _line(self, line: Line, body: dict[str, Any]) -> None:
        most: Wei | None = None
        if self._most is not None:
            reply = await self._send(line.url, dry(body), "")
            least = reply.body.get("least_wei")
            if reply.status != 200 or least is None:
                return self._refused(line, reply)
            most = await self._allowance(line, int(least), int(reply.body["most_wei"]))
            if most is None:
                return None
            body = {**body, "x_tally": {**body["x_tally"], "max_price": _tally(most)}}
        self._book.start(line.custom_id, most)
        reply = await self._answered(line, body)
        cost = cost_of(reply.body)
        if reply.status == 200:
            self._book.done(line.custom_id, entry(self._key(line), line, reply), cost)
        else:
            self._fail(line, reply, cost)
        return None

    async def _allowance(self, line: Line, least: int, most: int) -> Wei | None:
        """What this line may cost: its worst case, or what is left when nothing else runs. None: the budget is used."""
        assert self._most is not None
        totals = self._book.totals
        async with self._freed:
            while not self._stopping.is_set():
                room = self._most - totals.cost - totals.unsettled_most - sum(self._reserved.values())
                if room >= most or (room >= least and not self._reserved):
                    self._reserved[line.custom_id] = min(room, most)
                    return Wei(min(room, most))
                if not self._reserved:
                    left = money.amount(max(0, room))
                    self.stop(f"the next line could cost {money.amount(least)}, and {left} is left of --max-cost")
                    self._freed.notify_all()
                    break
                await self._freed.wait()
        return None

    async def _answered(self, line: Line, body: dict[str, Any]) -> Reply:
        """The gateway's answer, after as many tries as it takes or is worth."""
        spent_keys = 0
        for number in range(MAX_TRIES):
            reply = await self._send(line.url, body, self._key(line, spent_keys))
            if reply.error.get("code") in _NEW_KEY:
                spent_keys += 1
                continue
            again = reply.status in (0, 408, 429, 500, 502, 503) and reply.retry and not cost_of(reply.body)
            if not again or self._stopping.is_set() or number == MAX_TRIES - 1:
                return reply
            seconds = reply.retry_after_s if reply.retry_after_s is not None else 1.0
            await self._rest(min(MAX_PAUSE_S, seconds * 2**number))
        return reply

    async def _rest(self, seconds: float) -> None:
        """Wait, but not once the batch is to stop."""
        waits = [asyncio.ensure_future(self._until_stopped()), asyncio.ensure_future(self._pause(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _until_stopped(self) -> None:
        await self._stopping.wait()

    def _refused(self, line: Line, reply: Reply) -> None:
        """A line that could not even be priced."""
        if reply.status == 200:
            said = {"code": "no_provider", "message": "no offer can take this job now", "param": None}
            reply = Reply(503, {"error": {**said, "type": "server_error"}})
        self._book.start(line.custom_id, Wei(0))
        self._fail(line, reply, 0)

    def _fail(self, line: Line, reply: Reply, cost: int) -> None:
        final = reply.status in _FINAL
        self._book.failed(line.custom_id, entry(self._key(line), line, reply), cost, final=final)
        if reply.error.get("code") in _STOPPING:
            self.stop(str(reply.error.get("message", "the gateway takes no more")))

    def _key(self, line: Line, bump: int = 0) -> str:
        """The Idempotency-Key of a line's next try: a gateway that still runs it, or just answered it, is not paid
        again."""
        tries = self._book.tries.get(line.custom_id, 0)
        named = f"{self._batch.sha256}/{line.custom_id}/{tries}/{bump}"
        return hashlib.sha256(named.encode("utf-8", "replace")).hexdigest()


@dataclass(slots=True)
class Prices:
    """The worst cases of all lines that have one, in wei. `unpriced`: how many no offer can take now.

    `refused`: (line number, why) of those that would be refused however often they are sent.
    """

    least: int = 0
    most: int = 0
    unpriced: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)


async def prices(batch: BatchFile, lines: Sequence[Line], send: Send, concurrency: int) -> Prices:
    """Raises: CommandFailed when the gateway cannot say."""
    slots = asyncio.Semaphore(concurrency)

    async def one(line: Line) -> Reply:
        async with slots:
            return await send(line.url, dry(batch.body(line)), "")

    found = Prices()
    for line, reply in zip(lines, await asyncio.gather(*(one(line) for line in lines)), strict=True):
        said = str(reply.error.get("message", reply.status))
        if reply.status in _FINAL:
            found.refused.append((line.number, said))
        elif reply.status != 200:
            raise CommandFailed(f"line {line.number} cannot be priced: {said}", kept="nothing was sent or paid")
        elif reply.body.get("least_wei") is None:
            found.unpriced += 1
        else:
            found.least += int(reply.body["least_wei"])
            found.most += int(reply.body["most_wei"])
    return found


def dry(body: dict[str, Any]) -> dict[str, Any]:
    """The same request, to be priced only."""
    return {**body, "x_tally": {**body["x_tally"], "dry_run": True}}


def entry(key: str, line: Line, reply: Reply) -> dict[str, Any]:
    """One line of the output or error file, as OpenAI writes it."""
    made: dict[str, Any] = {"id": f"batch_req_{key[:24]}", "custom_id": line.custom_id, "response": None, "error": None}
    if reply.status:
        response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
        return {**made, "response": response}
    return {**made, "error": {**reply.error, "line": line.number}}


def _tally(wei: int) -> str:
    whole, rest = divmod(wei, WEI_PER_TALLY)
    return f"{whole}.{rest:018d}"
