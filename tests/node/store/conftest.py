"""A store to test: on disk and in memory, by the same tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node.store import SqlStore
from tests.twins.memory_store import MemoryStore


@pytest.fixture(params=["sql", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SqlStore | MemoryStore]:
    made = SqlStore(tmp_path / "data" / "journal.db") if request.param == "sql" else MemoryStore()
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def sql(tmp_path: Path) -> AsyncIterator[SqlStore]:
    made = SqlStore(tmp_path / "data" / "journal.db")
    await made.open()
    yield made
    await made.close()
