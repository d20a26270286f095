"""Concurrent writers share commits; one that is refused or cancelled harms no other."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from incentives.ledger import Role
from node.ports import StoreError
from node.store import SqlStore
from node.store.files import connect
from node.store.writer import GROUP_LIMIT
from tests.node.store import samples as s
from tests.node.store.samples import job_id


async def test_concurrent_writes_share_commits(sql: SqlStore) -> None:
    before = sql.commits
    await asyncio.gather(*[sql.write(s.opened(number)) for number in range(200)])
    assert sql.commits - before <= 10, "200 writes that waited together need a few commits"
    assert len(await sql.jobs(Role.PROVIDER)) == 200


async def test_a_write_alone_is_one_commit(sql: SqlStore) -> None:
    before = sql.commits
    for number in range(5):
        await sql.write(s.opened(number))
    assert sql.commits - before == 5


async def test_no_group_is_larger_than_the_limit(sql: SqlStore) -> None:
    before = sql.commits
    await asyncio.gather(*[sql.put_value(str(number), b"") for number in range(2 * GROUP_LIMIT + 1)])
    assert sql.commits - before >= 3


async def test_a_refused_call_does_not_poison_its_group(sql: SqlStore) -> None:
    calls = [sql.write(s.opened(n)) if n % 3 else sql.write(s.slot(n % 200), s.closed(n, 0)) for n in range(60)]
    before = sql.commits
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sql.commits - before <= 10
    for number, outcome in enumerate(outcomes):
        assert (outcome is None) if number % 3 else isinstance(outcome, StoreError)
        assert (await sql.job(job_id(number)) is not None) == bool(number % 3)
        assert await sql.account(s.key(number % 200)) is None or number == 0


async def test_a_value_no_column_can_hold_does_not_poison_its_group(sql: SqlStore) -> None:
    bad = s.slot(block=2**70)
    outcomes = await asyncio.gather(
        *[sql.write(s.opened(n)) for n in range(20)], sql.write(bad), sql.write(s.opened(99)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 20 + [StoreError, type(None)]
    assert len(await sql.jobs(Role.PROVIDER)) == 21


async def test_calls_are_applied_in_the_order_they_were_made(sql: SqlStore) -> None:
    await sql.write(s.opened(1))
    await asyncio.gather(*[sql.write(s.issued(1, n, n), s.received(1, n, n)) for n in range(1, 60)])
    (row,) = await sql.jobs(Role.PROVIDER)
    assert (row.steps, row.owed) == (59, 59)


async def test_reads_see_what_was_written_before_them_while_others_write(sql: SqlStore) -> None:
    async def write_and_read(number: int) -> None:
        await sql.write(s.opened(number))
        assert await sql.job(job_id(number)) is not None

    await asyncio.gather(*[write_and_read(number) for number in range(50)])


async def test_a_cancelled_caller_leaves_all_or_nothing_and_the_others_alone(sql: SqlStore) -> None:
    tasks = [asyncio.create_task(sql.write(s.opened(n), s.issued(n, 1, 5))) for n in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await sql.write(s.slot())
    for number, outcome in enumerate(outcomes):
        kept = await sql.job(job_id(number))
        receipts = await sql.receipts(job_id=job_id(number))
        assert (kept is None) == (not receipts)
        if number % 2:
            assert outcome is None and kept is not None


async def test_closing_commits_what_is_queued(sql: SqlStore) -> None:
    tasks = [asyncio.create_task(sql.write(s.opened(n))) for n in range(30)]
    await asyncio.sleep(0)
    await sql.close()
    assert await asyncio.gather(*tasks) == [None] * 30
    await sql.open()
    assert len(await sql.jobs(Role.PROVIDER)) == 30


def test_money_is_synced_at_each_commit(tmp_path: Path) -> None:
    connection = connect(tmp_path / "journal.db", writer=True)
    read = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")}
    foreign_keys = connection.execute("PRAGMA foreign_keys").fetchone()[0]
    connection.close()
    assert read == {"synchronous": 2, "journal_mode": "wal"} and foreign_keys == 1


async def test_files_and_directories_are_private(sql: SqlStore) -> None:
    await sql.write(s.slot())
    await sql.close()
    await sql.open()
    await sql.write(s.slot(1))
    directory = sql.path.parent
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.rglob("*")}
    assert modes.pop("backups") == 0o700 == directory.stat().st_mode & 0o777
    assert set(modes) == {
        "journal.db",
        "journal.db-wal",
        "journal.db-shm",
        "journal.db.lock",
        "journal-000001.db",
    }
    assert set(modes.values()) == {0o600}
    assert os.getpid() == int((directory / "journal.db.lock").read_text())
