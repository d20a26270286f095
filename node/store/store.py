"""SqlStore: the Store port on one SQLite file, its writer thread and its reader thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import StaticPool

from incentives.ledger import ChannelKey, ContentShredded, Record, Role
from node.ports import (
    ChannelAccount,
    CommitmentRow,
    JobRow,
    Kept,
    ReceiptRow,
    SettlementRow,
    StoreError,
    VerdictRow,
)
from node.store import apply, audit, files, keeping, migrate, read
from node.store.errors import store_errors
from node.store.writer import Call, Writer
from protocol.units import Digest, JobId

T = TypeVar("T")

log = logging.getLogger("tally.store")


def make_engine(path: Path, *, writer: bool) -> Engine:
    """An engine on one connection. The writer's transactions take the write lock at once, so none fails halfway."""
    engine = create_engine(
        "sqlite://",
        creator=partial(files.connect, path, writer=writer),
        poolclass=StaticPool,
        hide_parameters=True,  # an error's text is logged; what a record holds is not
    )
    begin = "BEGIN IMMEDIATE" if writer else "BEGIN"

    def say_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "begin", say_begin)
    return engine


class SqlStore:
    """The journal of one node in the SQLite file `path`; keeps `path.lock` and `backups/` beside it.

    `write` is durable when it returns and group-committed; calls are applied in the order in which `write` was
    called, because a call is queued before its first suspension. A caller that is cancelled while waiting does not
    learn whether its records were kept, as after a crash. Reads see everything written before they were called.
    """

    def __init__(self, path: Path, *, backups: bool = True) -> None:
        """`backups` False: open without one unless a migration needs it, for whoever only wants to look."""
        self.path = path
        self._backups = backups
        self.commits = 0
        """Write transactions committed since `open`."""
        self._lock = files.Lock(path)
        self._writer: Writer | None = None
        self._engines: tuple[Engine, ...] = ()
        self._reader: Engine | None = None
        self._reads: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Lock, check, back up, migrate. A whole read of the file: about a second per gigabyte.

        Raises: StoreError (corrupt, locked by another process, from a newer version, no room, no rights).
        """
        if self._writer is not None:
            raise StoreError(f"the journal {self.path} is open already")
        self._reads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-reader")
        try:
            await asyncio.get_running_loop().run_in_executor(self._reads, self._open)
        except BaseException:
            await self.close()
            raise

    def _open(self) -> None:
        files.make_directory(self.path.parent)
        self._lock.acquire()
        existed = self.path.exists() and self.path.stat().st_size > 0
        if not existed:
            files.refuse_leftovers(self.path)
        files.make_private(self.path)
        if existed:
            files.check(self.path)
        with store_errors(self.path):
            engine = make_engine(self.path, writer=True)
            self._engines = (engine,)
            with engine.connect() as connection:
                with connection.begin():
                    revision = migrate.check_version(connection, self.path)
                if revision is not None:
                    pending = not migrate.is_current(revision)
                    if self._backups or pending:
                        self._back_up(needed=pending)
                with connection.begin():
                    migrate.upgrade(connection)
            self._reader = make_engine(self.path, writer=False)
            self._engines = (engine, self._reader)
        event.listen(engine, "commit", self._count)
        self._writer = Writer(self.path, engine)

    def _back_up(self, *, needed: bool) -> None:
        """A backup that cannot be made keeps a node from migrating (`needed`), but not from earning."""
        try:
            files.rotate_backups(self.path)
        except StoreError as exc:
            if needed:
                raise
            log.warning("the node starts without a fresh backup: %s", exc)

    def _count(self, _connection: Connection) -> None:
        self.commits += 1

    async def close(self) -> None:
        """Commit what is queued, then release the file. Idempotent, never raises."""
        if self._reads is None:
            return
        reads, self._reads = self._reads, None
        await asyncio.get_running_loop().run_in_executor(None, self._close, reads)

    def _close(self, reads: ThreadPoolExecutor) -> None:
        # First the thread that opens and reads: an `open` that was cancelled may still be at work there.
        reads.shutdown(wait=True)
        if self._writer is not None:
            self._writer.stop()
            self._writer = None
        # The writer's connection goes last: the last one to close copies the WAL into the database.
        for engine in reversed(self._engines):
            engine.dispose()
        self._engines, self._reader = (), None
        self._lock.release()

    async def backup(self, to: Path) -> None:
        """Copy the journal as of now to `to`, without stopping writers. Raises: StoreError."""
        self._opened()
        await asyncio.get_running_loop().run_in_executor(None, files.backup, self.path, to)

    async def inconsistencies(self) -> list[str]:
        """What does not add up when the journal is counted again, one line each (node.store.audit)."""
        return await self._read(audit.inconsistencies)

    # ------------------------------------------------------------------------------------------------------- writing

    async def write(self, *records: Record) -> None:
        """Keep all records or none; durable on return. Raises: StoreError, then nothing of this call was kept."""

        def run(connection: Connection) -> None:
            for record in records:
                apply.apply(connection, record)

        kinds = tuple(type(record) for record in records)
        await self._submit(Call(run, kinds, shreds=ContentShredded in kinds))

    async def put_value(self, key: str, value: bytes) -> None:
        """Keep a setting; durable on return. Raises: StoreError."""
        await self._submit(Call(partial(apply.set_value, key=key, value=value), ()))

    async def _submit(self, call: Call) -> None:
        if self._writer is None:
            raise self._not_open()
        await asyncio.wrap_future(self._writer.submit(call))

    # ------------------------------------------------------------------------------------------------------- reading

    async def account(self, key: ChannelKey, role: Role | None = None) -> ChannelAccount | None:
        """One channel. A node that holds both sides of it names the role; without it the provider's side is read."""
        return await self._read(lambda connection: read.account(connection, key, role))

    async def accounts(self, role: Role) -> list[ChannelAccount]:
        """Channels with a job in `role`, then slots seen on the chain that have no job yet.

        Such a slot has no role of its own and is listed for both: compare its provider or owner with your wallet.
        """
        return await self._read(lambda connection: read.accounts(connection, role))

    async def job(self, job_id: JobId, role: Role | None = None) -> JobRow | None:
        """One job. A node that holds both sides of it names the role; without it the provider's side is read."""
        return await self._read(lambda connection: read.job(connection, job_id, role))

    async def jobs(self, role: Role, *, open_only: bool = False, limit: int = 1000) -> list[JobRow]:
        """Newest first."""
        return await self._read(lambda connection: read.jobs(connection, role, open_only, limit))

    async def receipts(
        self, *, role: Role | None = None, job_id: JobId | None = None, final_only: bool = False, limit: int = 1000
    ) -> list[ReceiptRow]:
        """Of one job in the order of its steps, otherwise newest first."""
        return await self._read(lambda connection: read.receipts(connection, role, job_id, final_only, limit))

    async def receipt(self, digest_prefix: bytes) -> ReceiptRow | None:
        """The one receipt whose digest begins so. Raises: StoreError when several do or the prefix is empty."""
        return await self._read(lambda connection: read.receipt(connection, digest_prefix))

    async def settlements(self, *, state: str | None = None, limit: int = 1000) -> list[SettlementRow]:
        """Newest first."""
        return await self._read(lambda connection: read.settlements(connection, state, limit))

    async def kept(self, role: Role, job_id: JobId) -> Kept | None:
        """A job's kept content; None when it was never kept or its key is destroyed. Raises: StoreError."""
        return await self._read(lambda connection: keeping.kept(connection, role, job_id))

    async def kept_before(self, role: Role, opened_before_ms: int, limit: int = 1000) -> list[JobId]:
        """Jobs opened earlier than that whose content is still kept, oldest first."""
        return await self._read(lambda connection: keeping.kept_before(connection, role, opened_before_ms, limit))

    async def commitment(self, key: Digest) -> CommitmentRow | None:
        return await self._read(lambda connection: keeping.commitment(connection, key))

    async def commitments(self, limit: int = 1000) -> list[CommitmentRow]:
        """Newest first."""
        return await self._read(lambda connection: keeping.commitments(connection, limit))

    async def verdict(self, case_id: Digest, round_: int) -> VerdictRow | None:
        return await self._read(lambda connection: keeping.verdict(connection, case_id, round_))

    async def verdicts(self, limit: int = 1000) -> list[VerdictRow]:
        """Newest first."""
        return await self._read(lambda connection: keeping.verdicts(connection, limit))

    async def get_value(self, key: str) -> bytes | None:
        return await self._read(lambda connection: read.value(connection, key))

    async def _read(self, query: Callable[[Connection], T]) -> T:
        """Run a query in a read transaction of its own. Raises: StoreError."""
        reads, _ = self._opened()
        return await asyncio.get_running_loop().run_in_executor(reads, self._run, query)

    def _run(self, query: Callable[[Connection], T]) -> T:
        if self._reader is None:
            raise self._not_open()
        with store_errors(self.path), self._reader.connect() as connection, connection.begin():
            return query(connection)

    def _opened(self) -> tuple[ThreadPoolExecutor, Engine]:
        if self._reads is None or self._reader is None:
            raise self._not_open()
        return self._reads, self._reader

    def _not_open(self) -> StoreError:
        return StoreError(f"the journal {self.path} is not open: nothing was read or kept")
