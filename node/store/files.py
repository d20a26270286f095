"""The journal's files: permissions, the lock that keeps a second process out, connections, backups.

Everything here blocks; it runs on the store's own threads.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from node.ports import StoreError
from node.store.errors import corrupt, store_errors

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700

BUSY_MS: Final = 5_000
"""How long a connection waits for somebody else's lock (a sqlite3 shell). Unit: ms. Shorter makes a harmless look
into the file refuse vouchers; longer than a peer's patience (15 s) gains nothing."""

CHECKPOINT_PAGES: Final = 1_000
"""WAL pages (of 4 KiB) after which a commit copies them into the database. SQLite's default: 4 MB to replay at
worst; larger groups the copying better and lets reads search a longer file."""

KEEP_BACKUPS: Final = 3
"""Files kept in backups/. One may hold a fault that was already there, three reach back three starts."""


def make_directory(path: Path) -> None:
    """Make `path` private to this user, unless it exists. Raises: StoreError."""
    try:
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(f"the data directory {path} cannot be made: {exc.strerror}. Choose another one") from exc


def make_private(path: Path) -> None:
    """Create the database file with mode 0600, or take rights away that others have on it.

    SQLite gives its -wal and -shm files the mode of the database. Raises: StoreError.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            with suppress(FileNotFoundError):
                path.with_name(name).chmod(FILE_MODE)
    except OSError as exc:
        raise StoreError(
            f"the journal {path} cannot be opened: {exc.strerror}. It must be a file that belongs to the user who runs "
            f"the node, in a directory that user may write"
        ) from exc


def refuse_leftovers(path: Path) -> None:
    """A journal that is gone while its WAL or its backups are there was lost, and must not be begun anew in silence.

    Raises: StoreError.
    """
    wal = path.with_name(f"{path.name}-wal")
    backups = backups_of(path)
    left = [wal] if wal.exists() and wal.stat().st_size else backups[-1:]
    if left:
        raise StoreError(
            f"the journal {path} is missing, but {left[0]} is there: starting anew would forget vouchers and what was "
            f"signed. Put the journal back, or copy the newest backup to {path} and run `tally doctor`; to start anew "
            f"all the same, move {left[0].name} and {path.parent / 'backups'} aside"
        )


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a new file whose name is lost with the power is no backup."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """Keeps a second process off the same journal. The kernel drops it with the process, however that ends."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(f"{database.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises: StoreError naming the process that holds it."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as exc:
            raise StoreError(f"the lock file {self._path} cannot be opened: {exc.strerror}") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StoreError(
                f"the data directory {self._path.parent} is in use by process {holder}: two nodes on one journal would "
                f"sign twice under one sequence number. Stop that process, or give this one another data directory"
            ) from exc
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two processes lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def connect(path: Path, *, writer: bool) -> sqlite3.Connection:
    """A connection with our settings, in autocommit mode: SQLAlchemy's events say BEGIN. Raises: sqlite3.Error."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000)
    pragmas = [
        f"busy_timeout = {BUSY_MS}",
        "foreign_keys = ON",
        "journal_mode = WAL",
        # FULL syncs the WAL at each commit, so that a voucher survives a power cut and not only a crash of ours.
        "synchronous = FULL",
        # macOS keeps a plain fsync in the drive's cache; elsewhere these change nothing.
        "fullfsync = ON",
        "checkpoint_fullfsync = ON",
        f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
    ]
    # What is deleted is overwritten with zeros in the file: a shredded job's key must not lie in a free page.
    pragmas.append("secure_delete = ON" if writer else "query_only = ON")
    try:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def check(path: Path) -> None:
    """Read the whole file once for damage. Raises: StoreError naming the file and the way back."""
    with store_errors(path), closing(connect(path, writer=False)) as connection:
        findings = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    if findings != ["ok"]:
        raise corrupt(path, "; ".join(findings))


def backup(path: Path, to: Path) -> None:
    """Copy the journal to `to` as of now, while it is being written; `to` appears whole or not at all.

    Raises: StoreError (no room, no such directory).
    """
    part = to.with_name(f"{to.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
        with store_errors(to), closing(connect(path, writer=False)) as source, closing(sqlite3.connect(part)) as target:
            source.backup(target)  # all pages in one step: one snapshot, and in WAL mode nobody waits for it
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.replace(to)
        sync_directory(to.parent)
    except OSError as exc:
        raise StoreError(f"no backup was made at {to}: {exc.strerror}. The journal {path} is untouched") from exc
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def backups_of(path: Path) -> list[Path]:
    """The automatic backups of a journal, oldest first."""
    return sorted((path.parent / "backups").glob(f"{path.stem}-[0-9]*{path.suffix}"))


def rotate_backups(path: Path) -> Path:
    """Back up into backups/ beside the journal under the next number, and keep the newest KEEP_BACKUPS.

    Returns the new file. Raises: StoreError.
    """
    directory = path.parent / "backups"
    make_directory(directory)
    kept = backups_of(path)
    last = max((int(file.stem.rpartition("-")[2]) for file in kept), default=0)
    to = directory / f"{path.stem}-{last + 1:06d}{path.suffix}"
    backup(path, to)
    for old in kept[: len(kept) + 1 - KEEP_BACKUPS]:
        old.unlink(missing_ok=True)
    return to
