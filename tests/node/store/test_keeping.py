"""Content at rest: sealed in the file, and after shredding in neither the file nor its log."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from incentives.ledger import OutputKept, PromptKept, Role
from node.ports import StoreError
from node.store import SqlStore
from tests.node.store import samples as s
from tests.node.store.samples import job_id

SAID = b"a sentence nobody else is to read"


def _bytes(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file())


async def _keep(store: SqlStore, job: int) -> None:
    prompt = PromptKept(Role.PROVIDER, job_id(job), b"\x07" * 32, (1, 2, 3))
    output = OutputKept(Role.PROVIDER, job_id(job), 1, (SAID,))
    await store.write(s.opened(job), prompt, s.issued(job, 1, 5), output)


def _key_of(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as connection:
        return bytes(connection.execute("SELECT key FROM content_key").fetchone()[0])


async def test_the_file_holds_no_plain_content_and_after_shredding_no_key(sql: SqlStore) -> None:
    await _keep(sql, 1)
    key = _key_of(sql.path)
    before = _bytes(sql.path.parent)
    assert SAID not in before and key in before
    await sql.write(s.closed(1, 0), s.shredded(1))
    assert key not in _bytes(sql.path.parent)
    assert await sql.inconsistencies() == []
    await sql.close()
    assert key not in _bytes(sql.path.parent)
    await sql.open()


async def test_altered_content_says_so(sql: SqlStore) -> None:
    await _keep(sql, 1)
    with closing(sqlite3.connect(sql.path)) as connection, connection:
        connection.execute("UPDATE content SET sealed = zeroblob(length(sealed)) WHERE step = 1")
    with pytest.raises(StoreError, match="altered"):
        await sql.kept(Role.PROVIDER, job_id(1))


async def test_a_prompt_of_a_wrong_salt_or_token_is_not_kept(sql: SqlStore) -> None:
    await sql.write(s.opened(1))
    for wrong in (
        PromptKept(Role.PROVIDER, job_id(1), b"", ()),
        PromptKept(Role.PROVIDER, job_id(1), b"s" * 32, (-1,)),
    ):
        with pytest.raises(Exception, match="PromptKept"):
            await sql.write(wrong)
    assert await sql.kept(Role.PROVIDER, job_id(1)) is None
