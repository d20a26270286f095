"""Schema versions: Alembic, driven from Python and packaged with the node, so there is no alembic.ini to find."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from node.ports import StoreError

MIGRATIONS: Final = Path(__file__).parent / "migrations"


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration; `connection` is the one migrations/env.py runs on."""
    made = Config()
    # A per cent sign starts an interpolation in Alembic's configuration, also in a path.
    made.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def current(connection: Connection) -> str | None:
    """The revision a database is at; None when it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def check_version(connection: Connection, path: Path) -> str | None:
    """The database's revision, if this release knows it.

    Raises: StoreError when it was written by a newer release.
    """
    revision = current(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise StoreError(
            f"the journal {path} is of version {revision}, written by a newer release of Tallystick, and was left "
            f"as it is. Upgrade this installation; or, to go back, copy the newest file of {path.parent / 'backups'} "
            f"that this release wrote to {path} and run `tally doctor`"
        )
    return revision


def is_current(revision: str | None) -> bool:
    """Whether a database at `revision` needs no migration."""
    return revision == ScriptDirectory.from_config(config()).get_current_head()


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest revision, in the transaction of the caller's connection."""
    if not is_current(current(connection)):
        command.upgrade(config(connection), "head")
