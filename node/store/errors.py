"""SQLite's errors in our words: what happened, what is safe, what to do. Foreign exceptions stop here."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy.exc import DBAPIError, StatementError

from node.ports import StoreError
from protocol.errors import FieldOutOfRange

FSYNC_FAILURES: Final = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})
"""Extended codes after which the kernel may have thrown dirty pages away: what this process wrote can no longer be
trusted to reach the disk, so the store refuses further writes until it is opened again and has read the disk."""


def restore_step(path: Path) -> str:
    """What to do when the journal at `path` cannot be read."""
    return (
        f"Stop the node, move {path.name}, {path.name}-wal and {path.name}-shm of {path.parent} aside, copy the newest "
        f"file of {path.parent / 'backups'} to {path} and run `tally doctor`: the vouchers in it stay claimable; jobs "
        f"that were open when it was made must not be continued. Without a backup, start with no file: the deposits "
        f"are in the contract and nothing but unsettled vouchers is lost"
    )


def corrupt(path: Path, finding: str) -> StoreError:
    """The journal is damaged or no database at all."""
    return StoreError(f"the journal {path} is damaged ({finding}) and was left as it is. {restore_step(path)}")


def explain(path: Path, error: sqlite3.Error) -> StoreError:
    """A SQLite error as a StoreError; the transaction it happened in was rolled back."""
    code = getattr(error, "sqlite_errorcode", 0) or 0
    primary = code & 0xFF
    if code in FSYNC_FAILURES:
        return StoreError(
            f"the disk under {path} failed to sync ({error}): nothing of this call counts as kept and the journal "
            f"takes no more writes. Check the disk, then restart the node"
        )
    if primary == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_WRITE:
        return StoreError(
            f"no room to write to {path} ({error}): nothing of this call was kept, everything before it was. "
            f"Free disk space under {path.parent} (or raise the file size limit); the node goes on by itself"
        )
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return corrupt(path, str(error))
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return StoreError(
            f"the journal {path} cannot be written ({error}): nothing was kept. Make {path.parent} and its files "
            f"belong to the user who runs the node"
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(
            f"another program holds {path} ({error}): nothing of this call was kept. Close it (a sqlite3 shell, a "
            f"backup tool) and try again"
        )
    return StoreError(f"the journal {path} failed: {error}. Nothing of this call was kept")


def is_fsync_failure(error: BaseException) -> bool:
    """Whether SQLite said that a sync failed."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return getattr(original, "sqlite_errorcode", 0) in FSYNC_FAILURES


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite, SQLAlchemy and the column types raise inside into StoreError."""
    try:
        yield
    except DBAPIError as exc:
        original = exc.orig if isinstance(exc.orig, sqlite3.Error) else sqlite3.Error(str(exc.orig))
        raise explain(path, original) from exc
    except sqlite3.Error as exc:
        raise explain(path, exc) from exc
    except StatementError as exc:  # a value that its column type refuses
        raise StoreError(f"a value cannot be kept in {path}: {exc.orig}. Nothing of this call was kept") from exc
    except (FieldOutOfRange, OverflowError, ValueError, TypeError) as exc:
        raise StoreError(f"a value cannot be kept in {path}: {exc}. Nothing of this call was kept") from exc
