"""What survives kill -9, a power cut, a full disk and a second process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from incentives.ledger import Role
from node.crashpoints import CRASH_POINTS
from node.ports import Store, StoreError
from node.store import SqlStore
from tests.node.store import samples as s
from tests.node.store.samples import job_id
from tests.twins.memory_store import MemoryStore

REPOSITORY = Path(__file__).parents[3]
FRAME_HEADER, WAL_HEADER, PAGE = 24, 32, 4096
STORE_POINTS = [name for name in CRASH_POINTS if name.startswith("store.")]


def _child(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.node.store.children", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, **options)


def _output(*arguments: str | Path, **options: Any) -> list[str]:
    child = _child(*arguments, **options)
    out, _ = child.communicate(timeout=200)
    return out.splitlines()


async def _everything(store: Store) -> list[Any]:
    return [
        [await store.accounts(role) for role in Role],
        [await store.jobs(role) for role in Role],
        await store.receipts(),
        await store.settlements(),
        await store.kept(Role.PROVIDER, job_id(3)),
        [row.record for row in await store.commitments()],
        [row.record for row in await store.verdicts()],
    ]


async def _histories() -> list[list[Any]]:
    """What a store holds after 0, 1, 2, ... calls of `one_of_each`."""
    memory = MemoryStore()
    await memory.open()
    states = [await _everything(memory)]
    for call in s.one_of_each():
        await memory.write(*call)
        states.append(await _everything(memory))
    return states


@asynccontextmanager
async def _opened(path: Path) -> Any:
    store = SqlStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


# ------------------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.slow
async def test_kill_at_every_crash_point_leaves_each_call_whole_or_absent(tmp_path: Path) -> None:
    states = await _histories()
    ends = _output("crash", tmp_path, "one_by_one", *STORE_POINTS)
    assert ends == [f"{point} {-signal.SIGKILL}" for point in STORE_POINTS], "every point is passed"
    for point in STORE_POINTS:
        acknowledged = len((tmp_path / point / "acknowledged").read_text().split())
        committed = acknowledged + point.endswith(".after")
        async with _opened(tmp_path / point / "journal.db") as store:
            assert await _everything(store) == states[committed], point


@pytest.mark.slow
@pytest.mark.parametrize("point", ["store.write.before:2", "store.write.after:2", "store.ReceiptIssued.before:30"])
async def test_kill_among_concurrent_writers_keeps_whatever_a_caller_was_told(tmp_path: Path, point: str) -> None:
    assert _output("crash", tmp_path, "burst", point) == [f"{point} {-signal.SIGKILL}"]
    acknowledged = {int(n) for n in (tmp_path / point / "acknowledged").read_text().split()}
    async with _opened(tmp_path / point / "journal.db") as store:
        kept = {number for number in range(120) if await store.job(job_id(number))}
        assert acknowledged <= kept
        for number in range(120):
            assert len(await store.receipts(job_id=job_id(number))) == (number in kept)


async def test_the_environment_arms_a_crash_point(tmp_path: Path) -> None:
    child = _child("starve", tmp_path, env={**os.environ, "TALLY_CRASH_AT": "store.write.before:3"})
    assert child.wait(timeout=100) == -signal.SIGKILL
    async with _opened(tmp_path / "journal.db") as store:
        assert len(await store.jobs(Role.PROVIDER)) == 2


# -------------------------------------------------------------------------------------------------------- power loss


async def _written_without_checkpoint(path: Path) -> bytes:
    """Write `one_of_each` into a fresh database whose schema is out of the WAL; returns the WAL, leaves the database.

    kill -9 cannot show a power cut: the kernel still has what was written. A WAL cut short is what the disk can hold.
    Shredding would empty the WAL, which is left out here.
    """
    async with _opened(path):
        pass
    async with _opened(path) as store:
        with patch("node.store.writer._empty_log"):
            for call in s.one_of_each():
                await store.write(*call)
        wal = path.with_name(f"{path.name}-wal").read_bytes()
        shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)
    return wal


def _disk_after_power_cut(path: Path, wal: bytes, directory: Path) -> Path:
    directory.mkdir()
    (directory / "journal.db-wal").write_bytes(wal)
    return Path(shutil.copy(path, directory / "journal.db"))


async def _after_power_cut(path: Path, wal: bytes, directory: Path) -> list[Any]:
    async with _opened(_disk_after_power_cut(path, wal, directory)) as store:
        return await _everything(store)


async def test_a_wal_cut_at_any_frame_holds_a_prefix_of_the_acknowledged_calls(tmp_path: Path) -> None:
    states = await _histories()
    wal = await _written_without_checkpoint(tmp_path / "journal.db")
    frames = (len(wal) - WAL_HEADER) // (FRAME_HEADER + PAGE)
    assert frames > 3 * len(s.one_of_each()), "the WAL holds every call"
    reached = 0
    for frame in range(frames + 1):
        end = WAL_HEADER + frame * (FRAME_HEADER + PAGE)
        torn = FRAME_HEADER + PAGE // 2 if frame % 4 == 0 else 0  # now and then half a frame more
        state = await _after_power_cut(tmp_path / "journal.db", wal[: end + torn], tmp_path / f"cut-{frame}")
        assert state in states[reached:], f"cut after frame {frame}: no state that was ever acknowledged, or an older"
        reached = states.index(state)
    assert reached == len(states) - 1, "the whole WAL holds every call"


async def test_a_damaged_frame_ends_the_wal_and_is_no_corruption(tmp_path: Path) -> None:
    states = await _histories()
    wal = bytearray(await _written_without_checkpoint(tmp_path / "journal.db"))
    wal[WAL_HEADER + (len(wal) // 2 // (FRAME_HEADER + PAGE)) * (FRAME_HEADER + PAGE) + FRAME_HEADER + 100] ^= 0xFF
    state = await _after_power_cut(tmp_path / "journal.db", bytes(wal), tmp_path / "cut")
    assert 0 < states.index(state) < len(states) - 1


# --------------------------------------------------------------------------------------------------------- full disk


async def test_no_file_may_grow_keeps_what_was_acknowledged_and_goes_on_afterwards(tmp_path: Path) -> None:
    refused, group, recovered = _output("starve", tmp_path)
    assert refused.startswith("refused ") and "no room to write" in refused and "journal.db" in refused
    assert group == "group ['StoreError', 'StoreError']", "a group fails call by call"
    number = int(refused.split()[1])
    assert number > 5 and recovered == f"recovered {number}"
    async with _opened(tmp_path / "journal.db") as store:
        assert len(await store.jobs(Role.PROVIDER)) == number + 1
        assert len(await store.receipts(limit=10_000)) == number + 1


async def test_a_full_database_keeps_nothing_of_the_call_and_its_neighbours_fit(sql: SqlStore) -> None:
    await sql.put_value("small", b"x")
    writer = sql._engines[0]
    with writer.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 8}")
    with pytest.raises(StoreError, match="no room to write"):
        await sql.put_value("large", b"x" * 100_000)
    assert await sql.get_value("large") is None
    await sql.put_value("small", b"y")
    with writer.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 100000")
    await sql.put_value("large", b"x" * 100_000)
    assert await sql.get_value("small") == b"y"


# ---------------------------------------------------------------------------------------------------- second process


async def test_a_second_process_is_refused_by_name_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    holder = _child("hold", tmp_path)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "holding\n"
        with pytest.raises(StoreError, match=f"in use by process {holder.pid}") as caught:
            await SqlStore(tmp_path / "journal.db").open()
        assert str(tmp_path) in str(caught.value)
    finally:
        holder.kill()
        holder.wait()
    async with _opened(tmp_path / "journal.db") as store:
        (line,) = _output("hold", tmp_path)
        assert line.startswith("refused") and f"process {os.getpid()}" in line
        await store.write(s.slot())


async def test_a_second_store_in_one_process_is_refused(sql: SqlStore) -> None:
    with pytest.raises(StoreError, match="in use by process"):
        await SqlStore(sql.path).open()
    with pytest.raises(StoreError, match="open already"):
        await sql.open()
    await sql.write(s.slot())
