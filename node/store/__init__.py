"""The journal on disk: SQLModel tables in SQLite, group commit, migrations, backups. Implements the Store port."""

from node.store.store import SqlStore

__all__ = ["SqlStore"]
