"""What every function that writes records needs: one row, or a refusal that says what was kept."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Connection, Row
from sqlalchemy.sql import Executable

from incentives.ledger import Role
from node.ports import StoreError

Found = Row[Any]


def one(connection: Connection, statement: Executable, **values: Any) -> Found | None:
    """The one row that a statement finds, or None."""
    return connection.execute(statement, values).one_or_none()


def refused(what: str, why: str) -> StoreError:
    """A record that contradicts the journal. The text says that nothing of the call was kept."""
    return StoreError(f"the journal refuses {what}: {why}. Nothing of this call was kept; do not sign or act on it")


def name(role: Role, job_id: bytes, step: int | None = None) -> str:
    """A job, or one of its steps, for a message."""
    at = "" if step is None else f" step {step}"
    return f"{role.value} job 0x{job_id.hex()[:16]}{at}"
