"""What a package would register under `tally.commands`."""

from __future__ import annotations

import click

NO_COMMAND = 3


@click.command()
def greet() -> None:
    """Say hello."""
    click.echo("hello from a plugin")
