"""Damaged, foreign and newer files are refused with the way back; backups are that way."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, event, inspect

from incentives.ledger import Role
from node.ports import StoreError
from node.store import SqlStore, files, migrate
from node.store.errors import explain
from node.store.files import KEEP_BACKUPS, rotate_backups
from node.store.tables import Base
from tests.node.store import samples as s
from tests.node.store.samples import job_id


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def _written(path: Path, jobs: int = 60) -> None:
    """A journal with one backup, made when it held all but the last job."""
    store = SqlStore(path)
    await store.open()
    await store.write(*[s.opened(number) for number in range(jobs - 1)])
    await store.close()
    await store.open()
    await store.write(s.opened(jobs - 1))
    await store.close()


def _text(path: Path) -> None:
    path.write_text("this is no database\n" * 500)


def _header(path: Path) -> None:
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])


def _pages(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: 4096 * 3] + b"\x5a" * 4096 * 12 + raw[4096 * 15 :])


def _short(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("damage", [_text, _header, _pages, _short])
async def test_damage_is_refused_with_the_file_and_the_way_back_which_works(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "journal.db"
    await _written(path)
    damage(path)
    damaged = path.read_bytes()
    store = SqlStore(path)
    with pytest.raises(StoreError) as caught:
        await store.open()
    for part in (str(path), str(tmp_path / "backups"), "tally doctor", "claimable"):
        assert part in str(caught.value)
    assert path.read_bytes() == damaged, "it was left as it is"
    newest = sorted((tmp_path / "backups").iterdir())[-1]
    for name in ("journal.db", "journal.db-wal", "journal.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(newest, path)
    await store.open()
    assert await store.job(job_id(58)) is not None, "what the backup held"
    await store.close()


async def test_an_empty_file_is_a_new_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.touch()
    store = SqlStore(path)
    await store.open()
    await store.close()
    assert not (tmp_path / "backups").exists(), "there was nothing to keep"


async def test_a_lost_journal_is_not_begun_anew_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await _written(path)
    for lose in (path.unlink, path.touch, lambda: (tmp_path / "journal.db-wal").write_bytes(b"x")):
        lose()
        with pytest.raises(StoreError, match=r"is missing, but .* is there"):
            await SqlStore(path).open()
    assert (tmp_path / "journal.db-wal").read_bytes() == b"x"
    (tmp_path / "journal.db-wal").unlink()
    (tmp_path / "backups").rename(tmp_path / "aside")
    store = SqlStore(path)
    await store.open()
    await store.close()


async def test_what_does_not_add_up_is_found(sql: SqlStore) -> None:
    for call in s.one_of_each():
        await sql.write(*call)
    assert await sql.inconsistencies() == []
    changes = {
        "S1": "UPDATE job SET owed = '00000000000000000000000000121' WHERE role = 'provider'",
        "S2": "UPDATE channel SET owed = '00000000000000000000000000007' WHERE role = 'client'",
        "S3": "UPDATE channel SET voucher_signature = x'00' WHERE role = 'provider'",
        "S4": "DELETE FROM receipt WHERE step = 1",
    }
    with sqlite3.connect(sql.path) as other:
        for number, (name, change) in enumerate(changes.items(), 1):
            other.execute(change)
            other.commit()
            found = await sql.inconsistencies()
            assert {line[:2] for line in found} >= set(list(changes)[:number]), name
    other.close()


async def test_a_cancelled_open_lets_go_of_the_file(tmp_path: Path) -> None:
    store = SqlStore(tmp_path / "journal.db")
    task = asyncio.create_task(store.open())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.open()
    await store.write(s.slot())
    await store.close()


async def test_a_directory_in_its_place_and_a_data_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "journal.db").mkdir()
    with pytest.raises(StoreError, match="cannot be opened"):
        await SqlStore(tmp_path / "journal.db").open()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made"):
        await SqlStore(tmp_path / "file" / "journal.db").open()


async def test_another_program_that_writes_is_waited_for_then_named(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sql._engines[0].connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(sql.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another program holds"):
        await sql.write(s.slot())
    other.execute("ROLLBACK")
    other.close()
    await sql.write(s.slot())


async def test_after_a_failed_sync_the_journal_takes_no_more_writes(sql: SqlStore) -> None:
    def fail(_connection: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error

    engine = sql._engines[0]
    event.listen(engine, "commit", fail)
    outcomes = await asyncio.gather(*[sql.write(s.opened(n)) for n in range(3)], return_exceptions=True)
    event.remove(engine, "commit", fail)
    assert all(isinstance(outcome, StoreError) and "failed to sync" in str(outcome) for outcome in outcomes)
    with pytest.raises(StoreError, match="restart the node"):
        await sql.write(s.opened(9))
    await sql.close()
    await sql.open()
    await sql.write(s.opened(9))
    assert [row.job_id for row in await sql.jobs(Role.PROVIDER)] == [job_id(9)]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, 1])
def test_every_failure_names_the_file(code: int) -> None:
    error = sqlite3.OperationalError("why")
    error.sqlite_errorcode = code
    assert "/data/journal.db" in str(explain(Path("/data/journal.db"), error))


# ----------------------------------------------------------------------------------------------------------- backups


async def test_a_backup_is_consistent_while_others_write(sql: SqlStore, tmp_path: Path) -> None:
    writes = [asyncio.create_task(sql.write(s.opened(n), s.issued(n, 1, 5))) for n in range(150)]
    to = tmp_path / "copy.db"
    await sql.backup(to)
    await asyncio.gather(*writes)
    assert to.stat().st_mode & 0o777 == 0o600
    copy = SqlStore(to)
    await copy.open()
    assert len(await copy.jobs(Role.PROVIDER)) == len(await copy.receipts())
    await copy.close()


async def test_a_backup_that_cannot_be_made_leaves_nothing(sql: SqlStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no backup was made"):
        await sql.backup(tmp_path / "missing" / "copy.db")
    assert _names(tmp_path) == ["data"]
    await sql.write(s.slot())


async def test_without_room_for_a_backup_the_node_starts_unless_it_must_migrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    await _written(path)

    def full(_path: Path, _to: Path) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(files, "backup", full)
    store = SqlStore(path)
    await store.open()
    await store.close()
    assert "no room" in caplog.text
    monkeypatch.setattr(migrate, "is_current", lambda _revision: False)
    with pytest.raises(StoreError, match="no room"):
        await store.open()


async def test_each_open_backs_up_and_the_newest_are_kept(tmp_path: Path) -> None:
    store = SqlStore(tmp_path / "journal.db")
    for number in range(KEEP_BACKUPS + 3):
        await store.open()
        await store.write(s.opened(number))
        await store.close()
    assert _names(tmp_path / "backups") == ["journal-000003.db", "journal-000004.db", "journal-000005.db"]
    assert rotate_backups(tmp_path / "journal.db").name == "journal-000006.db"


# --------------------------------------------------------------------------------------------------------- migrations


async def test_the_migrations_make_the_schema_of_the_models(tmp_path: Path) -> None:
    path = tmp_path / "100% new" / "journal.db"
    store = SqlStore(path)
    await store.open()
    await store.close()
    migrated, modelled = create_engine(f"sqlite:///{path}"), create_engine("sqlite://")
    Base.metadata.create_all(modelled)
    with migrated.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    for table in Base.metadata.tables:  # what compare_metadata does not look at
        for look in ("get_check_constraints", "get_foreign_keys", "get_pk_constraint", "get_columns"):
            found, wanted = (getattr(inspect(engine), look)(table) for engine in (migrated, modelled))
            assert repr(found) == repr(wanted), (table, look)
    migrated.dispose()
    modelled.dispose()


async def test_a_journal_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await _written(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    backups = sorted((tmp_path / "backups").iterdir())
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"9999.*newer release.*Upgrade"):
        await SqlStore(path).open()
    assert path.read_bytes() == before
    assert sorted((tmp_path / "backups").iterdir()) == backups, "a backup of it would push out one that can be used"


def test_every_migration_can_be_taken_back() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        migrate.upgrade(connection)
        from alembic import command

        command.downgrade(migrate.config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        migrate.upgrade(connection)
    engine.dispose()


async def test_who_only_looks_pushes_no_backup_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for backups in (True, True, False, False, False, False):
        store = SqlStore(path, backups=backups)
        await store.open()
        await store.close()
    assert len(list((tmp_path / "backups").iterdir())) == 1
