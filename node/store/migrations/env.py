"""Alembic's environment: runs on the connection that node.store.migrate hands over, in its transaction."""

from alembic import context

from node.store.tables import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
