"""Group commit: one thread, one connection, one fsync for all calls that wait.

While a commit syncs, further calls queue; the next transaction takes them all. So a lone caller pays one sync, and N
concurrent callers pay about two between them, with no timer to tune. Each call is a savepoint inside the group: a
call that is refused leaves nothing and does not disturb its neighbours. When the transaction itself fails (disk
full), every call of the group is tried again alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection, Engine

from node.crashpoints import STORE_AFTER, STORE_BEFORE, STORE_WRITE_AFTER, STORE_WRITE_BEFORE, crash_point
from node.ports import StoreError
from node.store.errors import is_fsync_failure, store_errors

GROUP_LIMIT: Final = 256
"""Calls in one transaction. At ~0.3 ms a record it bounds how long the first of them waits to about 0.1 s beyond the
sync; there are never that many unless more than 256 streams pay at once."""


@dataclass(frozen=True, slots=True)
class Call:
    """One `write`: what to run in the transaction, the kinds of its records (for crash points), and who waits.

    `shreds`: it destroys a key, which must then leave the log as well.
    """

    run: Callable[[Connection], None]
    kinds: tuple[type, ...]
    shreds: bool = False
    done: Future[None] = field(default_factory=Future)


class Writer:
    """The only writer of a database. Its thread lives from construction to `stop`."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self._path = path
        self._engine = engine
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._failed: StoreError | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> Future[None]:
        """Queue a call; calls are applied in this order. Raises: StoreError when the writer was stopped."""
        with self._lock:
            if self._stopped:
                raise StoreError(f"the journal {self._path} is closed: nothing was kept")
            self._queue.put(call)
        return call.done

    def stop(self) -> None:
        """Finish what is queued and end the thread. Blocks; idempotent."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._queue.put(None)
        self._thread.join()

    def _main(self) -> None:
        with self._engine.connect() as connection:
            while (group := self._next_group()) is not None:
                self._serve(connection, group)

    def _next_group(self) -> list[Call] | None:
        """Wait for a call, then take what else is there; None at the end."""
        first = self._queue.get()
        group: list[Call] = []
        while first is not None:
            # A caller that was cancelled before its turn is left out; from here on its records are kept.
            if first.done.set_running_or_notify_cancel():
                group.append(first)
            if len(group) == GROUP_LIMIT or (self._queue.empty() and group):
                return group
            first = self._queue.get()
        if group:
            self._queue.put(None)
            return group
        return None

    def _serve(self, connection: Connection, group: Sequence[Call]) -> None:
        """Commit a group and tell each caller what became of its call."""
        if self._failed is not None:
            for call in group:
                call.done.set_exception(self._failed)
            return
        try:
            outcomes = self._commit(connection, group)
        except Exception as exc:  # noqa: BLE001 - whatever it was, the callers wait for it on another thread
            if is_fsync_failure(exc):
                self._fail(group, exc)
            elif len(group) == 1:
                group[0].done.set_exception(self._explained(exc))
            else:
                for call in group:
                    self._serve(connection, [call])
            return
        for call, error in zip(group, outcomes, strict=True):
            if error is None:
                call.done.set_result(None)
            else:
                call.done.set_exception(error)

    def _commit(self, connection: Connection, group: Sequence[Call]) -> list[Exception | None]:
        """Run a group in one transaction. Returns each call's refusal or None.

        Raises whatever breaks the transaction itself; then nothing of the group was kept.
        """
        outcomes: list[Exception | None] = []
        with connection.begin():
            for call in group:
                try:
                    # A call alone needs no savepoint: its refusal ends the transaction.
                    with connection.begin_nested() if len(group) > 1 else nullcontext():
                        call.run(connection)
                    outcomes.append(None)
                except StoreError as exc:
                    if len(group) == 1:
                        raise
                    outcomes.append(exc)
            kinds = [kind for call, error in zip(group, outcomes, strict=True) if error is None for kind in call.kinds]
            crash_point(STORE_WRITE_BEFORE)
            for kind in kinds:
                crash_point(STORE_BEFORE[kind])
        for kind in kinds:
            crash_point(STORE_AFTER[kind])
        crash_point(STORE_WRITE_AFTER)
        if any(call.shreds for call in group):
            _empty_log(connection)
        return outcomes

    def _explained(self, error: BaseException) -> Exception:
        try:
            with store_errors(self._path):
                raise error
        except Exception as exc:  # noqa: BLE001 - the caller raises it
            return exc

    def _fail(self, group: Sequence[Call], error: BaseException) -> None:
        explained = self._explained(error)
        self._failed = explained if isinstance(explained, StoreError) else StoreError(str(explained))
        for call in group:
            call.done.set_exception(self._failed)


def _empty_log(connection: Connection) -> None:
    """Copy the WAL into the database and cut it to nothing: its old frames hold the pages as they were before.

    A reader that is at work keeps it from happening; the next shredding, or the close, does it then.
    """
    raw = connection.connection.dbapi_connection
    assert raw is not None
    raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
